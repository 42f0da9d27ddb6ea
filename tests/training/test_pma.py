"""The mean of checkpoints: its numbers, and runs that evaluate and save it while they train on from live weights."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from posttrain import cli
from posttrain.config.optimizer import AverageConfig
from posttrain.config.sections import OptimConfig
from posttrain.config.types import ConfigError
from posttrain.distributed.processes import Processes
from posttrain.errors import UserError
from posttrain.export.export import load_checkpoint
from posttrain.judge.config import JudgeConfig
from posttrain.stpo import train as stpo
from posttrain.training import checkpoint, pma
from posttrain.training.evaluate import Evaluator
from posttrain.training.policy import POLICY
from posttrain.training.stepper import Stepper
from prompts.records import read_prompts
from tests.helpers import runs
from tests.helpers.settings import validate

# ---- numbers --------------------------------------------------------------------------------------------------


def weights_of_mean(count: int) -> torch.Tensor:
    """What each checkpoint weighs, measured by giving one of them the value 1."""
    values = [[torch.tensor(float(i == j)) for i in range(count)] for j in range(count)]
    return torch.stack([pma.mean_of(row) for row in values]).double()


def variance(weights: torch.Tensor, correlation: float, every: int = 1) -> float:
    """Of a weighted mean of unit AR(1) values that lie `every` steps apart."""
    place = every * torch.arange(len(weights), dtype=torch.float64)
    covariance = correlation ** (place[:, None] - place).abs()
    return float(weights @ covariance @ weights)


@pytest.mark.parametrize(("correlation", "expected"), [(0.0, 0.1), (0.5, 0.2600), (0.9, 0.7276)])
def test_variance_of_a_mean_of_ten(correlation, expected):
    """Check 44: independent checkpoints leave a tenth of the variance, correlated ones most of it."""
    assert variance(weights_of_mean(10), correlation) == pytest.approx(expected, abs=5e-5)


def test_variance_beside_a_moving_average():
    """Check 44, one-step correlation .98: EMA .99 leaves .3322, PMA of 10 x 20 .3830, of 5 x 40 .4076.

    The window is the same: 200 = 1.99 / .01 steps, within one."""
    decay = 0.99
    moving = (1 - decay) * decay ** torch.arange(3000, dtype=torch.float64)
    assert variance(moving, 0.98) == pytest.approx(0.3322, abs=5e-5)
    assert variance(weights_of_mean(10), 0.98, 20) == pytest.approx(0.3830, abs=5e-5)
    assert variance(weights_of_mean(5), 0.98, 40) == pytest.approx(0.4076, abs=5e-5)
    assert (1 + decay) / (1 - decay) == pytest.approx(10 * 20, abs=1.01)


def test_the_mean_of_factors_is_another_update():
    """Check 44: A = 1, 3 and B = 2, 4 have updates 2 and 12, whose mean is 7; the product of the means is 6."""
    one = [(torch.tensor([[b]]), torch.tensor([[a]])) for a, b in ((1.0, 2.0), (3.0, 4.0))]
    b, a, cut = pma.mean_of_updates(one, rank=1)
    assert float(b @ a) == pytest.approx(7) and cut is not None and cut.error < 1e-6
    assert float(pma.mean_of([b for b, _ in one]) * pma.mean_of([a for _, a in one])) == 6


def test_mean_of_updates():
    """Near updates: the mean at their rank is the best there is. One update alone is not touched."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(24, 4, generator=generator), torch.randn(4, 16, generator=generator)
    factors = []
    for _ in range(5):
        factors.append(tuple(f + 0.2 * torch.randn(f.shape, generator=generator) for f in start))
    whole = torch.stack([b @ a for b, a in factors]).mean(0)
    b, a, cut = pma.mean_of_updates(factors, rank=4)
    assert cut is not None and b.shape == (24, 4) and a.shape == (4, 16)
    left = float((whole - b @ a).norm() / whole.norm())
    assert left == pytest.approx(cut.error, rel=1e-3) and 5e-3 < left < 0.1
    best = float(torch.linalg.svdvals(whole)[4:].norm() / whole.norm())
    assert left == pytest.approx(best, rel=1e-3)
    assert pma.mean_of_updates(factors[:1], rank=4)[:2] == factors[0]
    narrow = [(torch.ones(2, 4), torch.ones(4, 3) * i) for i in (1, 2)]
    b, a, _ = pma.mean_of_updates(narrow, rank=4)
    assert b.shape == (2, 4) and a.shape == (4, 3)
    assert torch.allclose(b @ a, torch.full((2, 3), 6.0))


# ---- runs -----------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path, model):
    made = runs.stpo_config(tmp_path, model)
    made.loss.terms_every = 0
    made.steps, made.checkpoint.every, made.checkpoint.keep, made.eval.every = 6, 4, 2, 2
    made.optim.average = AverageConfig(every=1, last=3)
    return made


def full(config):
    config.lora, config.optim.lr, config.model.dtype = None, 3e-4, "bfloat16"


def kept(run) -> list[int]:
    return sorted(int(path.stem[-6:]) for path in (Path(run) / "checkpoints/average").glob("*.safetensors"))


def deltas(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The updates B A of an adapter's layers, without the scale."""
    layers = [key.removesuffix(pma.A) for key in tensors if key.endswith(pma.A)]
    return {layer: tensors[layer + pma.B].double() @ tensors[layer + pma.A].double() for layer in layers}


@pytest.mark.parametrize("lora", [True, False])
def test_a_run_saves_and_evaluates_the_mean_and_trains_on_without_it(config, tmp_path, lora):
    if not lora:
        full(config)
    stpo.train(config)
    run = Path(config.output)
    saved = runs.latest(run)
    assert saved.step == 6 and saved.state["average"]["steps"] == [4, 5, 6]
    # Those of the checkpoint of step 4, which may be resumed, and of now.
    assert kept(run) == [2, 3, 4, 5, 6]
    files = {step: load_file(run / f"checkpoints/average/step-{step:06d}.safetensors") for step in kept(run)}
    name = "adapter" if lora else "weights"
    for path in sorted((run / "checkpoints").glob("step-*")):
        whole = checkpoint.load(path)
        three = [files[step] for step in range(whole.step - 2, whole.step + 1)]
        if lora:
            means, found = [deltas(tensors) for tensors in three], deltas(whole.tensors[name])
            for layer, delta in found.items():
                expected = torch.stack([updates[layer] for updates in means]).mean(0)
                assert (delta - expected).norm() < 0.1 * expected.norm()
            live = deltas(whole.tensors["live"])
            assert all((delta - live[layer]).norm() > 1e-3 * delta.norm() for layer, delta in found.items())
        else:
            for key, value in whole.tensors[name].items():
                expected = torch.stack([tensors[key].float() for tensors in three]).mean(0)
                torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-9)
            assert files[6]["transformer_blocks.0.attn.to_q.weight"].dtype == torch.bfloat16
        newest = files[whole.step]
        for key, value in whole.tensors["live"].items():
            assert value.dtype == torch.float32 and value.to(newest[key].dtype).equal(newest[key])
    rows = [row for row in runs.rows(run) if "eval/average_checkpoints" in row]
    assert [(row["step"], row["eval/average_checkpoints"]) for row in rows] == [(2, 2), (4, 3), (6, 3)]
    for row in rows:
        assert (0 < row["eval/average_error"] < 0.2) if lora else "eval/average_error" not in row
    runs.assert_metrics_are_defined(run, "brightness")

    # Training never sees the mean.
    config.output, config.optim.average = str(tmp_path / "plain"), None
    stpo.train(config)
    assert not (tmp_path / "plain/checkpoints/average").exists()
    plain = runs.latest(config.output)
    runs.assert_equal(plain.tensors[name], saved.tensors["live"])
    runs.assert_equal(plain.tensors["optimizer"], saved.tensors["optimizer"])
    losses = [[row["loss"] for row in runs.training_rows(one)] for one in (run, config.output)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("lora", [True, False])
def test_what_is_exported_is_what_was_evaluated(config, lora):
    """The last evaluation's images are those that the checkpoint draws, bit for bit."""
    if not lora:
        full(config)
    stpo.train(config)
    run, procs = Path(config.output), Processes()
    k2 = load_checkpoint(runs.latest(run))
    evaluator = Evaluator(k2, read_prompts(config.heldout), [], config.eval, (32, 32), 16, 64, procs)
    with k2.role(POLICY):
        images = evaluator().images
    for i, image in enumerate(images):
        assert np.array_equal(np.asarray(Image.open(run / f"samples/step-000006/{i:03d}.png")), image)


@pytest.mark.parametrize("lora", [True, False])
def test_killed_and_resumed_equals_uninterrupted(config, monkeypatch, tmp_path, lora):
    """Killed in step 6, after step 5 was kept, and continued from step 4."""
    if not lora:
        full(config)
    stpo.train(config)
    whole, config.output = config.output, str(tmp_path / "killed")

    def killed(*arguments):
        if len(runs.training_rows(config.output)) == 5:
            raise RuntimeError("killed")
        return optimise(*arguments)

    optimise = stpo.optimise
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(stpo, "optimise", killed)
        stpo.train(config)
    assert runs.latest(config.output).step == 4 and kept(config.output) == [2, 3, 4, 5]
    # Of a step that is made again; it must not count as kept.
    save_file({}, Path(config.output) / "checkpoints/average/step-000009.safetensors")
    stpo.train(config, resume=True)
    a, b = runs.latest(whole), runs.latest(config.output)
    assert a.step == b.step == 6 and a.tensors.keys() == b.tensors.keys()
    for name in a.tensors:
        runs.assert_equal(a.tensors[name], b.tensors[name])
    assert a.state["average"] == b.state["average"] and a.state["counters"] == b.state["counters"]
    assert kept(whole) == kept(config.output)
    assert runs.untimed(whole) == runs.untimed(config.output)


def test_sparse_and_few_checkpoints(config):
    """Kept every third step; the best step's checkpoint keeps what it needs; a run shorter than that has none."""
    config.optim.average = AverageConfig(every=3, last=2)
    config.steps, config.checkpoint.every, config.checkpoint.keep, config.eval.best = 8, 1, 1, "pairs/accuracy"
    stpo.train(config)
    saved = runs.latest(config.output)
    assert saved.step == 8 and saved.state["average"]["steps"] == [3, 6] == kept(config.output)
    config.output, config.steps = f"{config.output}-short", 2
    stpo.train(config)
    saved = runs.latest(config.output)
    assert saved.state["average"]["steps"] == [] and kept(config.output) == []
    runs.assert_equal(saved.tensors["adapter"], saved.tensors["live"])


def test_a_file_that_is_needed_and_gone_is_named(config, tmp_path, capsys):
    config.steps = 4
    stpo.train(config)
    path = Path(config.output) / "checkpoints/average/step-000003.safetensors"
    for name, damage in (
        ("missing", path.unlink),
        ("changed", lambda: path.write_bytes(path.read_bytes()[:-1] + b"\1")),
    ):
        shutil.copy(path, tmp_path / "kept")
        damage()
        config.steps = 5
        with pytest.raises(UserError, match=rf"step-000003\.safetensors (is|has) {name}, and optim\.average needs it"):
            stpo.train(config, resume=True)
        shutil.copy(tmp_path / "kept", path)
    stpo.train(config, resume=True)
    assert runs.latest(config.output).step == 5


def test_an_average_cannot_begin_or_end_on_the_way(config, capsys):
    config.steps, config.eval.every = 4, 0
    stpo.train(config)
    path, words = Path(config.output).parent / "recipe.yaml", ["--steps", "5", "--resume"]
    runs.recipe(config, path)
    assert cli.main(["stpo", "--config", str(path), "--optim.average", "null", *words]) == 2
    assert "cannot be resumed with optim.average" in capsys.readouterr().err
    assert cli.main(["stpo", "--config", str(path), "--optim.average.last", "2", *words]) == 0
    assert runs.latest(config.output).state["average"]["steps"] == [4, 5]


def test_a_full_disk_ends_the_run_with_a_line(config, monkeypatch):
    def full_disk(tensors, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pma, "save_file", full_disk)
    with pytest.raises(UserError, match=r"step-000001\.safetensors: cannot be saved: no space left; free some"):
        stpo.train(config)


# ---- memory and settings ----------------------------------------------------------------------------------------


def test_it_takes_no_memory_while_training():
    """An EMA keeps a copy of what is trained; the mean of files keeps none."""
    size = 64 * 48

    def held(**settings):
        stepper = Stepper([torch.zeros(64, 48).requires_grad_()], OptimConfig(**settings))
        stepper.parameters[0].grad = torch.ones(64, 48)
        stepper.step()
        return sum(tensor.numel() for tensor in stepper.kept() if tensor.ndim)

    assert held(ema=0.9) == 3 * size
    assert held(average=AverageConfig()) == held() == 2 * size


@pytest.mark.parametrize(
    ("average", "words"),
    [
        ({"kind": "pma", "every": 0}, "optim.average.every: is 0; use 1 or more"),
        ({"kind": "pma", "last": 1}, "optim.average.last: is 1; use 2 or more"),
        ({"kind": "ema"}, "optim.average.kind: is 'ema', expected"),
        ({"kind": "pma", "ema": 0.9}, "optim.average.ema: unknown key"),
        ({"last": 4}, "optim.average: is set, and optim.ema is 0.9, which averages too; set optim.ema: 0"),
    ],
)
def test_mistakes_are_told_in_a_line(config, tmp_path, capsys, average, words):
    made = json.loads(runs.recipe(config, tmp_path / "r.yaml").read_text())
    made["optim"] |= {"average": average, "ema": 0.9 if "is set" in words else 0.0}
    (tmp_path / "r.yaml").write_text(json.dumps(made))
    assert cli.main(["stpo", "--config", str(tmp_path / "r.yaml")]) == 2
    assert words in capsys.readouterr().err


def test_commands_without_a_run_of_k2_refuse_it(tmp_path):
    with pytest.raises(ConfigError, match=r"optim\.average: is of runs that train K2; use optim\.ema"):
        validate(JudgeConfig(str(tmp_path), "m", "d", "preference", optim=OptimConfig(average=AverageConfig())))
