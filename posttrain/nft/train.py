"""NFT: reinforcement learning of K2 on the forward process, without guidance, log-probs or stochastic steps.

Each step draws a group of images for some prompts by ODE, scores them, and turns their advantages into an optimality in
[0, 1]. The images are noised again, as in pretraining, and the velocity is moved towards what images better than their
group's average say and away from what the others say (DiffusionNFT, arXiv:2509.16117; losses.py has the formulas).

    posttrain nft --config recipes/nano/nft.yaml

The images are drawn by the old policy, which follows the policy by a schedule (`old`); the loss keeps the policy near
it. With `old.max: 0` it is always the policy, and neither its adapter nor its forward is needed. Any sampler may draw:
a forward and backward is made for each of `loss.times` noise levels of an image, whichever steps have led to it.

All noise comes from seeds of global indices (run, step, group, image, noise level), so nothing depends on processes,
batching or history: a resumed run draws what the uninterrupted one would have.

Evaluations draw in `eval.steps` with each guidance and in `sampling.steps` without, since a policy can learn to suit
the few steps that it is drawn with; and they measure every reward. Where the reward of training rises while one that is
not trained on falls, the run says so.

Legend: P groups, G images of a group, B images of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain.config import metric_names
from posttrain.distributed.processes import Processes
from posttrain.log import log
from posttrain.model import fp8, parallelize, sampler
from posttrain.model.k2 import K2
from posttrain.nft.config import NFTConfig
from posttrain.nft.update import OLD, Group, add_roles, check_old, follow, lags, optimise
from posttrain.training import checkpoint
from posttrain.training.evaluate import Evaluator, SamplingSettings, gather_scores
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
from posttrain.training.policy import POLICY, load_model
from posttrain.training.prompt_source import PromptSource, warn_of_cut_prompts
from posttrain.training.stepper import Clock, Stepper
from prompts.records import read_prompts
from rewards.background import ScoreQueue
from rewards.base import Noise, Scores
from rewards.gates import Gated, apply_gates
from rewards.load import load_rewards, record
from rewards.noise import noise_of

FALL = 0.05
"""Share of its first value by which a held-out figure falls before the run warns."""
WINDOW = 8
"""Steps over which the reward of training is averaged, at the start and now."""


def train(config: NFTConfig, resume: bool = False) -> None:
    """Runs a recipe into its run directory. Raises UserError for mistakes that the user can correct."""
    procs = Processes(shardable=True)
    resume = resuming(config, resume, procs)
    source, heldout = PromptSource(config, read_prompts(config.prompts.train)), read_prompts(config.prompts.heldout)
    try_rewards(config, heldout, source.records)
    saved = checkpoint.load_latest(Path(config.output) / "checkpoints") if resume else None
    if config.rollout.quantize:
        fp8.check(procs.device, "rollout.quantize")
    k2 = load_model(config.model, procs.device, saved)
    with parallelize.sharding(k2, procs):
        add_roles(k2, config)
    if config.rollout.quantize:
        fp8.add_copies(k2, procs.device)
    k2.train_role(POLICY)
    stepper = Stepper(k2.role_named_parameters(POLICY), config.optim)
    micro_batch = MicroBatch(config.groups.micro_batch, "groups.micro_batch", procs)
    max_tokens = config.prompts.max_tokens

    with open_run(config, resume, procs) as run:
        rewards = load_rewards([r for r in config.rewards if not r.heldout_only], run.urls)
        # Judges keep to one event loop, so evaluation has its own.
        measured = load_rewards(config.rewards, run.urls)
        size, batch = size_of(config, 0), 4 * micro_batch.size  # without gradients four times as many images fit
        evaluator = Evaluator(
            k2, heldout, measured, config.eval, size, batch, max_tokens, procs, evaluation_settings(config)
        )
        warn_of_cut_prompts(k2, [*source.records, *heldout], max_tokens)
        facts = {"rewards": record(rewards), "guidance": {"training": 0.0, "evaluation": config.eval.guidance}}
        training = Training("nft", config, run, procs, k2, {POLICY: stepper}, evaluator, saved, facts)
        if saved is not None:
            source.restore(saved)
            restore_old(k2, saved)
        history = training.history
        start_counting(training)
        if training.begin():
            if not any(reward.heldout_only for reward in config.rewards):
                log.warning("rewards: none has heldout_only: true, so damage to images would not show; add one")
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
                count_reward(history, metrics["reward"])
                if training.evaluation_due(step):
                    with training.policy():
                        evaluation = evaluator()
                    training.record(step, evaluation)
                    if warning := damage(config, history, evaluation.metrics):
                        log.warning(f"step {step}: {warning}")
                if training.save_due(step):
                    run.prompts(source.ends())
                    tensors, state = source.state()
                    training.save(step, tensors | saved_old(k2, procs), state)
            if run.stopped is None:
                refuse_unscored(history, history["steps"], idle)
            training.finish()


def updates(
    k2: K2,
    config: NFTConfig,
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
    check = True
    for step in steps:
        clock.start()
        scores: Scores | None = None
        gated: Gated | None = None
        metrics: dict[str, float | None] = {}
        check, updated = check and not lags(config, stepper), stepper.updates
        for attempt in micro_batch.attempts(stepper):
            groups: list[Group] = []  # lets go of those of an attempt that did not fit into memory
            queue.drop()
            with attempt:
                groups = sample(k2, config, step, stepper, source, queue, procs, micro_batch.size)
                clock.lap("sample")
                own = queue.gather() if groups else None
                scores = gather_scores(procs, own, config.groups.group_size, [group.index for group in groups])
                advantages_PG, metrics = score(config, scores, noise)
                clock.lap("score")
                metrics["clipped_advantages"] = clipped(config, advantages_PG)
                gated = apply_gates(scores, [r.spec for r in queue.rewards], noise)
                scored_PG = scored(config, gated)
                taught_P = taught(config, advantages_PG, scored_PG, lags(config, stepper))
                if bool(taught_P.any()):
                    groups = [group for group in groups if taught_P[group.index]]
                    metrics |= optimise(
                        k2, config, step, groups, advantages_PG, scored_PG, stepper, procs, micro_batch.size, check
                    )
                clock.lap("optimise")
        assert scores is not None and gated is not None
        if stepper.updates > updated:
            follow(k2, config, stepper.updates)
        metrics |= source.update(step, gated)
        # Of the first step that trained: an old policy that is not the policy would not show in the loss.
        if "old_error" in metrics:
            check_old(metrics["old_error"] or 0.0)
            check = False  # the same velocities from now on, or an old policy that is another one
        metrics |= clock.seconds
        yield step, metrics, idle_reason(metrics, scores)


# ---- sample -----------------------------------------------------------------------------------------------


def sample(
    k2: K2,
    config: NFTConfig,
    step: int,
    stepper: Stepper,
    source: PromptSource,
    queue: ScoreQueue,
    procs: Processes,
    micro_batch: int,
) -> list[Group]:
    """This process's groups of a step, each image from its own noise, since nothing else makes them differ. They are
    submitted for scoring as soon as they are decoded."""
    role = OLD if lags(config, stepper) else POLICY
    groups = []
    records, places = source.draw(step), procs.local_indices_by_cost(costs_of(k2, config, step))
    for prompted in prompted_groups(k2, config, step, {g: records[g] for g in places}):
        seeds = []
        for j in range(config.groups.group_size):
            seeds.append(sampler.seed_for(config.seed, step, prompted.index, j, 0))
        noise = sampler.noise(seeds, (k2.image_tokens(*prompted.size), k2.latent_channels))
        steps, parts = config.sampling.steps, []
        with k2.role(role, fp8=config.rollout.quantize == "fp8"):
            for part in noise.split(micro_batch):
                parts.append(k2.sample(prompted.text, part, steps, *prompted.size))
        group = Group(**vars(prompted), latents=torch.cat(parts))
        submit(k2, queue, group, group.latents)
        groups.append(group)
    return groups


def clipped(config: NFTConfig, advantages_PG: Tensor) -> float:
    """The share of images whose advantage is the largest or the least possible."""
    return float((advantages_PG.abs() >= config.loss.max_advantage).double().mean())


def scored(config: NFTConfig, gated: Gated) -> Tensor:
    """(P, G) 1 for images that have a score after the gates, else 0."""
    shape = (config.groups.prompts_per_step, config.groups.group_size)
    return torch.from_numpy(gated.valid_NK.any(1)).view(*shape).float()


def taught(config: NFTConfig, advantages_PG: Tensor, scored_PG: Tensor, lagging: bool) -> Tensor:
    """(P,) bool: groups that are trained on. One without advantages has only a distance to follow: to the old policy,
    if that is another one, or, if asked for, to the reference."""
    # With A = 0 the loss is A_m beta w |d|^2: it pulls the policy to the old one, where d is not 0.
    if lagging or (config.groups.flat == "kl" and config.loss.kl > 0):
        return (scored_PG > 0).any(1)
    return (advantages_PG != 0).any(1)


# ---- the old policy in checkpoints ------------------------------------------------------------------------


def saved_old(k2: K2, procs: Processes) -> dict[str, dict[str, Tensor]]:
    """The old policy as a file of a checkpoint, if there is one."""
    return {OLD: checkpoint.on_host(k2.role_state_dict(OLD), procs.main)} if OLD in k2.roles else {}


def restore_old(k2: K2, saved: checkpoint.Checkpoint) -> None:
    """Puts it back; in a run that had none until now it begins as the policy."""
    if OLD in k2.roles:  # a recipe may have raised old.max since
        state = saved.tensors[OLD] if OLD in saved.tensors else checkpoint.on_host(k2.role_state_dict(POLICY))
        k2.load_role_state_dict(OLD, state)


# ---- evaluate ---------------------------------------------------------------------------------------------


def evaluation_settings(config: NFTConfig) -> list[SamplingSettings]:
    """Each guidance in eval.steps; and, as in training, sampling.steps without guidance."""
    settings = []
    for scale in config.eval.guidance:
        settings.append(SamplingSettings(config.eval.steps, scale, suffix=metric_names.suffix(scale)))
    return [*settings, SamplingSettings(config.sampling.steps, suffix=config.rollout_suffix())]


def count_reward(history: dict[str, Any], reward: float | None) -> None:
    """Keeps the reward of training in the history: its mean over the first steps, and an average over the newest."""
    seen = history.setdefault("training_reward", {"steps": 0, "first": 0.0, "now": 0.0})
    if reward is None:
        return
    seen["steps"] += 1
    # A mean of the first WINDOW steps, and from then on an exponential average.
    seen["now"] += (reward - seen["now"]) / min(seen["steps"], WINDOW)
    if seen["steps"] <= WINDOW:
        seen["first"] = seen["now"]


def damage(config: NFTConfig, history: Mapping[str, Any], metrics: Mapping[str, float | None]) -> str | None:
    """What to say where training's reward has risen and held-out figures have fallen; None if there is nothing."""
    seen, fallen = history["training_reward"], []
    for reward in config.rewards:
        if not reward.heldout_only:
            continue
        for suffix in config.suffixes():
            name = reward.name + suffix
            before, now = history["before"].get(name), metrics.get(name)
            if before is not None and now is not None and now < before - FALL * abs(before):
                fallen.append(f"{name} from {before:.3g} to {now:.3g}")
    if not fallen or seen["now"] <= seen["first"]:
        return None
    return (
        f"the reward of training rose from {seen['first']:.3g} to {seen['now']:.3g}, and what is held out fell:"
        f" {', '.join(fallen)}; lower optim.lr, set loss.levels: noisier, or end such runs by eval.stop"
    )
