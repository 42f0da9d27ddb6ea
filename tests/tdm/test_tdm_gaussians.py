"""TDM on Gaussians, where its fixed points are known: what the fake score's loss teaches, where the student ends."""

import itertools

import numpy as np
import pytest
import scipy
import torch

from posttrain.model import sampler
from posttrain.tdm import losses as tdm_loss
from posttrain.tdm.losses import fake_loss, generator_loss, point_times, renoise_coefficients
from tests.tdm.test_tdm_loss import CLIP, MU, NO_CLIP, exact_velocity

# Gaussians: what the fake score's loss makes of a student that scales its input


def quadrature(count=81):
    """Nodes and weights for means over a unit normal."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(count)
    return torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())


def learnt_slope(x0, e, z, p, m, tau, target, power=1.0):
    """Slope of the best linear f at x_tau, weighed as the loss weighs: f = x_tau - tau v, v = g x_tau.

    The loss is quadratic in g, so three values of it give its minimum. All are (n,), p the points' probabilities.
    """
    m, tau_B = (torch.full((len(x0),), value, dtype=torch.float64) for value in (m, tau))
    x0, e, z = (value[:, None, None] for value in (x0, e, z))
    x_tau = tdm_loss.renoise(sampler.noised(x0, e, m), z, m, tau_B).double()
    values = []
    for g in (-1.0, 0.0, 1.0):
        loss, _ = fake_loss(g * x_tau, x0, e, z, m, tau_B, target, "uniform", NO_CLIP)
        values.append(float((loss.double() * p).sum()))
    low, mid, high = values
    g = (low - high) / (2 * (low + high - 2 * mid))
    return 1 - tau * g


def student_points(c, t, m, p_nodes):
    """A student that turns x ~ N(0, q_t) into x_m = c x; and z. (n,) x0, e, z and their probabilities."""
    nodes, weights = p_nodes
    x = nodes[:, None] * ((1 - t) ** 2 + t**2) ** 0.5
    v = (c * x - x) / (m - t)
    x0, e = (value.expand(-1, len(nodes)).flatten() for value in (x - t * v, x + (1 - t) * v))
    z = nodes[None].expand(len(nodes), -1).flatten()
    return x0, e, z, (weights[:, None] * weights[None]).flatten()


def fixed_point(target, tau, nodes, t=0.9, m=0.8):
    """var(x_m) of the student whose fake score is the teacher's at tau, for unit Gaussian data, by bisection."""
    teacher = (1 - tau) / ((1 - tau) ** 2 + tau**2)
    low, high = 0.85, 1.1
    for _ in range(40):
        c = (low + high) / 2
        x0, e, z, p = student_points(c, t, m, nodes)
        if learnt_slope(x0, e, z, p, m, tau, target) < teacher:
            low = c
        else:
            high = c
    return low**2 * ((1 - t) ** 2 + t**2)


def test_fixed_point_of_the_ambient_target():
    """The true variance, (1-m)^2 + m^2 = .68, at any tau; here f sees x_m as it is."""
    for tau in (0.8001, 0.85):
        assert fixed_point("ambient", tau, quadrature(9)) == pytest.approx(0.680, abs=5e-4)


def unweighted(monkeypatch):
    monkeypatch.setattr(tdm_loss, "importance", lambda z, n: torch.ones(len(z), dtype=z.dtype))


def test_fixed_point_of_the_reference_target(monkeypatch):
    """tau -> m: f = x0 at x_m itself, so (t - m/c) / (t - m) = (1-m) / q_m = .294118; c = .8 / .870588 = .918919 and
    c^2 q_t = .844412 x .82 = .6924, without the weight, which is 1 where a sample has many elements."""
    unweighted(monkeypatch)
    assert fixed_point("reference", 0.80001, quadrature(9)) == pytest.approx(0.6924, abs=2e-4)


def test_fixed_point_of_the_full_weight():
    """With one element the weight is the whole ratio: n is unit noise and independent of x0, whose variance then is
    1 = h^2 q_t, h = 1.104315; v = (1-h) x / t, x_m = (1 + .1 x .104315 / .9) x, so .8391."""
    assert fixed_point("reference", 0.95, quadrature(81)) == pytest.approx(0.8391, abs=5e-4)


def test_ambient_slope():
    """x_m ~ N(0, q_m) exactly, whatever made it: the slope of y on x_tau is the teacher's, (1-tau) / q_tau =
    .15 / .745 = .201342 at m = .8, tau = .85."""
    nodes, weights = quadrature(9)
    m, tau = 0.8, 0.85
    x_m = (nodes * 0.68**0.5)[:, None].expand(-1, 9).flatten()
    z = nodes[None].expand(9, -1).flatten()
    p = (weights[:, None] * weights[None]).flatten()
    for split in (0.3, -2.0):  # any x0 and e with that x_m
        x0 = split * x_m
        slope = learnt_slope(x0, (x_m - (1 - m) * x0) / m, z, p, m, tau, "ambient")
        assert slope == pytest.approx(0.201342, abs=1e-5)


# Gaussians: where the student ends


def scaled(alpha, t, m):
    """c with x_m = c x, of a student whose clean sample is x0 = alpha x."""
    return (1 - m) * alpha + m * (1 - (1 - t) * alpha) / t


def pulls(alphas, segments, std, target):
    """The student's gradient on the alpha of each segment: (t, variance of x there, m and tau of its points).

    The fake score is the best one: f - r is regressed on x_tau, on all points of a noise level together, as its loss
    weighs them. Elements are many, so importance weights are 1 and the scale is the same for all samples.
    """
    sums, parts = torch.zeros(2, 201, dtype=torch.float64), []
    for alpha, (t, variance, m, tau) in zip(alphas, segments):
        level = (torch.sigmoid(tau.logit() - MU) * 200).long()  # as finely as the fake score tells levels apart
        a, b = renoise_coefficients(m, tau)
        c = scaled(alpha, t, m)
        teacher = (1 - tau) * std**2 / ((1 - tau) ** 2 * std**2 + tau**2)  # r = teacher x_tau
        square = (a * c) ** 2 * variance + b**2  # of x_tau
        if target == "reference":
            weight, product = torch.ones_like(tau), a * c * alpha * variance  # of x_tau and x0
        else:
            weight, product = (b / tau) ** 2, (a * c**2 * variance - a * m**2) / (1 - m)  # of x_tau and y
        share = weight / len(tau)
        sums[0].index_add_(0, level, share * (product - teacher * square))
        sums[1].index_add_(0, level, share * square)
        scale = ((alpha - teacher * a * c) ** 2 * variance + (teacher * b) ** 2).sqrt()
        parts.append((level, a * c * variance / scale))
    gap = sums[0] / sums[1]  # (f - r) = gap x_tau
    return [float((gap[level] * factor).mean()) for level, factor in parts]


def points_of(steps, k, midpoints, count):
    """m and tau of segment k, evenly."""
    u = (torch.arange(count) + 0.5) / count
    u_m, u_tau = (part.flatten() for part in torch.meshgrid(u, u, indexing="ij"))
    ks = torch.full(u_m.shape, k)
    m, tau = point_times(ks, torch.full_like(ks, steps), u_m, u_tau, MU, midpoints, separate=True)
    return m.double(), tau.double()


def last_with_midpoints(steps, count):
    """Those of the last segment as they once were: m anywhere on the way to 0."""
    u = (torch.arange(count) + 0.5) / count
    u_m, u_tau = (part.flatten() for part in torch.meshgrid(u, u, indexing="ij"))
    s_m = u_m * (1 / steps - tdm_loss.GAP)
    least, most = s_m.clamp(min=tdm_loss.FIRST), min(1 / steps - tdm_loss.BELOW, tdm_loss.LAST)
    m, tau = sampler.shift(s_m, MU), sampler.shift(least + u_tau * (most - least), MU)
    return m.double(), tau.double()


def after(alpha, t, t_next, variance):
    return variance * scaled(alpha, t, t_next) ** 2


def variances(steps, midpoints, target, std, last=None):
    """Variance at the end of each segment over the teacher's there, for data N(0, std^2), once nothing moves any more:
    where each segment's pull is 0, by bisection. `last` may give other points for the last one."""
    variance, found = torch.tensor(1.0, dtype=torch.float64), []
    for k, (t, t_next) in enumerate(itertools.pairwise(sampler.schedule(steps, MU).double())):
        points = last(steps, 48) if last is not None and k == steps - 1 else points_of(steps, k, midpoints, 48)
        low, high = 0.0, 3.0
        for _ in range(40):
            alpha = (low + high) / 2
            (force,) = pulls([alpha], [(t, variance, *points)], std, target)
            low, high = (alpha, high) if force < 0 else (low, alpha)
        variance = after(low, t, t_next, variance)
        found.append(float(variance / ((1 - t_next) ** 2 * std**2 + t_next**2)))
    return found


@pytest.mark.parametrize("target", ["reference", "ambient"])
@pytest.mark.parametrize("midpoints", [True, False])
@pytest.mark.parametrize("steps", [1, 3, 4, 8])
def test_the_student_ends_with_the_teachers_variance(steps, midpoints, target):
    """Within 3 %, whatever the points before: those are up to 6 % off with mid-points, and without them the reference
    target leaves them up to 27 % too wide."""
    for std in (0.5, 1.0):
        *before, last = variances(steps, midpoints, target, std)
        assert last == pytest.approx(1, abs=0.03)
        if midpoints:
            assert before == pytest.approx([1] * (steps - 1), abs=0.065)
        elif target == "ambient":
            assert before == pytest.approx([1] * (steps - 1), abs=1e-3)
        else:
            assert all(1 <= value < 1.27 for value in before)


def test_midpoints_on_the_last_segment_would_narrow_the_end():
    """To .43 and .73 of the teacher's variance in three steps, and to a twentieth and a fifth in one."""
    ends = [variances(steps, True, "reference", std, last_with_midpoints)[-1] for steps in (3, 1) for std in (0.5, 1.0)]
    assert ends == pytest.approx([0.43, 0.73, 0.07, 0.21], abs=0.01)


@pytest.mark.parametrize(("midpoints", "expected"), [(True, [1.35, 0.60]), (False, [1.21, 0.76])])
def test_a_student_of_two_numbers_of_steps_is_right_in_neither(midpoints, expected):
    """8 and 4 steps share four times, at which one alpha serves a short and a long step: too wide in 8, too narrow in
    4. Where all pulls are 0, from the alphas of a student that keeps to the teacher's variances."""
    std, both = 0.5, (8, 4)
    grids = {steps: sampler.schedule(steps, MU).double() for steps in both}
    points = {(steps, k): points_of(steps, k, midpoints, 48) for steps in both for k in range(steps)}
    times, variance = grids[8][:-1].tolist(), {}
    q = [(1 - t) ** 2 * std**2 + t**2 for t in grids[8].tolist()]
    widths = [(b / a) ** 0.5 for a, b in itertools.pairwise(q)]
    first = [(w * t - m) / (t - m) for w, (t, m) in zip(widths, itertools.pairwise(grids[8].tolist()))]

    def forces(alphas):
        alpha, segments = dict(zip(times, alphas)), []
        for steps in both:
            variance[steps] = torch.tensor(1.0, dtype=torch.float64)
            for k, (t, t_next) in enumerate(itertools.pairwise(grids[steps])):
                segments += [(t, variance[steps], *points[steps, k])] * (8 // steps)  # each number as often
                variance[steps] = after(alpha[float(t)], t, t_next, variance[steps])
        total = dict.fromkeys(times, 0.0)
        for (t, *_), force in zip(segments, pulls([alpha[float(t)] for t, *_ in segments], segments, std, "reference")):
            total[float(t)] += force
        return np.array(list(total.values()))

    found = scipy.optimize.least_squares(forces, first, xtol=1e-12, ftol=1e-12, gtol=1e-12)
    assert np.abs(forces(found.x)).max() < 1e-4
    assert [float(variance[steps]) / std**2 for steps in both] == pytest.approx(expected, abs=0.015)


# the whole method on Gaussians


class Knots:
    """A velocity that is linear in x, with coefficients interpolated between knots in the unshifted time."""

    def __init__(self, count, start):
        s = torch.linspace(0, 1, count)
        self.table = start(sampler.shift(s, MU)).requires_grad_()  # (count, 2): slope and offset

    def __call__(self, x, t):
        s = torch.sigmoid(t.logit() - MU).nan_to_num(1.0).clamp(0, 1) * (len(self.table) - 1)
        low = s.floor().long().clamp(max=len(self.table) - 2)
        slope, offset = torch.lerp(self.table[low], self.table[low + 1], (s - low)[:, None])[:, :, None, None].unbind(1)
        return slope * x + offset


def line(mean, std):
    """Slope and offset of the exact velocity at times t."""

    def at(t):
        offset = exact_velocity(torch.zeros_like(t), t, mean, std)
        return torch.stack([exact_velocity(torch.ones_like(t), t, mean, std) - offset, offset], 1)

    return at


@pytest.mark.parametrize(("target", "midpoints"), [("reference", True), ("reference", False), ("ambient", False)])
def test_the_student_becomes_the_guided_teacher(target, midpoints):
    """Conditional N(1, .5^2), unconditional N(.6, .5^2), s = 1: c + s (c - u) is linear in the mean, so the guided
    teacher is that of N(1.4, .5^2). Four steps; the Euler steps it begins with have mean 1 and too small a deviation.
    """
    steps, B, shape = 4, 192, (8, 8)
    generator = torch.Generator().manual_seed(0)
    grid = sampler.schedule(steps, MU)
    student, fake = Knots(steps + 1, line(1.0, 0.5)), Knots(65, line(1.0, 0.5))
    teacher = [Knots(1025, line(mean, 0.5)) for mean in (1.0, 0.6)]

    def trajectory(count):
        xs = [torch.randn(count, *shape, generator=generator)]
        for t, t_next in itertools.pairwise(grid):
            with torch.no_grad():
                xs.append(sampler.ode_step(xs[-1], student(xs[-1], t.expand(count)), t, t_next))
        return xs

    before = trajectory(2000)[-1]
    assert before.mean() == pytest.approx(1.0, abs=0.01) and before.std() < 0.46
    optimisers = [torch.optim.Adam([net.table], lr, (0.0, 0.95)) for net, lr in ((student, 0.01), (fake, 0.05))]
    for i in range(800):
        xs = torch.stack(trajectory(B))
        for role in ("fake", "student") if i >= 20 else ("fake",):
            k = torch.randint(steps, (B,), generator=generator)
            u = torch.rand(2, B, generator=generator)
            m, tau = point_times(k, torch.full_like(k, steps), u[0], u[1], MU, midpoints, separate=True)
            z, x, t = torch.randn(B, *shape, generator=generator), xs[k, torch.arange(B)], grid[k]
            x0, e = sampler.x0_eps(x, student(x, t), t)
            x_tau = tdm_loss.renoise(sampler.noised(x0, e, m), z, m, tau).detach()
            if role == "fake":
                loss, _ = fake_loss(fake(x_tau, tau), x0, e, z, m, tau, target, "uniform", CLIP)  # type: ignore[arg-type]
            else:
                c, u = (net(x_tau, tau) for net in teacher)
                v_real = sampler.guide(c, u, 1.0)
                loss, _ = generator_loss(x0, x_tau, v_real, fake(x_tau, tau), tau, "square")
            optimiser = optimisers[role == "fake"]
            optimiser.param_groups[0]["lr"] = (0.05 if role == "fake" else 0.01) * (1 - i / 800)
            optimiser.zero_grad()
            loss.mean().backward()
            optimiser.step()
    xs = trajectory(2000)
    assert xs[-1].mean() == pytest.approx(1.4, abs=0.02) and xs[-1].std() == pytest.approx(0.5, abs=0.015)
    # On the way there only the ambient target is exact: at t = .512844 a std of sqrt((.487156 x .5)^2 + t^2) = .5677.
    # Mid-points bring the reference target near it too.
    if target == "ambient" or midpoints:
        assert xs[-2].std() == pytest.approx(0.5677, abs=0.015)
    else:
        assert 0.585 < xs[-2].std() < 0.605
