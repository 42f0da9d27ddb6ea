"""A run that goes on from an earlier one: its base has what that trained, and everything that reads it knows."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from diffusers import Krea2Pipeline
from PIL import Image
from safetensors.torch import load_file

from posttrain.config.sections import ModelConfig
from posttrain.errors import UserError
from posttrain.export.config import ExportConfig
from posttrain.export.export import export, load_checkpoint
from posttrain.grpo import train as grpo
from posttrain.model.fingerprint import fingerprint
from posttrain.model.k2 import K2
from posttrain.sample_config import SampleConfig
from posttrain.sample_images import sample
from posttrain.stpo import train as stpo
from posttrain.training import checkpoint
from posttrain.training.policy import load_model
from tests.export.test_export import distance, ours, stock_latents
from tests.helpers import runs, tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    PartialState(cpu=True)
    return tiny.save(tmp_path_factory.mktemp("tiny") / "raw")


def trained(folder: Path, model: Path, start: Path | None, seed: int, **lora) -> Path:
    """A GRPO run of one step, from another one or from the base."""
    folder.mkdir()
    config = runs.config(folder, model)
    config.steps, config.optim.lr, config.seed = 1, 0.02, seed
    config.model.start = None if start is None else str(start)
    for name, value in lora.items():
        setattr(config.lora, name, value)
    grpo.train(config)
    return Path(config.output)


@pytest.fixture(scope="module")
def stages(model, tmp_path_factory):
    """Three runs, each from the one before; the second adapts other layers with another rank."""
    folder = tmp_path_factory.mktemp("stages")
    first = trained(folder / "a", model, None, 1)
    second = trained(folder / "b", model, first, 2, rank=2, alpha=6.0, targets=["to_q", "ff.down"])
    return [first, second, trained(folder / "c", model, second / "checkpoints/step-000001", 3)]


def load(run) -> checkpoint.Checkpoint:
    return checkpoint.load(checkpoint.find(run))


@pytest.fixture(scope="module")
def policies(stages):
    """Latents of each run's policy, which all differ."""
    latents = [ours(load_checkpoint(load(run)), 1.5, "policy") for run in stages]
    assert distance(latents[0], latents[1]) > 0.05 and distance(latents[1], latents[2]) > 0.05
    return latents


def test_the_reference_is_the_policy_before(stages, policies):
    for i in (1, 2):
        assert distance(ours(load_checkpoint(load(stages[i])), 1.5), policies[i - 1]) < 1e-4
    merged = [[Path(entry["path"]).parts[-4] for entry in load(run).state["origin"]["merged"]] for run in stages]
    assert merged == [[], ["a"], ["a", "b"]]
    assert len({load(run).state["origin"]["base"] for run in stages}) == 1


def test_a_branch_starts_from_the_checkpoint_that_it_names(model, tmp_path):
    """Its weights exactly, not those of the run's end: what it draws before its first step, and its reference."""
    for name in ("first", "branch"):
        (tmp_path / name).mkdir()
    first = runs.config(tmp_path / "first", model)
    first.steps, first.optim.lr, first.eval.every = 2, 0.02, 1
    first.checkpoint.every, first.checkpoint.keep = 1, 3
    grpo.train(first)
    at = Path(first.output) / "checkpoints/step-000001"
    branch = runs.config(tmp_path / "branch", model)
    branch.model.start, branch.steps = str(at), 1
    grpo.train(branch)
    evaluated = [
        {row["step"]: row["eval/brightness"] for row in runs.rows(config.output) if "eval/brightness" in row}
        for config in (first, branch)
    ]
    assert evaluated[1][0] == pytest.approx(evaluated[0][1], abs=1e-6)
    assert abs(evaluated[0][2] - evaluated[0][1]) > 1e-5
    saved = checkpoint.load(at)
    factors = load_model(branch.model, "cpu").active_factors(None)
    scale = saved.state["lora"]["alpha"] / saved.state["lora"]["rank"]
    for key, value in saved.tensors["adapter"].items():
        assert torch.equal(factors[key], value * scale if "lora_B" in key else value), key


@pytest.mark.parametrize("format", ["diffusers", "lora", "original", "lora-original"])
def test_exports_hold_all_that_was_trained(stages, policies, model, tmp_path, format):
    """An adapter is for the base that all began with: the ranks of its stages side by side."""
    output = tmp_path / ("out" if format == "diffusers" else "out.safetensors")
    export(ExportConfig(str(stages[2]), str(output), format))
    if format == "original":
        k2 = K2.load(model, transformer_file=output)
        assert distance(ours(k2, 1.5), policies[2]) < 1e-4
        return
    pipe = Krea2Pipeline.from_pretrained(output if format == "diffusers" else model)
    if format != "diffusers":
        factors = load_file(output)
        ranks = {v.shape[0] for k, v in factors.items() if k.endswith("lora_A.weight")}
        assert ranks == {8, 10}
        pipe.load_lora_weights(output)
    assert distance(stock_latents(pipe, K2.load(model), 1.5), policies[2]) < 1e-4


def test_samples_of_an_adapter_have_what_it_stands_on(stages, model, tmp_path):
    pictures = {}
    export(ExportConfig(str(stages[1]), str(tmp_path / "tuned")))
    for name, path, adapter in (
        ("run", model, str(stages[1])), ("export", tmp_path / "tuned", None), ("base", model, None)
    ):  # fmt: skip
        config = SampleConfig(str(tmp_path / name), ModelConfig(str(path), dtype="float32"), prompt="a red circle")
        config.adapter, config.size, config.steps = adapter, [32, 48], 3
        sample(config)
        pictures[name] = np.asarray(Image.open(tmp_path / name / "000.png"), int)
    assert np.abs(pictures["run"] - pictures["export"]).max() <= 1
    assert np.abs(pictures["run"] - pictures["base"]).max() > 3


def test_stpo_goes_on_from_grpo(stages, policies, model, tmp_path):
    """Its reference is the policy before, so that its loss begins at ln 2; and its text cache is the base's."""
    config = runs.stpo_config(tmp_path, model)
    config.model.start, config.steps = str(stages[0]), 1
    stpo.train(config)
    (row,) = [row for row in runs.rows(config.output) if "loss" in row]
    assert row["loss"] == pytest.approx(0.693147, abs=1e-6)
    assert distance(ours(load_checkpoint(load(config.output)), 1.5), policies[0]) < 1e-4


def test_an_earlier_run_that_trained_all_weights(stages, model, tmp_path):
    folder = tmp_path / "full"
    folder.mkdir()
    config = runs.config(folder, model)
    config.lora, config.optim.lr, config.steps = None, 3e-3, 1
    grpo.train(config)
    first = ours(load_checkpoint(load(config.output)), 1.5, "policy")
    second = trained(tmp_path / "then", model, Path(config.output), 2)
    k2 = load_checkpoint(load(second))
    assert distance(ours(k2, 1.5), first) < 1e-4
    export(ExportConfig(str(second), str(tmp_path / "out")))
    assert distance(ours(K2.load(tmp_path / "out"), 1.5), ours(k2, 1.5, "policy")) < 1e-4
    with pytest.raises(UserError, match=r"format: .*full/run/.* has no adapter, all weights were trained"):
        export(ExportConfig(str(second), str(tmp_path / "lora.safetensors"), "lora"))


def test_resuming_stays_on_what_the_run_began_with(model, tmp_path):
    """Although the earlier run has gone on since, and its newest checkpoint is another."""
    first = trained(tmp_path / "a", model, None, 1)
    folder = tmp_path / "b"
    folder.mkdir()
    config = runs.config(folder, model)
    config.model.start, config.steps = str(first), 1
    grpo.train(config)
    before = load(config.output).state["origin"]
    saved = load(first)
    moved = {key: value * 2 for key, value in saved.tensors["adapter"].items()}
    checkpoint.save(first / "checkpoints", 2, {**saved.tensors, "adapter": moved}, saved.state, keep=9)
    config.steps = 2
    grpo.train(config, resume=True)
    assert load(config.output).state["origin"] == before and load(config.output).step == 2
    config.steps, config.model.path = 3, str(shutil.copytree(model, tmp_path / "moved"))
    grpo.train(config, resume=True)
    assert load(config.output).state["origin"] == before and load(config.output).step == 3
    config.model.start = str(first / "checkpoints/step-000002")
    with pytest.raises(UserError, match=r"model\.start: was .*a/run when the run began; restore it"):
        grpo.train(config, resume=True)


def test_earlier_runs_that_are_gone_or_have_changed(stages, model, tmp_path):
    """Named by whoever reads the later one."""
    first = trained(tmp_path / "a", model, None, 1)
    second = trained(tmp_path / "b", model, first, 2)
    step, aside = first / "checkpoints/step-000001", tmp_path / "aside"
    step.rename(aside)
    with pytest.raises(UserError, match=rf"{step}: is gone, and .*step-000001 was trained on top of it; put it back"):
        export(ExportConfig(str(second), str(tmp_path / "out")))
    saved = checkpoint.load(aside)
    moved = {key: value * 2 for key, value in saved.tensors["adapter"].items()}
    checkpoint.save(first / "checkpoints", 1, {**saved.tensors, "adapter": moved}, saved.state, keep=9)
    with pytest.raises(UserError, match=rf"{step}: has changed since .* was trained on top of it; restore it"):
        export(ExportConfig(str(second), str(tmp_path / "out")))
    shutil.rmtree(step)
    aside.rename(step)
    export(ExportConfig(str(second), str(tmp_path / "out")))
    with pytest.raises(UserError, match="none: holds no whole checkpoint"):
        trained(tmp_path / "c", model, tmp_path / "none", 3)


def test_another_base_is_refused(stages, model, tmp_path):
    other = tiny.save(tmp_path / "other", seed=5)
    with pytest.raises(UserError, match=r"model\.start: .* was trained on another model than model\.path \(.*other\)"):
        trained(tmp_path / "a", other, stages[0], 1)
    saved = load(stages[0])
    state = json.loads(json.dumps(saved.state))
    state["model"]["path"] = str(other)
    checkpoint.save(tmp_path / "checkpoints", 1, saved.tensors, state, keep=1)
    with pytest.raises(UserError, match=r"other: is not the model that .* was trained on: its weights differ"):
        export(ExportConfig(str(tmp_path), str(tmp_path / "out")))


def test_fingerprint_of_weights():
    """Of names, shapes and values; not of the type they are held in."""
    weights = {"a": torch.randn(300, 400), "b": torch.zeros(0), "c": torch.tensor(1.0)}
    seen = [
        fingerprint(weights),
        fingerprint({**weights, "a": weights["a"] * 1.02}),
        fingerprint({**weights, "a": weights["a"].T}),
        fingerprint({**weights, "c": torch.tensor(2.0)}),
        fingerprint({"x" + key: value for key, value in weights.items()}),
    ]
    assert len(set(seen)) == 5
    assert fingerprint({key: value.bfloat16() for key, value in reversed(weights.items())}) == seen[0]
