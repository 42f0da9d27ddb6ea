"""What `posttrain expander gdpo` adds to TRL's trainer: reward functions that share one evaluation, and a callback that
checks the diversity weight, times, logs, evaluates and stops.
"""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter, deque
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from posttrain.distributed.processes import Processes
from posttrain.errors import UserError
from posttrain.expander import thinking
from posttrain.expander.evaluate import ExpanderEvaluation, ExpanderEvaluator
from posttrain.expander.gdpo_config import DIVERSITY, ExpanderGDPOConfig
from posttrain.expander.policy import Policy
from posttrain.expander.score import Scored, Scorer
from posttrain.log import log
from posttrain.model import sampler
from posttrain.runs.files import append_line, replace_text
from posttrain.runs.run import Run, peak_memory
from posttrain.runs.stop import StopSignals
from posttrain.training.idle import check_idle, count_idle
from posttrain.training.judge_check import check_judges
from posttrain.training.stepper import MAX_SKIPPED
from prompts.parse import json_line, read_lines
from prompts.records import PromptRecord, as_row
from rewards.noise import PREFIX, noise_of

SHOWN_FAULTS = 20  # in the report
LOW = 0.2
"""Mean of a reward below which a prompt has failed."""
FAILURES = "failures.jsonl"
"""A run's file of prompts that failed, with their failure class, as candidates for `expander mine`."""
HISTORY = "history.json"
"""A checkpoint's file of the counts of GDPOCallback."""


def diversity_weight(config: ExpanderGDPOConfig, step: int) -> float:
    """The weight after `step` finished steps: constant, unless the recipe is an ablation of it."""
    weight = config.diversity.weight
    assert not isinstance(weight, list)
    match config.ablation.diversity:
        case "kept":
            return weight
        case "removed":
            return 0.0
        case "annealed":
            return weight * max(0.0, 1 - 2 * step / config.steps)


def reward_weights(config: ExpanderGDPOConfig, step: int) -> list[float]:
    """Weights of the trained rewards in TRL's order after `step` finished steps; diversity is the last, as in
    Scored.names."""
    weights = [reward.weight for reward in config.trained]
    return [*weights, diversity_weight(config, step)]


def idle_reason(scored: Scored, group_size: int, weighted: Container[str]) -> str | None:
    """Why nothing could be learnt from these expansions; None if something could. `weighted` are the rewards that have
    a weight at this step."""
    figures = scored.figures(group_size)
    for name in scored.names:
        if name in weighted and figures[f"flat/{name}"] != 1:
            return None
    if scored.valid_NK.any():
        return "the expansions of each group score alike in every reward"
    return scored.failures.most_common(1)[0][0] if scored.failures else "no reward has a score"


def failures(scored: Scored, group_size: int, trained: Sequence[str]) -> list[str | None]:
    """The failure class of each group, for `expander mine`: the fault that at least half of its expansions have, or
    `low NAME` for the reward with the lowest mean, if that is below LOW; None if nothing failed."""
    classes: list[str | None] = []
    for first in range(0, len(scored.causes_N), group_size):
        classes.append(_failure(scored, slice(first, first + group_size), trained))
    return classes


def _failure(scored: Scored, group: slice, trained: Sequence[str]) -> str | None:
    # Faults first: a gated expansion has the worst score of every reward, so low means would only repeat them.
    faults = Counter(itertools.chain(*scored.causes_N[group], *scored.unsafe_N[group]))
    for name, count in faults.most_common(1):
        if 2 * count >= len(scored.causes_N[group]):
            return name
    means = {}
    for name in trained:
        k = scored.names.index(name)
        if len(values := scored.values_NK[group, k][scored.valid_NK[group, k]]):
            means[name] = float(values.mean())
    lowest = min(means, key=means.__getitem__, default=None)
    return f"low {lowest}" if lowest is not None and means[lowest] < LOW else None


class SharedRewards:
    """TRL's reward functions, which share one evaluation of a batch of expansions."""

    def __init__(
        self,
        config: ExpanderGDPOConfig,
        policy: Policy,
        scorer: Scorer,
        records: Sequence[PromptRecord],
        procs: Processes,
    ):
        self.config, self.policy, self.scorer, self.records, self.procs = config, policy, scorer, records, procs
        self.called = self.returned = 0.0
        """Times at which the first reward function of the latest batch was called, and at which it had its scores."""
        self.scored: Scored | None = None
        self.faults: deque[dict[str, Any]] = deque(maxlen=SHOWN_FAULTS)
        """The latest expansions that failed a check, with the reasons."""
        self.failed: list[dict[str, Any]] = []
        """Prompts of the latest batch that failed, of this process."""
        self._key: Any = None

    def functions(self) -> list[Callable[..., list[float | None]]]:
        return list(map(self._function, self.scorer.trained))

    def _function(self, name: str) -> Callable[..., list[float | None]]:
        size = self.config.groups.group_size

        def reward(
            completion_ids: list[list[int]], row: list[int], trainer_state: Any, log_metric: Any, **_: Any
        ) -> list[float | None]:
            scored = self._evaluated(completion_ids, row, trainer_state.global_step, log_metric)
            return scored.rewards_for_trl(name, size)

        reward.__name__ = name  # TRL names its metrics after the function
        return reward

    def _evaluated(self, ids: list[list[int]], rows: list[int], step: int, log_metric: Any) -> Scored:
        """The evaluation of this batch, made by the reward function that is called first."""
        # TRL calls each reward function with the same batch; images are drawn for the first call only.
        key = (step, rows, ids)
        if self.scored is not None and self._key == key:
            return self.scored
        self.called = time.perf_counter()
        size = self.config.groups.group_size
        # TRL's sampler puts the n completions of a prompt side by side; diversity compares them, so they must be whole.
        if rows != np.repeat(rows[::size], size).tolist():
            raise RuntimeError(f"{len(rows)} expansions on this process are not whole groups of {size}")
        expansions = [self.policy.expansion(self.records[row], tokens) for row, tokens in zip(rows, ids)]
        groups = len(rows) // size
        first = self.procs.rank * groups
        seeds: list[int] = []
        for g in range(first, first + groups):
            seeds += [sampler.seed_for(self.config.seed, step, g)] * size  # one noise for a group
        self.scored, self._key = self.scorer(expansions, seeds, size), key
        for e, causes, unsafe in zip(expansions, self.scored.causes_N, self.scored.unsafe_N):
            if faults := causes + unsafe:
                row = {"step": step + 1, "prompt": e.record.prompt, "expansion": e.text, "fails": ", ".join(faults)}
                self.faults.append(row)
        trained = self.scorer.trained[:-1]  # without diversity, which says nothing about a prompt
        self.failed = []
        for e, failure in zip(expansions[::size], failures(self.scored, size, trained)):
            if failure is not None:
                self.failed.append(as_row(e.record) | {"failure": failure, "step": step + 1})
        weights = reward_weights(self.config, step)
        metrics = self.scored.figures(size) | {"noise_share": self.scored.noise_share(weights, size)}
        if self.policy.thinking:
            metrics |= thinking.figures([e.thought for e in expansions], [e.thought_tokens for e in expansions])
        for name, value in metrics.items():
            if value is not None:
                log_metric(name, value)
        self.returned = time.perf_counter()
        return self.scored


class GDPOCallback(TrainerCallback):
    """Runs around TRL's steps: diversity weight, times, metrics, evaluations, stopping."""

    def __init__(
        self,
        config: ExpanderGDPOConfig,
        run: Run,
        procs: Processes,
        trainer: Any,
        shared: SharedRewards,
        evaluator: ExpanderEvaluator,
        saved: Path | None,
    ):
        self.config, self.run, self.procs, self.trainer = config, run, procs, trainer
        self.shared, self.evaluator = shared, evaluator
        self.first = 0 if saved is None else int(json.loads((saved / "trainer_state.json").read_text())["global_step"])
        self.evaluations: list[dict[str, Any]] = []
        file = run.path / "evaluations.json"
        if saved is not None and file.is_file():
            self.evaluations = [row for row in json.loads(file.read_text()) if row["step"] <= self.first]
        if procs.main and (run.path / FAILURES).is_file():
            # A resumed run takes the later steps again, and would repeat their rows.
            rows = [row for row in read_lines(run.path / FAILURES) if row["step"] <= self.first]
            replace_text(run.path / FAILURES, "".join(map(json_line, rows)))
        self.done = self.first
        self.signals = StopSignals()
        self.history = {"skipped": 0, "skipped_in_a_row": 0, "skipped_steps": 0, "idle_steps": 0}
        """Counts that each checkpoint holds, so that a resumed run ends where an uninterrupted one does."""
        if saved is not None and (saved / HISTORY).is_file():
            self.history |= json.loads((saved / HISTORY).read_text())
        self._seconds: dict[str, float] = {}
        self._pool: dict[str, float] = {}
        self._began = self._started = time.perf_counter()

    # ---- around the run

    def begin(self) -> None:
        """Evaluates what is there before the first step, and measures the noise of judges; not if it is resumed."""
        scorer = self.shared.scorer
        if not self.evaluations:
            evaluation = self._evaluate(0)
            noise = self.procs.from_main(self._check_judges(evaluation) if self.procs.main else None)
            self.evaluations[0]["noise"] = noise
            self._write_evaluations()
        scorer.noise = noise_of(scorer.rewards, self.evaluations[0].get("noise", {}))

    def _check_judges(self, evaluation: ExpanderEvaluation) -> dict[str, float | None]:
        """Checks the judges on the images of an evaluation; returns their measured noise."""
        scorer, size = self.shared.scorer, self.config.eval.group_size
        images, expansions = [], []
        # The first image of each prompt, then the second ones: judges try only a few images.
        for i in sorted(range(len(evaluation.expansions)), key=lambda i: i % size):
            if (image := evaluation.scored.images_N[i]) is not None:
                images.append(image)
                expansions.append(evaluation.expansions[i])
        prompts = [e.record.prompt for e in expansions]
        metrics = check_judges(self.run, scorer.rewards, images, prompts, scorer.columns(expansions))
        return {name: value for name, value in metrics.items() if name.startswith(PREFIX)}

    def finish(self) -> None:
        """Writes the summary."""
        self.run.stopped = self.signals.received
        before, after = self.evaluations[0]["figures"], self.evaluations[-1]["figures"]
        ablation = {} if self.config.ablation.diversity == "kept" else {"ablation": self.config.ablation.diversity}
        self.run.summary(
            {
                "before": before, "after": after, "steps": self.done, "skipped": self.history["skipped"], **ablation,
                "seconds": round(time.perf_counter() - self._started, 1), **peak_memory(),
            }
        )  # fmt: skip

    # ---- around a step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        weight = diversity_weight(self.config, state.global_step)
        weights = self.trainer.reward_weights
        if self.config.ablation.diversity == "annealed":
            weights[-1] = weight
        # The weight is what keeps the expander from giving every prompt one look; nothing may lower it unnoticed.
        if abs(float(weights[-1]) - weight) > 1e-6 * weight:  # TRL keeps it in fp32
            raise RuntimeError(
                f"the weight of diversity is {float(weights[-1])}, not {weight}: it must not change in a run"
            )
        self._began = time.perf_counter()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Skips and counts a gradient that is not finite; ten in a row end the run."""
        # TRL would take the step, and one NaN would then be in every weight.
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
            self.history["skipped_in_a_row"] = 0
            return
        model.zero_grad(set_to_none=True)  # AdamW leaves parameters without a gradient alone
        self.history["skipped"] += 1
        self.history["skipped_in_a_row"] += 1
        if self.history["skipped_in_a_row"] >= MAX_SKIPPED:
            raise UserError(
                f"optim.lr: {MAX_SKIPPED} gradients in a row were not finite; lower it (it is {self.config.optim.lr:g})"
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        now, shared, scored = time.perf_counter(), self.shared, self.shared.scored
        assert scored is not None
        times = {"generate": shared.called - self._began, **scored.seconds, "train": now - shared.returned}
        self._seconds = times
        for message, count in scored.failures.most_common(1):
            log.info(f"missing images or scores: {count}, such as: {message}")
        step = self.done = state.global_step
        tables = {"The latest expansions that failed a check": list(shared.faults)} if shared.faults else {}
        self._write_failures()
        if self.trainer.pooled is not None:
            self._pool = self.trainer.pooled.update(step, scored)
            tables |= self.trainer.pooled.source.ends()
        self.run.prompts(tables or None)
        log.info(f"step {step}: " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in times.items()))
        # An ablation takes the weight of diversity away, whose images differ nearly always.
        weighted = [name for name in scored.names if name != DIVERSITY or diversity_weight(self.config, step - 1)]
        reason = idle_reason(scored, self.config.groups.group_size, weighted)
        # Another process may have had groups that differ; all must agree, since the counts decide when a run ends.
        if self.procs.any(reason is None):
            reason = None
        count_idle(self.history, reason, False)
        check_idle(self.history, reason, self.config.idle_steps)
        every = self.config.eval.every
        if (every and step % every == 0) or step == self.config.steps:
            figures = self._evaluate(step).figures
            self._look_at_thoughts(step, figures, control)
        # A signal may reach one process alone, and one that stops by itself would leave the others waiting for it.
        if self.procs.any(self.signals.received is not None):
            control.should_save = control.should_training_stop = True

    def _look_at_thoughts(self, step: int, figures: dict[str, float | None], control: Any) -> None:
        """Ends a run in which thinking decays. Evaluations are the same on all processes, and so is this."""
        if not self.shared.policy.thinking or step < thinking.SETTLED or step == self.config.steps:
            return
        reason = thinking.drift(self.evaluations[0]["figures"], figures)
        if reason is not None:
            log.warning(f"the run ends at step {step}: {reason}; use an earlier checkpoint, or raise optim.kl")
            control.should_save = control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Adds the counts and the pool to a checkpoint, before AtomicCheckpointCallback seals it."""
        if self.procs.main:
            folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            (folder / HISTORY).write_text(json.dumps(self.history) + "\n")
            if self.trainer.pooled is not None:
                self.trainer.pooled.save(folder)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" not in logs:
            return  # TRL's closing line
        metrics = {name: value for name, value in logs.items() if name not in ("epoch", "step_time")}
        metrics["diversity_weight"] = float(self.trainer.reward_weights[-1])
        metrics["skipped"] = self.history["skipped"]
        metrics |= {f"seconds/{name}": value for name, value in self._seconds.items()} | self._pool
        self.run.log(state.global_step, metrics)

    def _evaluate(self, step: int) -> ExpanderEvaluation:
        evaluation = self.evaluator()
        self.run.log(step, {f"eval/{name}": value for name, value in evaluation.figures.items()})
        self.evaluations.append({"step": step, "figures": evaluation.figures})
        if self.procs.main:
            self.evaluator.save(self.run.path / "groups", step, evaluation)
        self._write_evaluations()
        return evaluation

    def _write_failures(self) -> None:
        for failed in self.procs.gather(self.shared.failed) or []:
            for row in failed:
                append_line(self.run.path / FAILURES, json_line(row))

    def _write_evaluations(self) -> None:
        if self.procs.main:
            replace_text(self.run.path / "evaluations.json", json.dumps(self.evaluations, indent=1) + "\n")
