"""Seconds from the start of the process to a run's first step, by part; they are `startup` in summary.json.

| part | what it is |
|---|---|
| import | Python, the recipe, and the libraries |
| check | what can be refused at once (preconditions.py) |
| processes | finding each other, where there are several |
| inputs | prompts, pairs, rewards |
| read | weights, from disk to where they run |
| verify | whether they are finite, and their fingerprint |
| encode | pairs into latents and text, where that is to be done |
| servers | judges, where the run starts them |
| prepare | all else before the first evaluation: adapters, text of the held-out prompts |
| evaluation | before the first step |
| warm_up | of pairs: compiling, before the first block |
| first_step | the first step, the compiling of its blocks included; of pairs, until the first block is taken in |
| compile | of the first step: what it took beyond the second; not of pairs, where several blocks come at once |
| total | all of it |

Each part ends where a function calls `lap`; a part that comes twice is summed.
"""

from __future__ import annotations

import time

import psutil


class Startup:
    """A clock that runs from the start of the process, or of a later run in the same process, to `taken`."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._last: float | None = psutil.Process().create_time()

    def lap(self, part: str) -> None:
        """What went by since the last lap was this part."""
        now = time.time()  # the clock that create_time is of
        if self._last is None:  # a run has ended in this process, and this is where the next one begins
            self._seconds = {}
        else:
            self._seconds[part] = self._seconds.get(part, 0.0) + now - self._last
        self._last = now

    def taken(self, second_step: float | None) -> dict[str, float]:
        """The parts and their total. `second_step` is how many seconds the second one took, None if there was none."""
        found = {name: round(seconds, 2) for name, seconds in self._seconds.items()}
        # Before rounding, so that the total is not off by the parts' errors.
        found["total"] = round(sum(self._seconds.values()), 2)
        if second_step is not None and "first_step" in found and "warm_up" not in found:
            found["compile"] = round(max(0.0, self._seconds["first_step"] - second_step), 2)
        self.forget()
        return found

    def forget(self) -> None:
        """The next part begins anew: a run that ended leaves nothing to a later one in the same process."""
        self._last = None


CLOCK = Startup()
lap = CLOCK.lap
