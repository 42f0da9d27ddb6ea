"""What the student keeps of each teacher's gain, on the held-out prompts of that teacher.

    rho = (student - base) / (teacher - base)    means of one reward; the teacher with its guidance, the others without

Prompts are paired: all three are drawn from the same noise. The interval is a bootstrap over prompts. Where the
teacher's gain is under three standard errors of its mean there is no rho: it would be a ratio of noise. posttrain merge
measures what it keeps of its parents in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

DRAWS = 2000
"""Resamplings of the bootstrap."""
LEVEL = 0.95
LEAST_ERRORS = 3.0
"""Standard errors that a teacher's gain must have."""
Values = Sequence[float | None] | np.ndarray
"""A reward of each prompt; None or nan where it has no score."""


@dataclass(frozen=True)
class Retention:
    """Of one teacher."""

    value: float
    low: float
    high: float
    """The ends of the interval that holds it with probability LEVEL."""


def retention(base: Values, teacher: Values, student: Values, seed: int) -> Retention | None:
    """None where the teacher's gain is too small, or fewer than two prompts have all three scores."""
    rows = np.array([base, teacher, student], float)  # None becomes nan
    rows = rows[:, ~np.isnan(rows).any(0)]
    if rows.shape[1] < 2:
        return None
    gain, kept = rows[1] - rows[0], rows[2] - rows[0]
    error = gain.std(ddof=1) / len(gain) ** 0.5
    # The first condition also covers a gain of exactly 0 without any spread.
    if gain.mean() <= 0 or gain.mean() < LEAST_ERRORS * error:
        return None
    # Prompts are drawn whole, with all their scores, since these are paired.
    draws = np.random.default_rng(seed).integers(0, len(gain), (DRAWS, len(gain)))
    gains, kepts = gain[draws].mean(1), kept[draws].mean(1)
    # A resampled gain of 0 or below, rare at three errors, would turn the ratio's sign.
    ratios = kepts[gains > 0] / gains[gains > 0]
    low, high = np.quantile(ratios, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Retention(float(kept.mean() / gain.mean()), float(low), float(high))


def scores_of(per_image: Sequence[dict[str, Any]], rows: Sequence[int], reward: str) -> list[float | None]:
    """Of the images of these prompts, from what an evaluation says of each image."""
    return [per_image[row].get(reward, {}).get("score") for row in rows]


def mean(values: Values) -> float | None:
    """Of the prompts that have a score."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
