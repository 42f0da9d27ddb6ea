"""TDM's mathematics, against arithmetic done by hand and Gaussians whose scores are known."""

import itertools

import pytest
import torch

from posttrain.model import sampler
from posttrain.tdm import losses as tdm_loss
from posttrain.tdm.losses import fake_loss, fake_weight, generator_loss, importance, point_times, renoise_coefficients

MU = sampler.TURBO_MU
CLIP = (0.2, 5.0)
NO_CLIP = (0.0, float("inf"))


def exact_velocity(x, t, mean, std):
    """Of data N(mean, std^2)."""
    q = (1 - t) ** 2 * std**2 + t**2
    return (t - (1 - t) * std**2) / q * (x - (1 - t) * mean) - mean


def tensor(*values):
    return torch.tensor(values, dtype=torch.float32)


def like(value, count=1):
    """(count, 1, 1) of one value."""
    return torch.full((count, 1, 1), float(value))


# renoising


@pytest.mark.parametrize(
    ("m", "tau", "a", "b"),
    [
        (0.5, 0.8, 0.4, 0.774597),  # .2 / .5; sqrt(.64 - .2^2)
        (0.6, 0.6, 1.0, 0.0),
        (0.0, 0.7, 0.3, 0.7),
    ],
)
def test_renoise(m, tau, a, b):
    got = renoise_coefficients(tensor(m), tensor(tau))
    assert [float(value) for value in got] == pytest.approx([a, b], abs=1e-6)


def test_total_noise_gives_the_same_point():
    """x_tau = a x_m + b z = (1 - tau) x0 + tau n, and a x0 (1-m) is the whole of the clean part."""
    generator = torch.Generator().manual_seed(0)
    x0, e, z = torch.randn(3, 5, 4, 2, generator=generator)
    m, tau = tensor(0, 0.1, 0.4, 0.7, 0.9), tensor(0.3, 0.1, 0.8, 0.9, 0.95)
    x_tau = tdm_loss.renoise(sampler.noised(x0, e, m), z, m, tau)
    n = tdm_loss.total_noise(e, z, m, tau)
    torch.testing.assert_close(x_tau, sampler.noised(x0, n, tau))
    assert n[0].equal(z[0]) and torch.allclose(n[1], e[1], atol=1e-3)  # m = 0: all fresh; tau = m: none


def test_times_of_a_point():
    """Of every segment of 1 to 16 steps: t_{k+1} <= m < t_k, and m <= tau < t_k if levels are separate."""
    for steps, midpoints, separate in itertools.product((1, 2, 4, 8, 16), (True, False), (True, False)):
        grid = sampler.schedule(steps, MU)
        k = torch.arange(steps).repeat_interleave(50)
        u_m, u_tau = torch.rand(2, len(k), generator=torch.Generator().manual_seed(steps))
        u_m[::50], u_m[1::50], u_tau[::50], u_tau[1::50] = 0, 1, 0, 1
        m, tau = point_times(k, torch.full_like(k, steps), u_m, u_tau, MU, midpoints, separate)
        assert (m >= grid[k + 1] - 1e-6).all() and (m < grid[k]).all() and (m <= tau + 1e-6).all()
        assert (tau >= sampler.shift(tensor(0.02), MU) - 1e-6).all()
        assert tau.max() == pytest.approx(float(sampler.shift(tensor(0.99), MU)), abs=1e-5)
        if separate:
            assert (tau < grid[k]).all()
        elif steps > 1:
            assert (tau > grid[k]).any()
        last = k == steps - 1
        assert not m[last].any()
        if not midpoints:
            torch.testing.assert_close(m, grid[k + 1])
        elif steps > 1:
            assert (m > grid[k + 1])[~last].float().mean() > 0.9


def test_times_are_uniform_before_the_shift():
    """K = 4, k = 1: s_m from .5 to .73, s_tau from s_m to .74; halfway .615 and .6775."""
    m, tau = point_times(torch.tensor([1]), torch.tensor([4]), tensor(0.5), tensor(0.5), MU, True, True)
    assert m.item() == pytest.approx(float(sampler.shift(tensor(0.615), MU)), abs=1e-6)
    assert tau.item() == pytest.approx(float(sampler.shift(tensor(0.6775), MU)), abs=1e-6)


# the fake score's loss


def test_importance():
    """|n|^2 = 1, |z|^2 = 0: exp(-1/2) = .606531."""
    assert importance(torch.zeros(1, 8, 2), torch.ones(1, 8, 2)).item() == pytest.approx(0.606531, abs=1e-6)
    assert importance(torch.ones(1, 8, 2), torch.ones(1, 8, 2)).item() == 1


def test_weights():
    """The two cross where 1 - tau = sqrt(5) tau: tau = 1 / (1 + sqrt(5)) = .309017."""
    crossing = 1 / (1 + 5**0.5)
    assert crossing == pytest.approx(0.309017, abs=1e-6)
    below, at, above = fake_weight(tensor(0.2, crossing, 0.6), "min_snr").tolist()
    assert (below, above) == pytest.approx((5 * 0.04, 0.16)) and at == pytest.approx(0.477458, abs=1e-6)
    assert fake_weight(tensor(0.2, 0.9), "uniform").tolist() == [1, 1]
    # An error of v is tau times as large in the clean sample, so min(SNR, 5) on that is min(SNR, 5) tau^2 here.
    x, v, error = torch.randn(3, 1, 4, 2, generator=torch.Generator().manual_seed(0))
    x0_error = sampler.x0_eps(x, v + error, 0.6)[0] - sampler.x0_eps(x, v, 0.6)[0]
    torch.testing.assert_close(x0_error.square().mean(), 0.36 * error.square().mean())
    assert min((0.4 / 0.6) ** 2, 5) * 0.36 == pytest.approx(above)


def test_fake_loss_by_hand():
    """x0 = 2, e = 1, z = -1, m = .5, tau = .8: n = (.2 - .774597) / .8 = -.718246, target n - x0 = -2.718246;
    weight exp((1 - .515877) / 2) = 1.273872."""
    m, tau = tensor(0.5), tensor(0.8)
    v = like(-2).requires_grad_()
    loss, metrics = fake_loss(v, like(2), like(1), like(-1), m, tau, "reference", "uniform", CLIP)
    assert loss.item() == pytest.approx(1.273872 * 0.718246**2, rel=1e-5)
    assert metrics["omega"].item() == pytest.approx(1.273872, rel=1e-5) and metrics["omega_clipped"] == 0
    (gradient,) = torch.autograd.grad(loss.sum(), v)
    assert gradient.item() == pytest.approx(2 * 1.273872 * 0.718246, rel=1e-5)
    capped, metrics = fake_loss(v, like(2), like(1), like(-1), m, tau, "reference", "min_snr", (0.2, 1.1))
    assert capped.item() == pytest.approx(0.04 * 1.1 * 0.718246**2, rel=1e-5) and metrics["omega_clipped"] == 1


def test_ambient_target_by_hand():
    """The same point: x_m = 1.5, x_tau = .6 - .774597 = -.174597, y = (1.5 + .1 / .774597) / .5 = 3.258199,
    target (x_tau - y) / tau = -4.290995, weight .6 / .64 = .9375."""
    m, tau = tensor(0.5), tensor(0.8)
    loss, _ = fake_loss(like(-4), like(2), like(1), like(-1), m, tau, "ambient", "uniform", CLIP)
    assert loss.item() == pytest.approx(0.9375 * 0.290995**2, rel=1e-4)
    # b = 0: the weight takes away what the target has too much, and what is left is finite and no teacher.
    at_m, _ = fake_loss(like(-4), like(2), like(1), like(-1), m, m, "ambient", "uniform", CLIP)
    assert at_m.isfinite().all()


def test_targets_coincide_without_noise_in_x_m():
    generator = torch.Generator().manual_seed(1)
    v, x0, e, z = torch.randn(4, 6, 4, 2, generator=generator)
    tau = torch.rand(6, generator=generator) * 0.9 + 0.05
    for weight in ("uniform", "min_snr"):
        losses = [
            fake_loss(v, x0, e, z, torch.zeros(6), tau, kind, weight, CLIP)[0] for kind in ("reference", "ambient")
        ]
        torch.testing.assert_close(*losses)


def test_only_the_fake_score_learns_from_its_loss():
    x0, e = (torch.randn(2, 3, 2).requires_grad_() for _ in range(2))
    v = torch.randn(2, 3, 2).requires_grad_()
    z, m, tau = torch.randn(2, 3, 2), tensor(0.3, 0.5), tensor(0.6, 0.7)
    for target in ("reference", "ambient"):
        loss, metrics = fake_loss(v, x0, e, z, m, tau, target, "uniform", CLIP)
        grads = torch.autograd.grad(loss.sum(), [v, x0, e], allow_unused=True)
        assert grads[0].abs().sum() > 0 and grads[1] is grads[2] is None
        assert not any(value.requires_grad for value in metrics.values())


# the student's loss


def generated(x0, x_tau, v_real, v_fake, tau, distance: tdm_loss.Distance = "square"):
    x0 = x0.clone().requires_grad_()
    loss, metrics = generator_loss(x0, x_tau, v_real, v_fake, tau, distance)
    (gradient,) = torch.autograd.grad(loss.sum(), x0)
    return gradient, loss, metrics


def test_direction():
    """tau = .8, s_T = 4.5, c - u = .2, fake = c: f - r = .8 x 4.5 x .2 = .72; x0 - r is that of x0 = 1, x_tau = 1,
    c = 0: r = 1 - .8 x .9 = .28, so the gradient is .72 / .72 = 1 over the number of elements."""
    c, u = torch.zeros(1, 3, 2), torch.full((1, 3, 2), -0.2)
    gradient, loss, metrics = generated(
        torch.ones(1, 3, 2), torch.ones(1, 3, 2), sampler.guide(c, u, 4.5), c, tensor(0.8)
    )
    assert metrics["direction"].item() == pytest.approx(0.72, abs=1e-6)
    assert metrics["scale"].item() == pytest.approx(0.72, abs=1e-6)
    torch.testing.assert_close(gradient, torch.full((1, 3, 2), 1 / 6))
    assert loss.item() == pytest.approx(0.72**2 / 2 / 0.72)


def test_no_gradient_where_fake_and_teacher_agree():
    x0, x_tau, v = torch.randn(3, 2, 4, 3, generator=torch.Generator().manual_seed(2))
    for distance in ("square", "huber"):
        gradient, loss, metrics = generated(x0, x_tau, v, v.clone(), tensor(0.4, 0.9), distance)
        assert not gradient.any() and not loss.any() and not metrics["direction"].any()


def test_scale_has_a_floor():
    """x0 = r: the direction .5 x .1 is divided by .001, not by 0."""
    x_tau, v = like(1), like(0)
    gradient, _, metrics = generated(like(1), x_tau, v, like(-0.1), tensor(0.5))
    assert metrics["scale"].item() == pytest.approx(1e-3) and gradient.item() == pytest.approx(0.05 / 1e-3)


def test_huber_is_nearly_the_sign():
    """d / sqrt(d^2 + c^2) with d = .05 and c = .001: .99980."""
    gradient, loss, metrics = generated(like(1), like(0), like(0), like(-0.1), tensor(0.5), "huber")
    assert gradient.item() == pytest.approx(0.99980 / metrics["scale"].item(), rel=1e-4)
    assert loss.item() == pytest.approx(((0.05**2 + 1e-6) ** 0.5 - 1e-3) / metrics["scale"].item(), rel=1e-4)


def test_gradient_goes_through_x0_alone():
    x_tau, v_real, v_fake = (torch.randn(2, 3, 2).requires_grad_() for _ in range(3))
    x0 = torch.randn(2, 3, 2).requires_grad_()
    loss, _ = generator_loss(x0, x_tau, v_real, v_fake, tensor(0.4, 0.6), "square")
    grads = torch.autograd.grad(loss.sum(), [x0, x_tau, v_real, v_fake], allow_unused=True)
    assert grads[0].abs().sum() > 0 and grads[1] is grads[2] is grads[3] is None


def test_gap_of_two_gaussians():
    """E[f - r] = (m_S - m_T) tau^2 / q for equal std: gap 1, std 1, tau = .5: .25 / .5 = .5."""
    x_tau = torch.randn(1000, 1, 1, generator=torch.Generator().manual_seed(3))
    v_real, v_fake = (exact_velocity(x_tau, 0.5, mean, 1.0) for mean in (0.0, 1.0))
    gradient, _, metrics = generated(torch.zeros(1000, 1, 1), x_tau, v_real, v_fake, torch.full((1000,), 0.5))
    assert metrics["direction"].mean().item() == pytest.approx(0.5, abs=1e-5)
    torch.testing.assert_close(gradient.flatten() * metrics["scale"], torch.full((1000,), 0.5))


def test_step_anchored_at_x_m():
    """dx_m / dv = -(t - m), dx0 / dv = -t: which of them is pulled changes a sample's scale alone."""
    x, v, t, m = torch.randn(1, 2, 2), torch.randn(1, 2, 2).requires_grad_(), 0.8, 0.3
    x0, e = sampler.x0_eps(x, v, t)
    pull = torch.randn(1, 2, 2)
    (by_x0,) = torch.autograd.grad((x0 * pull).sum(), v, retain_graph=True)
    (by_x_m,) = torch.autograd.grad((sampler.noised(x0, e, m) * pull).sum(), v)
    torch.testing.assert_close(by_x_m, by_x0 * (t - m) / t)
