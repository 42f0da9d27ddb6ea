"""A training step's groups of images: their prompts, their scores and advantages, and what a run counts of them.

What the methods have in common that learn from rewards of groups. Each draws its images in its own way:

    for prompted in prompted_groups(k2, config, step, records):
        latents = ...
        submit(k2, queue, prompted, latents)
    ...                                                  # the scores of all processes
    advantages_PG, metrics = score(config, scores, noise)

Legend: P groups, G images of a group, K rewards, N image tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.config.groups import GroupTrainingConfig
from posttrain.distributed.processes import Processes
from posttrain.model import flops
from posttrain.model.k2 import K2, Text, to_pil
from posttrain.runs.run import Run
from posttrain.training import advantages
from posttrain.training.evaluate import Evaluation, Evaluator, means
from posttrain.training.idle import check_idle, count_idle
from posttrain.training.judge_check import SHOWN, check_judges
from posttrain.training.loop import Training
from prompts.records import PromptRecord, columns
from rewards.background import ScoreQueue
from rewards.base import Noise, Reward, Scores
from rewards.gates import apply_gates

# ---- sample -----------------------------------------------------------------------------------------------


@dataclass
class Prompted:
    """What a group of images is drawn from."""

    index: int
    """Among all groups of the step, whichever process draws them."""
    record: PromptRecord
    text: Text
    size: tuple[int, int]


def prompted_groups(
    k2: K2, config: GroupTrainingConfig, step: int, records: Mapping[int, PromptRecord]
) -> Iterator[Prompted]:
    """The groups of a step with these prompts by index, one after the other, their text encoded when they are asked
    for. A group beyond the step's first ones has the size of the one that it is drawn for."""
    n = config.groups.prompts_per_step
    for g, row in records.items():
        # One prompt at a time: in a batch its features would depend, within rounding, on the prompts beside it.
        text = Text.of([k2.text_tokens(k2.encode([row.prompt], config.prompts.max_tokens).features[0])])
        yield Prompted(g, row, text, size_of(config, (step - 1) * n + g % n))


def submit(k2: K2, queue: ScoreQueue, prompted: Prompted, latents_GNC: Tensor) -> None:
    """Decodes a group's images and submits them for scoring."""
    images = to_pil(k2.decode(latents_GNC, *prompted.size))
    queue.submit(images, [prompted.record.prompt] * len(images), columns([prompted.record] * len(images)))


def costs_of(k2: K2, config: GroupTrainingConfig, step: int) -> list[float]:
    """What an image of each group of a step costs, relative to the others."""
    first, n = (step - 1) * config.groups.prompts_per_step, config.groups.prompts_per_step
    return flops.of_sizes(k2, [size_of(config, first + g) for g in range(n)])


def size_of(config: GroupTrainingConfig, index: int) -> tuple[int, int]:
    """(height, width) of the images of a group, counted over the whole run."""
    sizes = config.image_sizes()
    height, width = sizes[index % len(sizes)]
    return height, width


# ---- score ------------------------------------------------------------------------------------------------


def score(
    config: GroupTrainingConfig,
    scores: Scores,
    noise: Mapping[str, Noise] | None = None,
    batch: Sequence[int] | None = None,
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
    limit = config.max_advantage()
    # Of all groups drawn, also of those that others have replaced.
    flat_PK, missing = advantages.flat(rewards_PGK, valid_PGK, floor_K), 1 - valid_PGK.any(-1).double().mean()
    if batch is not None:
        rewards_PGK, valid_PGK = rewards_PGK[list(batch)], valid_PGK[list(batch)]
    advantages_PG = normalise(rewards_PGK, valid_PGK, weights_K, floor_K=floor_K).clamp(-limit, limit)
    noise_K, summed = torch.from_numpy(gated.noise_K), config.advantages == "sum"
    waited, scoring = scores.waited_seconds, scores.scoring_seconds
    by_reward = means(scores)
    metrics: dict[str, float | None] = {f"reward/{name}": value for name, value in by_reward.items()}
    metrics["reward"] = weighted_mean(by_reward, dict(zip(gated.names, gated.weights_K.tolist())))
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


def weighted_mean(by_reward: Mapping[str, float | None], weights: Mapping[str, float]) -> float | None:
    """Of the rewards that have a score."""
    total, weight = 0.0, 0.0
    for name, share in weights.items():
        mean = by_reward[name]
        if mean is not None:
            total, weight = total + share * mean, weight + share
    return total / weight if weight else None


# ---- a run ------------------------------------------------------------------------------------------------


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


def log_step(
    training: Training, config: GroupTrainingConfig, step: int, metrics: Mapping[str, float | None], idle: str | None
) -> None:
    """Counts a step in the run's history and logs it. `idle` is why it taught nothing; raises UserError if too many
    have."""
    history = training.history
    drawn = config.groups.prompts_per_step + int(metrics.get("refilled_groups") or 0)
    history["images"] += drawn * config.groups.group_size
    count_idle(history, idle, metrics["missing"] == 1)
    counted = {name: history[name] for name in ("images", "skipped_steps")}
    training.run.log(step, {**metrics, **training.health(), **counted})
    check_idle(history, idle, config.idle_steps)


def start_counting(training: Training) -> None:
    """Puts the counters of `log_step` into the history of a run that has none yet."""
    for counter in ("images", "skipped_steps", "idle_steps"):
        training.history.setdefault(counter, 0)
