"""What a LoRA of Raw does on Turbo: the figures, both key namings, and every LoRA that is refused."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file

from posttrain import cli
from posttrain.config.sections import ModelConfig
from posttrain.errors import UserError
from posttrain.export import lora_transfer
from posttrain.export.config import CarryoverConfig, ExportConfig
from posttrain.export.export import export, load_checkpoint
from posttrain.grpo import train as grpo
from posttrain.model import key_names, sampler
from posttrain.model.k2 import K2
from posttrain.model.lora_file import add_lora, linear_shapes, read_lora
from posttrain.training import checkpoint
from tests.helpers import runs, tiny

BRIGHT = [{"name": "brightness", "function": "tests.helpers.runs:brightness"}]


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    PartialState(cpu=True)
    config = runs.config(tmp_path_factory.mktemp("lora"), model)
    config.steps, config.optim.lr, config.sampling.sizes = 2, 0.02, [[32, 32]]
    config.prompts.heldout = config.prompts.train
    grpo.train(config)
    return Path(config.output)


@pytest.fixture(scope="module")
def student(run, tmp_path_factory):
    """A Turbo: the tiny model with a small adapter of its own, as a student's checkpoint says it."""
    saved = runs.latest(run)
    generator = torch.Generator().manual_seed(1)
    adapter = {k: torch.randn(v.shape, generator=generator) * 0.02 for k, v in saved.tensors["adapter"].items()}
    folder = tmp_path_factory.mktemp("student")
    state = saved.state | {"method": "tdm", "student": {"steps": [8], "mu": 1.15}}
    checkpoint.save(folder / "checkpoints", 1, {"adapter": adapter}, state, keep=1)
    return folder


@pytest.fixture(scope="module")
def turbo(student, tmp_path_factory):
    output = tmp_path_factory.mktemp("turbo") / "turbo"
    export(ExportConfig(str(student), str(output)))
    return output


@pytest.fixture(scope="module")
def loras(run, tmp_path_factory):
    """The run's LoRA in both namings."""
    folder, files = tmp_path_factory.mktemp("files"), {}
    for format in ("lora", "lora-original"):
        files[format] = folder / f"{format}.safetensors"
        export(ExportConfig(str(run), str(files[format]), format))
    return files


@pytest.fixture
def check(tmp_path):
    """Runs the command line and returns what it wrote as JSON."""

    def check(lora, turbo, *options) -> dict:
        output = tmp_path / f"{len(list(tmp_path.glob('*.json')))}.json"
        arguments = ["--turbo", turbo, "--steps", 2, "--turbo_steps", 2, "--output", output, *options]
        assert cli.main(["export", "--check", str(lora), *map(str, arguments)]) == 0
        return json.loads(output.read_text())

    return check


def test_figures_of_a_run(run, student, check, capsys):
    found = check(run, student)
    assert found["images"] == 3 and found["settings"]["size"] == [32, 32]
    values = found["rewards"]["brightness"]
    # On Raw: what the policy and its base draw of the same prompts and seeds.
    k2 = load_checkpoint(runs.latest(run))
    seeds = [sampler.seed_for(1234, i) for i in range(3)]
    noise = sampler.noise(seeds, (k2.image_tokens(32, 32), k2.latent_channels))
    for name, role in (("off", None), ("on", "policy")):
        with k2.role(role):
            pictures = k2.decode(k2.sample(k2.text(tiny.PROMPTS[:3]), noise, 2, 32, 32), 32, 32)
        assert values["raw"][name] == pytest.approx(float(pictures.float().mean()) / 255, abs=1e-4)
    for where in ("raw", "turbo"):
        assert values[where]["gain"] == pytest.approx(values[where]["on"] - values[where]["off"])
        assert found["distance"][where] > 0.005
    assert values["turbo"]["off"] != values["raw"]["off"]
    if values["raw"]["gain"] > 2 * values["raw"]["error"]:
        assert values["share"] == pytest.approx(values["turbo"]["gain"] / values["raw"]["gain"])
    else:
        assert values["share"] is None
    assert "brightness" in capsys.readouterr().out


def test_a_file_does_what_its_run_does(run, loras, student, turbo, model, check):
    expected = check(run, student)
    recipe = ["--model.path", model, "--model.dtype", "float32", "--size", "[32, 32]", "--rewards", json.dumps(BRIGHT)]
    recipe += ["--prompts", runs.latest(run).path.parents[2] / "train.jsonl"]
    for lora in loras.values():
        found = check(lora, turbo, *recipe)
        for where in ("raw", "turbo"):
            assert found["distance"][where] == pytest.approx(expected["distance"][where], rel=1e-3)
            assert found["rewards"]["brightness"][where] == pytest.approx(
                expected["rewards"]["brightness"][where], rel=1e-3, abs=1e-5
            )


def test_shares_by_hand():
    """Gains of 0.2 +- 0 on Raw and 0.1 on Turbo carry over by half; noise on Raw has nothing to carry over."""
    base = np.array([0.1, 0.2, 0.3, 0.4])
    assert lora_transfer.summary(base, base + 0.2) == pytest.approx({"off": 0.25, "on": 0.45, "gain": 0.2, "error": 0})
    # Differences 0.3, -0.1, 0.3, -0.1: mean 0.1, standard deviation sqrt(4 * 0.04 / 3), error half of that.
    noisy = lora_transfer.summary(base, base + np.array([0.3, -0.1, 0.3, -0.1]))
    assert noisy["error"] == pytest.approx(np.sqrt(0.16 / 3) / 2)
    sure, half = lora_transfer.summary(base, base + 0.2), lora_transfer.summary(base, base + 0.1)
    assert lora_transfer.share(sure, half) == pytest.approx(0.5)
    assert lora_transfer.share(noisy, half) is None  # 0.1 is below twice 0.1155
    assert lora_transfer.share(dict.fromkeys(lora_transfer.FIGURES), half) is None
    assert lora_transfer.share(sure, dict.fromkeys(lora_transfer.FIGURES)) is None


def test_factors_of_other_trainers(model, tmp_path):
    """lora_down, lora_up and alpha, ranks that differ, and a layer left out: the same update, whatever the form."""
    k2 = K2.load(model)
    shapes = linear_shapes(k2.base_state_dict())
    state, updates = {}, {}
    generator = torch.Generator().manual_seed(0)
    for name, rank, alpha in (("blocks.0.attn.wq", 2, 4.0), ("blocks.2.mlp.up", 3, 1.0)):
        layer = key_names.diffusers_name(f"{name}.").removesuffix(".")
        outputs, inputs = shapes[layer]
        down = torch.randn(rank, inputs, generator=generator)
        up = torch.randn(outputs, rank, generator=generator)
        state |= {
            f"diffusion_model.{name}.lora_down.weight": down,
            f"diffusion_model.{name}.lora_up.weight": up,
            f"diffusion_model.{name}.alpha": torch.tensor(alpha),
        }
        updates[f"{layer}.weight"] = alpha / rank * up @ down
    save_file(state, tmp_path / "a.safetensors")
    before = {key: value.clone() for key, value in k2.base_state_dict().items()}
    add_lora(k2, "lora", read_lora(tmp_path / "a.safetensors", shapes), "a")
    k2.stack_role("lora")
    k2.merge_stack()
    for key, value in k2.base_state_dict().items():
        assert torch.allclose(value, before[key] + updates.get(key, 0), atol=1e-5), key


FIRST = "diffusion_model.blocks.0.attn.wq.lora_"


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda s: {f"unet.{k}": v for k, v in s.items()}, r"none of its 48 keys binds to .*\(unet\.diffusion_m"),
        (lambda s: {k.replace("blocks.", "blocks.7"): v for k, v in s.items()}, r"none of its 48 keys .*blocks\.70"),
        (lambda s: s | {"diffusion_model.blocks.9.attn.wq.lora_A.weight": torch.zeros(4, 128)},
         r"1 of its 49 keys would bind to no layer .* \(diffusion_model\.blocks\.9\.attn\.wq\.lora_A\.weight\)"),
        (lambda s: s | {"text_encoder.a.lora_A.weight": torch.zeros(1)}, r"1 of its 49 keys .*text_encoder\.a"),
        (lambda s: {k: v for k, v in s.items() if k != f"{FIRST}B.weight"}, r"a factor is missing for .*0\.attn\.wq"),
        (lambda s: s | {f"{FIRST}A.weight": torch.zeros(4, 64)}, r"wq: factors of \[4, 64\] and \[128, 4\] do not fit"),
        (lambda s: {k: v * ("lora_A" in k) for k, v in s.items()}, "every B factor is 0, so it does nothing"),
        (lambda s: s | {"diffusion_model.last.norm.lora_A.weight": torch.ones(4, 128),
                        "diffusion_model.last.norm.lora_B.weight": torch.ones(128, 4)},
         r"2 of its 50 keys would bind to no layer of this model \(diffusion_model\.last\.norm"),
        (lambda s: {}, "none of its 0 keys"),
    ],
)  # fmt: skip
def test_a_lora_that_does_not_bind_is_refused(loras, model, tmp_path, edit, says):
    save_file(edit(load_file(loras["lora-original"])), tmp_path / "a.safetensors")
    k2 = K2.load(model)
    with pytest.raises(UserError, match=says) as error:
        factors = read_lora(tmp_path / "a.safetensors", linear_shapes(k2.base_state_dict()))
        add_lora(k2, "lora", factors, tmp_path / "a.safetensors")
    assert str(error.value).startswith(str(tmp_path)) and "\n" not in str(error.value) and not k2.roles


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"check": "none.safetensors"}, "none.safetensors: no such file"),
        ({"check": "none"}, "none: holds no whole checkpoint"),
        ({"check": "{cut}"}, "cut.safetensors: not a whole safetensors file"),
        ({"check": "{student}"}, "is a student of posttrain tdm; it is a turbo, not a LoRA of Raw"),
        ({"turbo": "{model}"}, "model_index.json: is_distilled is not true; give a Turbo checkpoint"),
        ({"turbo": "{run}"}, "is no student of posttrain tdm; give a distilled model"),
        ({"turbo": "nowhere/at/all"}, "turbo: nowhere/at/all: no such directory"),
        ({"turbo": "{lora}"}, "turbo: {lora}: no such directory"),
        ({"turbo": "{empty}"}, "turbo: {empty}: has no model_index.json"),
        ({"turbo": "{headless}"}, "turbo: {headless}/text_encoder: has no weights"),
        ({"check": "{full}"}, "check: {full}/checkpoints/step-000001 trained all weights, so it is not a LoRA"),
        ({"check": "{unbound}"}, "unbound.safetensors: none of its 48 keys binds to a layer of this model"),
        ({"prompts": "{one}"}, "prompts: {one} holds 1 prompt; give at least 2"),
        ({"output": "{lora}/x.json"}, "output: {lora}/x.json: {lora} takes no file (Not a directory)"),
        ({"output": "/proc/x.json"}, "output: /proc/x.json: /proc takes no file"),
        ({"turbo": "{other}"}, "has another architecture"),
        ({"turbo": "{over}"}, "was distilled from"),
        ({"model.path": "{turbo}"}, "is distilled; give the Raw"),
        ({"output": "{model}"}, "exists; choose another name"),
        ({"prompts": "none.jsonl"}, "none.jsonl: no such file"),
        ({"rewards": '[{{"name": "a", "function": "tests.helpers.runs:dark"}}]'}, "reward a: function"),
        ({"images": "1"}, "images: is 1; use 2 or more"),
        ({"size": "[32, 40]"}, "size: 40 pixels is not a multiple of 16"),
        ({"steps": "0"}, "steps: is 0; use 1 or more"),
        ({"check": "{lora}"}, "model: {lora} has no recipe that states it; give it"),
        ({"check": "{lora}", "model.path": "{model}"}, "prompts: {lora} has no recipe that states it; give it"),
    ],
)
def test_bad_input(run, student, turbo, loras, model, tmp_path, capsys, monkeypatch, options, says):
    """Each before weights are read: of Raw and Turbo together they may be 60 GB."""
    monkeypatch.setattr(K2, "load", lambda *_: pytest.fail("a model is loaded"))
    places = {
        "run": run,
        "student": student,
        "model": model,
        "turbo": turbo,
        "lora": loras["lora"],
        "cut": tmp_path / "cut.safetensors",
    }
    places["cut"].write_bytes(loras["lora"].read_bytes()[:500])
    places["other"], places["over"] = tmp_path / "other", tmp_path / "over"
    places["empty"], places["headless"] = tmp_path, tmp_path / "headless"
    places["full"], places["one"] = tmp_path / "full", tmp_path / "one.jsonl"
    places["unbound"] = tmp_path / "unbound.safetensors"
    places["one"].write_text('{"prompt": "a fox"}\n')
    save_file({f"unet.{key}": value for key, value in load_file(loras["lora"]).items()}, places["unbound"])
    if "{headless}" in options.values():
        shutil.copytree(turbo, places["headless"])
        next((places["headless"] / "text_encoder").glob("*.safetensors")).unlink()
    if "{full}" in options.values():
        state = runs.latest(run).state | {"lora": None}
        checkpoint.save(places["full"] / "checkpoints", 1, {"weights": {"x": torch.zeros(1)}}, state, keep=1)
        shutil.copy(run / "recipe.yaml", places["full"])
    if "{other}" in options.values():
        other = tiny.pipeline(distilled=True)
        other.register_to_config(text_encoder_select_layers=(0, 1, 2))
        other.save_pretrained(tmp_path / "other")
    if "{over}" in options.values():
        saved = runs.latest(run)
        sums = json.loads((saved.path / "manifest.json").read_text())["adapter.safetensors"]["sha256"]
        merged = [{"path": str(saved.path), "sha256": sums}]
        origin = saved.state["origin"] | {"merged": merged}
        state = runs.latest(student).state | {"origin": origin}
        checkpoint.save(tmp_path / "over/checkpoints", 1, {"adapter": saved.tensors["adapter"]}, state, keep=1)
    given = {"check": "{run}", "turbo": "{turbo}", "steps": "1", "turbo_steps": "1"} | options
    if options.get("check") in ("{cut}", "{unbound}"):
        given |= {"model.path": "{model}", "prompts": str(run.parent / "train.jsonl"), "size": "[32, 32]",
                  "rewards": json.dumps(BRIGHT).replace("{", "{{").replace("}", "}}")}  # fmt: skip
    words = [f"--{name}={value.format(**places)}" for name, value in given.items()]
    assert cli.main(["export", *words]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert says.format(**places) in error and error.startswith("posttrain: error: ")


def test_a_base_whose_weights_were_replaced_is_refused(run, turbo, model, tmp_path, capsys):
    """The LoRA of a run belongs to the weights that the run read, which their fingerprint says when they are read."""
    other = shutil.copytree(model, tmp_path / "other")
    file = next((other / "transformer").glob("*.safetensors"))
    save_file({key: value * 1.5 for key, value in load_file(file).items()}, file, {"format": "pt"})
    words = ["export", f"--check={run}", f"--turbo={turbo}", f"--model.path={other}", "--model.dtype=float32"]
    assert cli.main([*words, "--steps=1", "--turbo_steps=1"]) == 2
    assert f"{other}: is not the model that {run}/checkpoints/step-000002 was" in capsys.readouterr().err


def test_help_and_settings(capsys):
    assert cli.main(["export", "--check", "--help"]) == 0
    told = capsys.readouterr().out
    assert "--turbo_steps" in told and "--format" not in told
    assert cli.main(["export", "--help"]) == 0
    assert "--format" in capsys.readouterr().out


def test_a_lora_that_changes_nothing_on_turbo_ends_with_one(run, student, monkeypatch, capsys):
    """Had the switch no effect there, no figure would say so but the distance."""
    saved = runs.latest(run)
    config = CarryoverConfig(str(run), str(student), ModelConfig(**saved.state["model"]), steps=1, turbo_steps=1)
    draw = lora_transfer._draw
    monkeypatch.setattr(lora_transfer, "_draw", lambda k2, *rest: (draw(k2, *rest)[0],) * 2)
    assert lora_transfer.check(config) == 1
    assert "the LoRA changes no image on Turbo" in capsys.readouterr().out
    assert asdict(config)["rewards"] == []  # what the run's recipe says was filled into a copy
