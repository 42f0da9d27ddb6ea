"""What every method does around its steps: the run directory, resuming, evaluations, checkpoints, the best step.

with open_run(config, resume, procs) as run:
    training = Training("grpo", config, run, procs, k2, {POLICY: stepper}, evaluator, saved, facts)
    if training.begin():
        training.record(0, evaluate(...))
    for step in training.steps():
        ...                                # the method's own: draw, score, update, run.log
        if training.evaluation_due(step):
            training.record(step, evaluate(...))
        if training.save_due(step):
            training.save(step)
    training.finish()
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

from torch import Tensor

from posttrain.config.sections import CheckpointConfig, EvalConfig, ModelConfig, OptimConfig
from posttrain.distributed import shards
from posttrain.distributed.processes import Processes
from posttrain.log import log
from posttrain.model import fp8
from posttrain.model.k2 import K2
from posttrain.report.page import write_report
from posttrain.runs import startup
from posttrain.runs.guard import check_run
from posttrain.runs.run import Run, RunConfig, peak_memory
from posttrain.training import checkpoint, early_stopping, gpu_health
from posttrain.training.checkpoint import Checkpoint
from posttrain.training.evaluate import Evaluation, Evaluator
from posttrain.training.judge_check import warn_of_silent_judges
from posttrain.training.pma import CheckpointAverage
from posttrain.training.policy import POLICY, described, file_of, load_policy
from posttrain.training.stepper import Loop, Stepper
from prompts.records import PromptRecord, columns
from rewards.base import Reward, RewardSpec
from rewards.load import check_columns, load_rewards, record
from rewards.serve import ServerSpec, serve

SHOWN = 16
"""Images of an evaluation that go into the run directory."""


class RewardsConfig(Protocol):
    """The settings of any command that has rewards."""

    rewards: list[RewardSpec]
    servers: list[ServerSpec]


class ServedConfig(RunConfig, RewardsConfig, Protocol):
    """The settings of any run that may need servers."""


class TrainingConfig(ServedConfig, Protocol):
    """What the settings of any method that trains K2 have."""

    steps: int
    model: ModelConfig
    optim: OptimConfig
    eval: EvalConfig
    checkpoint: CheckpointConfig


def resuming(config: RunConfig, resume: bool, procs: Processes) -> bool:
    """Whether to go on from the newest checkpoint: if asked to, and where torchrun restarts what it began itself.

    Raises UserError, in the main process, for a run directory that this cannot be done in.
    """
    if procs.main:  # one process looks at the disk, so that all decide alike
        resume = resume or Run.restarted(config)
        check_run(config, resume)
    return procs.from_main(resume)


def try_rewards(
    config: RewardsConfig,
    heldout: Sequence[PromptRecord],
    train: Sequence[PromptRecord] = (),
    more: Sequence[str] = (),
) -> list[Reward]:
    """Makes the rewards and safety checks of a recipe before anything large is loaded, so that a mistake in them, or a
    column that the prompts lack, is known at once. `more` are columns that the method adds to theirs.

    Servers do not run yet, so each has an address at which nothing is asked.
    """
    servers = {server.name: ["http://127.0.0.1/"] for server in config.servers}
    rewards = load_rewards(config.rewards, servers)
    trained = [reward for reward in rewards if not reward.spec.heldout_only]
    for records, asked in ((heldout, rewards), (train, trained)):
        if records:  # each has all columns of its file
            check_columns(asked, {**columns(records[:1]), **dict.fromkeys(more, ())})
    safety = [RewardSpec(f"safety {check.name}", check.function) for check in getattr(config, "safety", [])]
    checks = load_rewards(safety, servers)
    check_columns(checks, {**columns(heldout[:1]), **dict.fromkeys(more, ())})
    warn_of_silent_judges([*rewards, *checks])
    return rewards


@contextlib.contextmanager
def open_run(config: ServedConfig, resume: bool, procs: Processes) -> Iterator[Run]:
    """The run directory, locked, with the recipe's servers up (`run.urls`); at the end its report is written.

    Ctrl-C that ended the training (`run.stopped`) is passed on when all is written.
    """
    with Run.create(config, resume, procs.main) as run:
        startup.lap("prepare")
        # The main process starts the servers, and the others are told where they answer.
        with serve(config.servers if procs.main else [], run.path / "servers") as urls:
            startup.lap("servers")
            run.urls = procs.from_main(urls)
            yield run
        if procs.main:
            write_report(run.path)
    if run.stopped is signal.SIGINT:
        raise KeyboardInterrupt


Tensors = dict[str, dict[str, Tensor]]
"""By file of a checkpoint."""


def content(k2: K2, steppers: Mapping[str, Stepper]) -> tuple[Tensors, dict[str, Any]]:
    """What a checkpoint holds of the roles that are trained, where it is now, and the optimisers' state as JSON.

    The policy's files are `adapter` or `weights` (its average, if there is one, else what is trained), `live` (what is
    trained, beside an average), `previous` (see Stepper) and `optimizer`; those of another role are `NAME` and
    `NAME_optimizer`.
    """
    tensors: Tensors = {}
    states: dict[str, Any] = {}
    for role, stepper in steppers.items():
        optimizer, states[role] = stepper.flattened()
        if role == POLICY:
            tensors |= {"optimizer": optimizer, file_of(described(k2)): k2.role_state_dict(POLICY)}
        else:
            tensors |= {f"{role}_optimizer": optimizer, role: k2.role_state_dict(role)}
    if steppers[POLICY].averages:
        tensors["live"] = k2.role_state_dict(POLICY)
    if steppers[POLICY].remembers:
        tensors["previous"] = k2.role_state_dict(POLICY)
    return tensors, states


def snapshot(
    k2: K2, steppers: Mapping[str, Stepper], keep: bool, over: Tensors, alone: bool = False
) -> tuple[Tensors, dict[str, Any]]:
    """Copies on the CPU of `content`, with the policy's average and its previous parameters; for `keep` and `over` see
    `checkpoint.on_host`. `alone`: the main process calls it without the others, of which it needs nothing."""
    tensors, states = content(k2, steppers)
    policy, stepper = file_of(described(k2)), steppers[POLICY]
    # Copied apart, while the parameters hold them.
    average, previous = tensors.pop(policy), tensors.pop("previous", None)
    copies = {name: checkpoint.on_host(group, keep, over.get(name)) for name, group in tensors.items()}
    with stepper.averaged(alone):
        copies[policy] = checkpoint.on_host(average, keep, over.get(policy))
    if previous is not None:
        with stepper.previous():
            copies["previous"] = checkpoint.on_host(previous, keep, over.get("previous"))
    return copies, states


class Training:
    """One run of a method that trains the role `policy`, and perhaps others beside it."""

    def __init__(
        self,
        method: str,
        config: TrainingConfig,
        run: Run,
        procs: Processes,
        k2: K2,
        steppers: Mapping[str, Stepper],
        evaluator: Evaluator,
        saved: Checkpoint | None,
        facts: Mapping[str, Any],
    ):
        """Restores what `saved` holds. `steppers` are of the trained roles; `facts` go into each checkpoint's JSON.

        Raises UserError if the recipe no longer fits the checkpoint.
        """
        self.method, self.config, self.run, self.procs = method, config, run, procs
        self.k2, self.steppers, self.evaluator, self.facts = k2, steppers, evaluator, facts
        self.stepper = steppers[POLICY]
        self.history: dict[str, Any] = {"before": None, "after": None, "seconds": 0.0}
        """What summary.json says; a method may add to it, and finds it again when it resumes. `after` is the last
        evaluation; the summary of a run that its stop rule ended has the best step's in its place."""
        self.evaluations: list[Any] = []
        """(step, metrics) of each."""
        self.first = 0
        """The step that the run continues after."""
        self._loop: Loop | None = None
        self._saved = False
        """A checkpoint was written since the run began or went on."""
        self._writer = checkpoint.Writer()
        self._step = 0
        if config.optim.average is not None:
            folder = run.path / "checkpoints"
            self.stepper.from_disk = CheckpointAverage(k2, config.optim.average, folder, procs, self._writer)
        self._health = gpu_health.watch(procs.device, log.info)
        self._started = time.monotonic()
        if saved is not None:
            self._restore(saved)

    def begin(self) -> bool:
        """Whether the model has to be evaluated before the first step; a resumed run has done that."""
        self.run.start(self.config.steps, self.first)
        if 0 < self.first < self.config.steps:
            log.info(f"continues after step {self.first}")
        if warning := early_stopping.warning(self.config.eval.stop):
            log.warning(warning)
        self._mark_best()  # a run that was killed after it saved may not have come to it
        return self.history["before"] is None

    def steps(self) -> Iterator[int]:
        """The steps to train."""
        config, total = self.config, self.config.steps
        ended = early_stopping.regression(self.evaluations, config.eval.stop)  # one that was stopped does not go on
        loop = self._loop = Loop(self.first, self.first if ended else total, config.checkpoint, self.procs.any)
        try:
            for step in loop:
                self._writer.check()  # a save that failed ends the run now, not at the next save
                self.stepper.rate = min(1.0, (total - step + 1) / (config.optim.cooldown_steps + 1))
                self._step = step
                yield step
                self._keep()
                # After the first update, with which the optimiser has its moments.
                if step == self.first + 1 and not self._saved:
                    self._reserve()
        finally:
            self._writer.check(wait=True)
        self.history["steps"], self.run.stopped = loop.done, loop.stopped

    def health(self) -> dict[str, float | None]:
        """Metrics of the GPUs of all processes; see gpu_health.py. Nothing where there is none."""
        return gpu_health.worst(self.procs.by_rank(self._health.read() if self._health else {}))

    # ---- evaluations ------------------------------------------------------------------------------------------

    def evaluation_due(self, step: int) -> bool:
        every = self.config.eval.every
        return step == self.config.steps or bool(every and step % every == 0)

    @contextlib.contextmanager
    def policy(self) -> Iterator[None]:
        """Inside the block the model is the policy as it is exported: with the average of its weights if there is one,
        and computing exactly. Within a step, to be asked for after its updates."""
        self._keep()
        with self.k2.role(POLICY), self.stepper.averaged(), fp8.exact(self.k2):
            yield

    def record(self, step: int, evaluation: Evaluation) -> None:
        """Logs an evaluation, writes its images, and ends the training after this step if the stop rule says so."""
        run, metrics = self.run, evaluation.metrics
        self.evaluations.append((step, metrics))
        self.history["after"] = metrics
        if self.history["before"] is None:  # the first of the run, also of one that was resumed before it
            self.history["before"] = metrics
        average = self.stepper.from_disk.metrics() if self.stepper.from_disk is not None else {}
        logged = metrics | evaluation.details | average
        run.log(step, {f"eval/{name}": value for name, value in logged.items()})
        prompts = [record.prompt for record in self.evaluator.records[:SHOWN]]
        images, seeds = evaluation.images[:SHOWN], self.evaluator.seeds[:SHOWN]
        run.samples(step, images, prompts, seeds, evaluation.per_image_scores)
        run.grid(step, images, 4, 4)
        # The best step needs a checkpoint even if none is due by count.
        if self._loop is not None and early_stopping.newest_is_best(self.evaluations, self.config.eval.best):
            self._loop.save_next()
        if self._loop is not None and early_stopping.regression(self.evaluations, self.config.eval.stop):
            self._loop.end()

    # ---- checkpoints ------------------------------------------------------------------------------------------

    def save_due(self, step: int) -> bool:
        """Whether to save; to ask once at the end of each step, since a signal to stop is heard here."""
        assert self._loop is not None
        return self._loop.save_due(step)

    def save(self, step: int, tensors: Tensors | None = None, state: Mapping[str, Any] | None = None) -> None:
        """Copies what a resumed run needs, the method's own `tensors` and `state` too, and writes in the background."""
        self._saved = True
        self._keep()
        if not self.procs.main and not self.procs.sharded:
            return
        self._writer.check(wait=True)  # before there is another copy
        if self.procs.sharded:
            self.procs.all_gather(None)  # who gathers waits no longer for the disk
        alone = not self.procs.sharded  # otherwise all are here
        copies, optimizers = snapshot(self.k2, self.steppers, self.procs.main, self._writer.copies, alone)
        if not self.procs.main:
            return
        saved_state = {
            "method": self.method,
            "model": asdict(self.config.model),
            "origin": self.k2.origin,
            "lora": described(self.k2),
            "optimizer": optimizers.pop(POLICY),
            "counters": self.stepper.counters(),
            "history": {**self.history, "seconds": self._seconds()},
            "evaluations": self.evaluations,
            **early_stopping.outcome(self.evaluations, self.config.eval)[0],  # what checkpoint.find goes by
            **self.facts,
            **(state or {}),
        }
        if self.stepper.from_disk is not None:
            saved_state["average"] = self.stepper.from_disk.state()
        for role, optimizer in optimizers.items():
            saved_state[role] = {"optimizer": optimizer, "counters": self.steppers[role].counters()}
        top = early_stopping.best(self.evaluations, self.config.eval.best)
        best, keep = top and top[0], self.config.checkpoint.keep
        self._writer.save(self.run.path / "checkpoints", step, {**copies, **(tensors or {})}, saved_state, keep, best)

    def _restore(self, saved: Checkpoint) -> None:
        with self.stepper.averaged():  # the checkpoint's policy is the average
            load_policy(self.k2, saved)
        if self.stepper.averages:
            self.k2.load_role_state_dict(POLICY, saved.tensors["live"])
        self.stepper.remember()  # for a checkpoint that holds no other
        if self.stepper.remembers and "previous" in saved.tensors:
            with self.stepper.previous():
                self.k2.load_role_state_dict(POLICY, saved.tensors["previous"])
        self.stepper.restore(saved.tensors["optimizer"], saved.state["optimizer"])
        self.stepper.restore_counters(saved.state["counters"])
        for role, stepper in self.steppers.items():
            if role != POLICY:
                self.k2.load_role_state_dict(role, saved.tensors[role])
                stepper.restore(saved.tensors[f"{role}_optimizer"], saved.state[role]["optimizer"])
                stepper.restore_counters(saved.state[role]["counters"])
        self.history, self.evaluations = saved.state["history"], saved.state["evaluations"]
        self.first = self._step = saved.step
        if self.stepper.from_disk is not None:
            self.stepper.from_disk.restore(saved.state["average"], saved.step)

    def _keep(self) -> None:
        """Keeps the policy for its mean where one is due. Evaluations and checkpoints of a step need it, so whichever
        comes first asks, and the end of the step."""
        if self.stepper.from_disk is not None:
            self.stepper.from_disk.keep(self._step)

    def _reserve(self) -> None:
        """Allocates memory for the first checkpoint, which then waits less."""
        if self.procs.main or self.procs.sharded:
            tensors, _ = content(self.k2, self.steppers)
            if self.procs.main:
                self._writer.reserve(tensors)

    def _mark_best(self) -> None:
        if self.procs.main and (top := early_stopping.best(self.evaluations, self.config.eval.best)):
            checkpoint.mark_best(self.run.path / "checkpoints", top[0])

    # ---- the end ----------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Writes the summary and says what was decided."""
        self.history["seconds"] = round(self._seconds(), 1)
        decided, lines = early_stopping.outcome(self.evaluations, self.config.eval)
        for line in lines:
            log.info(line)
        rewards = record([*self.evaluator.rewards, *self.evaluator.group_rewards])
        handed_on = {**self.history, "after": early_stopping.handed_on(self.evaluations, decided)}
        self.run.summary({**decided, **handed_on, "rewards": rewards, "memory": self._memory(), **peak_memory()})

    def _memory(self) -> dict[str, float]:
        """GiB that this process keeps from step to step. What its peak is above them comes and goes within a step."""
        k2 = self.k2
        modules = [k2.transformer, k2.vae, k2.text_encoder, k2.reference, *k2.copies.values()]
        # Sets, as roles of a LoRA share the base's parameters.
        trained: set[Tensor] = set()
        weights: set[Tensor] = set()
        states: list[Tensor] = []
        for stepper in self.steppers.values():
            trained.update(stepper.parameters)
            states += stepper.kept()
        for module in modules:
            if module is not None:
                weights.update(module.parameters())
        return {
            "frozen weights": _gibibytes(weights - trained),
            "trained weights": _gibibytes(trained),
            "optimiser": _gibibytes(states),
        }

    def _seconds(self) -> float:
        return self.history["seconds"] + time.monotonic() - self._started


def _gibibytes(tensors: Any) -> float:
    """Of the parts that this process holds."""
    total = 0
    for tensor in tensors:
        for local in shards.held(tensor):
            total += local.numel() * local.element_size()
    return total / 2**30
