"""Losses: pure functions of tensors that return (loss, metrics). No config, no printing, no collectives.

Legend: B samples of one SDE step. Everything is fp32, whatever the network runs in.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

Objective = Callable[[Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]
"""(B,) log-ratios and (B,) advantages to a loss of each sample, and metrics."""


def objective(clip_low: float, clip_high: float, max_weight: float | None) -> Objective:
    """`clipped_policy`, or `weighted_policy` if there is a largest weight."""
    if max_weight is not None:
        return partial(weighted_policy, max_weight=max_weight)
    return partial(clipped_policy, clip_low=clip_low, clip_high=clip_high)


def clipped_policy(
    log_ratio_B: Tensor, advantages_B: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """(B,) loss of each sample, -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), with r = exp(log_ratio).

    Zero gradient where the ratio has already left the band in the direction of its advantage. Metrics are sums
    over the samples, to be divided by their number.
    """
    ratio = log_ratio_B.float().exp()  # in bf16 a ratio near 1 would have two decimals
    advantages_B = advantages_B.to(ratio)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    # The pessimistic bound of PPO (arXiv:1707.06347, eq. 7), with a band of its own on each side as in DAPO.
    loss_B = -torch.minimum(ratio * advantages_B, clipped * advantages_B)
    with torch.no_grad():
        metrics = {
            **_moments(log_ratio_B),
            "clip_low": ((ratio < 1 - clip_low) & (advantages_B < 0)).float().sum(),
            "clip_high": ((ratio > 1 + clip_high) & (advantages_B > 0)).float().sum(),
        }
    return loss_B, metrics


def weighted_policy(log_ratio_B: Tensor, advantages_B: Tensor, max_weight: float) -> tuple[Tensor, dict[str, Tensor]]:
    """(B,) loss of each sample, -min(r, max_weight) A log_ratio with the weight held constant: truncated importance
    weights (IMPALA, arXiv:1802.01561) in place of clips.

    No sample's gradient is zero; one that has become likelier since it was drawn counts for at most max_weight. Metrics
    are sums over the samples, to be divided by their number.
    """
    log_ratio = log_ratio_B.float()
    ratio = log_ratio.detach().exp()
    loss_B = -ratio.clamp(max=max_weight) * advantages_B.to(log_ratio) * log_ratio
    return loss_B, {**_moments(log_ratio_B), "truncated": (ratio > max_weight).float().sum()}


@torch.no_grad()
def _moments(log_ratio_B: Tensor) -> dict[str, Tensor]:
    log_ratio = log_ratio_B.float()
    return {
        "ratio": log_ratio.exp().sum(),
        "log_ratio": log_ratio.sum(),
        "log_ratio_square": log_ratio.square().sum(),
    }


def velocity_kl(v: Tensor, v_reference: Tensor) -> Tensor:
    """(B,) mean squared distance of velocities (B, N, C): the KL of a step less its step-dependent factor."""
    return (v.float() - v_reference.float()).square().flatten(1).mean(1)
