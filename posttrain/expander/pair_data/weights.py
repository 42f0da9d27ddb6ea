"""Which pairs are drawn more often in training: visually rich captions, and a few more photographs.

A pair's weight is min(3, 1 + the sum of its tags' weights). Photographs get as much more as the divergence of the media
from those of the captions allows.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence

from posttrain.expander.sft_pairs import MOST_WEIGHT

MEDIUM = re.compile(
    r"\b(photo\w*|paint\w*|drawing|drawn|sketch\w*|illustrat\w*|render\w*|watercolou?r|oil|acrylic|pastel|ink|anime|manga|"
    r"comic|cartoon|3d|pixel art|vector|collage|engraving|etching|poster|sculpture|film still|screenshot|logo)\b",
    re.IGNORECASE,
)
NOUN = re.compile(r"(an?|the|one|two|three|four|five|several|many)\s(?=.*\b(the|with|and|of)\b)", re.IGNORECASE)
"""How an English caption begins before which "A photograph of" is English too."""
STEPS = 40
"""Halvings in the search for a weight."""


def weight(added: float) -> float:
    """The weight of a pair whose tags add this much."""
    return min(MOST_WEIGHT, 1 + added)


def weights_with(added: Sequence[float], eligible: Sequence[bool], extra: float) -> list[float]:
    """The weight of each pair where the eligible ones get `extra` on top of what their tags add."""
    return [weight(a + extra * is_eligible) for a, is_eligible in zip(added, eligible)]


def share(weights: Sequence[float], chosen: Sequence[bool]) -> float:
    """Share of the draws that the chosen pairs get."""
    return sum(itertools.compress(weights, chosen)) / sum(weights)


def divergence(p: float, q: float) -> float:
    """KL of two shares in nats: of a medium among what is drawn (p) from that among the captions (q)."""
    total = 0.0
    for a, b in ((p, q), (1 - p, 1 - q)):
        if a > 0:  # 0 log 0 is 0
            total += a * math.log(a / b) if b > 0 else math.inf
    return total


def photograph_weight(
    added: Sequence[float], eligible: Sequence[bool], photographs: Sequence[bool], most: float, max_kl: float
) -> float:
    """What eligible pairs get in addition, at most `most`, so that the share of photographs in the draws diverges from
    that among the pairs by at most `max_kl` nats. 0 where the other weights alone exceed it."""
    among = sum(photographs) / len(photographs)

    def fits(extra: float) -> bool:
        return divergence(share(weights_with(added, eligible, extra), photographs), among) <= max_kl

    if fits(most):
        return most
    # The share of photographs rises with `extra`, so the largest one that fits is found by bisection.
    low, high = 0.0, most
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def names_medium(text: str) -> bool:
    return MEDIUM.search(text) is not None


def as_photograph(caption: str) -> str | None:
    """The caption with its medium named, "A photograph of a ..."; None if that would not be English."""
    if not NOUN.match(caption):
        return None
    return f"A photograph of {caption[0].lower()}{caption[1:]}"
