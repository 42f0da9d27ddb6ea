"""Advantages from group rewards. Nothing else in the project normalises a reward.

Legend: P prompts, G images of a prompt, K rewards. rewards_PGK is any real tensor, valid_PGK its bool mask: a missing
reward contributes its group's average, never a zero, and an image with every reward missing is out: its advantage
is 0 and it counts in no mean. Results are float64, zero on average, in units of standard deviations.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

EPSILON = 1e-4
"""Added to every standard deviation."""
FLAT = 1e-6
"""A group whose rewards span less than this carries no signal: its advantages are exactly 0."""


def gdpo(rewards_PGK: Tensor, valid_PGK: Tensor, weights_K: Tensor) -> Tensor:
    """(P, G) advantages, each reward normalised in its group before they are weighed (GDPO).

    A_k = (R_k - mean) / (std + 1e-4) in the group, summed with the weights, then normalised once more over the
    whole batch, so that the number of rewards does not change the size of an update.
    """
    weighed_PG = (weights_K.double() * standardise(rewards_PGK, valid_PGK)).sum(-1)
    return _over_batch(weighed_PG, valid_PGK.any(-1))


def sum_then_normalise(
    rewards_PGK: Tensor,
    valid_PGK: Tensor,
    weights_K: Tensor,
    scale: Literal["group", "batch", "none"] = "group",
) -> Tensor:
    """(P, G) advantages of the weighted sum, centred in the group; the ablation of `gdpo`.

    Divided by the group's or the batch's standard deviation, or by nothing (Dr. GRPO). Different rewards that sum to
    one value become one, and the reward with the larger spread rules.
    """
    total_PG = (weights_K.double() * _centre(rewards_PGK, valid_PGK)).sum(-1)
    scorable_PG = valid_PGK.any(-1)
    if scale == "group":
        return standardise(total_PG[..., None], scorable_PG[..., None])[..., 0]
    centred_PG = _centre(total_PG[..., None], scorable_PG[..., None])[..., 0]
    return _over_batch(centred_PG, scorable_PG) if scale == "batch" else centred_PG


def standardise(values_PGK: Tensor, valid_PGK: Tensor) -> Tensor:
    """Zero mean and unit Bessel standard deviation in each group; 0 where missing, flat or alone."""
    centred = _centre(values_PGK, valid_PGK)
    n = valid_PGK.sum(1, keepdim=True)
    std = (centred.square().sum(1, keepdim=True) / (n - 1).clamp_min(1)).sqrt()
    return centred / (std + EPSILON)


def flat(values_PGK: Tensor, valid_PGK: Tensor) -> Tensor:
    """(P, K) bool: groups with fewer than two values of a reward, or with values all alike."""
    values = values_PGK.double()
    top = values.masked_fill(~valid_PGK, -torch.inf).amax(1)
    bottom = values.masked_fill(~valid_PGK, torch.inf).amin(1)
    return (valid_PGK.sum(1) < 2) | (top - bottom < FLAT)


def _centre(values_PGK: Tensor, valid_PGK: Tensor) -> Tensor:
    """Zero mean in each group; exactly 0 where missing, flat or alone."""
    values = values_PGK.double().masked_fill(~valid_PGK, 0.0)
    mean = values.sum(1, keepdim=True) / valid_PGK.sum(1, keepdim=True).clamp_min(1)
    return (values - mean).masked_fill(~valid_PGK | flat(values_PGK, valid_PGK)[:, None], 0.0)


def _over_batch(values_PG: Tensor, scorable_PG: Tensor) -> Tensor:
    """Unit standard deviation over the batch. Each group is centred, so the batch's mean is 0 but for rounding: it is
    not subtracted, which would move the flat groups off 0."""
    scorable = values_PG[scorable_PG]
    return values_PG / (scorable.std() + EPSILON) if len(scorable) > 1 else torch.zeros_like(values_PG)
