"""Quality of predicted probabilities: Brier score, calibration error, reliability and area under the ROC curve.

Throughout, p are (N,) predicted probabilities and y (N,) outcomes in [0, 1], as numpy arrays.
"""

from __future__ import annotations

import numpy as np
from scipy.stats import rankdata


def brier(p: np.ndarray, y: np.ndarray) -> float:
    """Mean squared error, in [0, 1]; 0.25 for constant predictions of 0.5."""
    return float(np.mean((p - y) ** 2))


def reliability(p: np.ndarray, y: np.ndarray, bins: int = 10) -> list[tuple[float, float, int]]:
    """(mean prediction, mean outcome, count) for each of `bins` equal parts of [0, 1] that has predictions."""
    which = np.minimum((p * bins).astype(int), bins - 1)  # p = 1 belongs to the last bin
    rows = []
    for i in np.unique(which):
        inside = which == i
        rows.append((float(p[inside].mean()), float(y[inside].mean()), int(inside.sum())))
    return rows


def expected_calibration_error(p: np.ndarray, y: np.ndarray) -> float:
    """Mean distance between prediction and outcome over the bins of `reliability`, weighted by their counts."""
    return sum(n * abs(a - b) for a, b, n in reliability(p, y)) / len(p)


def auroc(p: np.ndarray, y: np.ndarray) -> float:
    """Probability that a positive scores above a negative, ties counting half; NaN if either is missing."""
    positive = np.asarray(y) > 0.5
    n, m = int(positive.sum()), int((~positive).sum())
    if not n or not m:
        return float("nan")
    # The Mann-Whitney U statistic over the number of pairs.
    return float((rankdata(p)[positive].sum() - n * (n + 1) / 2) / (n * m))
