"""Advantages from group rewards. Nothing else in the project normalises a reward.

Legend: P prompts, G images of a prompt, K rewards. rewards_PGK is any real tensor, valid_PGK its bool mask: a missing
reward contributes its group's average, never a zero, and an image with every reward missing is out: its advantage
is 0 and it counts in no mean. Results are float64, zero on average, in units of standard deviations.

floor_K is, per reward, the difference between two images that noise alone can make (rewards/noise.py), in the reward's
own units. Dividing by a bare standard deviation would turn the noise of a saturated reward into full advantages: so no
group is divided by less than the floor, and one that spans less is flat. A group with a larger standard deviation is
left as it is: its differences are real. None: no reward is noisy.

No constant is absolute, so a reward in [0, 1e-4] teaches what the same reward in [0, 1] does: EPSILON is a share of a
reward's own spread, and FLAT a share of its own size.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

EPSILON = 1e-4
"""Times the mean standard deviation of a reward's groups, floors included: added to that of each group."""
FLAT = 1e-6
"""A group whose rewards span less than this, times the largest of the batch, differs by rounding alone: its advantages
are exactly 0."""


def gdpo(rewards_PGK: Tensor, valid_PGK: Tensor, weights_K: Tensor, floor_K: Tensor | None = None) -> Tensor:
    """(P, G) advantages, each reward normalised in its group before they are weighed (GDPO).

    A_k = (R_k - mean) / (max(std, floor_k) + epsilon) in the group, summed with the weights, then normalised once more
    over the whole batch, so that the number of rewards does not change the size of an update.
    """
    # Each reward in its own standard deviations first, so that a reward on a large scale does not rule the sum.
    weighed_PG = (weights_K.double() * standardise(rewards_PGK, valid_PGK, floor_K)).sum(-1)
    return _over_batch(weighed_PG, valid_PGK.any(-1))


def sum_then_normalise(
    rewards_PGK: Tensor,
    valid_PGK: Tensor,
    weights_K: Tensor,
    scale: Literal["group", "batch", "none"] = "group",
    floor_K: Tensor | None = None,
) -> Tensor:
    """(P, G) advantages of the weighted sum, centred in the group; the ablation of `gdpo`.

    Divided by the group's or the batch's standard deviation, or by nothing (Dr. GRPO). Different rewards that sum to
    one value become one, and the reward with the larger spread rules. A reward that is flat in a group is left out of
    its sum there, with its floor.
    """
    total_PG1 = (weights_K.double() * _centre(rewards_PGK, valid_PGK, floor_K)).sum(-1, keepdim=True)
    scorable_PG1 = valid_PGK.any(-1, keepdim=True)
    floor_P1 = None if floor_K is None else _of_sum(floor_K, weights_K, flat(rewards_PGK, valid_PGK, floor_K))
    if scale == "group":
        return standardise(total_PG1, scorable_PG1, floor_P1)[..., 0]
    centred_PG = _centre(total_PG1, scorable_PG1, floor_P1)[..., 0]
    return _over_batch(centred_PG, scorable_PG1[..., 0]) if scale == "batch" else centred_PG


def noise_share(
    rewards_PGK: Tensor, valid_PGK: Tensor, weights_K: Tensor, floor_K: Tensor, noise_K: Tensor, summed: bool = False
) -> float | None:
    """The share of the advantages' variance, in [0, 1], that noise can explain; None where every advantage is 0.

    noise_K is the largest difference among some twenty scores of one image. A quarter of it is taken for the standard
    deviation of the noise, but no more than a group has. Of `sum_then_normalise` by group if `summed`, else of `gdpo`.
    """
    weights_K, floor_PK, noise_PK = weights_K.double(), floor_K.double()[None], noise_K.double()[None]
    if summed:  # then the sum is the one reward, with a noise and a floor of its own
        flat_PK = flat(rewards_PGK, valid_PGK, floor_K)
        rewards_PGK = (weights_K * _centre(rewards_PGK, valid_PGK, floor_K)).sum(-1, keepdim=True)
        valid_PGK = valid_PGK.any(-1, keepdim=True)
        floor_PK, noise_PK = (_of_sum(values_K, weights_K, flat_PK) for values_K in (floor_K, noise_K))
        weights_K = weights_K.new_ones(1)
    std_P1K = _std(_centre(rewards_PGK, valid_PGK, floor_PK), valid_PGK)
    # The range of some twenty normal draws is about four standard deviations.
    noise_P1K = torch.minimum(noise_PK[:, None] / 4, std_P1K) / divisor(std_P1K, floor_PK)
    noise = (weights_K * noise_P1K * valid_PGK).square().sum()
    total = (weights_K * standardise(rewards_PGK, valid_PGK, floor_PK)).sum(-1).square().sum()
    return min(1.0, float(noise / total)) if total > 0 else None


def standardise(values_PGK: Tensor, valid_PGK: Tensor, floor_K: Tensor | None = None) -> Tensor:
    """Zero mean and about unit Bessel standard deviation in each group; 0 where missing, flat or alone.

    Here and below the floor may also be one for each group, (P, K).
    """
    centred = _centre(values_PGK, valid_PGK, floor_K)
    return centred / divisor(_std(centred, valid_PGK), floor_K)


def flat(values_PGK: Tensor, valid_PGK: Tensor, floor_K: Tensor | None = None) -> Tensor:
    """(P, K) bool: groups with fewer than two values of a reward, or with values that noise can make."""
    values = values_PGK.double()
    # Infinities keep what is missing out of the extremes.
    top = values.masked_fill(~valid_PGK, -torch.inf).amax(1)
    bottom = values.masked_fill(~valid_PGK, torch.inf).amin(1)
    size_K = values.abs().masked_fill(~valid_PGK, 0.0).amax((0, 1))
    least = FLAT * size_K if floor_K is None else torch.maximum(floor_K.double(), FLAT * size_K)
    return (valid_PGK.sum(1) < 2) | (top - bottom < least) | (top == bottom)


def _centre(values_PGK: Tensor, valid_PGK: Tensor, floor_K: Tensor | None) -> Tensor:
    """Zero mean in each group; exactly 0 where missing, flat or alone."""
    values = values_PGK.double().masked_fill(~valid_PGK, 0.0)
    mean = values.sum(1, keepdim=True) / valid_PGK.sum(1, keepdim=True).clamp_min(1)
    return (values - mean).masked_fill(~valid_PGK | flat(values_PGK, valid_PGK, floor_K)[:, None], 0.0)


def _std(centred_PGK: Tensor, valid_PGK: Tensor) -> Tensor:
    """(P, 1, K) Bessel standard deviation of each group."""
    count = valid_PGK.sum(1, keepdim=True)  # a reward may be missing for some images of a group
    return (centred_PGK.square().sum(1, keepdim=True) / (count - 1).clamp_min(1)).sqrt()


def divisor(std_P1K: Tensor, floor_K: Tensor | None) -> Tensor:
    """(P, 1, K) what a group's deviations are divided by; 1 for a reward that differs nowhere.

    `std_P1K` is 0 in flat groups, which do not count in a reward's own spread.
    """
    floored = std_P1K if floor_K is None else torch.maximum(std_P1K, floor_K.double()[..., None, :])
    differs = std_P1K > 0
    spread_11K = (floored * differs).sum(0, keepdim=True) / differs.sum(0, keepdim=True).clamp_min(1)
    return (floored + EPSILON * spread_11K).masked_fill(spread_11K == 0, 1.0)


def _of_sum(noise_K: Tensor, weights_K: Tensor, flat_PK: Tensor) -> Tensor:
    """(P, 1) noise of the weighted sum of the rewards that are not flat, whose noise is independent."""
    return (weights_K.double() * noise_K * ~flat_PK).norm(dim=-1, keepdim=True)


def _over_batch(values_PG: Tensor, scorable_PG: Tensor) -> Tensor:
    """Unit standard deviation over the batch."""
    # Each group is centred, so the batch's mean is 0 within rounding. Subtracting it would move flat groups off 0.
    scorable = values_PG[scorable_PG]
    std = scorable.std() if len(scorable) > 1 else 0.0
    return values_PG / std if std > 0 else torch.zeros_like(values_PG)
