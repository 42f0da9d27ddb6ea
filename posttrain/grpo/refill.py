"""Groups that teach nothing are replaced in the same step by groups of other prompts (`groups.refill`).

DAPO's dynamic sampling (arXiv:2503.14476, section 3.2) leaves out groups whose answers are all right or all wrong, and
samples until the batch is full. Here a step has a limit of further groups, and their prompts come from the pool, which
is told of every group that was drawn.

Each of the batch's P places keeps its image size, whichever group it has. The groups drawn for it have the indices
place, place + P, place + 2 P, ..., which seed their noise, so a step does not depend on the number of processes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from posttrain.distributed.processes import Processes
from posttrain.errors import UserError, counted
from posttrain.grpo.config import GroupsConfig
from posttrain.grpo.update import Group
from posttrain.training.evaluate import gather_scores
from posttrain.training.prompt_source import PromptSource
from posttrain.training.stepper import Clock
from prompts.records import PromptRecord
from rewards.background import ScoreQueue
from rewards.base import Scores


def check_prompts(groups: GroupsConfig, source: PromptSource) -> None:
    """Raises UserError where every step draws all prompts, so that there is none to refill it from."""
    if groups.refill and len(source.records) == groups.prompts_per_step:
        raise UserError(
            f"groups.refill: is {groups.refill}, but each step draws all of prompts.train"
            f" ({counted(len(source.records), 'prompt')}); add prompts or set it to 0"
        )


@dataclass
class Refill:
    settings: GroupsConfig
    source: PromptSource
    draw: Callable[[int, Mapping[int, PromptRecord]], list[Group]]
    """Draws this process's part of the groups with these indices and prompts in a step; its images go to the queue."""
    teaching: Callable[[Scores], Tensor]
    """(P,) bool: which of the groups that these scores are of have a signal."""
    queue: ScoreQueue
    procs: Processes
    clock: Clock

    def __call__(self, step: int, groups: list[Group], scores: Scores) -> tuple[list[Group], Scores, list[int]]:
        """Draws further groups while some of the step's teach nothing and there may be more.

        `groups` are this process's of the P that were drawn for the step, `scores` are of all of them by index. Returns
        this process's groups of the batch, with their places as indices; the scores of all groups drawn, in the order
        in which the source gave their prompts; and which row of these is the group of each of the P places.
        """
        places = self.settings.prompts_per_step
        indices = list(range(places))
        chosen = indices
        for attempt in itertools.count(1):
            signal = self.teaching(scores).tolist()
            # Of each place the first group with a signal; where there is none yet, the first one.
            chosen = list(range(places))
            flat = set(chosen)
            for index, teaches in zip(indices, signal):
                place = index % places
                if teaches and place in flat:
                    chosen[place] = index
                    flat.discard(place)
            groups = [group for group in groups if group.index in chosen]  # the others take memory
            count = min(len(flat), places + self.settings.refill - len(indices))
            # Where nothing at all was scored a judge is out of order, and would not score more.
            records = self.source.redraw(step, count) if count and scores.valid_NK.any() else []
            if not records:
                break
            self.clock.lap("score")
            drawn = {place + attempt * places: record for place, record in zip(sorted(flat), records)}
            further = self.draw(step, drawn)
            self.clock.lap("sample")
            scores = self._joined(scores, further)
            groups, indices = groups + further, [*indices, *drawn]
        # A group takes the index of its place, by which advantages are looked up.
        batch = [replace(group, index=group.index % places) for group in groups]
        return batch, scores, list(map(indices.index, chosen))

    def _joined(self, scores: Scores, further: list[Group]) -> Scores:
        """The scores so far and, after them, those of the further groups of all processes."""
        own = self.queue.gather() if further else None
        places = [group.index for group in further]
        found = gather_scores(self.procs, own, self.settings.group_size, places)
        joined = Scores.concat([scores, found])
        joined.waited_seconds = scores.waited_seconds + found.waited_seconds
        joined.scoring_seconds = scores.scoring_seconds + found.scoring_seconds
        return joined
