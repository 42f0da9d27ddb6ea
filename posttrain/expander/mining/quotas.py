"""How many prompts of each failure class are kept, and which prompts are hard but not hopeless.

Pure arithmetic on scores: n expansions of a prompt, K rewards in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

Verdict = Literal["kept", "easy", "hopeless", "flat", "unsafe", "unscored"]
VERDICTS: tuple[Verdict, ...] = ("kept", "easy", "hopeless", "flat", "unsafe", "unscored")


def composites(values_NK: np.ndarray, valid_NK: np.ndarray, weights_K: np.ndarray) -> np.ndarray:
    """(N,) weighted means of the rewards that have a score, NaN where none has; a gated expansion's rewards are 0."""
    weights_NK = weights_K * valid_NK
    total_N = weights_NK.sum(1)
    summed_N = (weights_NK * values_NK).sum(1)
    return np.divide(summed_N, total_N, out=np.full(len(total_N), np.nan), where=total_N > 0)


def moments(composite_N: np.ndarray) -> tuple[float | None, float | None]:
    """(mean, sample standard deviation with n - 1) of the composites that are not NaN; None where there are too few."""
    known_N = composite_N[~np.isnan(composite_N)]
    mean = float(known_N.mean()) if len(known_N) else None
    return mean, float(known_N.std(ddof=1)) if len(known_N) > 1 else None


def pooled(parts: Sequence[tuple[int, float | None, float | None]]) -> tuple[float | None, float | None]:
    """`moments` of several rounds together, from (number of composites that are not NaN, mean, deviation) of each."""
    known = [(count, mean, std or 0.0) for count, mean, std in parts if mean is not None]
    total = sum(count for count, _, _ in known)
    if not total:
        return None, None
    middle = sum(count * mean for count, mean, _ in known) / total
    if total == 1:
        return middle, None
    # Squares about the common mean: those about a round's own mean, and how far that lies from it.
    squares = sum((count - 1) * std**2 + count * (mean - middle) ** 2 for count, mean, std in known)
    return middle, math.sqrt(squares / (total - 1))


def verdict(
    mean: float | None,
    std: float | None,
    safe: float,
    low: float = 0.2,
    high: float = 0.8,
    spread: float = 0.1,
    least_safe: float = 0.25,
) -> Verdict:
    """Whether a prompt is worth training on: kept if the mean of its composites is in [low, high], their standard
    deviation is at least `spread`, and a share of at least `least_safe` of its expansions is safe."""
    if mean is None or std is None:
        return "unscored"
    # An unsafe prompt is hopeless too, as gated expansions score 0, so the reason is looked at first.
    if safe < least_safe:
        return "unsafe"
    if mean > high:
        return "easy"
    if mean < low:
        return "hopeless"
    return "flat" if std < spread else "kept"


def shares(counts: Mapping[str, int], floor: float = 0.05) -> dict[str, float]:
    """The share of each class: in proportion to the square root of its count, but at least `floor` (or 1 over the
    number of classes, if that is less). They add up to 1. Classes without a prompt get none."""
    roots = {name: math.sqrt(count) for name, count in counts.items() if count}
    if not roots:
        return {}
    floor = min(floor, 1 / len(roots))
    low: set[str] = set()  # classes that get the floor
    while True:
        rest = sum(root for name, root in roots.items() if name not in low)
        left = 1 - floor * len(low)
        result = {name: floor if name in low else left * root / rest for name, root in roots.items()}
        # What the small classes are given is taken from the others, of which one may now be below the floor. 1e-12:
        # rounding alone must not put a class there.
        below = {name for name, share in result.items() if share < floor - 1e-12}
        if not below:
            return result
        low |= below


def slots(shares_of: Mapping[str, float], counts: Mapping[str, int], total: int) -> dict[str, int]:
    """`total` places divided in these shares, which add up to 1, among classes of so many prompts.

    Each share is rounded down, and the rest goes to the largest remainders. A class with fewer prompts than its places
    gives all it has, and the others divide what it leaves. `total` is at most the sum of the counts.
    """
    full: dict[str, int] = {}
    while True:
        rest = {name: share for name, share in shares_of.items() if name not in full}
        left, sum_of_rest = total - sum(full.values()), sum(rest.values())
        exact = {name: share * left / sum_of_rest for name, share in rest.items()}
        # 1e-9: 0.29 * 100 comes out just below 29.
        result = {name: math.floor(value + 1e-9) for name, value in exact.items()}
        by_remainder = sorted(exact, key=lambda name: result[name] - exact[name])  # stable, so ties go by order
        for name in by_remainder[: left - sum(result.values())]:
            result[name] += 1
        over = {name: counts[name] for name in rest if result[name] > counts[name]}
        if not over:
            return full | result
        full |= over
