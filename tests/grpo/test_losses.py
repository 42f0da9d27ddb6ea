"""The clipped objective and the velocity distance, against arithmetic and against autograd of the log-prob."""

import math

import pytest
import torch

from posttrain.grpo.losses import clipped_policy, velocity_kl, weighted_policy
from posttrain.model import sampler


@pytest.mark.parametrize(
    ("ratio", "advantage", "surrogate", "slope"),
    [
        (1.3, 1.0, 1.2, 0.0),  # min(1.3, 1.2): clipped, no gradient
        (1.3, -1.0, -1.3, -1.3),  # min(-1.3, -1.2): the way back is never clipped
        (0.7, 1.0, 0.7, 0.7),  # min(.7, .8)
        (0.7, -1.0, -0.8, 0.0),  # min(-.7, -.8): clipped, no gradient
        (1.0, 2.0, 2.0, 2.0),
    ],
)
def test_surrogate(ratio, advantage, surrogate, slope):
    """Both clips at .2; d (r A) / d log r = r A where it is not clipped."""
    log_ratio = torch.tensor([ratio]).log().requires_grad_()
    loss, _ = clipped_policy(log_ratio, torch.tensor([advantage]), 0.2, 0.2)
    (gradient,) = torch.autograd.grad(loss.sum(), log_ratio)
    assert loss.item() == pytest.approx(-surrogate, abs=1e-6)
    assert gradient.item() == pytest.approx(-slope, abs=1e-6)


def test_clips_of_two_widths():
    log_ratio = torch.tensor([0.85, 1.25]).log()
    loss, _ = clipped_policy(log_ratio, torch.tensor([-1.0, 1.0]), 0.1, 0.3)
    assert loss.tolist() == pytest.approx([0.9, -1.25])  # -min(-.85, -.9) and -min(1.25, 1.25)


def test_truncated_importance_weights():
    """-w A log r, with w = min(r, 1.2) held constant: the gradient by log r is -w A, and in no direction 0."""
    ratio, advantages = torch.tensor([1.3, 1.3, 0.7, 1.0]), torch.tensor([1.0, -1.0, 1.0, 2.0])
    log_ratio = ratio.log().requires_grad_()
    loss, metrics = weighted_policy(log_ratio, advantages, 1.2)
    (gradient,) = torch.autograd.grad(loss.sum(), log_ratio)
    assert gradient.tolist() == pytest.approx([-1.2, 1.2, -0.7, -2.0])
    logs = [math.log(1.3), math.log(1.3), math.log(0.7), 0.0]
    assert loss.tolist() == pytest.approx([-1.2 * logs[0], 1.2 * logs[1], -0.7 * logs[2], 0.0])
    assert metrics["truncated"] == 2 and metrics["ratio"].item() == pytest.approx(4.3)
    assert metrics["log_ratio"].item() == pytest.approx(sum(logs)) and not metrics["ratio"].requires_grad


def test_where_all_ratios_are_one_weights_and_clips_have_one_gradient():
    advantages, gradients = torch.tensor([1.0, -2.0]), []
    for loss in (lambda r: clipped_policy(r, advantages, 0.1, 0.1), lambda r: weighted_policy(r, advantages, 1.0)):
        log_ratio = torch.zeros(2, requires_grad=True)
        gradients.append(torch.autograd.grad(loss(log_ratio)[0].sum(), log_ratio)[0])
    assert torch.equal(*gradients)


def test_metrics_are_sums():
    ratio = torch.tensor([1.3, 1.3, 0.7, 0.7, 1.0])
    _, metrics = clipped_policy(ratio.log(), torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0]), 0.2, 0.2)
    assert metrics["ratio"].item() == pytest.approx(5.0)
    logs = [2 * math.log(1.3) + 2 * math.log(0.7), 2 * math.log(1.3) ** 2 + 2 * math.log(0.7) ** 2]
    assert [metrics[name].item() for name in ("log_ratio", "log_ratio_square")] == pytest.approx(logs)
    assert (metrics["clip_low"], metrics["clip_high"]) == (1, 1)
    assert not any(value.requires_grad for value in metrics.values())


def test_low_precision_is_computed_in_fp32():
    log_ratio = torch.tensor([2e-3, -3e-3], dtype=torch.bfloat16)
    loss, metrics = clipped_policy(log_ratio, torch.tensor([0.5, 2.0], dtype=torch.bfloat16), 0.2, 0.2)
    expected = -log_ratio.double().exp() * torch.tensor([0.5, 2.0]).double()
    assert loss.dtype == torch.float32 and all(value.dtype == torch.float32 for value in metrics.values())
    assert (loss - expected).abs().max() < 1e-6  # bf16 would round exp(.002) to 1

    v, reference = torch.full((2, 3, 4), 1.0, dtype=torch.bfloat16), torch.full((2, 3, 4), 0.5, dtype=torch.bfloat16)
    kl = velocity_kl(v, reference)
    assert kl.dtype == torch.float32 and kl.tolist() == [0.25, 0.25]


@pytest.mark.parametrize("ratio", ["plain", "guard"])
@pytest.mark.parametrize("dynamics", ["flow", "dance", "cps"])
def test_gradient_at_ratio_one(ratio, dynamics):
    """-mean(A grad log p) where nothing has moved yet; GRPO-Guard's ratio has the step's S as a factor."""
    generator = torch.Generator().manual_seed(0)
    x, z = (torch.randn(5, 3, 4, generator=generator) for _ in range(2))
    theta = torch.randn(4, 4, generator=generator).requires_grad_()
    advantages = torch.tensor([1.0, -2.0, 0.5, 0.0, 1.5])
    mean, std = sampler.sde_moments(x, x @ theta, 0.6, 0.5, dynamics, 0.7, 0.95)
    mean_old = mean.detach()
    x_next = mean_old + std * z
    log_prob = sampler.log_prob(x_next, mean, std)
    log_ratio = {
        "plain": log_prob - log_prob.detach(),
        "guard": sampler.guard_log_ratio(x_next, mean_old, mean, std),
    }[ratio]
    assert log_ratio.abs().max() == 0
    loss, metrics = clipped_policy(log_ratio, advantages, 1e-4, 1e-4)
    (gradient,) = torch.autograd.grad(loss.mean(), theta, retain_graph=True)
    (expected,) = torch.autograd.grad(-(advantages * log_prob).mean(), theta)
    factor = std.item() if ratio == "guard" else 1.0
    assert torch.allclose(gradient, factor * expected, rtol=1e-4, atol=1e-6)
    assert gradient.abs().max() > 1e-3
    assert (metrics["clip_low"], metrics["clip_high"], metrics["ratio"]) == (0, 0, 5)


def test_velocity_kl():
    """A mean over tokens and channels, for each sample; its gradient is 2 (v - reference) / D."""
    v = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[0.0, 0.0], [0.0, 2.0]]], requires_grad=True)
    reference = torch.tensor([[[0.0, 2.0], [3.0, 2.0]], [[0.0, 0.0], [0.0, 0.0]]])
    kl = velocity_kl(v, reference)
    assert kl.tolist() == [1.25, 1.0]  # (1 + 4) / 4 and 4 / 4
    (gradient,) = torch.autograd.grad(kl.sum(), v)
    assert torch.equal(gradient, (v.detach() - reference) / 2)
    assert velocity_kl(v, v).tolist() == [0, 0]
