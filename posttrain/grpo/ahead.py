"""When and where a step's images are drawn: in the step itself, or a step before, so that judges score them while it
trains; and by all processes, or by some that do nothing else (`rollout.gpus`).

    rollouts = Rollouts(draw, queue, stepper, config, procs)
    for step in steps:
        for attempt in micro_batch.attempts(stepper):
            rollouts.retry()
            with attempt:
                drawn = rollouts.of(step)
                ...                                         # drawn.gather(queue), score
                groups = rollouts.to_train(drawn, costs)
                rollouts.follow(step)
                ...                                         # update on these groups
        rollouts.forget(step)

Where all processes do both, the next step is drawn before this one's scores are waited for. With `rollout.gpus` it is
drawn after them, by some processes while the others train: the update of the adapter then needs no copy to those that
draw, since all processes take part in the sum of the gradients, and so all make the same update.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from posttrain.distributed.processes import Processes, deal
from posttrain.errors import UserError
from posttrain.grpo.config import GRPOConfig
from posttrain.training.stepper import Stepper
from rewards.background import ScoreQueue
from rewards.base import Scores

if TYPE_CHECKING:  # the loop stands above this
    from posttrain.grpo.update import Group


def roles(config: GRPOConfig, procs: Processes) -> tuple[range, range]:
    """The ranks that draw and those that train: all, or the last ones and the others.

    Raises UserError if rollout.gpus leaves none to train, or the model is sharded and rollout does not go with that.
    """
    gpus = config.rollout.gpus
    if config.rollout.keep_graphs and procs.sharded:
        raise UserError(f"rollout.keep_graphs: does not go with {procs.engine}; set it to false")
    if gpus == 0:
        return range(procs.size), range(procs.size)
    if procs.sharded:
        raise UserError(
            f"rollout.gpus: is {gpus}, but {procs.engine} takes all processes through the model; set it to 0"
        )
    if gpus >= procs.size:
        raise UserError(
            f"rollout.gpus: is {gpus} of {procs.size} processes, which leaves none to train; start more or lower it"
        )
    return range(procs.size - gpus, procs.size), range(procs.size - gpus)


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

    def __init__(
        self,
        draw: Callable[[int], list[Group]],
        queue: ScoreQueue,
        stepper: Stepper,
        config: GRPOConfig,
        procs: Processes,
    ):
        """`draw` gives this process's groups of a step, drawn by the policy as it is, with their images in `queue`."""
        self.draw, self.queue, self.stepper, self.config, self.procs = draw, queue, stepper, config, procs
        _, self.trainers = roles(config, procs)
        self._drawn: dict[int, Drawn] = {}

    def retry(self) -> None:
        """An attempt at a step begins. Of one that did not fit into memory nothing is left but what was drawn ahead,
        since the policy that drew it may be gone."""
        if not self.config.rollout.ahead:
            self._drawn.clear()
        self.queue.drop()

    def of(self, step: int) -> Drawn:
        if step not in self._drawn:
            # A run that goes on has lost what was drawn ahead for its first step: the same policy draws it again.
            with self.stepper.previous():
                groups = self.draw(step)
                if self.stepper.remembers:
                    self.procs.all_gather(None)  # where parameters are sharded all must be here to put them back
            updates = self.stepper.previous_updates if self.stepper.remembers else self.stepper.updates
            self._drawn[step] = Drawn(groups, self.queue.hand_over(), updates)
        # Before this step's scores are waited for: judges then have the images of two steps.
        if not self.config.rollout.gpus:
            self._follow(step)
        return self._drawn[step]

    def to_train(self, drawn: Drawn, costs: Sequence[float]) -> list[Group]:
        """The groups that this process trains on, wherever they were drawn. `costs` are of all groups of the step."""
        if not self.config.rollout.gpus:
            return drawn.groups
        # Over the CPU, as messages go over gloo.
        parcels = {}
        for rank, hand in zip(self.trainers, deal(costs, len(self.trainers))):
            part = [_moved(group, torch.device("cpu")) for group in drawn.groups if group.index in hand]
            if part:
                parcels[rank] = part
        received: dict[int, Group] = {}
        for part in self.procs.deliver(parcels).values():
            for group in part:
                received[group.index] = _moved(group, self.procs.device)
        return [received[i] for i in self.procs.local_indices_by_cost(costs, self.trainers)]

    def follow(self, step: int) -> None:
        """Before an update: keeps the policy that draws the next step, and with rollout.gpus has it drawn."""
        if self.config.rollout.gpus:
            self._follow(step)
        self.stepper.remember()

    def forget(self, step: int) -> None:
        del self._drawn[step]

    def _follow(self, step: int) -> None:
        if self.config.rollout.ahead and step < self.config.steps and step + 1 not in self._drawn:
            groups = self.draw(step + 1)
            self._drawn[step + 1] = Drawn(groups, self.queue.hand_over(), self.stepper.updates)


def _moved(value: Any, device: torch.device) -> Any:
    """The same with its tensors on a device; single numbers, such as times, stay on the CPU."""
    if isinstance(value, Tensor):
        return value.to(device) if value.ndim else value
    if isinstance(value, list):
        return [_moved(item, device) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        moved = {field.name: _moved(getattr(value, field.name), device) for field in fields(value)}
        return replace(value, **moved)
    return value
