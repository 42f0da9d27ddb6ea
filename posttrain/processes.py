"""Several processes that train as one: which groups are whose, and sums and decisions over all of them.

Groups are dealt out whole, g to process g mod N, and every seed is one of global indices. So any number of processes
draws the same images, and their summed gradients give the same update within rounding.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from rewards.base import Scores


class OutOfMemoryElsewhere(torch.OutOfMemoryError):
    """Another process has run out of memory."""


@dataclass(frozen=True)
class _NoRoom:
    """What a process says in place of its value."""


class Processes:
    """The processes that a launcher started, or the only one."""

    def __init__(self) -> None:
        launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
        self.state = PartialState(cpu=True) if launched and not torch.cuda.is_available() else PartialState()
        self.rank, self.size = self.state.process_index, self.state.num_processes
        self.main = self.rank == 0
        self.summed = False
        """Set when tensors are summed over processes."""

    @property
    def device(self) -> torch.device:
        return self.state.device or torch.device("cpu")

    def alone(self) -> Processes:
        """This process as if it were the only one, for what the others take no part in."""
        other = copy.copy(self)
        other.rank, other.size, other.main = 0, 1, True
        return other

    def mine(self, count: int) -> range:
        """Which of `count` things are this process's."""
        return range(self.rank, count, self.size)

    def dealt_back(self, mine: Sequence[Any]) -> list[Any]:
        """The inverse of `mine`: everyone's things in their global order."""
        parts = self.each(list(mine))
        return [parts[i % self.size][i // self.size] for i in range(sum(map(len, parts)))]

    def each(self, value: Any) -> list[Any]:
        """Everyone's value, by rank. Raises OutOfMemoryElsewhere if one of them has called `tell_out_of_memory`."""
        values = gather_object([value]) if self.size > 1 else [value]
        if any(isinstance(v, _NoRoom) for v in values):
            raise OutOfMemoryElsewhere("another process has run out of memory")
        return values

    def tell_out_of_memory(self) -> None:
        """To the others, who are in `each`, or will be."""
        if self.size > 1:
            gather_object([_NoRoom()])

    def from_main(self, value: Any) -> Any:
        """The main process's value, for everyone."""
        return broadcast_object_list([value])[0] if self.size > 1 else value

    def scores(self, mine: Scores | None, group_size: int) -> Scores:
        """The scores of all groups in their global order, from those of each process; None: it has no group.

        The times are the main process's.
        """
        if self.size == 1:
            assert mine is not None
            return mine
        parts = self.each(mine)
        held = [part for part in parts if part is not None]
        merged = Scores.concat(held)
        ranks = [
            rank for rank, part in enumerate(parts) for _ in range(len(part.values_NK) // group_size if part else 0)
        ]
        turns = [sum(r == rank for r in ranks[:i]) for i, rank in enumerate(ranks)]
        order = sorted(range(len(ranks)), key=lambda i: turns[i] * self.size + ranks[i])
        scores = merged.take([g * group_size + j for g in order for j in range(group_size)])
        scores.waited_seconds, scores.scoring_seconds = held[0].waited_seconds, held[0].scoring_seconds
        return scores

    def any(self, flag: bool) -> bool:
        return any(self.each(flag))

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Each parameter's gradient becomes the sum over processes; one that some process lacks counts as zero."""
        if self.size == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.sum(parameter.grad for parameter in parameters if parameter.grad is not None)

    def sum(self, tensors: Iterable[Tensor]) -> None:
        """Each tensor becomes the sum over processes."""
        self.summed = self.size > 1
        for tensor in tensors if self.size > 1 else ():
            dist.all_reduce(tensor)
