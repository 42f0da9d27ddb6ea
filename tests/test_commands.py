"""Commands from end to end through the real command line: stopped and resumed, and given bad input.

Bad input that shows only once a model or a file is read is one line on stderr and exit code 2, and nothing is
lost; recipes that are wrong in themselves are in test_cli.py.
"""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from posttrain.model import key_names
from posttrain.training import checkpoint
from tests.helpers import runs
from tests.test_cli import fails

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def grpo(command, tmp_path, model):
    """Runs the recipe of tests/helpers/runs.py with more options."""
    path = runs.recipe(runs.config(tmp_path, model), tmp_path / "recipe.yaml")
    return lambda *options, **limits: command("grpo", "--config", path, *options, **limits)


def relabelled(model: Path, copy: Path, **index) -> Path:
    """A copy of a pipeline (by links) whose model_index.json says something else."""
    shutil.copytree(model, copy, copy_function=os.link)
    (copy / "model_index.json").unlink()
    old = json.loads((model / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(old | index))
    return copy


def test_sound_recipe_runs_quietly(grpo, tmp_path):
    """What the failures below differ from. A quiet run prints its progress and nothing of the libraries'."""
    result = grpo("--steps", 1)
    assert result.returncode == 0 and result.stdout == ""
    *steps, last = result.stderr.splitlines()
    assert all(line.startswith("step ") for line in steps), result.stderr
    assert ": done; brightness 0." in last and last.endswith("/run/report.html")
    fails(grpo("--steps", 1), tmp_path / "run", "holds a run already; add --resume or choose another --output")
    assert grpo("--steps", 2, "--resume").returncode == 0
    assert [row["step"] for row in runs.rows(tmp_path / "run") if "loss" in row] == [1, 2]


def test_sigterm_saves_and_resuming_finishes(command, tmp_path, model):
    config = runs.config(tmp_path, model)
    config.steps = 100_000
    path, run = runs.recipe(config, tmp_path / "recipe.yaml"), Path(config.output)
    (process,) = command.start("grpo", "--config", path)
    began = time.monotonic()
    while not (run / "metrics.jsonl").exists() or len(runs.rows(run)) < 4:
        assert time.monotonic() - began < 120
        time.sleep(0.02)
    os.kill(process, signal.SIGTERM)
    result = command.wait()
    assert result.returncode == 0 and "Traceback" not in result.stderr
    done = checkpoint.load(checkpoint.find(run)).step
    steps = [row["step"] for row in runs.rows(run) if "loss" in row]
    assert steps == list(range(1, done + 1)) and 3 <= done < 1000
    assert json.loads((run / "summary.json").read_text())["steps"] == done
    assert (run / "report.html").is_file()

    assert command("grpo", "--config", path, "--steps", done + 2, "--resume").returncode == 0
    assert checkpoint.find(run).name == f"step-{done + 2:06d}"
    assert [row["step"] for row in runs.rows(run) if "loss" in row] == [*steps, done + 1, done + 2]
    assert json.loads((run / "summary.json").read_text())["images"] == 8 * (done + 2)


def test_model_that_is_none(grpo, tmp_path, model):
    fails(grpo("--model.path", tmp_path / "none"), tmp_path / "none", "no such directory; give a K2 pipeline")
    fails(grpo("--model.path", tmp_path), tmp_path, "has no model_index.json; give a K2 pipeline")
    other = relabelled(model, tmp_path / "other", _class_name="FluxPipeline")
    fails(grpo("--model.path", other), other / "model_index.json", "holds a FluxPipeline", "give a K2 checkpoint")
    turbo = relabelled(model, tmp_path / "turbo", is_distilled=True)
    says = "model_index.json: is_distilled is true: train the Raw checkpoint and distil it afterwards"
    fails(grpo("--model.path", turbo), turbo, says)
    assert grpo("--steps", 1).returncode == 0  # the failures have left no run in the way


def test_pool_that_cannot_give_a_step(grpo):
    result = grpo("--pool.kind", "adaptive", "--groups.prompts_per_step", 9)
    fails(result, "groups.prompts_per_step: is 9, but prompts.train holds 3", "lower it or add prompts")
    fails(grpo("--pool.kind", "adaptive", "--pool.quotas", "{text: 0.5}"), "pool.quotas.text: no prompt", "remove it")


def test_single_file(grpo, tmp_path, model):
    state = key_names.to_original(load_file(model / WEIGHTS))
    option = "--model.transformer_file"
    fails(grpo(option, tmp_path / "none.safetensors"), "none.safetensors: no such file; give the transformer")
    short = {key: value for key, value in state.items() if not key.startswith("blocks.1.attn.")}
    save_file(short, tmp_path / "short.safetensors")
    fails(
        grpo(option, tmp_path / "short.safetensors"),
        "short.safetensors: keys do not match", "7 missing (blocks.1.attn.", ", ...)", "give a file in the original",
    )  # fmt: skip
    save_file(state | {"lora.a": torch.zeros(1), "lora.b": torch.zeros(1)}, tmp_path / "long.safetensors")
    fails(grpo(option, tmp_path / "long.safetensors"), "long.safetensors", "2 unexpected (lora.a, lora.b)")
    (tmp_path / "cut.safetensors").write_bytes((model / WEIGHTS).read_bytes()[:5000])
    fails(grpo(option, tmp_path / "cut.safetensors"), "cut.safetensors: not a whole safetensors file", "copy")
    save_file(state, tmp_path / "whole.safetensors")
    assert grpo("--steps", 1, option, tmp_path / "whole.safetensors").returncode == 0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", ": holds no prompt; write one object a line"),
        ('{"prompt": "a fox"}\na red cube\n', ":2: not JSON (Expecting value at column 1); write one object a line"),
        ('{"prompt": ""}\n', ":1: prompt: is empty; write what"),
        (None, ": no such file; give the path of a file of prompts"),
    ],
)
@pytest.mark.parametrize("which", ["train", "heldout"])
def test_prompt_files(grpo, tmp_path, text, says, which):
    path = tmp_path / "bad.jsonl"
    if text is not None:
        path.write_text(text)
    fails(grpo(f"--prompts.{which}", path), f"{path}{says}")
    assert not (tmp_path / "run").exists()


def test_rewards(grpo, tmp_path):
    def reward(*others, **fields):
        return grpo("--rewards", json.dumps([{"name": "a", **fields}, *others]))

    fails(reward(function="nomodule:f"), "reward a: function: cannot import nomodule")
    fails(reward(function="tests.helpers.runs:dark"), "reward a: function", "'dark'", "check the name")
    bright = {"name": "b", "function": "tests.helpers.runs:brightness"}
    fails(
        reward(bright, function="tests.helpers.runs:brightness", gate="mask"),
        "command line: rewards[0].threshold: gate: mask needs one",
    )
    fails(
        reward(function="tests.helpers.runs:brightness", gate="multiply"),
        "rewards: the weights",
        "sum to zero; give one",
    )
    assert not (tmp_path / "run").exists()
    result = reward(function="tests.helpers.runs:nothing")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1] == (
        "posttrain: error: rewards: not one image of 2 steps could be scored: all None, so none applies to these"
        " prompts; fix or add a reward"
    )


def test_no_space_left_while_saving(grpo, tmp_path):
    """The adapter of the second step fits below the limit, its optimiser does not."""
    assert grpo("--steps", 1).returncode == 0
    result = grpo("--steps", 2, "--resume", limit=200_000)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("posttrain: error: ") and "step-000002: no space left while saving" in last
    assert "free some" in last and "--resume" in last
    assert checkpoint.find(tmp_path / "run").name == "step-000001"
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-000001"]
    assert grpo("--steps", 2, "--resume").returncode == 0
    assert checkpoint.find(tmp_path / "run").name == "step-000002"


def test_export(command, grpo, tmp_path, model):
    def export(output, *options, **limits):
        return command("export", "--source", tmp_path / "run", "--output", output, *options, **limits)

    fails(export(tmp_path / "out"), tmp_path / "run", "holds no whole checkpoint; give a run directory")
    assert grpo("--steps", 1).returncode == 0
    fails(export(model), f"output: {model} exists; choose another name")
    fails(export(tmp_path / "a.bin", "--format", "lora"), "command line: output: ", "end it in .safetensors")
    fails(
        export(tmp_path / "recipe.yaml/out"),
        f"output: {tmp_path}/recipe.yaml/out: {tmp_path}/recipe.yaml takes no file",
    )
    for options in ([], ["--format", "original"]):
        full = export(tmp_path / "out.safetensors", *options, limit=200_000)
        fails(full, tmp_path / "out.safetensors", "no space left; free some or choose another disk")
    assert not list(tmp_path.glob("out*")) and not list(tmp_path.glob(".export*"))
    result = export(tmp_path / "out")
    assert (result.returncode, result.stderr) == (0, "")
    kept, wrote = result.stdout.splitlines()
    assert kept.startswith("posttrain: merged in float32: 1.000 of what was trained is kept (")
    assert wrote.startswith(f"posttrain: wrote {tmp_path}/out (diffusers) from ")


def test_sample(command, tmp_path, model):
    def sample(output, *options):
        return command(
            "sample", "--model.path", model, "--output", output, "--size", "[32, 32]", "--steps", 2, *options
        )

    prompt = ["--prompt", "a red circle"]
    result = sample(tmp_path / "a", *prompt)
    assert (result.returncode, result.stderr) == (0, "")
    fails(sample(tmp_path / "a", *prompt), f"output: {tmp_path}/a exists; choose another name")
    fails(sample(tmp_path / "b", *prompt, "--adapter", tmp_path), tmp_path, "holds no whole checkpoint")
    fails(sample(tmp_path / "b"), "command line: prompt: give either prompt (a text) or prompts")
    fails(sample(tmp_path / "b", *prompt, "--size", "[40, 32]"), "size: 40 pixels is not a multiple of 16; use 32")
    fails(
        sample(tmp_path / "a/000.png/b", *prompt), "output: ", "takes no file (Not a directory)", "choose another place"
    )
    assert not (tmp_path / "b").exists()
    result = sample(tmp_path / "b", "--prompt", "🦊" * 150)
    assert result.returncode == 0
    assert result.stderr == "posttrain: warning: too long: 1 prompt, of which up to 93 tokens are cut\n"


def test_report(command, tmp_path):
    fails(command("report", tmp_path), tmp_path, "is not a run directory (no recipe.yaml)")
