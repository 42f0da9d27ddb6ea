"""NFT and AWM: pure functions of fp32 velocities at images that are noised again. No config, no printing, no
collectives.

An image x0 that the old policy drew is noised to x_t = (1-t) x0 + t eps, where the target velocity is u = eps - x0.
With the velocities v of the policy and v_o of the old one, d = v - v_o and e = v_o - u,

    v+ = v_o + beta d,  v- = v_o - beta d            implicit positive and negative policy
    l(q) = t |q - u|^2 / mean |q - u|                error of the clean image, normalised: the published code's form
    L = (A_m / beta) (r l(v+) + (1-r) l(v-))         r = 1/2 + A / 2 A_m in [0, 1], the optimality

(DiffusionNFT, arXiv:2509.16117). Up to the detached normalisers L = w (2 A <e, d> + A_m beta |d|^2) + const with
w = t / mean |e|. So where d = 0 the gradient is 2 A w e whatever beta is, and A_m beta is a trust region. AWM
(arXiv:2509.25050) is

    A w (|v - u|^2 - |v_o - u|^2) + anchor w |d|^2 = w (2 A <e, d> + (A + anchor) |d|^2)

with the same gradient at d = 0.

Legend: B samples, N image tokens, C channels. Norms, products and means are means over N C, times (B,).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

LEAST = 1e-5
"""Least mean absolute error to divide by."""


Objective = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""Of v, v_old, u, t and advantages to (B,) losses."""


def objective(form: str, max_advantage: float, beta: float, anchor: float) -> Objective:
    """`nft_loss`, or `awm_loss` for the form `awm`."""
    if form == "awm":
        return partial(awm_loss, anchor=anchor)
    return partial(nft_loss, max_advantage=max_advantage, beta=beta)


def optimality(advantages: Tensor, most: float) -> Tensor:
    """r in [0, 1] from advantages, which are clipped to plus or minus `most`; 1/2 is the group's average."""
    return 0.5 + advantages.clamp(-most, most) / (2 * most)


def nft_loss(
    v: Tensor, v_old: Tensor, u: Tensor, t: Tensor, advantages_B: Tensor, max_advantage: float, beta: float
) -> Tensor:
    """(B,) L above; only v carries a gradient."""
    d, r_B = v - v_old, optimality(advantages_B, max_advantage)
    positive = _clean_error(v_old + beta * d, u, t)
    negative = _clean_error(v_old - beta * d, u, t)
    return max_advantage / beta * (r_B * positive + (1 - r_B) * negative)


def awm_loss(v: Tensor, v_old: Tensor, u: Tensor, t: Tensor, advantages_B: Tensor, anchor: float) -> Tensor:
    """(B,) as above. It has a minimum for every sample if anchor > -A."""
    w_B = t / (v_old - u).abs().flatten(1).mean(1).clamp_min(LEAST)  # of the old policy, so without gradient
    gain_B = mean_square(v - u) - mean_square(v_old - u)
    return w_B * (advantages_B * gain_B + anchor * mean_square(v - v_old))


def _clean_error(v: Tensor, u: Tensor, t: Tensor) -> Tensor:
    """(B,) |x0_hat - x0|^2 / mean |x0_hat - x0| of the clean image that v implies, with the divisor held constant."""
    # The clean image is x_t - t v, so its error is t times that of the velocity: t^2 over t.
    error = v - u
    return t * mean_square(error) / error.detach().abs().flatten(1).mean(1).clamp_min(LEAST)


@torch.no_grad()
def measured(v: Tensor, v_old: Tensor | None, u: Tensor, advantages_B: Tensor) -> dict[str, Tensor]:
    """(B,) metrics: the error of the policy's velocity; and, where the old policy is another one, the squared distance
    to it and <e, d>, whose sign is that of how the loss of an image changes, by the sign of its advantage."""
    metrics = {"velocity_error": mean_square(v - u)}
    if v_old is not None:
        e, d = v_old - u, v - v_old
        along_B = (e * d).flatten(1).mean(1)
        metrics |= {"old_distance": mean_square(d)}
        metrics |= {"toward_better": along_B * (advantages_B > 0), "toward_worse": along_B * (advantages_B < 0)}
    return metrics


def mean_square(x: Tensor) -> Tensor:
    """(B,) mean square of each sample."""
    return x.square().flatten(1).mean(1)
