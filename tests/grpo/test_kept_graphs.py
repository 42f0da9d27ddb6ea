"""Graphs of stochastic steps that are kept from drawing until the update: the same numbers with fewer forwards."""

import copy

import pytest
import torch

from posttrain.config.types import ConfigError
from posttrain.grpo import train as grpo
from posttrain.model.k2 import K2
from tests.distributed.test_sharding import FSDP2
from tests.helpers import runs
from tests.helpers.settings import validate


@pytest.fixture
def config(tmp_path, model):
    made = runs.config(tmp_path, model)
    made.groups.micro_batch, made.sampling.sizes = 3, [[32, 32], [16, 48]]
    return made


@pytest.fixture
def asked(monkeypatch):
    """Forwards of the policy with gradient, while an update is made and before it."""
    counts, updating = {False: 0, True: 0}, []
    velocity, optimise = K2.velocity, grpo.optimise

    def noted(self, x, *rest):
        if torch.is_grad_enabled():
            counts[bool(updating)] += 1
        return velocity(self, x, *rest)

    def optimised(*arguments):
        updating.append(1)
        metrics = optimise(*arguments)
        updating.clear()
        return metrics

    monkeypatch.setattr(K2, "velocity", noted)
    monkeypatch.setattr(grpo, "optimise", optimised)
    return counts


@pytest.mark.parametrize(("window", "passes", "lora"), [(2, 1, True), (None, 2, True), (2, 2, False)])
def test_the_same_numbers(config, tmp_path, asked, window, passes, lora):
    """Bit for bit. Of two steps of two groups of four images, in parts of three, a window of two takes three forwards
    for a group, and three stochastic steps of each image's own take six."""
    config.sampling.window, config.optim.passes = window, passes
    if not lora:
        config.lora, config.optim.lr = None, 3e-4
    outputs, counts = [], []
    for keep in (False, True):
        config.rollout.keep_graphs, config.output = keep, str(tmp_path / f"run-{keep}")
        asked.update({False: 0, True: 0})
        grpo.train(config)
        outputs.append(config.output)
        counts.append((asked[False], asked[True]))
    forwards = 2 * 2 * (3 if window else 6)
    assert counts == [(0, passes * forwards), (forwards, (passes - 1) * forwards)]
    plain, kept = outputs
    assert runs.untimed(plain) == runs.untimed(kept) and runs.training_rows(kept)[0]["ratio_error"] == 0
    for name, tensors in runs.latest(plain).tensors.items():
        runs.assert_equal(tensors, runs.latest(kept).tensors[name])


def test_without_memory_a_run_goes_on_without_it(config, monkeypatch, asked):
    config.rollout.keep_graphs, config.steps = True, 3
    optimise, sizes = grpo.optimise, []

    def optimised(*arguments):
        sizes.append(arguments[-1])
        if len(sizes) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return optimise(*arguments)

    monkeypatch.setattr(grpo, "optimise", optimised)
    grpo.train(config)
    assert sizes == [3, 3, 1, 1] and asked == {False: 2 * 2 * 3, True: 2 * 2 * 5}


def test_refused(config, command, tmp_path):
    for changes, says in (
        ({"rollout.ahead": 1}, "is for images of the policy that trains; set it to false, or ahead: 0"),
        ({"model.sequence_parallel": 2}, r"does not go with model\.sequence_parallel; leave one of them out"),
        ({"rollout.quantize": "fp8", "model.dtype": "bfloat16"}, "trains on steps as they are drawn, but not in fp8"),
    ):
        made = copy.deepcopy(config)
        made.rollout.keep_graphs = True
        for field, value in changes.items():
            section, name = field.split(".")
            setattr(getattr(made, section), name, value)
        with pytest.raises(ConfigError, match=says) as told:
            validate(made)
        assert told.value.field == "rollout.keep_graphs"
    config.rollout.keep_graphs = True
    path = runs.recipe(config, tmp_path / "r.yaml")
    result = command("grpo", "--config", path, processes=2, **FSDP2)
    assert result.returncode == 2 and "rollout.keep_graphs: does not go with FSDP2; set it to false" in result.stderr
