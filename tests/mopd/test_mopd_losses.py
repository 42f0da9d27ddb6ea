"""MOPD's loss, weights and retention: numbers worked out by hand."""

import numpy as np
import pytest
import torch

from posttrain.model import sampler
from posttrain.mopd import losses
from posttrain.mopd.retention import retention


def test_weight_of_a_stochastic_step_is_that_of_its_kl():
    """t = .5, d = .1, eta = .7: Flow-OPD's (d/2) (s (1-t) / 2t + 1 / s)^2 with s^2 = eta^2 t / (1-t) is C^2 / 2 S^2."""
    s = 0.7
    assert 0.05 * (s / 2 + 1 / s) ** 2 == pytest.approx(0.158166, abs=1e-6)
    found = losses.weights(torch.tensor([0.9, 0.5, 0.4, 0.0]), "kl", 0.7)
    assert found[1].item() == pytest.approx(0.158166, abs=1e-6) and found[2] == 0
    # The KL of two Gaussians of one variance is |difference of means|^2 / 2 S^2.
    x, v, target = torch.randn(3, 1, 4, 8)
    t, t_next, first = torch.tensor([0.5, 0.4, 0.9])
    mean, std = sampler.sde_moments(x, v, t, t_next, "flow", 0.7, first)
    other, _ = sampler.sde_moments(x, target, t, t_next, "flow", 0.7, first)
    kl = (mean - other).square().mean() / (2 * std**2)
    assert kl.item() == pytest.approx(0.158166 * (v - target).square().mean().item(), rel=1e-4)


def test_weights_of_a_schedule():
    """Turbo's shift, eight steps: both others than `velocity` train late steps almost alone."""
    times = sampler.schedule(8, 1.15)
    expected = [0.0019, 0.0037, 0.0107, 0.0243, 0.0526, 0.1183, 0.3034, 0.0]
    assert losses.weights(times, "kl", 0.7).tolist() == pytest.approx(expected, abs=1e-4)
    mean = losses.weights(times, "mean", 0.7)
    assert mean.min().item() == pytest.approx(0.0009, abs=1e-4) and mean.max().item() == pytest.approx(0.048, abs=1e-3)
    assert losses.weights(times, "velocity", 0.7).tolist() == [1.0] * 8


def test_the_target_is_the_guided_velocity():
    """s = 1.5, c = 2, u = 1: 3.5. A student that is the teacher without guidance is s^2 |c - u|^2 away; at s = 0 loss
    and gradient are 0."""
    c, u = torch.full((1, 2, 2), 2.0), torch.full((1, 2, 2), 1.0)
    assert sampler.guide(c, u, 1.5).unique().tolist() == [3.5]
    apart = losses.distance(c, sampler.guide(c, c - 0.2, 1.5))
    assert apart.item() == pytest.approx((1.5 * 0.2) ** 2, rel=1e-5) and pytest.approx(0.09) == (1.5 * 0.2) ** 2
    v = c.clone().requires_grad_()
    loss = losses.distance(v, sampler.guide(c, u, 0.0))
    loss.sum().backward()
    assert v.grad is not None and loss.item() == 0 and v.grad.abs().max() == 0


@pytest.mark.parametrize(("shares", "floor"), [((0.5, 0.5), 1.0), ((0.75, 0.25), 0.75)])
def test_two_teachers_on_one_prompt_have_a_floor(shares, floor):
    """Teachers +1 and -1: the least of sum a_k |v - v_k|^2 is sum a_k |v_k - mean|^2. Routing is hard for this."""
    v = torch.linspace(-1, 1, 20_001, dtype=torch.float64).view(-1, 1, 1)
    total = sum(a * losses.distance(v, torch.full_like(v, sign)) for a, sign in zip(shares, (1.0, -1.0)))
    assert torch.as_tensor(total).min().item() == pytest.approx(floor, abs=1e-6)


@pytest.mark.parametrize(("reference", "kept"), [(0.05, 0.9524), (0.25, 0.8)])
def test_what_the_reference_leaves_of_a_gain(reference, kept):
    """The optimum of |v - 1|^2 + l |v|^2 is 1 / (1 + l)."""
    v = torch.linspace(0, 1, 100_001, dtype=torch.float64).view(-1, 1, 1)
    loss = losses.distance(v, torch.ones_like(v)) + reference * losses.distance(v, torch.zeros_like(v))
    assert v[loss.argmin()].item() == pytest.approx(kept, abs=1e-4)


def test_teachers_count_alike_whatever_their_shares():
    """8 rows of 1 and 24 of 2: 1.5, not 1.75."""
    loss = 8 * 1.0 * losses.row_weight(8, 2) + 24 * 2.0 * losses.row_weight(24, 2)
    assert loss == pytest.approx(1.5)


def test_cosines_of_gradients():
    found = losses.cosines({"a": torch.tensor([1.0, 0]), "b": torch.tensor([1.0, 1]), "c": torch.zeros(2)})
    assert found == pytest.approx({"a/b": 0.5**0.5, "a/c": 0.0, "b/c": 0.0})


def test_retention_of_a_gain():
    """Base .4, teacher .8: a student at .7 keeps three quarters; the interval is that of the prompts."""
    rng = np.random.default_rng(0)
    base = rng.uniform(0.2, 0.6, 40).tolist()
    teacher = [value + 0.4 for value in base]
    kept = retention(base, teacher, [value + 0.3 for value in base], 0)
    assert kept is not None and (kept.value, kept.low, kept.high) == pytest.approx((0.75, 0.75, 0.75))
    noisy = [value + 0.3 + float(rng.normal(0, 0.2)) for value in base]
    kept = retention(base, teacher, noisy, 0)
    assert kept is not None and kept.low < kept.value < kept.high
    # The interval's half width is about two standard errors of the student's gain, over the teacher's.
    error = np.std(np.subtract(noisy, base), ddof=1) / 40**0.5 / 0.4
    assert (kept.high - kept.low) / 2 == pytest.approx(1.96 * error, rel=0.15)
    assert retention(base, teacher, noisy, 0) == kept


def test_there_is_no_retention_of_a_gain_that_may_be_chance():
    """Under three standard errors of the teacher's gain, at a loss, or without scores."""
    base, gain = [0.5] * 16, [0.1 + 0.2 * (-1) ** i for i in range(16)]  # mean .1, standard error .052
    assert retention(base, [0.5 + g for g in gain], base, 0) is None
    assert retention(base, [0.4] * 16, base, 0) is None
    assert retention([None] * 16, base, base, 0) is None and retention([0.1], [0.2], [0.2], 0) is None
    missing = [None, *[0.9] * 15]
    kept = retention(base, missing, [0.7] * 16, 0)
    assert kept is not None and kept.value == pytest.approx(0.5)
