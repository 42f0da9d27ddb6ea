"""What every command refuses before its code is imported or a model is read, and what a machine cannot do."""

import copy
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import save_file

from posttrain import cli, commands
from posttrain.errors import UserError
from posttrain.model import files, machine
from posttrain.model.files import Base
from tests.helpers import pair_runs, runs, style_runs, tiny


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("raw") / "raw")


@pytest.fixture(scope="module")
def recipes(raw, tmp_path_factory):
    """A sound recipe of every command that reads a K2 or writes a run, by the command's name."""
    folder = tmp_path_factory.mktemp("recipes")
    configs = {
        "grpo": runs.config(folder, raw), "stpo": runs.stpo_config(folder, raw),
        "sft": runs.sft_config(folder, raw), "style": style_runs.config(folder, raw),
        "tdm": runs.tdm_config(folder, raw), "pairs": pair_runs.recipe(folder, raw),
    }  # fmt: skip
    made = {name: json.loads(json.dumps(dataclasses.asdict(config))) for name, config in configs.items()}
    model, reward = (
        {"path": str(raw), "dtype": "float32"},
        {"name": "brightness", "function": "tests.helpers.runs:brightness"},
    )
    chat = {"model": "m", "data": str(folder / "train.jsonl")}
    return made | {
        "judge": chat | {"mode": "preference"},
        "expander sft": chat,
        "expander gdpo": {
            "model": {"path": "chat"}, "renderer": model, "rewards": [reward],
            "prompts": {name: made["grpo"]["prompts"][name] for name in ("train", "heldout")},
            "safety": [reward | {"name": sees, "sees": sees} for sees in ("text", "image")],
        },
        "expander mine": {
            "model": {"path": "chat"}, "renderer": model, "rewards": [reward],
            "candidates": [{"path": made["grpo"]["prompts"]["train"], "failure": "all"}],
            "safety": [reward | {"name": sees, "sees": sees} for sees in ("text", "image")],
        },
        "sample": {"model": model, "prompt": "a fox"},
        "export": {"source": str(folder)},
    }  # fmt: skip


def reached(*_, **__):
    """Stands in for a command's own code."""
    pytest.fail("the command was begun")


@pytest.fixture
def refused(recipes, tmp_path, capsys, monkeypatch):
    """Runs a command that must be refused before its own code is imported, and returns its one line."""
    stand_in = dataclasses.replace
    made = {name: stand_in(held, function="tests.test_early:reached") for name, held in commands.COMMANDS.items()}
    monkeypatch.setattr(commands, "COMMANDS", made)

    def run(command: str, **changes) -> str:
        recipe = copy.deepcopy(recipes[command]) | {"output": str(tmp_path / "run")}
        for path, value in changes.items():
            *sections, last = path.split("__")
            section = recipe
            for name in sections:
                section = section[name]
            section[last] = value
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        assert cli.main([*command.split(), "--config", str(tmp_path / "recipe.yaml")]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and err.startswith("posttrain: error: ")
        return err

    return run


K2 = ["grpo", "sft", "style", "stpo", "tdm", "pairs"]


@pytest.mark.parametrize("command", [*K2, "judge", "expander sft", "expander gdpo", "expander mine"])
def test_a_run_that_exists(refused, tmp_path, command):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/recipe.yaml").write_text("{}")
    assert "holds a run already" in refused(command)


@pytest.mark.parametrize("command", ["sample", "export"])
def test_an_output_that_exists(refused, tmp_path, command):
    (tmp_path / "run").mkdir()
    assert "run exists; choose another name" in refused(command)


@pytest.mark.parametrize(
    ("command", "field"),
    [("grpo", "prompts__train"), ("tdm", "prompts__heldout"), ("stpo", "heldout"), ("stpo", "pairs__train"),
     ("sft", "images__train"),
     ("pairs", "prompts"), ("expander gdpo", "prompts__train"), ("expander mine", "traffic"),
     ("judge", "data"), ("expander sft", "data")],
)  # fmt: skip
def test_a_file_that_is_not_there(refused, tmp_path, command, field):
    assert "none.jsonl: no such file" in refused(command, **{field: str(tmp_path / "none.jsonl")})


@pytest.mark.parametrize("command", [*K2, "expander gdpo"])
@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("tests.helpers.runs:no_such", "no_such': check the name"),
        ("no_such.module:f", "cannot import no_such"),
        ("tests.helpers.runs:ROOT", "tests.helpers.runs:ROOT cannot be called"),
        (
            "tests.helpers.runs:untimed",
            "tests.helpers.runs:untimed takes run; it is called with images and prompts, and the",
        ),
        (
            {"class_path": "tests.helpers.warm.Script", "init_args": {"steps": 3}},
            "missing a required argument: 'values'",
        ),
        ({"class_path": "rewards.image.Aesthetic", "init_args": {"judge": {"model": "m", "base_urls": "server://j"}}},
         "no server 'j': the recipe's servers are: none"),
    ],
)  # fmt: skip
def test_a_reward_that_is_wrong(refused, command, function, says):
    assert says in refused(command, rewards=[{"name": "r", "function": function}])


@pytest.mark.parametrize("command", K2)
def test_a_server_that_cannot_be_started(refused, command):
    server = {"name": "vlm", "model": "/no/such/model", "executable": "/no/such/vllm"}
    assert "server vlm: executable: no '/no/such/vllm'" in refused(command, servers=[server])


@pytest.mark.parametrize(
    ("command", "field"),
    [*((name, "model__start") for name in K2), ("pairs", "policy"), ("sample", "adapter"), ("export", "source")],
)
def test_no_checkpoint_to_go_on_from(refused, tmp_path, command, field):
    says = refused(command, **{field: str(tmp_path / "empty")})
    assert field.replace("__", ".") + ": " in says and "empty: holds no whole checkpoint" in says


@pytest.mark.parametrize("command", [*K2, "sample", "expander gdpo", "expander mine"])
def test_a_model_that_is_none(refused, tmp_path, command):
    section = "renderer" if command.startswith("expander") else "model"
    assert "no such directory; give a K2 pipeline" in refused(command, **{f"{section}__path": str(tmp_path / "no/ne")})


@pytest.mark.parametrize("command", K2)
def test_a_distilled_model(refused, raw, tmp_path, command):
    for part in raw.iterdir():
        (tmp_path / "turbo").mkdir(exist_ok=True)
        (tmp_path / "turbo" / part.name).symlink_to(part)
    index = tmp_path / "turbo/model_index.json"
    index.unlink()
    index.write_text(json.dumps(json.loads((raw / "model_index.json").read_text()) | {"is_distilled": True}))
    assert "is_distilled is true" in refused(command, model__path=str(tmp_path / "turbo"))


# ---- the machine ----------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch):
    """A GPU as torch tells of it, with 80 GiB of which 20 are free."""
    facts = SimpleNamespace(capability=(9, 0), free=20 * 2**30)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(machine, "_gpus", lambda: [Path("/dev/nvidia0")])
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    for name, value in {
        "is_available": lambda: True, "init": lambda: None, "device_count": lambda: 1,
        "get_device_capability": lambda device: facts.capability, "get_device_name": lambda device: "Tesla T4",
        "get_arch_list": lambda: ["sm_80", "sm_90", "compute_90"],
        "mem_get_info": lambda device: (facts.free, 80 * 2**30),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    return facts


def k2_files(folder: Path, monkeypatch) -> Base:
    """A K2's files as headers tell of them: 24 GiB in bfloat16, 20 of them in blocks, and 8 of text encoder."""
    (folder / "transformer").mkdir(parents=True)
    weight = files.Weight
    held = [weight("transformer", "transformer_blocks.0.ff.up.weight", (10 * 2**15, 2**15), "BF16"),
            weight("transformer", "img_in.weight", (2 * 2**15, 2**15), "BF16"),
            weight("text_encoder", "w", (4 * 2**15, 2**15), "BF16")]  # fmt: skip
    monkeypatch.setattr(machine, "weights", lambda path, file: held)
    return Base("model", str(folder), "bfloat16")


def test_too_little_memory_on_the_gpu(gpu, tmp_path, monkeypatch):
    base = k2_files(tmp_path, monkeypatch)
    with pytest.raises(UserError) as raised:
        machine.check([base], {})
    says = "take 32.0 GiB of the GPU, and 20.0 of 80.0 GiB are free; set model.quantize: fp8 or set model.offload:"
    assert str(raised.value).startswith("model.path: ") and says in str(raised.value)
    with pytest.raises(UserError, match=r"take 24.0 GiB"):
        machine.check([dataclasses.replace(base, offload=("text_encoder", "vae"))], {})
    machine.check([dataclasses.replace(base, offload=("text_encoder",), quantize="fp8")], {})  # 10 + 4 GiB
    gpu.free = 40 * 2**30
    machine.check([base], {})
    with pytest.raises(UserError, match=r"take 64.0 GiB of the GPU"):
        machine.check([dataclasses.replace(base, dtype="float32")], {})


def test_too_little_memory_beside_the_gpu(gpu, tmp_path, monkeypatch):
    base = dataclasses.replace(k2_files(tmp_path, monkeypatch), offload=("text_encoder",), quantize="fp8")
    monkeypatch.setattr(machine, "host_memory", lambda: 12 * 2**30)
    machine.check([base], {})
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"take 16.0 GiB of this machine's memory for all processes, and 12.0 GiB"):
        machine.check([base], {})
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(
        UserError, match=r"take 22.0 GiB of this machine's memory, and 12.0 GiB are free; use a machine"
    ):
        machine.check([base], {})


def test_a_gpu_without_bfloat16_or_fp8(gpu, monkeypatch):
    gpu.capability = (7, 5)
    types = {"renderer.dtype": "bfloat16", "model.dtype": "float32"}
    with pytest.raises(UserError, match=r"torch: Tesla T4 has compute capability 7.5, and this torch is built for"):
        machine.check([], types)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75"])
    with pytest.raises(UserError, match=r"renderer.dtype: Tesla T4 \(compute capability 7.5\) has no bfloat16"):
        machine.check([], types)
    machine.check([], {"model.dtype": "float32"})
    gpu.capability = (8, 6)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80"])
    machine.check([], types)
    with pytest.raises(UserError, match=r"model.quantize: fp8: Tesla T4 has none"):
        machine.check([Base("model", "owner/hub", "bfloat16", quantize="fp8")], {})


def test_a_gpu_that_torch_cannot_use(gpu, monkeypatch):
    def old():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nUpdate it.")

    monkeypatch.setattr(torch.cuda, "init", old)
    with pytest.raises(
        UserError, match=r"cannot use it: The NVIDIA driver .* \(found version 11040\). Update it.; upd"
    ):
        machine.check_cuda()
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    with pytest.raises(UserError, match=r"is built without CUDA; install a build with it"):
        machine.check_cuda()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    machine.check_cuda()  # as it was asked for
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(machine, "_gpus", list)
    machine.check_cuda()


def test_weights_are_counted_from_headers(tmp_path, raw):
    counted = sum(weight.count for weight in files.weights(str(raw)) if weight.part == "transformer")
    assert counted == sum(p.numel() for p in tiny.pipeline().transformer.parameters())
    save_file({"blocks.0.w": torch.zeros(3, 5)}, tmp_path / "one.safetensors")
    held = [w for w in files.weights(str(raw), str(tmp_path / "one.safetensors")) if w.part == "transformer"]
    assert held == [files.Weight("transformer", "blocks.0.w", (3, 5), "F32")]
