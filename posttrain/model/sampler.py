"""K2's time direction, schedule, guidance and steps: the one place where these conventions live.

Pure functions of tensors. t in [0, 1] and 1 is noise: x_t = (1-t) x0 + t eps, the network predicts the
velocity v = eps - x0, and sampling walks t from 1 down to 0. Latents x are packed, (B, N tokens, C channels),
and every function here computes in fp32 whatever it is given. Times are floats, 0-d tensors or (B,) tensors.

Norms, log-probs and ratios are means over a sample's D = N*C elements, never sums: the exponential of a
difference of two log-probs is the D-th root of the density ratio, and clip ranges are in that unit.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Dynamics = Literal["flow", "dance", "cps"]
Time = float | Tensor

TURBO_MU = 1.15
"""The shift of the distilled checkpoint, whatever the resolution."""
STEPS, GUIDANCE = {True: 8, False: 28}, {True: 0.0, False: 4.5}
"""The published settings, by whether the checkpoint is distilled (Turbo) or not (Raw)."""


# schedule


def shift(s: Tensor, mu: float) -> Tensor:
    """The unshifted coordinate s in [0, 1] as a time: logit t = logit s + mu.

    Written as diffusers' scheduler computes it, so that the grids agree to the last bit; s = 0 gives 0.
    """
    return math.exp(mu) / (math.exp(mu) + (1 / s - 1))


def resolution_mu(
    image_tokens: int,
    base_tokens: int = 256,
    max_tokens: int = 6400,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
) -> float:
    """The Raw checkpoint's shift: linear in the number of image tokens, beyond both ends too."""
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)
    return base_shift + slope * (image_tokens - base_tokens)


def schedule(steps: int, mu: float) -> Tensor:
    """The (steps + 1,) fp32 grid of times from 1 to 0, on the CPU."""
    if steps < 1:
        raise ValueError(f"a schedule needs at least one step, got {steps}")
    # diffusers' grid: numpy makes it in fp64, and it is rounded before the shift.
    s = torch.linspace(1.0, 1.0 / steps, steps, dtype=torch.float64).float()
    return torch.cat([shift(s, mu), torch.zeros(1)])


def model_time(t: Time, dtype: torch.dtype = torch.float32) -> Tensor:
    """The time that the network gets, in fp32.

    Rollout and training must use the same one. The public pipeline rounds t to the latents' dtype: pass bfloat16 to
    reproduce that.
    """
    return torch.as_tensor(t, dtype=torch.float32).to(dtype).float()


def logit_normal(n: Tensor, mean: float, std: float, mu: float) -> Tensor:
    """Times to train at, of standard normal n: logit t = mean + std n, shifted as the schedule is, by adding mu."""
    return torch.sigmoid(mean + std * n.float() + mu)


# the path


def noised(x0: Tensor, eps: Tensor, t: Time) -> Tensor:
    """x_t = (1 - t) x0 + t eps."""
    t_ = _column(t, x0)
    return (1 - t_) * x0.float() + t_ * eps.float()


def velocity_target(x0: Tensor, eps: Tensor) -> Tensor:
    """The target velocity, the same along the whole path: eps - x0."""
    return eps.float() - x0.float()


# guidance and deterministic steps


def guide(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """K2's guidance, c + s (c - u): off at s = 0, which is 1 in the convention of other models."""
    return cond + scale * (cond - uncond)


def x0_eps(x: Tensor, v: Tensor, t: Time) -> tuple[Tensor, Tensor]:
    """The clean sample and the noise that a velocity at (x, t) implies."""
    x, v, t_ = x.float(), v.float(), _column(t, x)
    return x - t_ * v, x + (1 - t_) * v


def ode_step(x: Tensor, v: Tensor, t: Time, t_next: Time) -> Tensor:
    """One Euler step of the probability-flow ODE from t to t_next < t."""
    x, v = x.float(), v.float()
    return x + (_column(t_next, x) - _column(t, x)) * v


# stochastic steps


def sde_moments(
    x: Tensor, v: Tensor, t: Time, t_next: Time, dynamics: Dynamics, eta: float, t_first: Time
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the Gaussian x_next ~ N(mean, std^2) of a stochastic step.

    dynamics: "flow" (Flow-GRPO: sigma^2 = eta^2 t / (1 - t*)), "dance" (DanceGRPO: sigma = eta), "cps"
    (coefficients-preserving: the noise of t_next is part old, part new). eta = 0 is the ODE for all of them.
    t_first is the grid's second value, schedule(...)[1]: it stands in for t where 1 - t would be 0.

    std broadcasts against x. For single times it stays on their device: checking it on the CPU costs no sync.
    The last step (t_next = 0) has no use for noise: take `ode_step` there.
    """
    x, v = x.float(), v.float()
    t_, next_ = _column(t, x), _column(t_next, x)
    # The score is -eps / t, by which the SDE's drift differs from the ODE's.
    x0, eps = x0_eps(x, v, t)
    if dynamics == "cps":
        angle = eta * math.pi / 2
        return (1 - next_) * x0 + next_ * math.cos(angle) * eps, next_ * math.sin(angle)
    delta = t_ - next_
    variance = _variance(t_, _column(t_first, x), dynamics, eta)
    return x - delta * v - delta * variance / (2 * t_) * eps, (variance * delta).sqrt()


def kl_coefficient(t: Time, t_next: Time, dynamics: Dynamics, eta: float, t_first: Time) -> Tensor:
    """C = d mean / d v of `sde_moments`: the step's exact KL an element is C^2 |dv|^2 / (2 std^2)."""
    t, t_next, t_first = (torch.as_tensor(value, dtype=torch.float32) for value in (t, t_next, t_first))
    if dynamics == "cps":
        return t_next * (1 - t) * math.cos(eta * math.pi / 2) - t * (1 - t_next)
    return -(t - t_next) * (1 + _variance(t, t_first, dynamics, eta) * (1 - t) / (2 * t))


def guard_weights(times: Tensor, dynamics: Dynamics, eta: float) -> Tensor:
    """(steps - 1,) weights of the steps of a grid that can be trained, all but the last; their mean is 1.

    `guard_log_ratio` is <z, C dv> for the step's noise z, with C of `kl_coefficient`. Weighted by 1 / |C| it is equally
    sensitive to the velocity at every step. For flow, C = -delta (1 + eta^2/2) at every t < 1, and the weight is
    1 / delta as published, which differs at t = 1 alone.
    """
    # Without the last step, which has no noise.
    t, t_next = times[:-2].double(), times[1:-1].double()
    if dynamics == "flow":
        inverse = 1 / (t - t_next)
    else:
        inverse = 1 / kl_coefficient(t, t_next, dynamics, eta, times[1]).abs().double()
    return inverse / inverse.mean()


def _variance(t: Tensor, t_first: Tensor, dynamics: Dynamics, eta: float) -> Tensor:
    """sigma^2, the diffusion's variance a unit of time."""
    if dynamics == "dance":
        return torch.full_like(t, eta**2)
    if dynamics == "flow":
        # At t = 1 the divisor would be 0; the grid's second time stands in, as in Flow-GRPO's code.
        return eta**2 * t / (1 - torch.where(t >= 1, t_first.to(t.device), t))
    raise ValueError(f"unknown dynamics {dynamics!r}: use flow, dance or cps")


# likelihoods


def log_prob(x_next: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(B,) exact Gaussian log-density of x_next, as the mean over its elements."""
    std = _positive(std)
    z = (x_next.float() - mean.float()) / std
    logp = -0.5 * z.square() - std.log() - 0.5 * math.log(2 * math.pi)
    return logp.flatten(1).mean(1)


def guard_log_ratio(x_next: Tensor, mean_old: Tensor, mean_new: Tensor, std: Tensor) -> Tensor:
    """(B,) GRPO-Guard's log-ratio <x_next - mean_old, mean_new - mean_old> / std.

    It equals std * (log_prob_new - log_prob_old + |mean_new - mean_old|^2 / (2 std^2)), without the
    cancellation: zero on average for x_next ~ N(mean_old, std^2), with variance |mean_new - mean_old|^2 / D.
    """
    std = _positive(std)
    difference = mean_new.float() - mean_old.float()
    return ((x_next.float() - mean_old.float()) * difference / std).flatten(1).mean(1)


def _positive(std: Tensor) -> Tensor:
    if not bool((std > 0).all()):
        raise ValueError(
            "a trained step needs noise, but its standard deviation is 0: eta must be above 0, and the last "
            "step (t_next = 0) is deterministic and cannot be trained"
        )
    return std.float()


# noise


def seed_for(*indices: int) -> int:
    """A 63-bit seed from global indices (run seed, step, prompt, sample, SDE step, ...); stable for ever."""
    text = ",".join(str(int(index)) for index in indices)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def uniform(*indices: int) -> float:
    """A number in [0, 1], uniform over global indices."""
    return seed_for(*indices) / 2**63


def stratified_normal(seed: int, i: int, parts: int) -> float:
    """The i-th of some standard normal numbers that cover the distribution evenly: each is of part i mod `parts`, of as
    many parts of equal probability, and anywhere in it."""
    share = (i % parts + uniform(seed, i, 0)) / parts
    return float(torch.special.ndtri(torch.tensor(share, dtype=torch.float64)))


def noise(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """(B, *shape) fp32 standard normal on the CPU: row i depends on seeds[i] alone, not on the batch."""
    rows = [torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows) if rows else torch.empty(0, *shape)


def _column(t: Time, x: Tensor) -> Tensor:
    """t as an fp32 tensor that broadcasts against x: (B,) becomes (B, 1, ...); a single time stays put."""
    t = torch.as_tensor(t, dtype=torch.float32)
    return t if t.ndim == 0 else t.to(x.device).reshape(-1, *[1] * (x.ndim - 1))
