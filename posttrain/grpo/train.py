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

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from posttrain.distributed.processes import Processes
from posttrain.grpo.ahead import Drawn, Rollouts, roles
from posttrain.grpo.config import GRPOConfig
from posttrain.grpo.refill import Refill
from posttrain.grpo.rollout import rollout
from posttrain.grpo.update import Group, optimise
from posttrain.model import flops, fp8, parallelize, sampler
from posttrain.model.k2 import K2, Text, to_pil
from posttrain.runs.run import Run
from posttrain.training import advantages, checkpoint
from posttrain.training.evaluate import Evaluation, Evaluator, gather_scores, means
from posttrain.training.idle import check_idle, count_idle, idle_reason, refuse_unscored
from posttrain.training.judge_check import SHOWN, check_judges
from posttrain.training.loop import Training, open_run, resuming, try_rewards
from posttrain.training.oom_retry import MicroBatch
from posttrain.training.policy import POLICY, add_policy, load_model
from posttrain.training.prompt_source import PromptSource, warn_of_cut_prompts
from posttrain.training.stepper import Clock, Stepper, check_ratio
from prompts.records import PromptRecord, columns, read_prompts
from rewards.background import ScoreQueue
from rewards.base import Noise, Reward, Scores
from rewards.gates import apply_gates
from rewards.load import load_rewards, record
from rewards.noise import noise_of


def train(config: GRPOConfig, resume: bool = False) -> None:
    """Runs a recipe into its run directory. Raises UserError for mistakes that the user can correct."""
    procs = Processes(shardable=True)
    roles(config, procs)  # refuses numbers that do not go together before anything is loaded
    resume = resuming(config, resume, procs)
    source, heldout = PromptSource(config, read_prompts(config.prompts.train)), read_prompts(config.prompts.heldout)
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
        size, batch = _size(config, 0), 4 * micro_batch.size  # without gradients four times as many images fit
        evaluator = Evaluator(k2, heldout, measured, config.eval, size, batch, max_tokens, procs)
        warn_of_cut_prompts(k2, [*source.records, *heldout], max_tokens)
        facts = {"rewards": record(rewards), "guidance": {"training": 0.0, "evaluation": config.eval.guidance}}
        training = Training("grpo", config, run, procs, k2, {POLICY: stepper}, evaluator, saved, facts)
        if saved is not None:
            source.restore(saved)
        history = training.history
        for counter in ("images", "skipped_steps", "idle_steps"):
            history.setdefault(counter, 0)
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
                drawn = config.groups.prompts_per_step + int(metrics.get("refilled_groups") or 0)
                history["images"] += drawn * config.groups.group_size
                count_idle(history, idle, metrics["missing"] == 1)
                counted = {name: history[name] for name in ("images", "skipped_steps")}
                run.log(step, {**metrics, **training.health(), **counted})
                check_idle(history, idle, config.idle_steps)
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


def judge_noise(
    run: Run, procs: Processes, evaluator: Evaluator, rewards: list[Reward], before: Evaluation
) -> dict[str, float | None]:
    """How far judges repeat themselves, measured once on the first images; a resumed run finds it in its history."""
    found: dict[str, float | None] = {}
    if procs.main:
        shown = evaluator.records
        images = to_pil(torch.from_numpy(before.images[:SHOWN]))
        found = check_judges(run, rewards, images, [r.prompt for r in shown], columns(shown))
    return procs.from_main(found)


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
    s, n = config.sampling, config.groups.prompts_per_step
    window = window_of(config, step)
    records = dict(enumerate(source.draw(step))) if records is None else records
    indices, costs = list(records), costs_of(k2, config, step)
    drawing, _ = roles(config, procs)
    # A step that did not fit into memory is repeated in smaller micro-batches, and without it.
    keep = config.rollout.keep_graphs and micro_batch == config.groups.micro_batch
    groups = []
    for i in procs.local_indices_by_cost([costs[g % n] for g in indices], drawing):
        g = indices[i]
        row = records[g]
        height, width = size = _size(config, (step - 1) * n + g % n)
        # One prompt at a time: in a batch its features would depend, within rounding, on the prompts beside it.
        text = Text.of([k2.text_tokens(k2.encode([row.prompt], config.prompts.max_tokens).features[0])])
        seeds = []
        for j in range(config.groups.group_size):
            # The first is that of the noise that the image begins with, the others those of its stochastic steps.
            seeds.append([sampler.seed_for(config.seed, step, g, j, i) for i in range(len(window) + 1)])
        times = sampler.schedule(s.steps, k2.mu(height, width))
        shared = s.window is not None
        with k2.role(POLICY, fp8=config.rollout.quantize == "fp8"):
            trajectory = rollout(
                k2, text, seeds, times, window, s.dynamics, s.eta, height, width, micro_batch, shared, keep
            )
        images = to_pil(k2.decode(trajectory.latents, height, width))
        rows = [row] * len(images)
        queue.submit(images, [r.prompt for r in rows], columns(rows))
        groups.append(Group(g, row, text, size, trajectory))
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


def costs_of(k2: K2, config: GRPOConfig, step: int) -> list[float]:
    """What an image of each group of a step costs, relative to the others."""
    first, n = (step - 1) * config.groups.prompts_per_step, config.groups.prompts_per_step
    return flops.of_sizes(k2, [_size(config, first + g) for g in range(n)])


def _size(config: GRPOConfig, index: int) -> tuple[int, int]:
    height, width = config.sampling.sizes[index % len(config.sampling.sizes)]
    return height, width


# ---- score ------------------------------------------------------------------------------------------------


def score(
    config: GRPOConfig, scores: Scores, noise: Mapping[str, Noise] | None = None, batch: Sequence[int] | None = None
) -> tuple[Tensor, dict[str, float | None]]:
    """(P, G) advantages of the groups of a batch, and what the step's rewards look like in all groups.

    `noise` of the rewards by name; None: every difference counts. `batch`: which of the groups that have scores it
    holds; None: all.
    """
    gated = apply_gates(scores, [r for r in config.rewards if not r.heldout_only], noise)
    shape = (-1, config.groups.group_size, len(gated.names))
    rewards_PGK = torch.from_numpy(gated.values_NK).view(*shape)
    valid_PGK = torch.from_numpy(gated.valid_NK).view(*shape)
    weights_K, floor_K = torch.from_numpy(gated.weights_K), torch.from_numpy(gated.floor_K)
    normalise = advantages.gdpo if config.advantages == "gdpo" else advantages.sum_then_normalise
    limit = config.loss.max_advantage
    flat_PK, missing = advantages.flat(rewards_PGK, valid_PGK, floor_K), 1 - valid_PGK.any(-1).double().mean()
    if batch is not None:
        rewards_PGK, valid_PGK = rewards_PGK[list(batch)], valid_PGK[list(batch)]
    advantages_PG = normalise(rewards_PGK, valid_PGK, weights_K, floor_K=floor_K).clamp(-limit, limit)
    noise_K, summed = torch.from_numpy(gated.noise_K), config.advantages == "sum"
    waited, scoring = scores.waited_seconds, scores.scoring_seconds
    by_reward = means(scores)
    metrics: dict[str, float | None] = {f"reward/{name}": value for name, value in by_reward.items()}
    metrics["reward"] = _weighted_mean(by_reward, dict(zip(gated.names, gated.weights_K.tolist())))
    metrics["missing"] = float(missing)
    metrics["failed"] = float(scores.failed_NK.mean())
    metrics["flat_groups"] = float(flat_PK.all(-1).double().mean())
    metrics["noise_share"] = advantages.noise_share(rewards_PGK, valid_PGK, weights_K, floor_K, noise_K, summed)
    metrics["advantage"] = float(advantages_PG.abs().mean())
    if batch is not None:
        metrics["refilled_groups"] = len(flat_PK) - len(advantages_PG)
    metrics["score_hidden"] = 1 - waited / scoring if scoring > 0 else None
    metrics["score_wait"] = waited
    return advantages_PG.float(), metrics


def _weighted_mean(by_reward: Mapping[str, float | None], weights: Mapping[str, float]) -> float | None:
    """Of the rewards that have a score."""
    total, weight = 0.0, 0.0
    for name, share in weights.items():
        mean = by_reward[name]
        if mean is not None:
            total, weight = total + share * mean, weight + share
    return total / weight if weight else None


def taught(config: GRPOConfig, advantages_PG: Tensor) -> Tensor:
    """(P,) bool: groups that are trained on. One without advantages has nothing but its KL to follow, if asked to."""
    if config.groups.flat == "kl" and config.loss.kl > 0:
        return torch.ones(len(advantages_PG), dtype=torch.bool)
    return (advantages_PG != 0).any(1)
