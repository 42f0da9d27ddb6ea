"""GRPO: reinforcement learning of K2 from groups of images, without guidance in rollout or training.

Each step draws a group of images for some prompts, partly with stochastic (SDE) steps; scores them; and makes the
steps that led to better-than-average images of a prompt more likely. It is Flow-GRPO (arXiv:2505.05470) with the
windows of MixGRPO (arXiv:2507.21802), the ratio of GRPO-Guard (arXiv:2510.22319) and GDPO advantages.

    posttrain grpo --config recipes/nano/grpo.yaml

Any number of processes (`accelerate launch`) share a step's groups; each group has one prompt and one size, so its
text has one length and needs no mask. All noise comes from seeds of global indices (run, step, group, image, SDE
step), so nothing depends on processes, batching or history: a resumed run draws what the uninterrupted one would have.

Legend: P groups, G images of a group, K rewards, W stochastic steps, B images of a micro-batch.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain.config.sections import GRPOConfig
from posttrain.distributed.processes import Processes
from posttrain.errors import UserError
from posttrain.grpo import losses
from posttrain.grpo.rollout import Trajectory, rollout
from posttrain.model import flops, parallelize, sampler
from posttrain.model.k2 import K2, Text, to_pil
from posttrain.runs.run import Run
from posttrain.training import advantages, checkpoint
from posttrain.training.checkpoint import Checkpoint
from posttrain.training.evaluate import Evaluator, gather_scores, means
from posttrain.training.judge_check import SHOWN, check_judges
from posttrain.training.loop import Training, Urls, in_run, resuming
from posttrain.training.oom_retry import Memory
from posttrain.training.policy import POLICY, add_policy, load_model
from posttrain.training.prompt_source import PromptSource, cut_prompts
from posttrain.training.stepper import Clock, Stepper, check_ratio
from prompts.records import PromptRecord, columns, read_prompts
from rewards.background import ScoreQueue
from rewards.base import Noise, Scores
from rewards.gates import apply_gates
from rewards.load import load_rewards, record
from rewards.noise import noise_of


@dataclass
class Group:
    """One prompt's images of one step."""

    index: int
    """Among all groups of the step, whichever process drew them."""
    record: PromptRecord
    text: Text
    size: tuple[int, int]
    trajectory: Trajectory
    advantages: Tensor
    """(G,)"""


def train(config: GRPOConfig, resume: bool = False) -> None:
    """Runs a recipe into its run directory. Raises UserError for what the user can mend."""
    procs = Processes(shardable=True)
    resume = resuming(config, resume, procs)
    source, heldout = PromptSource(config, read_prompts(config.prompts.train)), read_prompts(config.prompts.heldout)
    load_rewards(config.rewards, {server.name: ["http://127.0.0.1/"] for server in config.servers})  # before the wait
    saved = checkpoint.load_latest(Path(config.output) / "checkpoints") if resume else None
    k2 = load_model(config.model, procs.device, saved)
    with parallelize.sharding(k2, procs):
        add_policy(k2, config.lora, config.seed, reference=config.loss.kl > 0)
    in_run(config, resume, procs, lambda run, urls: _train(config, saved, run, procs, k2, source, heldout, urls))


def _train(
    config: GRPOConfig,
    saved: Checkpoint | None,
    run: Run,
    procs: Processes,
    k2: K2,
    source: PromptSource,
    heldout: list[PromptRecord],
    urls: Urls,
) -> signal.Signals | None:
    trained = load_rewards([r for r in config.rewards if not r.heldout_only], urls)
    measured = load_rewards(config.rewards, urls)  # judges keep to one event loop, so evaluation has its own
    stepper = Stepper(k2.train_role(POLICY), config.optim)
    batch, max_tokens = 4 * config.groups.micro_batch, config.prompts.max_tokens
    evaluator = Evaluator(k2, heldout, measured, config.eval, _size(config, 0), batch, max_tokens, procs)
    for warning in cut_prompts(k2, [*source.records, *heldout], max_tokens):
        run.say(warning)

    def state() -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        run.prompts(source.ends())
        pool, pool_state = source.state()
        guidance = {"training": 0.0, "evaluation": config.eval.guidance}
        return pool, {"rewards": record(trained), "guidance": guidance, **pool_state}

    training = Training("grpo", config, run, procs, k2, stepper, evaluator, saved)
    training.state = state
    history = training.history
    if saved is not None:
        source.restore(saved)
    history.setdefault("images", 0)

    with ScoreQueue(trained, config.groups.group_size) as queue:
        before = training.begin()
        if before is not None:
            checked: dict[str, float | None] = {}
            if procs.main:
                shown = evaluator.records
                pictures = to_pil(torch.from_numpy(before.images[:SHOWN]))
                checked = check_judges(run, measured, pictures, [r.prompt for r in shown], columns(shown))
            history |= procs.from_main(checked)  # with the noise, which a run that goes on finds here
        noise = noise_of(trained, history)

        for step, metrics in updates(k2, config, source, queue, stepper, training.steps(), procs, run.say, noise):
            history["images"] += config.groups.prompts_per_step * config.groups.group_size
            run.log(step, {**metrics, **training.health(), "images": history["images"]})
        training.finish()
    return training.stopped


def updates(
    k2: K2,
    config: GRPOConfig,
    source: PromptSource,
    queue: ScoreQueue,
    stepper: Stepper,
    steps: Iterable[int],
    procs: Processes,
    say: Callable[[str], None],
    noise: Mapping[str, Noise],
    clocks: Callable[[], Clock] = Clock,
) -> Iterator[tuple[int, dict[str, float | None]]]:
    """Trains one step at a time, and yields its number and metrics: a run's loop, and what `posttrain bench` times.

    `noise` is how far two scores of one image differ, by reward; see rewards.noise.
    """

    def attempt(step: int, clock: Clock) -> tuple[Scores, dict[str, float | None], dict[str, float]]:
        queue.drop()  # of an attempt that did not fit into memory
        groups = sample(k2, config, step, source, queue, procs)
        clock.lap("sample")
        places = [group.index for group in groups]
        scores = gather_scores(procs, queue.gather() if groups else None, config.groups.group_size, places)
        metrics = score(config, groups, scores, noise)
        clock.lap("score")
        updated = optimise(k2, config, groups, stepper, procs)
        clock.lap("optimise")
        return scores, metrics, updated

    memory, checked = Memory(config.groups, "groups.micro_batch", procs, say), False
    for step in steps:
        timed = clocks()
        scores, metrics, updated = memory.fit(stepper, attempt, step, timed)
        metrics |= source.update(step, apply_gates(scores, [r.spec for r in queue.rewards], noise))
        if not checked:
            check_ratio(updated["ratio_error"], config.loss)
            checked = True
        yield step, {**metrics, **updated, **timed.seconds}


# ---- sample -----------------------------------------------------------------------------------------------


def sample(
    k2: K2, config: GRPOConfig, step: int, source: PromptSource, queue: ScoreQueue, procs: Processes
) -> list[Group]:
    """This process's groups of a step. Their pictures are submitted for scoring as soon as they are decoded."""
    s, n = config.sampling, config.groups.prompts_per_step
    first, chosen = (step - 1) * n, source.draw(step)
    window = window_of(config, step)
    groups = []
    sizes = [_size(config, first + g) for g in range(n)]
    for g in procs.mine_by_cost(flops.of_sizes(k2, sizes)):
        row = chosen[g]
        height, width = size = sizes[g]
        text = Text.of([k2.fuse(k2.encode([row.prompt], config.prompts.max_tokens).features[0])])
        seeds = [
            [sampler.seed_for(config.seed, step, g, j, i) for i in range(len(window) + 1)]
            for j in range(config.groups.group_size)
        ]
        times = sampler.schedule(s.steps, k2.mu(height, width))
        with k2.role(POLICY):
            trajectory = rollout(
                k2, text, seeds, times, window, s.dynamics, s.eta, height, width, config.groups.micro_batch,
                shared=s.window is not None,
            )  # fmt: skip
        images = to_pil(k2.decode(trajectory.latents, height, width))
        rows = [row] * len(images)
        queue.submit(images, [r.prompt for r in rows], columns(rows))
        groups.append(Group(g, row, text, size, trajectory, torch.empty(0)))
    return groups


def window_of(config: GRPOConfig, step: int) -> range:
    """The stochastic steps of a training step: the same for all its groups."""
    s = config.sampling
    if s.window is None:
        return range(s.steps - 1)
    start, starts = s.window_start, min((s.steps + 1) // 2, s.steps - s.window)
    if start == "random":
        start = sampler.seed_for(config.seed, step, -1) % starts
    elif start == "sliding":
        start = (step - 1) // s.window_every % starts
    return range(start, start + s.window)


def _size(config: GRPOConfig, index: int) -> tuple[int, int]:
    height, width = config.sampling.sizes[index % len(config.sampling.sizes)]
    return height, width


# ---- score ------------------------------------------------------------------------------------------------


def score(
    config: GRPOConfig, groups: list[Group], scores: Scores, noise: Mapping[str, Noise] | None = None
) -> dict[str, float | None]:
    """Turns the scores of all groups into the advantages of these; returns what the step's rewards looked like.

    `noise` of the rewards by name; None: every difference counts.
    """
    gated = apply_gates(scores, [r for r in config.rewards if not r.heldout_only], noise)
    shape = (config.groups.prompts_per_step, config.groups.group_size, -1)
    rewards_PGK = torch.from_numpy(gated.values_NK).view(*shape)
    valid_PGK = torch.from_numpy(gated.valid_NK).view(*shape)
    weights_K, floor_K = torch.from_numpy(gated.weights_K), torch.from_numpy(gated.floor_K)
    if not valid_PGK.any():
        reasons = [f"{name}: {next(iter(f))}" for name, f in scores.failures.items() if f]
        told = "; ".join(reasons or ["all None, so none applies to these prompts"])
        raise UserError(f"rewards: not one image of this step could be scored: {told}; mend or add a reward")
    normalise = advantages.gdpo if config.advantages == "gdpo" else advantages.sum_then_normalise
    limit = config.loss.max_advantage
    advantages_PG = normalise(rewards_PGK, valid_PGK, weights_K, floor_K=floor_K).clamp(-limit, limit)
    for group in groups:
        group.advantages = advantages_PG[group.index].float()
    flat_PK = advantages.flat(rewards_PGK, valid_PGK, floor_K)
    noise_K, summed = torch.from_numpy(gated.noise_K), config.advantages == "sum"
    noise_share = advantages.noise_share(rewards_PGK, valid_PGK, weights_K, floor_K, noise_K, summed)
    by_reward = means(scores)
    weighed = [(w, mean) for n, w in zip(gated.names, gated.weights_K) if (mean := by_reward[n]) is not None]
    total = float(sum(w for w, _ in weighed))
    metrics: dict[str, float | None] = {f"reward/{name}": value for name, value in by_reward.items()}
    metrics["reward"] = sum(w * mean for w, mean in weighed) / total if total else None
    metrics["missing"] = 1 - float(valid_PGK.any(-1).double().mean())
    metrics["failed"] = float(scores.failed_NK.mean())
    metrics["flat_groups"] = float(flat_PK.all(-1).double().mean())
    metrics["noise_share"] = noise_share
    metrics["advantage"] = float(advantages_PG.abs().mean())
    metrics["score_hidden"] = 1 - scores.waited_seconds / scores.scoring_seconds if scores.scoring_seconds > 0 else None
    return metrics


# ---- optimise ---------------------------------------------------------------------------------------------


def optimise(k2: K2, config: GRPOConfig, groups: list[Group], stepper: Stepper, procs: Processes) -> dict[str, float]:
    """One or more updates on the groups of all processes; the reference is the weights that training began with."""
    passes = []
    for _ in range(config.optim.passes):
        metrics = gradient(k2, config, groups, procs)
        procs.sum_gradients(stepper.parameters)
        metrics["grad_norm"] = stepper.step()
        passes.append(metrics | stepper.metrics())
    # Before the first update the policy is the one that drew the images, so every ratio is 1.
    return {**passes[-1], "ratio_error": passes[0]["ratio_error"], "skipped_updates": stepper.skipped}


def gradient(k2: K2, config: GRPOConfig, groups: list[Group], procs: Processes) -> dict[str, float]:
    """Adds the loss's gradient over these groups to the policy's, and returns metrics over the groups of all processes.

    The loss is a mean over the groups, images and stochastic steps of a whole step, whatever is in `groups`.
    """
    s, loss = config.sampling, config.loss
    moves = [(g, t) for g in groups for t in g.trajectory.transitions]
    stochastic = s.steps - 1 if s.window is None else s.window
    count = config.groups.prompts_per_step * stochastic * config.groups.group_size
    totals: dict[str, Tensor] = {}
    for group, move in moves:
        times = sampler.schedule(s.steps, k2.mu(*group.size))
        weight = float(sampler.guard_weights(times, s.dynamics, s.eta)[move.index]) if loss.ratio == "guard" else 1.0
        for rows in torch.arange(len(move.x)).split(config.groups.micro_batch):
            with k2.role(POLICY):
                v = k2.velocity(move.x[rows], move.t, group.text, *group.size)
            mean, std = sampler.sde_moments(move.x[rows], v, move.t, move.t_next, s.dynamics, s.eta, times[1])
            if loss.ratio == "guard":
                log_ratio = sampler.guard_log_ratio(move.x_next[rows], move.mean[rows], mean, std)
            else:
                log_ratio = sampler.log_prob(move.x_next[rows], mean, std) - move.log_prob[rows]
            loss_B, parts = losses.clipped_policy(log_ratio, group.advantages[rows], loss.clip_low, loss.clip_high)
            if loss.kl > 0:
                with torch.no_grad(), k2.role(None):
                    reference = k2.velocity(move.x[rows], move.t, group.text, *group.size)
                kl_B = losses.velocity_kl(v, reference)
                loss_B = loss_B + loss.kl * kl_B
                parts["kl"] = kl_B.detach().sum()
            loss_B = weight * loss_B  # the KL's term too, so that loss.kl means the same at every step
            parts["loss"] = loss_B.detach().sum()
            with k2.role(POLICY):
                (loss_B.sum() / count).backward()
            for name, value in parts.items():
                totals[name] = totals.get(name, 0.0) + value.double()
            error = log_ratio.detach().exp().sub(1).abs().max().double()
            totals["worst"] = torch.maximum(totals.get("worst", error), error)
    each = [part for part in procs.each({name: float(value) for name, value in totals.items()}) if part]
    worst = max(part.pop("worst") for part in each)
    average = {name: sum(part[name] for part in each) / count for name in each[0]}
    # Log-ratios lie around 0, so the difference of their moments is accurate; that of ratios around 1 would not be.
    mean, square = average.pop("log_ratio"), average.pop("log_ratio_square")
    average["log_ratio_std"] = max(0.0, square - mean**2) ** 0.5
    return {**average, "ratio_error": worst}
