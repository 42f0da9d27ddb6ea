"""A few rows that stand for a set of pairs or images, which takes hours to encode as a whole."""

from __future__ import annotations

from typing import Any

import numpy as np

ROWS = 32
"""Most rows that are encoded."""
CHANCE = 2
"""Bad rows among them that say nothing of the set."""


class Few:
    """Some rows of a set, spread over all of it, with the interface of the whole."""

    def __init__(self, whole: Any) -> None:
        self.whole, self.path = whole, whole.path
        # Spread, since files are often sorted by size or source; `unique` for sets of fewer rows.
        self.places: list[int] = np.unique(np.linspace(0, len(whole) - 1, ROWS).astype(int)).tolist()

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i: int) -> Any:
        return self.whole[self.places[i]]

    def captions(self, i: int) -> Any:
        """Of a set of images."""
        return self.whole.captions(self.places[i])

    def name(self, i: int) -> str:
        return self.whole.name(self.places[i])

    def tally(self) -> Any:
        return self.whole.tally()

    def fingerprint(self) -> str:
        # The places too, or a cache of these rows would be taken for one of the whole set.
        return f"{self.whole.fingerprint()} {self.places}"

    def is_sound(self, bad: int) -> bool:
        """Whether so many of these rows may be bad by chance, of a set that has no more than its max_bad allows."""
        return bad <= max(CHANCE, 2 * self.tally().max_bad * len(self))
