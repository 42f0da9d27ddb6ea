"""Means with standard errors, and paired comparisons of two sets of scores of the same prompts.

Scores are (P,) by prompt, NaN where a prompt has none: such prompts are left out, never counted as 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

DRAWS = 10_000
"""Resamples of the bootstrap, and sign flips of the test."""
CHUNK = 2**22
"""Random numbers in memory at a time."""


def mean_and_error(scores: np.ndarray) -> tuple[float | None, float | None]:
    """The mean, and its standard error s / sqrt(P) with s of P - 1 degrees; None without prompts, or with one."""
    known = scores[~np.isnan(scores)]
    if len(known) == 0:
        return None, None
    error = float(known.std(ddof=1) / len(known) ** 0.5) if len(known) > 1 else None
    return float(known.mean()), error


@dataclass(frozen=True)
class Paired:
    """How scores differ from others of the same prompts and noise."""

    difference: float
    """Mean of the differences."""
    error: float | None
    """Its standard error; None for one prompt."""
    low: float
    """95 % interval by the bootstrap over prompts (percentiles of DRAWS resampled means)."""
    high: float
    p: float
    """Two-sided, by flipping the signs of differences at random: (1 + flips at least as far from 0) / (1 + DRAWS)."""
    win_rate: float
    """Share of prompts whose score is higher, half of the ties counted."""
    prompts: int
    """That both have a score of."""


def paired(scores: np.ndarray, others: np.ndarray, seed: int = 0) -> Paired | None:
    """`scores` less `others`, both (P,); None where no prompt has both. The same numbers for the same seed."""
    differences = scores - others
    differences = differences[~np.isnan(differences)]
    n = len(differences)
    if not n:
        return None
    mean, error = mean_and_error(differences)
    assert mean is not None
    means, as_far = np.empty(DRAWS), 0
    generator = np.random.default_rng(seed)
    # In parts: DRAWS x P random numbers at once would take 80 MB for each thousand prompts.
    step = max(1, CHUNK // n)
    for first in range(0, DRAWS, step):
        count = min(step, DRAWS - first)
        means[first : first + count] = differences[generator.integers(0, n, (count, n))].mean(1)
        # Without any effect each sign would be a coin flip. The margin counts flips that are as far but for rounding.
        flipped = (differences * generator.choice((-1.0, 1.0), (count, n))).mean(1)
        as_far += int((np.abs(flipped) >= abs(mean) - 1e-12).sum())
    low, high = np.quantile(means, (0.025, 0.975))
    wins = float((differences > 0).mean() + (differences == 0).mean() / 2)
    # The observed signs are one of the flips, so p is never 0 (see p of Paired).
    return Paired(mean, error, float(low), float(high), (1 + as_far) / (1 + DRAWS), wins, n)
