"""TDM for rectified flow: pure functions of one batch of trajectory points. No config, no printing, no collectives; all
in fp32.

Trajectory Distribution Matching (arXiv:2503.06674) with velocities in place of noise predictions. A student of K steps
walks the times t_0 = 1 > t_1 > ... > t_K = 0. At a point x of its trajectory, at t = t_k, it says v_S, so

    x0 = x - t v_S,  e = x + (1-t) v_S          clean sample and noise that it implies
    x_m = (1-m) x0 + m e                         where it goes on to: m = t_{k+1}, or, before the last step, anywhere
                                                 between the two
    x_tau = a x_m + b z,  m <= tau < t           noised again, a = (1-tau)/(1-m), b^2 = tau^2 - (a m)^2, z fresh
    r = x_tau - tau v_T,  f = x_tau - tau v_F    clean samples that the guided teacher and the fake score see in it

The fake score learns f from the student's own points by flow matching; the student then follows f - r, which is zero
where its points are distributed as the teacher's.

Legend: B samples, N image tokens, C channels. Times are (B,), latents and velocities (B, N, C), errors means over N C.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from posttrain.model import sampler

GAP, FIRST, LAST = 0.02, 0.02, 0.99
"""In the unshifted coordinate: least way of a mid-point from t_k; least and most noise that is put on again."""
BELOW = 0.01
"""How far the noise put on again stays below t_k where each noise level belongs to one segment."""
LEAST_SCALE = 1e-3
HUBER = 1e-3

Target = Literal["reference", "ambient"]
Weight = Literal["uniform", "min_snr"]
Distance = Literal["square", "huber"]


# times


def point_times(
    k: Tensor, steps: Tensor, u_m: Tensor, u_tau: Tensor, mu: float, midpoints: bool, separate: bool
) -> tuple[Tensor, Tensor]:
    """(B,) m and tau of segment k of `steps`, from uniform numbers; both are uniform in the unshifted coordinate.

    `separate` keeps tau below t_k, so that a noise level belongs to one segment and the fake score need not average
    over several; joint lets it go to 0.99.

    The last segment has no mid-points, m = 0: one clean sample cannot have the right distribution at 0 and at all
    points on the way there, since a straight way between two noise levels is wider than the distributions between
    them. The student would settle for images of too little variance.
    """
    # Before the shift the times of a schedule are evenly spaced.
    s, s_next = 1 - k.float() / steps, 1 - (k.float() + 1) / steps
    s_m = s_next + u_m * (s - GAP - s_next) if midpoints else s_next
    s_m = torch.where(k + 1 < steps, s_m, s_next)
    least = s_m.clamp(min=FIRST)
    most = (s - BELOW).clamp(max=LAST) if separate else torch.full_like(s, LAST)
    s_tau = least + u_tau * (most - least)
    return sampler.shift(s_m, mu), sampler.shift(s_tau, mu)


# noise put on again


def renoise_coefficients(m: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) a and b of x_tau = a x_m + b z."""
    a = (1 - tau) / (1 - m)
    # Clamped, as rounding makes it a little less than 0 where tau = m.
    return a, (tau.square() - (a * m).square()).clamp(min=0).sqrt()


def renoise(x_m: Tensor, z: Tensor, m: Tensor, tau: Tensor) -> Tensor:
    """x_tau, of the law that x_m's clean samples have under the noise of tau."""
    a, b = renoise_coefficients(m, tau)
    return _column(a, x_m) * x_m + _column(b, x_m) * z


def total_noise(e: Tensor, z: Tensor, m: Tensor, tau: Tensor) -> Tensor:
    """n with x_tau = (1-tau) x0 + tau n: the student's own noise e and the fresh z together."""
    a, b = renoise_coefficients(m, tau)
    return (_column(a * m, e) * e + _column(b, e) * z) / _column(tau, e)


# the fake score


def importance(z: Tensor, n: Tensor) -> Tensor:
    """(B,) exp((|z|^2 - |n|^2) / 2) with mean squares: the D-th root of how much likelier n is as unit noise than z."""
    return ((_mean_square(z) - _mean_square(n)) / 2).exp()


def fake_weight(tau: Tensor, weight: Weight) -> Tensor:
    """(B,) weight of a velocity error. min_snr is min(SNR, 5) of the clean sample's, which is tau^2 times as large."""
    if weight == "uniform":
        return torch.ones_like(tau)
    return torch.minimum((1 - tau).square(), 5 * tau.square())


def fake_loss(
    v_fake: Tensor,
    x0: Tensor,
    e: Tensor,
    z: Tensor,
    m: Tensor,
    tau: Tensor,
    target: Target,
    weight: Weight,
    clip: tuple[float, float],
) -> tuple[Tensor, dict[str, Tensor]]:
    """(B,) flow-matching loss of the fake score at x_tau; only v_fake carries a gradient. Metrics are (B,) too.

    reference: towards n - x0, weighed by `importance` within `clip`, as the published code does. Since e is not unit
    noise independent of x0, its optimum is not quite the score of the student's points. ambient: towards what x_m alone
    says, whose optimum is; an unbiased guess y of the clean sample is (x_m - (a m^2 / b) z) / (1-m), and errors of
    (x_tau - y) / tau are weighed by (b / tau)^2. Without noise in x_m (m = 0) the two are one.
    """
    x0, e = x0.detach().float(), e.detach().float()
    n = total_noise(e, z, m, tau)
    omega = importance(z, n)
    clipped = omega.clamp(*clip)
    if target == "reference":
        error = clipped * _mean_square(v_fake.float() - sampler.velocity_target(x0, n))
    else:
        # Multiplied out by b, which may be 0.
        x_m = sampler.noised(x0, e, m)
        a, b = renoise_coefficients(m, tau)
        by = (_column(b, x_m) * x_m - _column(a * m.square(), x_m) * z) / _column(1 - m, x_m)
        b_target = (_column(b, x_m) * renoise(x_m, z, m, tau) - by) / _column(tau, x_m)
        error = _mean_square((_column(b, x_m) * v_fake.float() - b_target) / _column(tau, x_m))
    loss = fake_weight(tau, weight) * error
    with torch.no_grad():
        metrics = {"omega": omega, "omega_clipped": (omega != clipped).float(), "fake_loss": loss.detach()}
    return loss, metrics


# the student


def generator_loss(
    x0: Tensor, x_tau: Tensor, v_real: Tensor, v_fake: Tensor, tau: Tensor, distance: Distance
) -> tuple[Tensor, dict[str, Tensor]]:
    """(B,) loss whose gradient on x0 is f - r = tau (v_real - v_fake), over mean |x0 - r|; metrics are (B,) too.

    Only x0 carries a gradient. square: half the squared distance, so that its gradient is that direction itself; huber:
    sqrt(d^2 + c^2) - c, which is nearly its sign.
    """
    with torch.no_grad():
        r = x_tau - _column(tau, x_tau) * v_real.float()
        f = x_tau - _column(tau, x_tau) * v_fake.float()
        scale = (x0 - r).abs().flatten(1).mean(1).clamp(min=LEAST_SCALE)
    # Of the value f - r, with the gradient of x0.
    d = x0 - x0.detach() + (f - r)
    psi = d.square() / 2 if distance == "square" else (d.square() + HUBER**2).sqrt() - HUBER
    loss = psi.flatten(1).mean(1) / scale
    with torch.no_grad():
        gap = (f - r).abs().flatten(1).mean(1)
        metrics = {"generator_loss": loss.detach(), "direction": gap, "scale": scale}
    return loss, metrics


def _mean_square(x: Tensor) -> Tensor:
    return x.square().flatten(1).mean(1)


def _column(t: Tensor, x: Tensor) -> Tensor:
    return t.reshape(-1, *[1] * (x.ndim - 1))
