"""Processes that share the tokens of each sample give the velocities, gradients and runs of one process."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from posttrain.distributed.processes import Processes
from posttrain.errors import UserError
from posttrain.model import parallelize
from posttrain.model.k2 import K2, Text
from posttrain.training import checkpoint
from posttrain.training.policy import POLICY
from tests.helpers import runs

LENGTHS = [(7, 7), (8, 8), (5, 8)]
"""Of the texts of two samples: 16 image tokens and 7 are an odd number, 8 an even one; the last need a mask."""


def outcome(k2: K2, procs: Processes, lengths: tuple[int, int], recompute: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The velocity of two samples, and the adapter's gradient of a loss of it, summed over processes."""
    k2.blocks.recompute = recompute
    text = Text.of([k2.fuse(k2.random_features(length, i)) for i, length in enumerate(lengths)])
    side = 4 * k2.pixel_multiple
    x = torch.randn(2, k2.image_tokens(side, side), k2.latent_channels, generator=torch.Generator().manual_seed(1))
    parameters = k2.train_role(POLICY)
    with k2.role(POLICY):
        v = k2.velocity(x, torch.tensor([0.3, 0.8]), text, side, side)
        (v - x).square().mean().backward()
    procs.sum_gradients(parameters)
    gradient = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    for parameter in parameters:
        parameter.grad = None
    return v.detach(), gradient


def outcomes(size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    procs = Processes(shardable=True)
    k2 = K2.random("cpu", torch.float32, "tiny", text=False)
    k2.sequence_parallel = size
    with parallelize.sharding(k2, procs):
        k2.add_role(POLICY, 4, 4.0)
        generator = torch.Generator().manual_seed(2)
        for name, parameter in k2.role_named_parameters(POLICY).items():
            if name.endswith("lora_B.weight"):  # zero at the start of training, when nothing would show
                torch.nn.init.normal_(parameter, std=0.05, generator=generator)
    found = []
    for lengths in LENGTHS:
        for recompute in (0, 2):
            found.append(outcome(k2, procs, lengths, recompute))
    return found


def save_outcomes(args: list[str]) -> None:
    torch.save(outcomes(2), f"{args[0]}.{os.environ['RANK']}")


def test_two_processes_give_the_velocity_and_gradient_of_one(command, tmp_path):
    result = command(tmp_path / "part", processes=2, function=f"{__name__}:save_outcomes")
    assert result.returncode == 0, result.stderr
    one = outcomes(1)
    for rank in range(2):
        part = torch.load(tmp_path / f"part.{rank}", weights_only=True)
        for (v, gradient), (whole_v, whole_gradient) in zip(part, one, strict=True):
            assert whole_gradient.norm() > 0
            assert (v - whole_v).norm() < 1e-5 * whole_v.norm()
            assert (gradient - whole_gradient).norm() < 1e-5 * whole_gradient.norm()


@pytest.mark.long
def test_grpo_in_groups_of_two_is_that_of_one_process(command, model, tmp_path):
    """Three groups: with four processes, two work on each. An evaluation of one prompt and one group; a KL."""
    config, outputs = runs.config(tmp_path, model), []
    config.groups.prompts_per_step, config.eval.prompts, config.eval.groups, config.eval.group_size = 3, 1, 1, 3
    for count, together in ((1, 1), (2, 2), (4, 2)):
        config.output, config.model.sequence_parallel = str(tmp_path / f"run-{count}"), together
        result = command("grpo", "--config", runs.recipe(config, tmp_path / "recipe.yaml"), processes=count)
        assert result.returncode == 0, result.stderr[-3000:]
        outputs.append(Path(config.output))
    one, *others = outputs
    for other in others:
        for a, b in zip(runs.untimed(one), runs.untimed(other), strict=True):
            assert a == pytest.approx(b, rel=1e-4, abs=1e-7)
        for path in one.glob("samples/step-*/*.png"):
            same = [np.asarray(Image.open(run / path.relative_to(one)), int) for run in (one, other)]
            assert np.abs(same[0] - same[1]).max() <= 1
        a, b = (checkpoint.load_latest(run / "checkpoints") for run in (one, other))
        assert a is not None and b is not None
        trained, again = (runs.flat(saved.tensors["adapter"]) for saved in (a, b))
        assert (trained - again).norm() < 1e-3 * trained.norm()


def test_what_does_not_go_with_it_is_refused(command, model, tmp_path):
    config = runs.config(tmp_path, model)
    config.model.sequence_parallel = 2
    path = runs.recipe(config, tmp_path / "recipe.yaml")
    for words, processes, says in (
        (["grpo"], 1, "model.sequence_parallel: is 2, which does not divide the 1 processes of this run"),
        (["grpo", "--model.compile", "true"], 2, "model.compile: model.sequence_parallel does not go with it"),
        (["preflight"], 1, "model.sequence_parallel: preflight takes whole samples"),
    ):
        result = command(words[0], "--config", path, *words[1:], processes=processes)
        assert result.returncode == 2 and says in result.stderr, result.stderr[-2000:]


def test_workers_divide_the_work():
    """Six processes in groups of two: three workers."""
    procs = Processes()
    procs.size = 6
    procs.share(2)
    for procs.rank in range(6):
        assert list(procs.local_indices(7)) == list(range(procs.rank // 2, 7, 3))
    assert [procs.owner(i) for i in range(4)] == [0, 2, 4, 0]


def test_one_process_cannot_be_divided():
    from posttrain.model import sequence

    sequence.check(1)
    with pytest.raises(UserError, match="launch a multiple of it"):
        sequence.check(2)
