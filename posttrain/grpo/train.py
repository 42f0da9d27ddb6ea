"""GRPO: reinforcement learning of K2 from groups of images, without guidance in rollout or training.

Each step draws a group of images for some prompts, partly with stochastic (SDE) steps; scores them; and makes the
steps that led to better-than-average images of a prompt more likely. It is Flow-GRPO (arXiv:2505.05470) with the
windows of MixGRPO (arXiv:2507.21802), the ratio of GRPO-Guard (arXiv:2510.22319) and GDPO advantages.

    posttrain grpo --config recipes/nano/grpo.yaml

Any number of processes (`accelerate launch`) share a step's groups; each group has one prompt and one size, so its
text has one length and needs no mask. All noise comes from seeds of global indices (run, step, group, image, SDE
step), so nothing depends on processes, batching or history: a resumed run draws what the uninterrupted one would have.

With `rollout.ahead: 1` the images of step n + 1 are drawn before update n, and judged while it is made. They are then
off-policy by that update, and the ratio is to the policy that drew them. A checkpoint holds that policy (`previous`),
so that a resumed run draws the same images again.

Legend: P groups, G images of a group, K rewards, W stochastic steps, B images of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from posttrain.distributed.processes import Processes
from posttrain.grpo.ahead import Drawn, Rollouts, roles
from posttrain.grpo.config import GRPOConfig
from posttrain.grpo.refill import Refill, check_prompts
from posttrain.grpo.rollout import rollout
from posttrain.grpo.update import Group, optimise
from posttrain.model import fp8, parallelize, sampler
from posttrain.model.k2 import K2
from posttrain.training import checkpoint
from posttrain.training.evaluate import Evaluator, gather_scores
from posttrain.training.groups import (
    costs_of,
    judge_noise,
    log_step,
    prompted_groups,
    score,
    size_of,
    start_counting,
    submit,
)
from posttrain.training.idle import idle_reason, refuse_unscored
from posttrain.training.loop import Training, open_run, resuming, try_rewards
from posttrain.training.oom_retry import MicroBatch
from posttrain.training.policy import POLICY, add_policy, load_model
from posttrain.training.prompt_source import PromptSource, warn_of_cut_prompts
from posttrain.training.stepper import Clock, Stepper, check_ratio
from prompts.records import PromptRecord, read_prompts
from rewards.background import ScoreQueue
from rewards.base import Noise, Scores
from rewards.gates import apply_gates
from rewards.load import load_rewards, record
from rewards.noise import noise_of


def train(config: GRPOConfig, resume: bool = False) -> None:
    """Runs a recipe into its run directory. Raises UserError for mistakes that the user can correct."""
    procs = Processes(shardable=True)
    roles(config, procs)  # refuses numbers that do not go together before anything is loaded
    resume = resuming(config, resume, procs)
    source, heldout = PromptSource(config, read_prompts(config.prompts.train)), read_prompts(config.prompts.heldout)
    check_prompts(config.groups, source)
    try_rewards(config, heldout, source.records)
    saved = checkpoint.load_latest(Path(config.output) / "checkpoints") if resume else None
    if config.rollout.quantize:
        fp8.check(procs.device, "rollout.quantize")
    k2 = load_model(config.model, procs.device, saved)
    with parallelize.sharding(k2, procs):
        add_policy(k2, config.lora, config.seed, reference=config.loss.kl > 0)
    if config.rollout.quantize:
        fp8.add_copies(k2, procs.device)
    k2.train_role(POLICY)
    stepper = Stepper(k2.role_named_parameters(POLICY), config.optim, previous=bool(config.rollout.ahead))
    micro_batch = MicroBatch(config.groups.micro_batch, "groups.micro_batch", procs)
    max_tokens = config.prompts.max_tokens

    with open_run(config, resume, procs) as run:
        rewards = load_rewards([r for r in config.rewards if not r.heldout_only], run.urls)
        # Judges keep to one event loop, so evaluation has its own.
        measured = load_rewards(config.rewards, run.urls)
        size, batch = size_of(config, 0), 4 * micro_batch.size  # without gradients four times as many images fit
        evaluator = Evaluator(k2, heldout, measured, config.eval, size, batch, max_tokens, procs)
        warn_of_cut_prompts(k2, [*source.records, *heldout], max_tokens)
        facts = {"rewards": record(rewards), "guidance": {"training": 0.0, "evaluation": config.eval.guidance}}
        training = Training("grpo", config, run, procs, k2, {POLICY: stepper}, evaluator, saved, facts)
        if saved is not None:
            source.restore(saved)
        history = training.history
        start_counting(training)
        if training.begin():
            with training.policy():
                before = evaluator()
            training.record(0, before)
            history |= judge_noise(run, procs, evaluator, measured, before)
        noise = noise_of(rewards, history)

        idle: str | None = None
        with ScoreQueue(rewards, config.groups.group_size) as queue:
            steps = training.steps()
            for step, metrics, idle in updates(
                k2, config, source, queue, stepper, steps, procs, noise, micro_batch, Clock()
            ):
                log_step(training, config, step, metrics, idle)
                if training.evaluation_due(step):
                    with training.policy():
                        evaluation = evaluator()
                    training.record(step, evaluation)
                if training.save_due(step):
                    run.prompts(source.ends())
                    training.save(step, *source.state())
            if run.stopped is None:
                refuse_unscored(history, history["steps"], idle)
            training.finish()


def updates(
    k2: K2,
    config: GRPOConfig,
    source: PromptSource,
    queue: ScoreQueue,
    stepper: Stepper,
    steps: Iterable[int],
    procs: Processes,
    noise: Mapping[str, Noise],
    micro_batch: MicroBatch,
    clock: Clock,
) -> Iterator[tuple[int, dict[str, float | None], str | None]]:
    """Trains one step at a time: a run's loop, and what `posttrain bench` times. Yields its number, its metrics, and
    why it taught nothing, if so. A step of which no image could be scored makes no update.

    `noise` is how far two scores of one image differ, by reward; see rewards.noise.
    """
    checked = False

    def draw(step: int, records: Mapping[int, PromptRecord] | None = None) -> list[Group]:
        return sample(k2, config, step, source, queue, procs, micro_batch.size, records)

    def teaching(scores: Scores) -> Tensor:
        return (score(config, scores, noise)[0] != 0).any(1)

    rollouts = Rollouts(draw, queue, stepper, config, procs)
    refill = Refill(config.groups, source, draw, teaching, queue, procs, clock)
    for step in steps:
        clock.start()
        scores: Scores | None = None
        metrics: dict[str, float | None] = {}
        for attempt in micro_batch.attempts(stepper):
            # Lets go of the images of another step, or of an attempt that did not fit into memory.
            drawn: Drawn | None = None
            groups: list[Group] = []
            rollouts.retry()
            with attempt:
                drawn = rollouts.of(step)
                clock.lap("sample")
                own_scores = drawn.gather(queue)
                places = [group.index for group in drawn.groups]
                scores = gather_scores(procs, own_scores, config.groups.group_size, places)
                batch: list[int] | None = None
                if config.groups.refill:
                    drawn.groups, scores, batch = refill(step, drawn.groups, scores)
                advantages_PG, metrics = score(config, scores, noise, batch)
                metrics["policy_age"] = stepper.updates - drawn.updates
                groups = rollouts.to_train(drawn, costs_of(k2, config, step))
                clock.lap("score")
                rollouts.follow(step)
                taught_P = taught(config, advantages_PG)
                if metrics["missing"] != 1 and bool(taught_P.any()):
                    groups = [group for group in groups if taught_P[group.index]]
                    metrics |= optimise(k2, config, groups, advantages_PG, stepper, procs, micro_batch.size)
                clock.lap("optimise")
        assert scores is not None
        rollouts.forget(step)
        metrics |= source.update(step, apply_gates(scores, [r.spec for r in queue.rewards], noise))
        if not checked and "ratio_error" in metrics and metrics["policy_age"] == 0:
            check_ratio(metrics["ratio_error"] or 0.0, config.loss)
            checked = True  # later ratios differ from 1 where a step has several updates or was drawn ahead
        metrics |= clock.seconds
        yield step, metrics, idle_reason(metrics, scores)


# ---- sample -----------------------------------------------------------------------------------------------


def sample(
    k2: K2,
    config: GRPOConfig,
    step: int,
    source: PromptSource,
    queue: ScoreQueue,
    procs: Processes,
    micro_batch: int,
    records: Mapping[int, PromptRecord] | None = None,
) -> list[Group]:
    """This process's groups of a step. Their images are submitted for scoring as soon as they are decoded.

    `records` by index of the group: further ones of this step (see refill.py); None: those that the step begins with.
    """
    s, window = config.sampling, window_of(config, step)
    records = dict(enumerate(source.draw(step))) if records is None else records
    # A further group has the size of the one whose place it takes, and so its cost.
    indices, costs = list(records), costs_of(k2, config, step)
    drawing, _ = roles(config, procs)
    # A step that did not fit into memory is repeated in smaller micro-batches, and without it.
    keep = config.rollout.keep_graphs and micro_batch == config.groups.micro_batch
    groups = []
    places = procs.local_indices_by_cost([costs[g % len(costs)] for g in indices], drawing)
    own = {indices[i]: records[indices[i]] for i in places}
    for prompted in prompted_groups(k2, config, step, own):
        g, (height, width) = prompted.index, prompted.size
        seeds = []
        for j in range(config.groups.group_size):
            # The first is that of the noise that the image begins with, the others those of its stochastic steps.
            seeds.append([sampler.seed_for(config.seed, step, g, j, i) for i in range(len(window) + 1)])
        times, text = sampler.schedule(s.steps, k2.mu(height, width)), prompted.text
        # With a window the images of a group differ by its noise alone, so all advantages belong to its steps.
        shared = s.window is not None
        with k2.role(POLICY, fp8=config.rollout.quantize == "fp8"):
            trajectory = rollout(
                k2, text, seeds, times, window, s.dynamics, s.eta, height, width, micro_batch, shared, keep
            )
        submit(k2, queue, prompted, trajectory.latents)
        groups.append(Group(**vars(prompted), trajectory=trajectory))
    return groups


def window_of(config: GRPOConfig, step: int) -> range:
    """The stochastic steps of a training step: the same for all its groups."""
    s = config.sampling
    if s.window is None:
        return range(s.steps - 1)
    # A window begins in the first half of the steps, and never holds the last one, which is without noise.
    start, starts = s.window_start, min((s.steps + 1) // 2, s.steps - s.window)
    if start == "random":
        start = sampler.seed_for(config.seed, step, -1) % starts
    elif start == "sliding":
        start = (step - 1) // s.window_every % starts
    return range(start, start + s.window)


def taught(config: GRPOConfig, advantages_PG: Tensor) -> Tensor:
    """(P,) bool: groups that are trained on. One without advantages has nothing but its KL to follow, if asked to."""
    if config.groups.flat == "kl" and config.loss.kl > 0:
        return torch.ones(len(advantages_PG), dtype=torch.bool)
    return (advantages_PG != 0).any(1)
