"""What all training loops share: when to save, when to stop, and how to step safely."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from posttrain.config import clipping
from posttrain.config.sections import CheckpointConfig, OptimConfig
from posttrain.distributed import shards
from posttrain.errors import UserError
from posttrain.runs.stop import StopSignals
from posttrain.training import muon
from posttrain.training.optim import flatten_optimizer, make_optimizer, median_root, restore_optimizer, set_group

if TYPE_CHECKING:  # methods stand above training
    from posttrain.grpo.config import LossConfig
    from posttrain.training.pma import CheckpointAverage

MAX_SKIPPED = 10
"""Updates in a row whose gradient was not finite, after which a run ends."""

RATIO_REMEDY = "use model.dtype float32, or raise loss.clip_low and loss.clip_high"
"""What to do if the policy that trains is not quite the one that sampled."""


class Loop:
    """Training steps first+1 .. total. Its body asks `save_due` once, at the end of each step, and saves if so.

    A checkpoint is due by count, by time, at the end and when a signal asks to stop: SIGTERM and Ctrl-C let the step in
    progress finish and end the loop. So does `end`; `save_next` only makes a checkpoint due.
    """

    def __init__(self, first: int, total: int, config: CheckpointConfig, anywhere: Callable[[bool], bool] = bool):
        """`anywhere` says whether something is so in any process: a signal to one of them stops all."""
        self.first, self.total, self.config, self.anywhere = first, total, config, anywhere
        self.stopped: signal.Signals | None = None
        self.done = first
        """The last step that was finished."""
        self._signals = StopSignals()
        self._due = self._last = False
        self._saved_at = 0.0

    def __iter__(self) -> Iterator[int]:
        self._saved_at = time.monotonic()
        with self._signals:
            for step in range(self.first + 1, self.total + 1):
                yield step
                self.done = step
                if self._last:
                    break
        self.stopped = self._signals.received or self.stopped

    def save_due(self, step: int) -> bool:
        """Whether to save after this step. All processes must ask at once."""
        # The answer that all get counts: a signal that comes after it is one for the next step.
        stopping = self.anywhere(self._signals.received is not None)
        if stopping and self._signals.received is None:
            self.stopped = signal.SIGTERM  # another process was told to stop
        minutes = self.config.minutes
        late = minutes and self.anywhere(time.monotonic() - self._saved_at > 60 * minutes)
        counted = self.config.every and step % self.config.every == 0
        self._last = self._last or stopping or step == self.total
        due = bool(self._last or late or counted or self._due)
        if due:
            self._saved_at, self._due = time.monotonic(), False
        return due

    def save_next(self) -> None:
        """The step in progress gets a checkpoint."""
        self._due = True

    def end(self) -> None:
        """The step in progress is the last."""
        self._last = True


def check_ratio(error: float, config: LossConfig) -> None:
    """Raises UserError if, before its first update, a ratio of the policies is further off 1 than the smaller clip."""
    clip = min(config.clip_low, config.clip_high)
    if not error <= clip:
        raise UserError(
            f"loss: before the first update a ratio is {error:.2g} off 1, more than the clip of {clip:g}, so the policy"
            f" that trains is not the one that sampled; {RATIO_REMEDY}"
        )


class Clock:
    """Seconds between the laps of a step, as metrics `seconds/NAME`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = 0.0

    def start(self) -> None:
        """A step begins."""
        self.seconds, self._last = {}, time.perf_counter()

    def lap(self, name: str) -> None:
        """What went by since the lap before was this part of the step, which may have several."""
        now, part = time.perf_counter(), f"seconds/{name}"
        self.seconds[part], self._last = self.seconds.get(part, 0.0) + now - self._last, now


class Stepper:
    """An optimiser over some parameters: warm-up, clipping, and gradients that are not finite left out and counted.

    With `ema` it keeps an exponential moving average of the parameters, which is evaluated and exported in their
    place and never sampled from. Its decay after n updates is at most (1 + n) / (10 + n), so that it soon forgets the
    start. With `average` a mean of the run's files takes that place (pma.py). With `previous` it also keeps the
    parameters as they were when `remember` was called last.
    """

    def __init__(
        self, parameters: Sequence[Tensor] | Mapping[str, Tensor], config: OptimConfig, previous: bool = False
    ):
        """Muon needs the parameters by name."""
        self.config = config
        self.parameters = list(parameters.values() if isinstance(parameters, Mapping) else parameters)
        matrices: list[Tensor] = []
        if config.kind == "muon":
            matrices, others = muon.split(parameters if isinstance(parameters, Mapping) else {})
            self.parameters = [*matrices, *others]  # in the order of the optimiser's groups
        self._own = [shards.own(p) for p in self.parameters]
        self.optimizer: torch.optim.Optimizer
        if matrices:
            own, count = self._own, len(matrices)
            self.optimizer = muon.Muon(own[:count], own[count:], matrices, config)
        else:
            self.optimizer = make_optimizer(self._own, config)
        if any(shards.is_parted(p) for p in self.parameters):
            if config.kind == "adamw8bit":
                raise UserError(f"optim.kind: sharding does not go with {config.kind}; use adamw")
            # foreach would take another copy of all parameters.
            self.optimizer.param_groups[-1]["foreach"] = False
        self.rate = 1.0
        """Share of the learning rate to take, for a method that lowers it."""
        self.updates = self.skipped = self.skipped_in_a_row = self.clipped = self.spiked = 0
        self.norms: list[float] = []
        """The newest norms of gradients before clipping, with which the next one is compared."""
        self._average = [p.detach().clone() for p in self._own] if config.ema else None
        self.from_disk: CheckpointAverage | None = None
        """The mean of config.average, which `Training` sets."""
        self._previous = [p.detach().clone() for p in self._own] if previous else None
        self.previous_updates = 0
        """Updates that the remembered parameters had seen."""

    def step(self) -> float:
        """One update with the accumulated gradients, which are then cleared; returns their norm before clipping.

        Raises UserError when ten gradients in a row were not finite.
        """
        total = shards.norm(self.parameters)
        # The optimiser sees this process's parts, and backward has left gradients at the whole parameters.
        for parameter, own in zip(self.parameters, self._own):
            if parameter.grad is not None:
                own.grad = shards.own(parameter.grad)
        norm = total.item()  # waits for the GPU
        self.updates += 1
        if math.isfinite(norm):
            self.skipped_in_a_row = 0
            # A spike is left out, not clipped: see muon.SPIKE. It still counts among the norms, so that training goes
            # ahead if all become larger.
            spike = norm > clipping.limit(self.norms, muon.SPIKE if self.config.kind == "muon" else 0.0)
            if spike:
                self.spiked += 1
            else:
                self._clip(norm)
                self._update()
            if norm > 0:  # a batch without any gradient says nothing about the usual norm
                self.norms = [*self.norms, norm][-clipping.WINDOW :]
        else:
            self.skipped += 1
            self.skipped_in_a_row += 1
        for parameter, own in zip(self.parameters, self._own):
            shards.clear(parameter, own)
        if self.skipped_in_a_row >= MAX_SKIPPED:
            raise UserError(
                f"optim.lr: {MAX_SKIPPED} gradients in a row were not finite; lower it (it is {self.config.lr:g})"
            )
        return norm

    def _update(self) -> None:
        warm = min(1.0, self.updates / max(1, self.config.warmup_steps))
        rate = self.config.lr * warm * self.rate
        for group in self.optimizer.param_groups:
            set_group(group, self.config, rate)
        self.optimizer.step()
        if self._average is not None:
            decay = min(self.config.ema, (1 + self.updates) / (10 + self.updates))
            torch._foreach_lerp_(self._average, [p.detach() for p in self._own], 1 - decay)
        shards.spread(self.parameters)

    def _clip(self, norm: float) -> None:
        """Scales the gradients down where their norm is far above those before it."""
        limit = clipping.limit(self.norms, self.config.clip_factor)
        if norm > limit:
            for own in self._own:
                if own.grad is not None:
                    own.grad.mul_(limit / norm)
            self.clipped += 1

    def metrics(self, prefix: str = "") -> dict[str, float]:
        """How many updates were clipped so far; `sqrt_v`, the median root of AdamW's second moment over a sample of the
        weights that this process updates; and `eps_share`, the share by which optim.eps lowers the step of that median
        weight. The last two are missing before there is a gradient. Of Muon also how many updates were left out for
        their norm, the newest norm over the median of those before, and what the optimiser says."""
        metrics: dict[str, float] = {f"{prefix}clipped_updates": self.clipped}
        if isinstance(self.optimizer, muon.Muon):
            metrics[f"{prefix}spiked_updates"] = self.spiked
            if math.isfinite(usual := clipping.limit(self.norms[:-1], 1.0)):
                metrics[f"{prefix}grad_norm_ratio"] = self.norms[-1] / usual
            for name, value in self.optimizer.metrics().items():
                metrics[f"{prefix}{name}"] = value
        if (root := median_root(self.optimizer)) is not None:
            metrics[f"{prefix}sqrt_v"] = root
            metrics[f"{prefix}eps_share"] = self.config.eps / (root + self.config.eps)
        return metrics

    @property
    def averages(self) -> bool:
        """Whether evaluations and exports take an average of some kind."""
        return bool(self.config.ema) or self.config.average is not None

    @contextlib.contextmanager
    def averaged(self, alone: bool = False) -> Iterator[None]:
        """Inside the block the parameters hold their average, if one is kept. For `alone` see pma.py."""
        if self.from_disk is not None:
            with self.from_disk.averaged(alone):
                yield
            return
        self._swap(self._average)
        try:
            yield
        finally:
            self._swap(self._average)

    @property
    def remembers(self) -> bool:
        return self._previous is not None

    @torch.no_grad()
    def remember(self) -> None:
        """Keeps the parameters as they are now, if any are kept."""
        if self._previous is not None:
            torch._foreach_copy_(self._previous, self._own)
            self.previous_updates = self.updates

    @contextlib.contextmanager
    def previous(self) -> Iterator[None]:
        """Inside the block the parameters are the remembered ones, if any are kept."""
        self._swap(self._previous)
        try:
            yield
        finally:
            self._swap(self._previous)

    @torch.no_grad()
    def _swap(self, others: list[Tensor] | None) -> None:
        if others is None:
            return
        for parameter, other in zip(self._own, others):
            # One tensor at a time, so that no third copy of all parameters is needed.
            held = parameter.clone()
            parameter.copy_(other)
            other.copy_(held)
        shards.spread(self.parameters)

    def kept(self) -> list[Tensor]:
        """Its memory besides the parameters: the optimiser's moments, and copies of the parameters if there are any."""
        kept = [*(self._average or []), *(self._previous or [])]
        for state in self.optimizer.state.values():
            kept += [value for value in state.values() if isinstance(value, Tensor)]
        return kept

    def flattened(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The optimiser's state for a checkpoint, whichever processes hold it; see `flatten_optimizer`."""
        tensors, state = flatten_optimizer(self.optimizer)
        return {key: shards.joined(value, self._of(key)) for key, value in tensors.items()}, state

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Put back what `flattened` gave. Raises UserError; see `restore_optimizer`."""
        parts = {key: shards.part(value, self._of(key)) for key, value in tensors.items()}
        own = {key: value for key, value in self.optimizer.param_groups[-1].items() if key == "foreach"}
        restore_optimizer(self.optimizer, parts, state)
        self.optimizer.param_groups[-1] |= own  # however it was where it was saved

    def _of(self, key: str) -> Tensor:
        """The parameter that an entry of the optimiser's state belongs to."""
        index = key.partition(".")[0]
        return self.parameters[int(index)] if index.isdigit() else torch.empty(0)

    def counters(self) -> dict[str, Any]:
        names = ["updates", "skipped", "skipped_in_a_row", "clipped", "norms"]
        names += ["previous_updates"] if self.remembers else []
        names += ["spiked"] if self.config.kind == "muon" else []
        return {name: getattr(self, name) for name in names}

    def restore_counters(self, counters: dict[str, Any]) -> None:
        self.updates, self.skipped = counters["updates"], counters["skipped"]
        self.skipped_in_a_row = counters["skipped_in_a_row"]
        self.clipped, self.norms = counters.get("clipped", 0), counters.get("norms", [])  # older checkpoints have none
        self.spiked = counters.get("spiked", 0)
        self.previous_updates = counters.get("previous_updates", self.updates)
