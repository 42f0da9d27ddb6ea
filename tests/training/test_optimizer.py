"""Updates that do not depend on the scale of gradients, and clipping by the norms before."""

import copy
import itertools
import json
import math

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from posttrain.config import clipping
from posttrain.config.sections import OptimConfig
from posttrain.distributed import shards
from posttrain.report.limits import limits
from posttrain.training import checkpoint, optim
from posttrain.training.stepper import Stepper

SMALL = 3e-9
"""About the root of the second moment of K2's gradients at 1024 x 1024 pixels."""


@pytest.fixture
def eager():
    with torch.compiler.set_stance("force_eager"):
        yield


def factors():
    """An adapter's: one large enough for 8 bits, one that is not."""
    return [
        torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).requires_grad_(),
        torch.ones(8, 8).requires_grad_(),
    ]


def update(stepper, sizes):
    """An update for each of these sizes, which multiplies gradients that are drawn from the number of the update."""
    for size in sizes:
        generator = torch.Generator().manual_seed(stepper.updates)
        for parameter in stepper.parameters:
            parameter.grad = size * (torch.randn(parameter.shape, generator=generator) + 0.5)
        stepper.step()


def moved(stepper):
    return torch.cat([(p.detach() - before.detach()).flatten() for p, before in zip(stepper.parameters, factors())])


# ---- eps ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("size", [1.0, SMALL])
def test_the_update_does_not_depend_on_the_scale_of_the_loss(kind, size, eager):
    """A loss of 1e-4 times the size makes the same updates; with an eps of 1e-8 it would not."""

    def after(scale, **settings):
        stepper = Stepper(factors(), OptimConfig(kind=kind, lr=1e-2, **settings))
        update(stepper, [scale] * 5)
        return moved(stepper)

    expected = after(size)
    assert expected.abs().mean() > 0.01
    # 3e-9 x 1e-4 is only 300 times eps.
    assert (after(1e-4 * size) - expected).norm() < (1e-5 if size == 1 else 0.02) * expected.norm()
    if kind == "adamw":
        small = after(SMALL, eps=1e-8)
        assert small.norm() < 0.4 * expected.norm()


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("eps", [1e-15, 1e-8])
def test_what_eps_takes_of_the_rate_is_measured(kind, eps, eager):
    """Of a gradient that stays the same, sqrt(v_hat) is its size: 3e-9 loses 1e-8 / 1.3e-8 = .769 of the rate."""
    stepper = Stepper(factors(), OptimConfig(kind=kind, eps=eps))
    assert stepper.metrics() == {"clipped_updates": 0}  # nothing is known yet, so nothing is said
    for parameter in stepper.parameters:
        parameter.grad = torch.zeros_like(parameter)
    stepper.step()
    assert stepper.metrics("fake_") == {"fake_clipped_updates": 0}  # as of an adapter's first factors at its start
    for _ in range(100):
        for parameter in stepper.parameters:
            parameter.grad = torch.full_like(parameter, -SMALL)
        stepper.step()
    found = stepper.metrics()
    assert found["sqrt_v"] == pytest.approx(SMALL, rel=0.02)
    assert found["eps_share"] == pytest.approx(eps / (SMALL + eps), rel=0.02)


def test_the_sample_holds_both_factors_of_an_adapter():
    """Of 400 tensors that take turns, one of 1 and one of 3: the median of both is between, or one of them."""
    tensors = [torch.zeros(40, 40).requires_grad_() for _ in range(400)]
    stepper = Stepper(tensors, OptimConfig())
    for i, tensor in enumerate(tensors):
        tensor.grad = torch.full_like(tensor, 1.0 + 2.0 * (i % 2))
    stepper.step()
    beta = stepper.config.betas[1]
    stepped = list(stepper.optimizer.state.values())[:: 400 // optim.TENSORS | 1]
    sizes = {round(float((state["exp_avg_sq"].mean() / (1 - beta)).sqrt())) for state in stepped}
    assert sizes == {1, 3} and len(stepped) <= optim.TENSORS + 1


def test_8_bit_updates_stay_near_the_rate(eager):
    """Gradients of eight powers of ten in a block of 256: what rounds to 0 in the second moment is no reason to leap.
    As torchao does it, with this eps, the greatest step is 24,000 times the rate."""
    size = 10 ** torch.linspace(-8, 0, 64 * 128)[torch.randperm(64 * 128, generator=torch.Generator().manual_seed(1))]
    steps = []
    for kind in ("adamw", "adamw8bit"):
        stepper = Stepper([factors()[0]], OptimConfig(kind=kind, lr=1e-3))
        (weight,) = stepper.parameters
        largest = 0.0
        generator = torch.Generator().manual_seed(2)
        for _ in range(30):
            before = weight.detach().clone()
            weight.grad = SMALL * size.view(64, 128) * torch.randn(weight.shape, generator=generator)
            stepper.step()
            largest = max(largest, float((weight.detach() - before).abs().max()) / 1e-3)
        steps.append(largest)
    assert steps[0] < 3.5 and steps[1] < 3.5


def test_8_bit_updates_of_small_gradients_are_adamws(eager):
    """Of 3e-9 each, as they are of 1: see test_options.py."""
    changes = []
    for kind in ("adamw", "adamw8bit"):
        stepper = Stepper(factors(), OptimConfig(kind=kind, lr=1e-2))
        update(stepper, [SMALL] * 5)
        changes.append(moved(stepper))
    assert 1e-4 < (changes[1] - changes[0]).norm() / changes[0].norm() < 0.05


# ---- clipping -------------------------------------------------------------------------------------------------


def test_limit():
    """Three times the median of the newest 64, once there are 16."""
    assert clipping.limit([1.0] * 15, 3) == math.inf
    assert clipping.limit([1.0] * 9 + [5.0] * 7, 3) == 3
    assert clipping.limit([100.0] * 50 + [2.0] * 64, 3) == 6
    assert clipping.limit([1.0] * 99, 0) == math.inf


@pytest.fixture
def seen(monkeypatch):
    """The norm of each gradient as AdamW got it."""
    norms = []
    step = torch.optim.AdamW.step

    def watched(self, closure=None):
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(float(torch.cat([g.flatten() for g in gradients]).norm()))
        return step(self, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    return norms


@pytest.mark.parametrize("size", [1.0, SMALL])
def test_a_spike_is_scaled_down_to_what_is_usual(seen, size):
    """Spikes of 50 times the usual norm at updates 6, 20 and 21: the first is before anything is known to be usual."""
    stepper = Stepper(factors(), OptimConfig(clip_factor=2.0))
    spikes = {5: 50.0, 19: 50.0, 20: 50.0}
    update(stepper, [size * spikes.get(i, 1.0) for i in range(24)])
    usual = (64 * 128 + 64) ** 0.5 * 1.25**0.5 * size  # of numbers with a mean square of 1 + .25
    expected = [usual * (1 if i not in spikes else 50 if i < 16 else 2) for i in range(24)]
    assert seen == pytest.approx(expected, rel=0.02)
    assert stepper.metrics()["clipped_updates"] == 2
    assert sorted(stepper.norms)[-3:] == pytest.approx([50 * usual] * 3, rel=0.02)  # as they came


def test_a_new_usual_is_learnt(seen):
    """Norms that stay ten times as large are clipped until they are half of the window."""
    stepper = Stepper(factors(), OptimConfig())
    update(stepper, [1.0] * 20 + [10.0] * 40)
    assert stepper.clipped == 20 and seen[-1] == pytest.approx(10 * seen[0], rel=0.05)


def test_what_is_no_norm_is_not_remembered():
    stepper = Stepper(factors(), OptimConfig())
    update(stepper, [1.0] * 16)
    norms = list(stepper.norms)
    update(stepper, [0.0] * 40)
    update(stepper, [math.nan, math.inf])
    assert stepper.norms == norms and stepper.skipped == 2 and stepper.clipped == 0
    update(stepper, [1e-3, 100.0])
    assert stepper.clipped == 1


def test_no_factor_is_no_clipping(seen):
    stepper = Stepper(factors(), OptimConfig(clip_factor=0))
    update(stepper, [1.0] * 20 + [1e4])
    assert seen[-1] == pytest.approx(1e4 * seen[0], rel=0.05) and stepper.clipped == 0


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
def test_a_resumed_run_clips_as_the_uninterrupted_one(tmp_path, kind, eager):
    """Saved after 20 updates, with a spike behind and one ahead."""
    config = OptimConfig(kind=kind, lr=1e-2, ema=0.9)
    sizes = [1.0, 1.1] * 8 + [1.0, 40.0, 0.9, 1.0] + [1.0, 60.0, 1.0, 0.0, 5.0]
    stepper = Stepper(factors(), config)
    update(stepper, sizes[:20])
    tensors, state = stepper.flattened()
    weights = {str(i): p.detach() for i, p in enumerate(stepper.parameters)}
    kept = {"optimizer": state, "counters": stepper.counters()}
    checkpoint.save(tmp_path, 20, {"optimizer": tensors, "weights": weights}, kept, keep=1)
    saved = checkpoint.load_latest(tmp_path)
    update(stepper, sizes[20:])

    assert saved is not None
    resumed = Stepper([saved.tensors["weights"][str(i)].requires_grad_() for i in range(2)], config)
    resumed.restore(saved.tensors["optimizer"], saved.state["optimizer"])
    resumed.restore_counters(saved.state["counters"])
    assert resumed.clipped == 1
    update(resumed, sizes[20:])
    assert all(torch.equal(a, b) for a, b in zip(stepper.parameters, resumed.parameters))
    assert json.dumps(resumed.counters()) == json.dumps(stepper.counters())
    assert resumed.clipped == 3 and resumed.metrics() == stepper.metrics()


def test_sharded_parameters_are_clipped_and_measured_as_whole_ones(tmp_path):
    """As DTensors of one process: sharded, and replicated."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        placements = [Shard(0)], [Replicate()]
        parted = [distribute_tensor(f.detach(), mesh, p).requires_grad_() for f, p in zip(factors(), placements)]
        steppers = [Stepper(parameters, OptimConfig(lr=1e-2)) for parameters in (factors(), parted)]
        for size in [1.0] * 17 + [50.0, 1.0]:
            for stepper in steppers:
                generator = torch.Generator().manual_seed(stepper.updates)
                for parameter in stepper.parameters:
                    gradient = size * torch.randn(parameter.shape, generator=generator)
                    if isinstance(parameter, DTensor):
                        gradient = distribute_tensor(gradient, mesh, parameter.placements)
                    parameter.grad = gradient
                stepper.step()
        whole, parts = steppers
        for a, b in zip(whole.parameters, parts.parameters):
            torch.testing.assert_close(shards.whole(b).detach(), a.detach())
        assert parts.clipped == whole.clipped == 1 and parts.norms == pytest.approx(whole.norms)
        assert parts.metrics() == pytest.approx(whole.metrics())
    finally:
        dist.destroy_process_group()


def test_the_report_draws_what_each_norm_was_held_against():
    stepper = Stepper(factors(), OptimConfig())
    points, clipped = [], []
    for i in range(40):
        before = stepper.clipped
        held = copy.copy(stepper.norms)
        update(stepper, [20.0 if i == 30 else 1.0 + 0.01 * i])
        points.append((i + 1, stepper.norms[-1]))
        clipped.append((stepper.clipped > before, clipping.limit(held, 3.0)))
    (line,) = limits({"optim": {"clip_factor": 3.0}}, {"grad_norm": points})["grad_norm"]
    assert [value for _, value in line.points[:16]] == [None] * 16
    assert [value for _, value in line.points[16:]] == [limit for _, limit in clipped[16:]]
    above = [value > limit for (_, value), (_, limit) in itertools.islice(zip(points, line.points), 16, None)]
    assert above == [was for was, _ in clipped[16:]] and sum(above) == 1
