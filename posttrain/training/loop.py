"""What every training method does around its steps: resume, evaluate, save, keep the best, stop, sum up.

training = Training("grpo", config, run, procs, k2, stepper, evaluator, saved)
before = training.begin()
for step in training.steps():
    ...                          # the method's own: draw, score, update, run.log
training.finish()
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, Protocol

from torch import Tensor

from posttrain.config.sections import CheckpointConfig, EvalConfig, ModelConfig, OptimConfig
from posttrain.distributed import shards
from posttrain.distributed.processes import Processes
from posttrain.model.k2 import K2
from posttrain.report.page import write_report
from posttrain.runs import startup
from posttrain.runs.guard import check_run
from posttrain.runs.run import Run, RunConfig, peak_memory
from posttrain.training import checkpoint, early_stopping, gpu_health
from posttrain.training.checkpoint import Checkpoint
from posttrain.training.evaluate import Evaluation, Evaluator
from posttrain.training.policy import POLICY, described, file_of, load_policy
from posttrain.training.stepper import Loop, Stepper
from rewards.load import record
from rewards.serve import ServerSpec, serve


class ServedConfig(RunConfig, Protocol):
    """The settings of any run that may need servers."""

    servers: list[ServerSpec]


class TrainingConfig(ServedConfig, Protocol):
    """What the settings of any method that trains K2 have."""

    steps: int
    model: ModelConfig
    optim: OptimConfig
    eval: EvalConfig
    checkpoint: CheckpointConfig


Urls = dict[str, list[str]]
"""Where each server of a recipe answers."""


def in_run(
    config: ServedConfig, resume: bool, procs: Processes, body: Callable[[Run, Urls], signal.Signals | None]
) -> None:
    """Runs `body` in the run directory, with the recipe's servers up, and writes the report. Ctrl-C is passed on."""
    with Run.create(config, resume, procs.main) as run:
        startup.lap("prepare")
        with serve(config.servers if procs.main else [], run.path / "servers") as urls:
            startup.lap("servers")
            stopped = body(run, procs.from_main(urls))
        if procs.main:
            write_report(run.path)
    if stopped is signal.SIGINT:
        raise KeyboardInterrupt


def resuming(config: RunConfig, resume: bool, procs: Processes) -> bool:
    """Whether to go on from the newest checkpoint: if asked to, and where torchrun restarts what it began itself.

    Raises UserError, in the main process, for a run directory that this cannot be done in.
    """
    if procs.main:
        resume = resume or Run.restarted(config)
        check_run(config, resume)
    return procs.from_main(resume)


Tensors = dict[str, dict[str, Tensor]]
"""By file of a checkpoint."""


def content(k2: K2, stepper: Stepper, further: Tensors) -> tuple[Tensors, dict[str, Any]]:
    """What a checkpoint holds, where it is now, and the JSON of the optimiser."""
    optimizer, state = stepper.flattened()
    tensors = {"optimizer": optimizer, **further, file_of(described(k2)): k2.role_state_dict(POLICY)}
    if stepper.config.ema:
        tensors["live"] = k2.role_state_dict(POLICY)
    return tensors, state


def snapshot(k2: K2, stepper: Stepper, further: Tensors, keep: bool, over: Tensors) -> tuple[Tensors, dict[str, Any]]:
    """Copies on the CPU of a checkpoint's content, with the policy's average; see `checkpoint.on_host`."""
    tensors, state = content(k2, stepper, further)
    policy = file_of(described(k2))
    average = tensors.pop(policy)
    copies = {name: checkpoint.on_host(group, keep, over.get(name)) for name, group in tensors.items()}
    with stepper.averaged():
        copies[policy] = checkpoint.on_host(average, keep, over.get(policy))
    return copies, state


class Training:
    """One run of one method that trains the role `policy`."""

    def __init__(
        self,
        method: str,
        config: TrainingConfig,
        run: Run,
        procs: Processes,
        k2: K2,
        stepper: Stepper,
        evaluator: Evaluator,
        saved: Checkpoint | None,
    ):
        """Puts back what `saved` holds. Raises UserError if the recipe no longer fits it."""
        self.method, self.config, self.run, self.procs = method, config, run, procs
        self.k2, self.stepper, self.evaluator = k2, stepper, evaluator
        self.history: dict[str, Any] = {"before": None, "after": None, "seconds": 0.0}
        """What summary.json says; a method may add to it, and finds it again when it resumes. `after` is the last
        evaluation; the summary of a run that its stop rule ended has the best step's in its place."""
        self.measure: Callable[[Evaluation], None] = lambda evaluation: None
        """Adds figures to an evaluation, under the policy: a method may put its own here, and below."""
        self.state: Callable[[], tuple[dict[str, dict[str, Tensor]], dict[str, Any]]] = lambda: ({}, {})
        """Further tensors and JSON of a checkpoint."""
        self.steppers = [stepper]
        """Of all that is trained, for the summary: a method that trains more than the policy adds to them."""
        self.evaluations: list[Any] = []  # (step, figures)
        self.first = 0
        self.stopped: signal.Signals | None = None
        self._writer = checkpoint.Writer()
        self._health = gpu_health.watch(procs.device, run.say)
        self._started = time.monotonic()
        if saved is not None:
            with stepper.averaged():
                load_policy(k2, saved)
            if config.optim.ema:
                k2.load_role_state_dict(POLICY, saved.tensors["live"])
            stepper.restore(saved.tensors["optimizer"], saved.state["optimizer"])
            stepper.restore_counters(saved.state["counters"])
            self.history, self.evaluations = saved.state["history"], saved.state["evaluations"]
            self.first = saved.step

    def begin(self) -> Evaluation | None:
        """Evaluates what is there before the first step; None for a run that is resumed."""
        self.run.start(self.config.steps, self.first)
        if self.first:
            self.run.say(f"goes on after step {self.first}")
        if warning := early_stopping.warning(self.config.eval.stop):
            self.run.say(warning)
        before = None
        if self.history["before"] is None:
            before = self._evaluate(0)
            self.history["before"] = self.history["after"] = before.figures
        self._mark_best()  # a run that was killed after it saved may not have come to it
        return before

    def steps(self) -> Iterator[int]:
        """The steps to train; after each, whatever is due."""
        config, total = self.config, self.config.steps
        ended = early_stopping.regression(self.evaluations, config.eval.stop)  # one that was stopped does not go on
        loop = Loop(self.first, self.first if ended else total, config.checkpoint, self._save, self.procs.any)
        try:
            for step in loop:
                self._writer.check()
                self.stepper.rate = min(1.0, (total - step + 1) / (config.optim.cooldown_steps + 1))
                yield step
                if step == self.first + 1:
                    self._reserve()
                if step == total or (config.eval.every and step % config.eval.every == 0):
                    self.history["after"] = self._evaluate(step).figures
                    if early_stopping.newest_is_best(self.evaluations, config.eval.best):
                        loop.save_next()
                    if early_stopping.regression(self.evaluations, config.eval.stop):
                        loop.end()
        finally:
            self._writer.check(wait=True)
        self.history["steps"], self.stopped = loop.done, loop.stopped

    def health(self) -> dict[str, float | None]:
        """Metrics of the GPUs of all processes; see health.py. Nothing where there is none."""
        return gpu_health.worst(self.procs.each(self._health.read() if self._health else {}))

    def finish(self) -> None:
        """Writes the summary and tells what was decided."""
        self.history["seconds"] = round(self._seconds(), 1)
        decided, lines = early_stopping.outcome(self.evaluations, self.config.eval)
        for line in lines:
            self.run.say(line)
        asked = record([*self.evaluator.rewards, *self.evaluator.group_rewards])
        handed_on = {**self.history, "after": early_stopping.handed_on(self.evaluations, decided)}
        self.run.summary({**decided, **handed_on, "rewards": asked, "memory": self._memory(), **peak_memory()})

    def _memory(self) -> dict[str, float]:
        """GiB that this process keeps from step to step. What its peak is above them comes and goes within a step."""
        k2 = self.k2
        modules = [k2.transformer, k2.vae, k2.text_encoder, k2.reference, *k2.copies.values()]
        weights = {id(p): p for module in modules if module is not None for p in module.parameters()}
        trained = {id(p): p for stepper in self.steppers for p in stepper.parameters}
        kept = {
            "frozen weights": [p for key, p in weights.items() if key not in trained],
            "trained weights": list(trained.values()),
            "optimiser": [tensor for stepper in self.steppers for tensor in stepper.kept()],
        }
        sizes = {name: [held for t in part for held in shards.held(t)] for name, part in kept.items()}
        return {name: sum(t.numel() * t.element_size() for t in part) / 2**30 for name, part in sizes.items()}

    def _seconds(self) -> float:
        return self.history["seconds"] + time.monotonic() - self._started

    def _evaluate(self, step: int) -> Evaluation:
        evaluator, run = self.evaluator, self.run
        with self.k2.role(POLICY), self.stepper.averaged():
            result = evaluator()
            self.measure(result)
        self.evaluations.append((step, result.figures))
        run.log(step, {f"eval/{name}": value for name, value in (result.figures | result.details).items()})
        shown = [r.prompt for r in evaluator.records[:16]]
        run.samples(step, result.images[:16], shown, evaluator.seeds[:16], result.said[:16])
        run.grid(step, result.images[:16], 4, 4)
        return result

    def _reserve(self) -> None:
        """Memory for the first checkpoint, now that the optimiser has its moments."""
        if self.procs.main or self.procs.sharded:
            tensors, _ = content(self.k2, self.stepper, self.state()[0])
            if self.procs.main:
                self._writer.reserve(tensors)

    def _save(self, step: int) -> None:
        if not self.procs.main and not self.procs.sharded:
            return
        self._writer.check(wait=True)  # before there is another copy
        if self.procs.sharded:
            self.procs.each(None)  # who gathers waits no longer for the disk
        further, state = self.state()
        tensors, optimizer_state = snapshot(self.k2, self.stepper, further, self.procs.main, self._writer.copies)
        if not self.procs.main:
            return
        state = {
            "method": self.method,
            "model": asdict(self.config.model),
            "origin": self.k2.origin,
            "lora": described(self.k2),
            "optimizer": optimizer_state,
            "counters": self.stepper.counters(),
            "history": {**self.history, "seconds": self._seconds()},
            "evaluations": self.evaluations,
            **early_stopping.outcome(self.evaluations, self.config.eval)[0],  # what checkpoint.find goes by
            **state,
        }
        top = early_stopping.best(self.evaluations, self.config.eval.best)
        best, keep = top and top[0], self.config.checkpoint.keep
        self._writer.save(self.run.path / "checkpoints", step, tensors, state, keep, best)

    def _mark_best(self) -> None:
        if self.procs.main and (top := early_stopping.best(self.evaluations, self.config.eval.best)):
            checkpoint.mark_best(self.run.path / "checkpoints", top[0])
