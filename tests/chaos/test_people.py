"""What people bring: damaged parts of models, LoRAs that contradict themselves, rewards that touch what is not theirs,
prompts that nothing can score, masks for files, full disks; and Ctrl-C, which says what is saved."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from posttrain.model.lora_file import shapes_at
from tests.chaos import methods
from tests.chaos.test_faults import ALL, fails
from tests.chaos.test_faults import recipe as recipe  # a fixture
from tests.helpers import runs
from tests.helpers.commands import Commands

DRAWING = ["stpo", "grpo", "tdm", "pairs", "expander gdpo"]
"""Those that load a K2."""


def model_of(method: str) -> str:
    return "renderer.path" if method == "expander gdpo" else "model.path"


# ---- parts of a model -----------------------------------------------------------------------------------------------


def lose_a_tensor(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    weights = load_file(file)
    del weights[sorted(weights)[-1]]
    save_file(weights, file, {"format": "pt"})


def store_in_8_bits(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    weights = load_file(file)
    largest = max(weights, key=lambda name: weights[name].numel())
    weights[largest] = (weights[largest] * 100).to(torch.int8)
    save_file(weights, file, {"format": "pt"})


def lose_half_of_the_vocabulary(folder: Path) -> None:
    held = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = held["model"]["vocab"]
    held["model"]["vocab"] = {token: i for token, i in vocabulary.items() if i < len(vocabulary) // 2}
    held["model"]["merges"] = []
    (folder / "tokenizer.json").write_text(json.dumps(held))


DAMAGES = {
    "text_encoder lost a tensor": ("text_encoder", lose_a_tensor),
    "text_encoder in 8 bits": ("text_encoder", store_in_8_bits),
    "vae lost a tensor": ("vae", lose_a_tensor),
    "vae is gone": ("vae", shutil.rmtree),
    "tokenizer lost half": ("tokenizer", lose_half_of_the_vocabulary),
    "tokenizer is gone": ("tokenizer", shutil.rmtree),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("method", DRAWING)
def test_damaged_parts(command, recipe, parts, tmp_path, method, damage):
    """One line that names the part, and no run is begun."""
    part, how = DAMAGES[damage]
    model = Path(shutil.copytree(parts / "k2", tmp_path / "model"))
    how(model / part)
    result = command(*method.split(), "--config", recipe(method), f"--{model_of(method)}", model)
    fails(result, str(model), part)
    assert not (tmp_path / "run").exists()


def test_a_lora_that_states_two_scales(command, parts, tmp_path):
    """Its alpha tensor says 2, its header 1: by every command that takes such a file."""
    layer = "transformer.transformer_blocks.0.attn.to_q"
    outputs, inputs = shapes_at(str(parts / "k2"))[layer.removeprefix("transformer.")]
    tensors = {f"{layer}.alpha": torch.tensor(8.0)}
    tensors[f"{layer}.lora_A.weight"] = torch.ones(4, inputs)
    tensors[f"{layer}.lora_B.weight"] = torch.ones(outputs, 4)
    header = {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 4})}
    save_file(tensors, tmp_path / "a.safetensors", header)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    turbo = Path(shutil.copytree(parts / "k2", tmp_path / "turbo"))
    index = json.loads((turbo / "model_index.json").read_text())
    (turbo / "model_index.json").write_text(json.dumps(index | {"is_distilled": True}))
    model = ["--model.path", parts / "k2", "--model.dtype", "float32", "--size", "[32, 32]"]
    rewards = json.dumps([{"name": "brightness", "function": "tests.helpers.runs:brightness"}])
    for words in (
        ["sample", *model, "--prompt", "a", "--adapter", tmp_path / "a.safetensors", "--output", tmp_path / "out"],
        ["export", "--check", tmp_path / "a.safetensors", "--turbo", turbo, *model, "--prompts",
         tmp_path / "prompts.jsonl", "--rewards", rewards],
    ):  # fmt: skip
        fails(command(*words), str(tmp_path / "a.safetensors"), "gives a scale (alpha / rank) of 2, and", "of 1")


# ---- rewards --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", methods.SCORING)
def test_a_reward_that_ruins_what_it_is_given(command, parts, tmp_path, method):
    """Asked before and after the run's own, with a path of the run that is relative: all that is trained and scored is
    as with one that only looks, bit for bit."""
    states = []
    for function in ("looks", "ruins"):
        folder = tmp_path / function
        folder.mkdir()
        path = runs.recipe(methods.METHODS[method][0](folder, parts, method), folder / "recipe.yaml")
        held = json.loads(path.read_text())
        spec = {"function": f"tests.chaos.rewards:{function}", "weight": 0.0}
        held["rewards"] = [{"name": "a", **spec}, *held["rewards"], {"name": "b", **spec}]
        path.write_text(json.dumps(held | {"output": os.path.relpath(folder / "run", runs.ROOT)}))
        result = command(*method.split(), "--config", path)
        assert result.returncode == 0, result.stderr
        states.append(methods.METHODS[method][1](folder / "run"))
    methods.assert_same(*states)


@pytest.mark.parametrize("method", methods.SCORING)
def test_nothing_can_be_scored(command, recipe, tmp_path, method):
    """What learns from that reward alone ends with a line, others say what is missing; nowhere is it a number."""
    reward = {"name": "silent", "function": "tests.helpers.runs:nothing"}
    result = command(*method.split(), "--config", recipe(method, rewards=[reward]))
    if method in ("grpo", "nft"):
        fails(result, "not one image of 5 steps could be scored: all None")
    else:
        assert result.returncode == 0, result.stderr
    if method == "pairs":
        assert "source judged: 0 of 8 pairs after 40 candidates" in result.stderr
    else:
        assert {row.get("silent") for row in runs.rows(tmp_path / "run")} == {None}


# ---- files ----------------------------------------------------------------------------------------------------------

MASKED = "import os\nos.umask(0o027)\n"


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    commands = Commands(tmp_path_factory.mktemp("masked"), MASKED + methods.PREPARE)
    yield commands
    commands.close()


@pytest.mark.parametrize("method", ALL)
def test_files_have_the_mode_that_the_umask_leaves(masked, recipe, tmp_path, method):
    result = masked(*method.split(), "--config", recipe(method))
    assert result.returncode == 0, result.stderr
    assert modes(tmp_path / "run") == {0o640, 0o750}


def modes(folder: Path) -> set[int]:
    return {path.stat().st_mode & 0o777 for path in [folder, *folder.rglob("*")] if not path.is_symlink()}


@pytest.fixture(scope="module")
def trained(command, parts, tmp_path_factory):
    """A run of grpo, and the files that commands after it take."""
    folder = tmp_path_factory.mktemp("trained")
    path = runs.recipe(methods.training(folder, parts, "grpo"), folder / "recipe.yaml")
    result = command("grpo", "--config", path)
    assert result.returncode == 0, result.stderr
    return folder


def after_a_run(folder: Path, parts: Path, output: Path) -> dict[str, list]:
    """Commands that write something beside a run, which is `output`."""
    turbo = folder / "turbo"
    if not turbo.exists():
        shutil.copytree(parts / "k2", turbo)
        index = json.loads((turbo / "model_index.json").read_text())
        (turbo / "model_index.json").write_text(json.dumps(index | {"is_distilled": True}))
    small = ["--size", "[32, 32]", "--steps", 1]
    return {
        "sample": ["sample", "--model.path", parts / "k2", "--model.dtype", "float32", "--prompt", "a fox", *small,
                   "--guidance", 0, "--adapter", folder / "run", "--output", output],
        "export": ["export", "--source", folder / "run", "--output", output],
        "check": ["export", "--check", folder / "run", "--turbo", turbo, *small, "--turbo_steps", 1, "--output",
                  output],
        "report": ["report", folder / "run", "--output", output],
    }  # fmt: skip


@pytest.mark.parametrize("name", ["sample", "export", "check", "report"])
def test_files_of_other_commands_have_it_too(masked, trained, parts, tmp_path, name):
    result = masked(*after_a_run(trained, parts, tmp_path / "out")[name])
    assert result.returncode == 0, result.stderr
    assert modes(tmp_path / "out") <= {0o640, 0o750}


@pytest.mark.parametrize(("name", "limit"), [("sample", 1000), ("export", 20_000), ("check", 200), ("report", 9000)])
def test_full_disk_of_other_commands(command, trained, parts, tmp_path, name, limit):
    """One line that names what cannot be written; what was there is whole, and the command can be given again."""
    words = after_a_run(trained, parts, tmp_path / "out")[name]
    fails(command(*words, limit=limit), str(tmp_path / "out"))
    if name == "report":
        assert not (tmp_path / "out").exists()
        (tmp_path / "out").write_text("older")
        fails(command(*words, limit=limit), str(tmp_path / "out"))
        assert (tmp_path / "out").read_text() == "older"
    else:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        (tmp_path / "out").unlink(missing_ok=True)
    result = command(*words)
    assert result.returncode == 0, result.stderr


# ---- Ctrl-C ---------------------------------------------------------------------------------------------------------

HEARS = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
"""A process that a shell has put into the background ignores Ctrl-C, and so do those that it begins."""


@pytest.fixture(scope="module")
def hearing(tmp_path_factory):
    commands = Commands(tmp_path_factory.mktemp("hearing"), HEARS + methods.PREPARE)
    commands("--version")
    yield commands
    commands.close()


@pytest.mark.parametrize("method", ALL)
def test_ctrl_c_says_what_is_saved(hearing, recipe, whole, tmp_path, method):
    """After the first checkpoint (of pairs: the first block). With --resume it ends as if it had not been stopped."""
    path = recipe(method)
    (process,) = hearing.start(*method.split(), "--config", path)
    began = time.monotonic()
    while not list(tmp_path.glob("run/checkpoints/[!.]*-*")) and not list(tmp_path.glob("run/*.parquet")):
        assert time.monotonic() - began < 60
        time.sleep(0.005)
    os.kill(process, signal.SIGINT)
    result = hearing.wait()
    assert result.returncode == 130, result.stderr
    said = [line for line in result.stderr.splitlines() if line.startswith(f"posttrain: {tmp_path / 'run'}: stopped; ")]
    assert len(said) == 1 and said[0].endswith("; to go on, continue with --resume"), result.stderr
    saved = sorted(int(place.name.partition("-")[2]) for place in tmp_path.glob("run/checkpoints/[!.]*-*"))
    assert not saved or f"step {saved[-1]} of " in said[0]
    result = hearing(*method.split(), "--config", path, "--resume")
    assert result.returncode == 0, result.stderr
    methods.assert_same(whole(method)[0], methods.METHODS[method][1](tmp_path / "run"))
