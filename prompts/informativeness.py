"""How much the images of a prompt teach: pure functions of scores, without torch.

Legend: P groups, G images of a group, K rewards, R prompts. NaN is missing, and a missing reward is left out of every
mean; it is never a zero.
"""

from __future__ import annotations

import numpy as np

ALIKE = 1e-6
"""Scores of a group that span less than this, times the largest of the batch, are alike: their variance is 0, as their
advantages are."""


def group_moments(
    values_PGK: np.ndarray, valid_PGK: np.ndarray, floor_K: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(P, K) mean and Bessel variance of each group's scores; NaN where fewer than two were had.

    The variance is 0 where scores span less than `floor_K`, the difference that a reward's noise can make.
    """
    count_PK = valid_PGK.sum(1)  # of each group and reward, the images that have a score
    values = np.where(valid_PGK, values_PGK, 0.0)
    mean_PK = values.sum(1) / np.maximum(count_PK, 1)
    deviations = np.where(valid_PGK, values - mean_PK[:, None], 0.0)
    variance_PK = np.square(deviations).sum(1) / np.maximum(count_PK - 1, 1)
    size_K = ALIKE * np.abs(values).max((0, 1), initial=0.0)
    least_K = size_K if floor_K is None else np.maximum(floor_K, size_K)
    # What rounding or a judge's noise leaves would look like a lesson, so it is set to exactly 0.
    variance_PK[np.ptp(deviations, axis=1) < least_K] = 0.0
    missing = count_PK < 2
    return np.where(missing, np.nan, mean_PK), np.where(missing, np.nan, variance_PK)


def weighted_mean(values_RK: np.ndarray, weights_K: np.ndarray) -> np.ndarray:
    """(R,) mean over the rewards that are not NaN; NaN where no reward of weight is left."""
    weights_RK = np.where(np.isnan(values_RK), 0.0, weights_K)  # a missing score is out of the mean, not a 0 in it
    total_R = weights_RK.sum(1)
    summed_R = (weights_RK * np.nan_to_num(values_RK)).sum(1)
    return np.divide(summed_R, total_R, out=np.full(len(total_R), np.nan), where=total_R > 0)


def informativeness(variance_RK: np.ndarray, spread_K: np.ndarray, weights_K: np.ndarray) -> np.ndarray:
    """(R,) in [0, 1]: the mean over rewards of min(1, std / spread); 1 for what was never scored.

    spread_K is the mean within-group std of each reward; one that has none anywhere tells nothing, and counts as 0.
    """
    std = np.sqrt(variance_RK)
    # Capped at 1, so that one reward with an unusual spread does not decide alone.
    ratio = np.divide(std, spread_K, out=np.where(np.isnan(std), np.nan, 0.0), where=spread_K > 0)
    return np.nan_to_num(weighted_mean(np.minimum(ratio, 1.0), weights_K), nan=1.0)
