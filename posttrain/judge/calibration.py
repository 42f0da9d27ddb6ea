"""How good probabilities are: Brier score, calibration error, reliability, and the area under the ROC curve.

Everywhere p is (N,) predicted probabilities and y (N,) outcomes in [0, 1], numpy.
"""

from __future__ import annotations

import numpy as np
from scipy.stats import rankdata


def brier(p: np.ndarray, y: np.ndarray) -> float:
    """Mean squared error, in [0, 1]; 0.25 for a coin."""
    return float(np.mean((p - y) ** 2))


def reliability(p: np.ndarray, y: np.ndarray, bins: int = 10) -> list[tuple[float, float, int]]:
    """(mean prediction, mean outcome, number) for each tenth of [0, 1] that has predictions."""
    which = np.minimum((p * bins).astype(int), bins - 1)
    groups = [which == i for i in range(bins)]
    return [(float(p[g].mean()), float(y[g].mean()), int(g.sum())) for g in groups if g.any()]


def expected_calibration_error(p: np.ndarray, y: np.ndarray, bins: int = 10) -> float:
    """Mean distance of prediction and outcome over the bins of `reliability`, weighted by their size."""
    return sum(n * abs(a - b) for a, b, n in reliability(p, y, bins)) / len(p)


def auroc(p: np.ndarray, y: np.ndarray) -> float:
    """Chance that a positive scores above a negative, ties counted half; NaN without both."""
    positive = np.asarray(y) > 0.5
    n, m = int(positive.sum()), int((~positive).sum())
    if not n or not m:
        return float("nan")
    return float((rankdata(p)[positive].sum() - n * (n + 1) / 2) / (n * m))
