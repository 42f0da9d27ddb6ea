"""The sampler's conventions, against arithmetic done by hand, diffusers' scheduler and torch's distributions.

The worked example: data N(m, s^2) has the exact velocity v*(x, t) below, so every step is affine in x and the
sampler's own functions carry a mean and a standard deviation from noise to data exactly.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from posttrain.model import sampler
from posttrain.model.load import SCHEDULER

DYNAMICS = ["flow", "dance", "cps"]


def exact_velocity(x, t, m, s):
    q = (1 - t) ** 2 * s**2 + t**2
    return (t - (1 - t) * s**2) / q * (x - (1 - t) * m) - m


def tensor(*values):
    return torch.tensor(values, dtype=torch.float32)


# schedule


def test_resolution_mu():
    assert sampler.resolution_mu(64 * 64) == pytest.approx(0.90625)  # 1024 x 1024
    assert sampler.resolution_mu(32 * 32) == pytest.approx(0.58125)
    assert sampler.resolution_mu(128 * 128) == pytest.approx(2.20625)  # not clamped
    assert sampler.resolution_mu(80 * 80) == pytest.approx(sampler.TURBO_MU)


def test_turbo_schedule():
    expected = tensor(1, 0.956724, 0.904531, 0.840349, 0.759511, 0.654567, 0.512844, 0.310901, 0)
    times = sampler.schedule(8, sampler.TURBO_MU)
    assert times.dtype == torch.float32
    assert (times - expected).abs().max() < 1e-6


@pytest.mark.parametrize("steps", [1, 2, 8, 28, 52, 1000])
@pytest.mark.parametrize("mu", [0.479687, 0.58125, 0.90625, 1.15, 2.20625])
def test_schedule_equals_diffusers(steps, mu):
    scheduler = FlowMatchEulerDiscreteScheduler(**SCHEDULER)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    assert (sampler.schedule(steps, mu) - scheduler.sigmas).abs().max() <= 1e-7


def test_a_schedule_has_a_step():
    with pytest.raises(ValueError, match="at least one step, got 0"):
        sampler.schedule(0, 1.15)


def test_shift_adds_mu_to_the_logit():
    s = torch.linspace(0.05, 0.95, 19)
    assert torch.allclose(sampler.shift(s, 0.7).logit(), s.logit() + 0.7, atol=1e-5)
    # The median of a logit-normal time is the shifted 1/2.
    assert sampler.shift(tensor(0.5), 0.90625).item() == pytest.approx(0.712232, abs=1e-6)
    assert sampler.shift(tensor(0.5), 1.15).item() == pytest.approx(0.759511, abs=1e-6)


def test_model_time_rounds_as_asked():
    t = sampler.schedule(8, 1.15)[1]
    assert sampler.model_time(t) == t
    assert sampler.model_time(t, torch.bfloat16).item() == pytest.approx(0.957031, abs=1e-6)
    assert sampler.model_time(0.25).dtype == torch.float32


# guidance and the ODE


def test_guidance_convention():
    assert sampler.guide(tensor(2.0), tensor(1.0), 4.5).item() == 6.5
    assert sampler.guide(tensor(2.0), tensor(1.0), 0.0).item() == 2.0


def test_euler_step_keeps_x0_and_eps():
    x, v = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    x0, eps = sampler.x0_eps(x, v, 0.7)
    assert torch.allclose(v, eps - x0, atol=1e-6)
    assert torch.allclose(x, 0.3 * x0 + 0.7 * eps, atol=1e-6)
    assert torch.allclose(sampler.ode_step(x, v, 0.7, 0.4), 0.6 * x0 + 0.4 * eps, atol=1e-6)


def test_times_may_differ_within_a_batch():
    x, v = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    t, t_next = tensor(0.9, 0.5), tensor(0.6, 0.4)
    together = sampler.sde_moments(x, v, t, t_next, "flow", 0.7, 0.95)
    for i in range(2):
        alone = sampler.sde_moments(x[i : i + 1], v[i : i + 1], t[i], t_next[i], "flow", 0.7, 0.95)
        assert torch.allclose(together[0][i], alone[0][0], atol=1e-6)
        assert torch.allclose(together[1][i], alone[1], atol=1e-7)
    assert torch.allclose(sampler.ode_step(x, v, t, t_next)[1], sampler.ode_step(x[1], v[1], 0.5, 0.4), atol=1e-6)


def test_exact_velocity_of_gaussian_data():
    assert exact_velocity(1.0, 0.5, 1.0, 0.5) == pytest.approx(-0.4)
    assert exact_velocity(1.0, 0.8, 0.0, 1.0) == pytest.approx(0.882353, abs=1e-6)


@pytest.mark.parametrize(("t", "loss"), [(0.5, 0.8), (0.3, 1.176471), (0.8, 0.384615)])
def test_minimum_flow_matching_loss(t, loss):
    """s^2 / q for s = 1/2: Var(eps - x0 given x_t), here by Monte Carlo through x0_eps's own convention."""
    generator = torch.Generator().manual_seed(0)
    x0 = 1 + 0.5 * torch.randn(400_000, 1, generator=generator)
    eps = torch.randn(400_000, 1, generator=generator)
    x = sampler.ode_step(eps, eps - x0, 1.0, t)  # x_t of the straight path
    measured = (exact_velocity(x, t, 1.0, 0.5) - (eps - x0)).square().mean().item()
    assert 0.25 / ((1 - t) ** 2 * 0.25 + t**2) == pytest.approx(loss, abs=1e-6)
    assert measured == pytest.approx(loss, rel=0.01)


# stochastic steps


def final_moments(steps, mu, dynamics, eta, m=1.0, s=0.5):
    """Mean and std after sampling N(m, s^2) from N(0, 1), exactly: each step is x -> a x + b + std z."""
    times = sampler.schedule(steps, mu).double()
    mean, variance = 0.0, 1.0
    probe = torch.tensor([[0.0], [1.0]])
    for i in range(steps):
        t, t_next = times[i].item(), times[i + 1].item()
        v = exact_velocity(probe, t, m, s)
        if dynamics == "ode" or i == steps - 1:
            out, std = sampler.ode_step(probe, v, t, t_next), torch.zeros(())
        else:
            out, std = sampler.sde_moments(probe, v, t, t_next, dynamics, eta, times[1].item())
        b, a = out[0].item(), (out[1] - out[0]).item()
        mean, variance = a * mean + b, a**2 * variance + std.item() ** 2
    return mean, variance**0.5


@pytest.mark.parametrize(
    ("dynamics", "eta", "std_28", "std_1000"),
    [
        ("ode", 0, 0.4568, 0.4987),
        ("flow", 0.7, 0.4760, 0.5000),
        ("dance", 0.3, 0.4611, 0.4989),
        ("cps", 0.7, 0.3861, 0.4231),
    ],
)
def test_final_distribution(dynamics, eta, std_28, std_1000):
    for steps, expected in ((28, std_28), (1000, std_1000)):
        mean, std = final_moments(steps, 0.90625, dynamics, eta)
        assert mean == pytest.approx(1.0, abs=2e-4)
        assert std == pytest.approx(expected, abs=2e-4)


def test_sampled_final_distribution():
    """The same 28 steps, drawn: 100,000 samples of each dynamics land within 3 standard errors of what is exact.

    For a normal sample of n those are std / sqrt(n) of its mean and std / sqrt(2 n) of its standard deviation.
    """
    n, times = 100_000, sampler.schedule(28, 0.90625)
    drawn = {}
    for dynamics, eta in (("ode", 0.0), ("flow", 0.7), ("dance", 0.3), ("cps", 0.7)):
        x = sampler.noise([sampler.seed_for(0)], (n, 1))[0]
        for i, (t, t_next) in enumerate(itertools.pairwise(times)):
            v = exact_velocity(x, t, 1.0, 0.5)
            if dynamics == "ode" or i == 27:
                x = sampler.ode_step(x, v, t, t_next)
            else:
                mean, std = sampler.sde_moments(x, v, t, t_next, dynamics, eta, times[1])
                x = mean + std * sampler.noise([sampler.seed_for(1, i)], (n, 1))[0]
        mean, std = final_moments(28, 0.90625, dynamics, eta)
        drawn[dynamics] = x.std().item()
        assert abs(x.mean().item() - mean) < 3 * std / n**0.5
        assert abs(drawn[dynamics] - std) < 3 * std / (2 * n) ** 0.5
    # Flow- and Dance-SDE have the ODE's spread but for the size of the steps. CPS, 0.386 here, has not in any number.
    assert drawn["ode"] - drawn["cps"] > 0.06
    assert abs(drawn["ode"] - drawn["dance"]) < 0.01 and abs(drawn["ode"] - drawn["flow"]) < 0.03


@pytest.mark.parametrize("dynamics", DYNAMICS)
@pytest.mark.parametrize(("t", "t_next"), [(1.0, 0.95), (0.6, 0.5), (0.3, 0.0)])
def test_no_noise_is_the_ode(dynamics, t, t_next):
    x, v = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    mean, std = sampler.sde_moments(x, v, t, t_next, dynamics, 0.0, 0.95)
    assert std.item() == 0
    assert (mean - sampler.ode_step(x, v, t, t_next)).abs().max() < 1e-6


def test_cps_with_all_noise_renewed():
    x, v = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    mean, std = sampler.sde_moments(x, v, 0.6, 0.5, "cps", 1.0, 0.95)
    assert torch.allclose(mean, 0.5 * sampler.x0_eps(x, v, 0.6)[0], atol=1e-6)
    assert std.item() == pytest.approx(0.5)


@pytest.mark.parametrize("t_first", [0.95, 0.7])
def test_flow_first_step_does_not_depend_on_the_grid(t_first):
    """At t = 1 sigma^2 = eta^2 / (1 - t_first) and delta = 1 - t_first: S = eta, M = Euler - eta^2/2 eps."""
    x, v = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    mean, std = sampler.sde_moments(x, v, 1.0, t_first, "flow", 0.7, t_first)
    assert std.item() == pytest.approx(0.7, abs=1e-6)
    eps = sampler.x0_eps(x, v, 1.0)[1]
    assert torch.allclose(mean - sampler.ode_step(x, v, 1.0, t_first), -0.245 * eps, atol=1e-5)


def test_flow_excess_variance():
    """t = .6, delta = .1, sigma^2 = .3: the step adds (sigma^2 delta^2 / t)(1 + sigma^2 / 4t) too much.

    With x0 = 0 and eps of unit variance, x = t eps: Var(M) + S^2 = t'^2 + the excess.
    """
    eta = (0.3 * (1 - 0.6) / 0.6) ** 0.5
    x = torch.tensor([[0.6]])  # one standard deviation; v = eps - x0 = 1
    mean, std = sampler.sde_moments(x, torch.ones(1, 1), 0.6, 0.5, "flow", eta, 0.95)
    assert (mean.square() + std.square() - 0.5**2).item() == pytest.approx(0.005625, abs=1e-6)


def test_noise_scale_differs_by_step():
    times = sampler.schedule(8, 1.15)
    x = torch.zeros(1, 1)
    stds = [sampler.sde_moments(x, x, times[i], times[i + 1], "flow", 0.7, times[1])[1].item() for i in (0, 6)]
    assert stds == pytest.approx([0.70, 0.32], abs=0.005)


def test_unknown_dynamics():
    with pytest.raises(ValueError, match="flow, dance or cps"):
        sampler.sde_moments(torch.zeros(1, 1), torch.zeros(1, 1), 0.5, 0.4, "sde", 0.7, 0.9)  # type: ignore


# likelihoods


@pytest.mark.parametrize("dynamics", DYNAMICS)
def test_log_prob_is_the_gaussian_density(dynamics):
    x, v, x_next = torch.randn(3, 5, 4), torch.randn(3, 5, 4), torch.randn(3, 5, 4)
    mean, std = sampler.sde_moments(x, v, 0.6, 0.5, dynamics, 0.7, 0.95)
    expected = torch.distributions.Normal(mean.double(), std.double()).log_prob(x_next.double()).flatten(1).mean(1)
    logp = sampler.log_prob(x_next, mean, std)
    assert logp.shape == (3,) and logp.dtype == torch.float32
    assert (logp - expected).abs().max() < 1e-5


def test_trained_steps_need_noise():
    x = torch.zeros(1, 4)
    mean, std = sampler.sde_moments(x, x, 0.3, 0.0, "cps", 0.7, 0.95)
    for function in (
        lambda: sampler.log_prob(x, mean, std),
        lambda: sampler.guard_log_ratio(x, mean, mean, std),
    ):
        with pytest.raises(ValueError, match="standard deviation is 0"):
            function()


def test_kl_coefficient_by_hand():
    # Flow, eta = .7, t = .5, delta = .1: sigma^2 = .49, C = -.1 (1 + .49/2) and the KL factor C^2 / 2 S^2.
    c = sampler.kl_coefficient(0.5, 0.4, "flow", 0.7, 0.95).item()
    assert c == pytest.approx(-0.1245, abs=1e-6)
    assert c**2 / (2 * 0.49 * 0.1) == pytest.approx(0.158166, abs=1e-6)
    assert pytest.approx(0.158166, abs=1e-6) == 0.1 * (1 + 0.49 / 2) ** 2 * 0.5 / (2 * 0.49 * 0.5)
    assert sampler.kl_coefficient(0.6, 0.5, "cps", 0.7, 0.95).item() == pytest.approx(-0.209202, abs=1e-6)


@pytest.mark.parametrize("dynamics", DYNAMICS)
@pytest.mark.parametrize(("t", "t_next"), [(1.0, 0.95), (0.6, 0.5)])
def test_kl_coefficient_is_the_derivative(dynamics, t, t_next):
    x, v = torch.randn(1, 4), torch.randn(1, 4, requires_grad=True)
    mean, _ = sampler.sde_moments(x, v, t, t_next, dynamics, 0.7, 0.95)
    (gradient,) = torch.autograd.grad(mean.sum(), v)
    c = sampler.kl_coefficient(t, t_next, dynamics, 0.7, 0.95)
    assert (gradient - c).abs().max() < 1e-6


def test_guard_weights_by_hand():
    """Eight steps at 1024 x 1024: 1 / delta over its mean over the first seven, 1.63 to .47. Within a window of its
    first two steps a mean of their own would leave 1.08 and .92."""
    times = sampler.schedule(8, sampler.resolution_mu(4096))
    weights = sampler.guard_weights(times, "flow", 0.7)
    assert weights.tolist() == pytest.approx([1.631, 1.388, 1.165, 0.961, 0.777, 0.612, 0.466], abs=1e-3)
    assert weights.mean().item() == pytest.approx(1)
    assert (weights[:2] / weights[:2].mean()).tolist() == pytest.approx([1.08, 0.92], abs=5e-3)
    # dance, from t = 1: C = -delta, so 1 / .054553; at t = .945447: C = -delta (1 + .09 x .054553 / (2 t)).
    dance = sampler.guard_weights(times, "dance", 0.3)
    t, t_next = times[1].item(), times[2].item()
    second = 1 / ((t - t_next) * (1 + 0.09 * (1 - t) / (2 * t)))
    assert (dance[0] / dance[1]).item() == pytest.approx((1 / (1 - t)) / second, rel=1e-5)


@pytest.mark.parametrize("dynamics", DYNAMICS)
def test_guard_weights_level_the_steps(dynamics):
    """Weighted, the guard's log-ratio moves as much with the velocity at any step: its gradient by v is w C z / D. For
    flow all is level but t = 1, by 1 + eta^2/2 = 1.245 of the published 1 / delta."""
    times = sampler.schedule(8, 0.9)
    weights = sampler.guard_weights(times, dynamics, 0.7)
    generator = torch.Generator().manual_seed(0)
    x, v, z = torch.randn(3, 1, 64, generator=generator)
    sensitivity = []
    for weight, t, t_next in zip(weights, times, times[1:]):
        old, std = sampler.sde_moments(x, v, t, t_next, dynamics, 0.7, times[1])
        leaf = v.clone().requires_grad_()
        new, _ = sampler.sde_moments(x, leaf, t, t_next, dynamics, 0.7, times[1])
        (gradient,) = torch.autograd.grad(sampler.guard_log_ratio(old + std * z, old, new, std).sum(), leaf)
        sensitivity.append(weight.item() * gradient.norm().item())
    expected = [sensitivity[1] / (1.245 if dynamics == "flow" else 1.0), *[sensitivity[1]] * 6]
    assert sensitivity == pytest.approx(expected, rel=1e-3)


def test_guard_log_ratio_both_forms():
    """In fp64 the two forms agree to 1e-12; the sampler's fp32 agrees with them to fp32."""
    generator = torch.Generator().manual_seed(1)
    old, difference, z = (torch.randn(2, 50, generator=generator, dtype=torch.float64) for _ in range(3))
    std, new = torch.tensor(0.3, dtype=torch.float64), old + 1e-2 * difference
    x_next = old + std * z
    normal = [torch.distributions.Normal(mean, std).log_prob(x_next).mean(1) for mean in (old, new)]
    long_form = std * (normal[1] - normal[0] + (new - old).square().mean(1) / (2 * std**2))
    short_form = ((x_next - old) * (new - old)).mean(1) / std
    assert (long_form - short_form).abs().max() < 1e-12
    assert (sampler.guard_log_ratio(x_next, old, new, std) - short_form).abs().max() < 1e-7


def test_guard_log_ratio_statistics():
    generator = torch.Generator().manual_seed(2)
    old, difference = torch.randn(1, 16, generator=generator), torch.randn(1, 16, generator=generator)
    x_next = old + 0.3 * torch.randn(200_000, 16, generator=generator)
    ratio = sampler.guard_log_ratio(x_next, old, old + difference, torch.tensor(0.3))
    variance = difference.square().mean().item() / 16
    assert abs(ratio.mean().item()) < 4 * (variance / 200_000) ** 0.5
    assert ratio.var().item() == pytest.approx(variance, rel=0.02)


# noise


def test_noise_depends_on_its_seed_alone():
    seeds = [sampler.seed_for(0, step, 3) for step in range(5)]
    together = sampler.noise(seeds, (4, 2))
    assert together.shape == (5, 4, 2) and together.dtype == torch.float32
    torch.manual_seed(99)
    for i, seed in enumerate(seeds):
        assert torch.equal(sampler.noise([seed], (4, 2))[0], together[i])
    assert abs(together.mean().item()) < 0.5 and together.std().item() == pytest.approx(1, abs=0.3)
    assert sampler.noise([], (4, 2)).shape == (0, 4, 2)


def test_seeds_are_stable_and_apart():
    assert sampler.seed_for(1, 2, 3) == 8149998584550362645
    seeds = {sampler.seed_for(a, b) for a in range(40) for b in range(40)} | {sampler.seed_for(12, 3, 4)}
    assert len(seeds) == 1601 and all(0 <= seed < 2**63 for seed in seeds)
    assert sampler.seed_for(1, 23) != sampler.seed_for(12, 3)


def test_training_times():
    """The median of a logit-normal is shifted with mu: s(.90625) = .712232, s(1.15) = .759511; at one deviation above,
    s(mean + std + mu)."""
    zero = torch.zeros(1)
    assert sampler.logit_normal(zero, 0, 1, 0.90625).item() == pytest.approx(0.712232, abs=1e-6)
    assert sampler.logit_normal(zero, 0, 1, 1.15).item() == pytest.approx(0.759511, abs=1e-6)
    above = sampler.logit_normal(torch.ones(1), 0.5, 2.0, 0.25).item()
    assert above == pytest.approx(1 / (1 + math.exp(-2.75)), abs=1e-6)


def test_the_path_and_its_velocity():
    """The target at x_t, from any t, leads back to x0 and to the noise; a time for each sample."""
    x0, eps = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    t = torch.tensor([0.3, 1.0])
    x = sampler.noised(x0, eps, t)
    back, noise = sampler.x0_eps(x, sampler.velocity_target(x0, eps), t)
    torch.testing.assert_close(back, x0, atol=1e-6, rtol=0)
    torch.testing.assert_close(noise, eps, atol=1e-6, rtol=0)
    assert torch.equal(sampler.noised(x0, eps, 0.0), x0)
