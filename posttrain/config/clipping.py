"""What a gradient's norm is clipped to: a multiple of the median of the norms before it.

A fixed limit would suit one size alone: norms fall with the number of latent elements, of images and of weights.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

WINDOW = 64
"""Norms that the median is taken of, the newest ones."""
LEAST = 16
"""Norms below which there is no clipping yet."""


def limit(norms: Sequence[float], factor: float) -> float:
    """The greatest norm that is left as it is, of those so far, oldest first; inf for none. `factor` 0 turns it off.

    The norms are those before clipping. The median stays where it is if less than half of the window are outliers.
    """
    # The first norms, of AdamW's warm-up, say little about the usual one.
    if not factor or len(norms) < LEAST:
        return math.inf
    return factor * statistics.median(norms[-WINDOW:])
