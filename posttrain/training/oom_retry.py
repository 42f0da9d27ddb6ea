"""A step that does not fit into memory is begun once more with half of micro_batch, and then not again.

A step's prompts are drawn once (source.py), its other draws come from seeds of global indices, and micro_batch sets
memory and not the result, so the second attempt is the step that the first would have been, within rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch

from posttrain.distributed.processes import OutOfMemoryElsewhere, Processes
from posttrain.errors import UserError
from posttrain.training.stepper import Stepper

T = TypeVar("T")


class DoesNotFit(UserError):
    """A step does not fit into memory, and nothing more can be done about it."""


class Batched(Protocol):
    """The section of a recipe that has it."""

    micro_batch: int


class Memory:
    """`fit(stepper, body, ...)` is `body(...)`; see above. `field` names the setting to the user."""

    def __init__(self, settings: Batched, field: str, procs: Processes, say: Callable[[str], None]):
        self.settings, self.field, self.procs, self.say = settings, field, procs, say
        self.halved = False

    def fit(self, stepper: Stepper, body: Callable[..., T], *arguments: Any) -> T:
        """What `body` returns, whose one lasting effect is an update of `stepper` at its end.

        All processes begin again together, whichever of them has no room. Raises DoesNotFit if that has happened
        before, where micro_batch is 1, and when it is too late: after gradients were exchanged, and where passes are
        agreed upon (FSDP2).
        """
        updates, self.procs.summed = stepper.updates, False
        try:
            result = body(*arguments)
            self.procs.each(None)
            return result
        except torch.OutOfMemoryError as error:
            told = " ".join(str(error).split())
            too_late = self.procs.summed or self.procs.sharded or stepper.updates != updates
            if not too_late and not isinstance(error, OutOfMemoryElsewhere):
                self.procs.tell_out_of_memory()
        # Here, and not in the handler, whose traceback holds on to the tensors that are in the way.
        size = self.settings.micro_batch
        if self.halved or too_late or size == 1:
            raise DoesNotFit(
                f"{self.field}: a step does not fit into memory with {size} ({told}); lower it, draw smaller pictures"
                " or use more or larger GPUs, then go on with --resume"
            )
        self.halved, self.settings.micro_batch = True, size // 2
        stepper.optimizer.zero_grad(set_to_none=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.say(
            f"warning: a step does not fit into memory with {self.field} {size}; it is begun again with {size // 2},"
            " which the rest of this run keeps"
        )
        return self.fit(stepper, body, *arguments)
