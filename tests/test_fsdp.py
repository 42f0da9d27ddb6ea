"""All weights under FSDP2: the same run as one process with all of them, and checkpoints that either goes on from."""

import re

import pytest
import torch

from posttrain import checkpoint
from posttrain.k2 import K2
from tests import runs

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
"""What `accelerate launch` tells the processes."""


def assert_close(a: checkpoint.Checkpoint, b: checkpoint.Checkpoint, begun: dict) -> None:
    """The same files of the same tensors, whose values agree; of weights, how far they moved."""
    assert a.step == b.step and a.tensors.keys() == b.tensors.keys() >= {"weights", "live", "optimizer"}
    for name, group in a.tensors.items():
        form = [{key: (value.shape, value.dtype) for key, value in part.items()} for part in (group, b.tensors[name])]
        assert form[0] == form[1]
        first, second = (
            torch.cat([(t[k] - begun.get(k, 0)).flatten() for k in group]) for t in (group, b.tensors[name])
        )
        assert first.norm() > 0 and (first - second).norm() < 1e-2 * first.norm(), name


@pytest.mark.parametrize("method", ["grpo", "stpo", "tdm"])
def test_two_sharded_processes_equal_one(command, model, tmp_path, method):
    """What is dealt out does not divide by two. A run is cut in half and carried on by the other kind of processes."""
    config = getattr(runs, f"{method}_config", runs.config)(tmp_path, model)
    config.lora, config.optim.lr, config.optim.ema, config.steps = None, 1e-4, 0.5, 2
    config.eval.prompts, config.eval.every = 1, 1
    if method == "grpo":
        config.groups.prompts_per_step, config.groups.group_size = 3, 2
        config.sampling.sizes, config.optim.max_grad_norm = [[32, 32], [16, 48]], 1e-3
    elif method == "stpo":
        config.batch, config.micro_batch = 5, 2
    else:
        config.batch, config.micro_batch, config.steps, config.student.steps = 5, 2, 3, [2, 3]
    made = []
    for name, halves in {"one": [{}], "two": [FSDP2], "cut": [FSDP2, {}], "mended": [{}, FSDP2]}.items():
        config.output = str(tmp_path / name)
        path = runs.recipe(config, tmp_path / "recipe.yaml")
        for i, engine in enumerate(halves):
            steps = config.steps - (len(halves) - i - 1)
            args = [method, "--config", path, "--steps", steps, "--resume"]
            result = command(*args, processes=2 if engine else 1, **engine)
            assert result.returncode == 0, result.stderr[-3000:]
            if engine:
                held, total = re.search(r"each process holds (\S+) of (\S+) million", result.stderr).groups()
                assert float(held) < 0.65 * float(total)
        made.append(config.output)
    one, *others = made
    begun = K2.load(model).base_state_dict()
    for other in others:
        assert len(runs.rows(one)) == len(runs.rows(other))
        for a, b in zip(runs.untimed(one), runs.untimed(other)):
            assert a == pytest.approx(b, rel=1e-3, abs=1e-6)
        assert_close(runs.latest(one), runs.latest(other), begun)
