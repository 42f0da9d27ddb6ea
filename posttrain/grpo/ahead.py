"""When a step's images are drawn: in the step itself, or a step before, so that judges score them while it trains.

rollouts = Rollouts(draw, queue, stepper, config)
for step in steps:
    for attempt in micro_batch.attempts(stepper):
        rollouts.retry()
        with attempt:
            drawn = rollouts.of(step)   # with rollout.ahead the next step's are drawn here too
            ...                         # drawn.gather(queue), score
            stepper.remember()
            ...                         # update
    rollouts.forget(step)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

from posttrain.grpo.config import GRPOConfig
from posttrain.training.stepper import Stepper
from rewards.background import ScoreQueue
from rewards.base import Scores

if TYPE_CHECKING:  # the loop stands above this
    from posttrain.grpo.train import Group


@dataclass
class Drawn:
    """This process's groups of a step, whose scores may still be on their way."""

    groups: list[Group]
    jobs: list[Future[Scores]]
    updates: int
    """How many updates the policy that drew them had seen."""
    scores: Scores | None = None

    def gather(self, queue: ScoreQueue) -> Scores | None:
        """Waits for the scores, once; None if there is no group."""
        if self.scores is None and self.groups:
            self.scores = queue.gather(self.jobs)
        return self.scores


class Rollouts:
    """The images of a step and, with `rollout.ahead`, those of the next one, each drawn once."""

    def __init__(self, draw: Callable[[int], list[Group]], queue: ScoreQueue, stepper: Stepper, config: GRPOConfig):
        """`draw` gives this process's groups of a step, drawn by the policy as it is, with their images in `queue`."""
        self.draw, self.queue, self.stepper, self.config = draw, queue, stepper, config
        self._drawn: dict[int, Drawn] = {}

    def retry(self) -> None:
        """An attempt at a step begins. Of one that did not fit into memory nothing is left but what was drawn ahead,
        since the policy that drew it may be gone."""
        if not self.config.rollout.ahead:
            self._drawn.clear()
        self.queue.drop()

    def of(self, step: int) -> Drawn:
        following = step < self.config.steps and self.config.rollout.ahead
        for n in range(step, step + following + 1):
            if n not in self._drawn:
                self._drawn[n] = self._draw(n, n == step)
        return self._drawn[step]

    def forget(self, step: int) -> None:
        del self._drawn[step]

    def _draw(self, step: int, first: bool) -> Drawn:
        # A run that goes on has lost what was drawn ahead for its first step, and draws it again by the same policy.
        again = first and self.stepper.remembers
        with self.stepper.previous() if again else contextlib.nullcontext():
            groups = self.draw(step)
        updates = self.stepper.previous_updates if again else self.stepper.updates
        return Drawn(groups, self.queue.hand_over(), updates)
