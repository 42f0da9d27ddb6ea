"""NFT's and AWM's losses: numbers worked out by hand, and what each formula says about optimum and gradient.

In float64 where an identity is tested; the losses take whatever they are given.
"""

import math

import pytest
import torch

from posttrain.nft import losses
from posttrain.nft.config import OldConfig
from posttrain.nft.update import decay


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def one(*values: float) -> torch.Tensor:
    """One sample of one token, in float64."""
    return torch.tensor(values, dtype=torch.float64).view(1, 1, -1)


def row(value: float) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.float64)


def gradient(v: torch.Tensor, v_old: torch.Tensor, u, t, advantage, most, beta=1.0):
    """The loss of one sample and its gradient to the velocity."""
    v = v.clone().requires_grad_()
    loss = losses.nft_loss(v, v_old, u, row(t), row(advantage), most, beta)
    loss.sum().backward()
    assert v.grad is not None
    return loss.item(), v.grad.flatten().tolist()


@pytest.mark.parametrize(("beta", "r"), [(1.0, 0.9), (0.1, 0.3)])
def test_positive_and_negative_errors_are_one_square(beta, r):
    """r |e + b d|^2 + (1-r) |e - b d|^2 = |e|^2 + b^2 |d|^2 + 2 b (2r-1) <e, d>."""
    e, d = torch.randn(2, 50, dtype=torch.float64)
    both = r * (e + beta * d).square().mean() + (1 - r) * (e - beta * d).square().mean()
    apart = e.square().mean() + beta**2 * d.square().mean() + 2 * beta * (2 * r - 1) * (e * d).mean()
    assert both.item() == pytest.approx(apart.item(), abs=1e-12)


def test_the_error_is_that_of_the_clean_image():
    """|x0_hat - x0|^2 / mean |x0_hat - x0| = t |v - u|^2 / mean |v - u|: the published code's form, from velocities."""
    x0, eps, v = torch.randn(3, 1, 50, 1, dtype=torch.float64)
    t, u = row(0.7), eps - x0
    clean = (1 - 0.7) * x0 + 0.7 * eps - 0.7 * v - x0
    expected = clean.square().mean() / clean.abs().mean()
    assert losses._clean_error(v, u, t).item() == pytest.approx(expected.item(), abs=1e-12)


V, U = one(0.3, -0.2, 0.8, 0.1), one(0.1, 0.4, 0.2, -0.3)


@pytest.mark.parametrize(
    ("advantage", "most", "value", "expected"),
    [
        # w = t / mean |e| = .6 / .45 for e = (.2, -.6, .6, .4): gradient 2 A w e / 4; value A_m / beta * w * mean e^2.
        (1.5, 5.0, 15.3333, (0.2, -0.6, 0.6, 0.4)),
        (1.5, 2.0, 6.1333, (0.2, -0.6, 0.6, 0.4)),
        (-0.4, 5.0, 15.3333, (-0.0533, 0.16, -0.16, -0.1067)),
    ],
)
def test_gradient_where_the_policy_is_the_old_one(advantage, most, value, expected):
    """It is that of the advantage, whatever the largest one and beta are; the value does not know the reward at all."""
    loss, found = gradient(V, V, U, 0.6, advantage, most, beta=0.1)
    assert loss == pytest.approx(value, abs=1e-4)
    assert found == pytest.approx(expected, abs=1e-4)
    assert gradient(V, V, U, 0.6, advantage, most, beta=1.0)[1] == pytest.approx(found, abs=1e-12)
    assert gradient(V, V, U, 0.6, advantage, 2 * most)[1] == pytest.approx(found, abs=1e-12)


def test_optimality_of_advantages():
    """Those of 2 prompts, 3 rewards (tests/training/test_advantages.py); 1 would clip a third of a Gaussian."""
    advantages = torch.tensor([0.4782, -0.4782, 1.1273, -1.1273])
    assert losses.optimality(advantages, 5.0).tolist() == pytest.approx([0.5478, 0.4522, 0.6127, 0.3873], abs=1e-4)
    assert losses.optimality(advantages, 1.0).tolist() == pytest.approx([0.7391, 0.2609, 1, 0], abs=1e-4)
    beyond = 1 - math.erf(1 / math.sqrt(2))
    assert beyond == pytest.approx(0.3173, abs=1e-4)


@pytest.mark.parametrize(("beta", "best"), [(1.0, -0.4), (0.1, -4.0)])
def test_beta_is_a_trust_region(beta, best):
    """e = .5, r = .9, without normalisers: d* = -(2r-1) e / beta. With those detached at d = 0 it is the same."""
    d = torch.linspace(-6, 6, 120_001, dtype=torch.float64)
    plain = 0.9 * (0.5 + beta * d).square() + 0.1 * (0.5 - beta * d).square()
    assert d[plain.argmin()].item() == pytest.approx(best, abs=1e-3)


@pytest.mark.parametrize(("anchor", "best"), [(1.5, 1.0), (3.0, 0.25)])
def test_awm_of_a_bad_image_has_a_minimum_if_its_anchor_is_larger(anchor, best):
    """A = -1, e = .5: d* = e / (anchor - 1). The gradient at d = 0 is NFT's."""
    e, d = 0.5, torch.linspace(-3, 3, 60_001, dtype=torch.float64)
    v_old, u = torch.zeros(len(d), 1, 1, dtype=torch.float64), torch.full((len(d), 1, 1), -e, dtype=torch.float64)
    t, advantages = torch.full((len(d),), 0.6, dtype=torch.float64), torch.full((len(d),), -1.0, dtype=torch.float64)
    loss = losses.awm_loss(d.view(-1, 1, 1), v_old, u, t, advantages, anchor)
    assert d[loss.argmin()].item() == pytest.approx(best, abs=1e-3)
    concave = losses.awm_loss(d.view(-1, 1, 1), v_old, u, t, advantages, 0.5)
    assert concave.argmin().item() in (0, len(d) - 1)  # curvature -.5: no minimum inside
    for advantage in (1.5, -0.4):
        v = V.clone().requires_grad_()
        losses.awm_loss(v, V, U, row(0.6), row(advantage), anchor).sum().backward()
        assert v.grad is not None
        assert v.grad.flatten().tolist() == pytest.approx(gradient(V, V, U, 0.6, advantage, 5.0)[1], abs=1e-12)


@pytest.mark.parametrize(("posterior", "beta", "best"), [(0.5, 1, 1.0), (0.9, 1, 1.16), (0.9, 2, 0.98)])
def test_two_modes_of_which_one_is_good(posterior, beta, best):
    """Clean images +1 (r = 1, of this posterior) and -1 (r = 0): the optimum of the plain loss is 2p - 1 + 4 p (1-p) /
    beta, beyond the good mode for beta = 1 where its posterior is above a half. Found on a grid."""
    old = 2 * posterior - 1
    x = torch.linspace(-2, 2, 400_001, dtype=torch.float64)
    plus, minus = old + beta * (x - old), old - beta * (x - old)
    loss = posterior * (plus - 1).square() + (1 - posterior) * (minus + 1).square()
    assert x[loss.argmin()].item() == pytest.approx(best, abs=1e-4)


def test_schedule_of_the_old_policy():
    published = OldConfig(0, 0.001, 0.5)
    assert [decay(published, i) for i in (0, 1, 100, 500, 900)] == pytest.approx([0, 0.001, 0.1, 0.5, 0.5])
    ocr = OldConfig(75, 0.0075, 0.999)
    assert [decay(ocr, i) for i in (75, 100, 200, 300)] == pytest.approx([0, 0.1875, 0.9375, 0.999])
    assert [d / (1 - d) for d in (0.5, 0.9)] == pytest.approx([1, 9])  # updates that it is behind
    assert decay(OldConfig(max=0), 1000) == 0


def test_without_lag_a_second_forward_says_nothing_new():
    """The gradient with the policy's own velocity, detached, is that with a second forward to the bit."""

    def velocity(theta: torch.Tensor) -> torch.Tensor:
        return torch.sin(theta * torch.tensor([0.2, -0.4, 1.1])).view(1, 1, 3)

    u, found = torch.tensor([0.5, 0.1, -0.3]).view(1, 1, 3), {}
    for beta in (1.0, 0.1):
        for again in (False, True):
            theta = torch.tensor(0.7, requires_grad=True)
            v = velocity(theta)
            v_old = velocity(theta.detach()) if again else v.detach()
            losses.nft_loss(v, v_old, u, torch.tensor([0.4]), torch.tensor([3.0]), 5.0, beta).sum().backward()
            assert theta.grad is not None
            found[beta, again] = theta.grad.item()
    assert found[1.0, False] == found[1.0, True] and found[0.1, False] == found[0.1, True]
    assert found[1.0, False] == pytest.approx(found[0.1, False], rel=1e-5)


def test_metrics_tell_the_signs_of_advantages_apart():
    """A step along -e for a good image and along e for a bad one."""
    e = torch.ones(2, 1, 4)
    v_old, d = torch.zeros(2, 1, 4), torch.tensor([-0.5, 0.25]).view(2, 1, 1).expand(2, 1, 4)
    found = losses.measured(v_old + d, v_old, v_old - e, torch.tensor([1.0, -1.0]))
    assert found["toward_better"].tolist() == [-0.5, 0] and found["toward_worse"].tolist() == [0, 0.25]
    assert found["old_distance"].tolist() == [0.25, 0.0625]
    assert found["velocity_error"].tolist() == [0.25, 1.5625]
    assert set(losses.measured(v_old + d, None, v_old - e, torch.ones(2))) == {"velocity_error"}


def test_the_bias_of_few_steps_cancels_in_a_group():
    """E[e] is not 0 for images of few steps. A group's advantages sum to 0, so with equal weights (here |e| has one
    mean with the bias and without) its mean takes no part in the gradient."""
    advantages = torch.tensor([1.2, -0.3, -0.5, -0.4], dtype=torch.float64)
    signs = torch.stack([torch.randperm(6) for _ in advantages]).double().sub(2.5).sign()  # half of each are -1
    found = []
    for bias in (0.0, 0.2):
        v = torch.zeros(6, dtype=torch.float64, requires_grad=True)
        both, u = v.expand(4, 1, 6), -(signs + bias).view(4, 1, 6)
        losses.nft_loss(both, both.detach(), u, torch.full((4,), 0.5), advantages, 5.0, 1.0).sum().backward()
        assert v.grad is not None
        found.append(v.grad)
    assert found[0].abs().max() > 0.1
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-12)
