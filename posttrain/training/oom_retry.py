"""On out-of-memory a step is repeated once with half the micro-batch, which the rest of the run keeps.

    micro_batch = MicroBatch(config.micro_batch, "micro_batch", procs)
    for step in steps:
        for attempt in micro_batch.attempts(stepper):
            with attempt:
                ...              # the step, in micro-batches of `micro_batch.size`

A repeated step is the same step within rounding: its prompts are drawn once (prompt_source.py), its other draws come
from seeds of global indices, and the micro-batch sets memory and not the result.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from posttrain.distributed.processes import OutOfMemoryElsewhere, Processes
from posttrain.errors import UserError
from posttrain.log import log
from posttrain.training.stepper import Stepper


class DoesNotFit(UserError):
    """A step does not fit into memory, and nothing more can be done about it."""


class MicroBatch:
    """Images (pairs, groups' images) in one forward of the model. `field` names the setting to the user."""

    def __init__(self, size: int, field: str, procs: Processes, halve: bool = True):
        """Without `halve` the first attempt is the last."""
        self.size, self.field, self.procs = size, field, procs
        self._may_halve = halve

    def attempts(self, stepper: Stepper) -> Iterator[Attempt]:
        """One attempt, and a second one if that runs out of memory in any process.

        An attempt's only lasting effect must be one update of `stepper` at its end. Raises DoesNotFit where a second
        one has no use (a step was halved before, or micro_batch is 1) or comes too late: after gradients were
        exchanged, and where processes agree on every pass through the model (FSDP2).
        """
        for again in (False, True):
            attempt = Attempt(stepper, self.procs, again)
            yield attempt
            if attempt.fitted:
                return
            # Here, and not in `__exit__`, where the error's traceback still holds the tensors that are in the way.
            if not self._may_halve or attempt.too_late or self.size == 1:
                raise DoesNotFit(
                    f"{self.field}: a step does not fit into memory with {self.size} ({attempt.error}); lower it, draw"
                    " smaller images or use more or larger GPUs, then continue with --resume"
                )
            half = self.size // 2
            log.warning(
                f"a step does not fit into memory with {self.field} {self.size}; it is retried with {half}, which"
                " the rest of this run keeps"
            )
            self.size, self._may_halve = half, False


class Attempt:
    """A block that may run out of memory, in this process or in another one."""

    def __init__(self, stepper: Stepper, procs: Processes, again: bool):
        self.stepper, self.procs = stepper, procs
        self.again = again
        """An attempt before this one did not fit."""
        self.fitted = self.too_late = False
        self.error = ""
        self._updates = stepper.updates

    def __enter__(self) -> Attempt:
        self.procs.summed = False
        if self.again:  # gradients and cached memory of the attempt before are in the way
            self.stepper.optimizer.zero_grad(set_to_none=True)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        try:
            if error is None:
                self.procs.all_gather(None)  # raises if another process has no room
                self.fitted = True
                return False
        except OutOfMemoryElsewhere as elsewhere:
            error = elsewhere
        if not isinstance(error, torch.OutOfMemoryError):
            return False
        self.error = " ".join(str(error).split())
        updated = self.stepper.updates != self._updates
        self.too_late = self.procs.summed or self.procs.sharded or updated
        if not self.too_late and not isinstance(error, OutOfMemoryElsewhere):
            self.procs.tell_out_of_memory()
        return True
