"""PMA: the policy as the mean of the last checkpoints that are kept for it (arXiv:2505.12082), with equal weights.

    checkpoints/average/step-000120.safetensors     the adapter in fp32, or all weights in the types they run in

These files are the only copies. Training continues with the live weights; evaluations and checkpoints take the mean,
which is read one tensor at a time, in fp32. Of adapters it is the mean of their updates and not of their factors, whose
product is another update: the factors are concatenated with weights 1 / K and brought back to the rank of the role.

A file stays as long as a checkpoint that may be resumed needs it. Checkpoints themselves need none: they hold the mean.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from posttrain.config.optimizer import AverageConfig
from posttrain.distributed import shards
from posttrain.distributed.processes import Processes
from posttrain.errors import UserError
from posttrain.model.adapters import low_rank
from posttrain.model.k2 import K2
from posttrain.model.load import keeps_fp32
from posttrain.runs.files import replacing
from posttrain.training import checkpoint
from posttrain.training.policy import POLICY

FOLDER = "average"
"""Under checkpoints/."""
A, B = ".lora_A.weight", ".lora_B.weight"


class CheckpointAverage:
    """The files of one run, and the mean of the newest."""

    def __init__(self, k2: K2, config: AverageConfig, checkpoints: Path, procs: Processes, writer: checkpoint.Writer):
        """`checkpoints` is the directory of the run's checkpoints, which `writer` writes too."""
        self.k2, self.config, self.procs = k2, config, procs
        self.folder, self._checkpoints, self._writer = checkpoints / FOLDER, checkpoints, writer
        self.steps: list[int] = []
        """What the mean is of, oldest first."""
        self.error: float | None = None
        """Of the last mean of adapters, what their rank left out, relative to its size; None: nothing was left out."""
        self._sums: dict[int, str] = {}
        """sha256 of the files by step, on the main process."""

    def keep(self, step: int) -> None:
        """Copies the live policy as it is after this step, if one is due then, and writes it in the background. Asking
        twice is harmless. Where the model is sharded, all processes must ask at once."""
        if step % self.config.every or step <= max(self.steps, default=0):
            return
        self.steps = [*self.steps, step][-self.config.last :]
        if not (self.procs.main or self.procs.sharded):
            return
        self._writer.check(wait=True)  # before there is another copy
        copies: dict[str, Tensor] = {}
        for key, value in self.k2.role_state_dict(POLICY).items():
            whole = shards.whole(value).detach()
            if self.procs.main:
                copies[key] = whole.to("cpu", self._type_of(key), copy=True).contiguous()
        if self.procs.main:
            self._writer.submit(lambda: self._write(step, copies))

    @contextlib.contextmanager
    def averaged(self, alone: bool = False) -> Iterator[None]:
        """Inside the block the policy is the mean, if anything was kept; the live one waits in the CPU's memory.

        `alone`: the main process asks without the others, which is possible where nothing is sharded.
        """
        if not self.steps:
            yield
            return
        parameters = list(self.k2.role_named_parameters(POLICY).values())
        # On the CPU: the GPU may have no room for a second copy of all weights.
        live = [shards.own(parameter).detach().to("cpu", copy=True) for parameter in parameters]
        try:
            self._load_mean(alone)
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(parameters, live):
                    shards.own(parameter).copy_(value)
                shards.spread(parameters)

    def metrics(self) -> dict[str, float | None]:
        """Of the last mean; nothing before there is one."""
        if not self.steps:
            return {}
        error = {} if self.error is None else {"average_error": self.error}
        return {"average_checkpoints": len(self.steps), **error}

    def state(self) -> dict[str, Any]:
        """For a checkpoint, on the main process: what its mean is of."""
        self._writer.check(wait=True)
        return {"steps": self.steps, "sha256": [self._sums[step] for step in self.steps]}

    def restore(self, state: Mapping[str, Any], step: int) -> None:
        """Continues from a checkpoint of this step. Raises UserError if a file that its mean is of is gone or damaged.
        Later files are of steps that will be made again, and are removed."""
        self.steps = list(state["steps"])
        self._sums = dict(zip(self.steps, state["sha256"]))
        problem = None
        if self.procs.main:
            for kept in self._kept():
                if kept > step:
                    self._path(kept).unlink()
            problem = next(filter(None, map(self._problem, self.steps)), None)
        if problem := self.procs.from_main(problem):
            raise UserError(
                f"{problem}, and optim.average needs it to continue after step {step}; restore it, or branch off with"
                f" model.start: {self._checkpoints}/step-{step:06d} and another output"
            )

    # ---- files --------------------------------------------------------------------------------------------------

    def _write(self, step: int, tensors: dict[str, Tensor]) -> None:
        path = self._path(step)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                save_file(tensors, temporary)
        except (OSError, SafetensorError) as error:
            reason = "no space left; free some or lower optim.average.last" if checkpoint.is_full(error) else error
            raise UserError(f"{path}: cannot be saved: {reason}; checkpoints are whole: run again with --resume") from (
                error
            )
        self._sums[step] = checkpoint.sha256(path)
        self._prune(step)

    def _prune(self, now: int) -> None:
        """Removes files that no mean needs any more: not that of now, nor that of a checkpoint that is on disk."""
        kept = self._kept()
        needed: set[int] = set()
        for end in (now, *checkpoint.steps_in(self._checkpoints)):
            needed.update([step for step in kept if step <= end][-self.config.last :])
        for step in kept:
            if step not in needed:
                self._path(step).unlink()
                self._sums.pop(step, None)

    def _kept(self) -> list[int]:
        """The steps of the files on disk, in order."""
        steps = []
        for path in self.folder.glob("step-*.safetensors"):
            match = checkpoint.STEP.fullmatch(path.stem)
            if match is not None:
                steps.append(int(match[1]))
        return sorted(steps)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}.safetensors"

    def _problem(self, step: int) -> str | None:
        path = self._path(step)
        if not path.is_file():
            return f"{path} is missing"
        return None if checkpoint.sha256(path) == self._sums[step] else f"{path} has changed"

    def _type_of(self, key: str) -> torch.dtype:
        # fp32 holds nothing of weights that the network rounds to bf16 before it uses them.
        exact = self.k2.roles[POLICY] is not None or keeps_fp32(key)
        return torch.float32 if exact else self.k2.dtype

    # ---- the mean -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _load_mean(self, alone: bool) -> None:
        """Puts the mean into the policy. The main process reads and computes; the others receive tensor by tensor."""
        if self.procs.main:
            self._writer.check(wait=True)
        shared = self.procs.size > 1 and not alone
        if shared:
            # A file that cannot be read must end all, and not leave the others waiting for its tensors.
            problem = self._unreadable() if self.procs.main else None
            if problem := self.procs.from_main(problem):
                raise UserError(problem)
        parameters = self.k2.role_named_parameters(POLICY)
        means = self._means() if self.procs.main else None
        for key in self._order(parameters):
            parameter = parameters[key]
            own = shards.own(parameter)
            if means is not None:
                name, mean = next(means)
                assert name == key
            else:
                mean = own.new_empty(shards.shape(parameter), dtype=torch.float32)
            if shared:
                mean = mean.to(own.device).contiguous()
                dist.broadcast(mean, 0)
            own.copy_(shards.part(mean, parameter))
        if means is not None:
            next(means, None)  # ends it, so that the error is known and the files are closed
        shards.spread(list(parameters.values()))
        if shared:
            self.error = self.procs.from_main(self.error)

    def _order(self, parameters: Mapping[str, Tensor]) -> list[str]:
        """Factor B of a layer follows A, as one mean makes both."""
        if self.k2.roles[POLICY] is None:
            return list(parameters)
        order = []
        for key in parameters:
            if key.endswith(A):
                order += [key, key.removesuffix(A) + B]
        return order

    def _unreadable(self) -> str | None:
        try:
            with self._opened():
                return None
        except UserError as error:
            return str(error)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[list[Any]]:
        """The files, of which each tensor is read when it is asked for."""
        with contextlib.ExitStack() as stack:
            files = []
            for step in self.steps:
                try:
                    files.append(stack.enter_context(safe_open(self._path(step), "pt")))
                except (OSError, SafetensorError) as error:
                    raise UserError(f"{self._path(step)}: cannot be read: {error}; continue with --resume") from error
            yield files

    def _means(self) -> Iterator[tuple[str, Tensor]]:
        """The mean by name, fp32, on the device of the policy; in the order of `_order`."""
        role, device = self.k2.roles[POLICY], self.k2.device
        parameters = self.k2.role_named_parameters(POLICY)
        truncated: list[low_rank.Truncated] = []
        with self._opened() as files:
            for key in self._order(parameters):
                if role is None:
                    yield key, mean_of(file.get_tensor(key).to(device) for file in files)
                elif key.endswith(A):
                    layer = key.removesuffix(A)
                    factors = []
                    for file in files:
                        factors.append((file.get_tensor(layer + B).to(device), file.get_tensor(layer + A).to(device)))
                    b, a, cut = mean_of_updates(factors, role.rank)
                    truncated += [] if cut is None else [cut]
                    yield layer + A, a
                    yield layer + B, b
        self.error = low_rank.error_of(truncated) if truncated else None


def mean_of(tensors: Iterable[Tensor]) -> Tensor:
    """The mean of tensors of one shape with equal weights, in fp32 whatever their type; they are needed one by one."""
    total, count = torch.zeros(()), 0
    for tensor in tensors:
        total = tensor.float().clone() if count == 0 else total.add_(tensor)
        count += 1
    return total / count


def mean_of_updates(factors: Sequence[low_rank.Factors], rank: int) -> tuple[Tensor, Tensor, low_rank.Truncated | None]:
    """B (out, rank) and A (rank, in) of the mean of the updates B_i A_i, as near as that rank allows, and what was cut.

    A single update stays as it is, and then nothing was cut.
    """
    if len(factors) == 1:
        return *factors[0], None
    b, a = low_rank.concatenate(factors, [1 / len(factors)] * len(factors))
    cut = low_rank.truncate(b, a, rank)
    missing = rank - cut.b.shape[1]  # a layer narrower than the rank
    b = torch.nn.functional.pad(cut.b, (0, missing))
    a = torch.nn.functional.pad(cut.a, (0, 0, 0, missing))
    return b, a, cut
