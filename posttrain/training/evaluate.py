"""Evaluation on held-out prompts: fixed seeds, deterministic sampling, every reward of the recipe and the metrics of
image_metrics.py. A reward that compares a group sees those groups that are drawn for their diversity.

Each process measures and scores the images that it has drawn. Numbers go to all processes; of the images, only those
that are shown go to the main one, and those of a group to the process that scores it, if a reward compares groups.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from posttrain.config import metric_names
from posttrain.config.sections import EvalConfig
from posttrain.distributed.processes import Processes
from posttrain.model import sampler
from posttrain.model.k2 import K2, Text, to_pil
from posttrain.training import image_metrics
from prompts.records import PromptRecord, columns
from rewards.base import Reward, Scores, score_all

SHOWN = 16
"""Images of each setting that the main process gets, to show them."""


def square_of(resolution: int) -> tuple[int, int]:
    """(height, width) of a square of about that many pixels a side, in whole image tokens of 16 pixels."""
    side = max(16, resolution // 16 * 16)
    return side, side


@dataclass(frozen=True)
class SamplingSettings:
    """How images are drawn."""

    steps: int
    guidance: float = 0.0
    mu: float | None = None
    """The schedule's shift; None: the model's own."""
    suffix: str = ""
    """Of the names of its metrics."""


Draw = Callable[[Sequence[int], Text, Tensor, SamplingSettings, Text | None], Tensor]
"""Latents (B, N, C) of the records with these numbers, from their texts and noise; last comes the empty prompt's text,
None without guidance."""


@dataclass
class Evaluation:
    """Metrics and images of one evaluation. `suffix` below is that of a SamplingSettings."""

    metrics: dict[str, float | None] = field(default_factory=dict)
    """NAME + suffix: mean scores (None where no image could be scored), `image/...`."""
    shown: dict[str, np.ndarray] = field(default_factory=dict)
    """By suffix: the first images, uint8 (N, H, W, 3); N is 0 but on the main process."""
    measured: dict[str, dict[str, float]] = field(default_factory=dict)
    """By suffix: what image_metrics.measure says of all images."""
    details: dict[str, float | None] = field(default_factory=dict)
    """Further metrics, which are logged but not put into the summary."""
    per_image_scores: list[dict[str, Any]] = field(default_factory=list)
    """By image of the first settings, as `per_image_scores` gives it."""

    @property
    def images(self) -> np.ndarray:
        """uint8 (N, H, W, 3): the images shown of the first settings; none but on the main process."""
        return next(iter(self.shown.values()))


class Evaluator:
    """Draws and scores the same images each time it is called, under the role that is active then."""

    def __init__(
        self,
        k2: K2,
        records: Sequence[PromptRecord],
        rewards: Sequence[Reward],
        config: EvalConfig,
        size: tuple[int, int],
        batch: int,
        max_tokens: int,
        procs: Processes,
        settings: Sequence[SamplingSettings] | None = None,
        shown: int = SHOWN,
        draw: Draw | None = None,
    ):
        """Without `settings`: each guidance of `config`, in its steps. `shown`: how many images of each are kept.
        `draw`: how latents are drawn; None: by `K2.sample`."""
        self.shown, self._drawn = shown, draw
        self.k2, self.config, self.size, self.batch, self.procs = k2, config, size, batch, procs
        guidances = [SamplingSettings(config.steps, s, suffix=metric_names.suffix(s)) for s in config.guidance]
        self.settings = settings or guidances
        self.rewards = [reward for reward in rewards if not reward.spec.group]
        self.group_rewards = [reward for reward in rewards if reward.spec.group]
        self.records = list(records[: config.prompts])
        self.seeds = [sampler.seed_for(config.seed, i) for i in range(len(self.records))]
        self._groups: list[tuple[int, int]] = []
        """Prompt and seed of each image of the groups."""
        for i in range(min(config.groups, len(self.records))):
            for j in range(config.group_size):
                self._groups.append((i, sampler.seed_for(config.seed, i, j)))
        encoding = k2.encode([record.prompt for record in self.records], max_tokens)
        # Fused text waits in RAM: on the GPU it would take the place of training's activations.
        self._fused = [k2.text_tokens(features).cpu() for features in encoding.features]
        self._columns = columns(self.records)
        self._null: Text | None = None

    def __call__(self, settings: Sequence[SamplingSettings] | None = None) -> Evaluation:
        """With `settings`, by these instead."""
        result = Evaluation()
        for chosen in settings or self.settings:
            rows = self.procs.local_indices(len(self.seeds))  # all have one size, so none costs more
            images, latents = self._draw([(row, self.seeds[row]) for row in rows], chosen)
            scores = self._score(self.rewards, images, rows, 1)
            result.per_image_scores = result.per_image_scores or per_image_scores(scores)
            result.shown[chosen.suffix] = self._shown(images, rows)
            looks = list(map(image_metrics.measure, images, latents))
            measured = image_metrics.means(self.procs.gather_in_order(looks))
            result.measured[chosen.suffix] = measured
            values = means(scores)
            for name in metric_names.LOOK:
                values[name] = measured[name]
            values |= self._of_groups(chosen)
            for name, value in values.items():
                result.metrics[name + chosen.suffix] = value
        return result

    def first(self, count: int, draw: Draw) -> np.ndarray:
        """The first images of the first settings, drawn in another way: uint8 (N, H, W, 3). They are not scored."""
        jobs = [(row, self.seeds[row]) for row in range(min(count, len(self.seeds)))]
        return np.stack(self._draw(jobs, self.settings[0], draw)[0])

    def _of_groups(self, settings: SamplingSettings) -> dict[str, float | None]:
        """Metrics of the groups: their diversity, and rewards that compare the images of a group."""
        if not self._groups:
            return {}
        size, places = self.config.group_size, self.procs.local_indices(len(self._groups))
        images, _ = self._draw([self._groups[place] for place in places], settings)
        # 768 numbers of each image travel, not the image.
        cells = [image_metrics.cells(image[None])[0] for image in images]
        all_cells = np.stack(self.procs.gather_in_order(cells))
        values: dict[str, float | None] = {metric_names.DIVERSITY: image_metrics.diversity_of_cells(all_cells, size)}
        if self.group_rewards:
            # Each group travels to one process, which alone scores it.
            parcels: dict[int, dict[int, np.ndarray]] = {}
            for place, image in zip(places, images):
                parcels.setdefault(self.procs.owner(place // size), {})[place] = image
            received: dict[int, np.ndarray] = {}
            for parcel in self.procs.deliver(parcels).values():
                received |= parcel
            # In their order again, so that neighbours are a group.
            own_images, rows = [], []
            for place in sorted(received):
                own_images.append(received[place])
                rows.append(self._groups[place][0])
            values |= means(self._score(self.group_rewards, own_images, rows, size))
        return values

    def _score(
        self, rewards: Sequence[Reward], images: Sequence[np.ndarray], rows: Sequence[int], group_size: int
    ) -> Scores:
        """The scores of all processes' images; these are the ones of this process, and `rows` their prompts."""
        if not images:  # fewer images than processes
            return gather_scores(self.procs, None, group_size)
        pil_images = to_pil(torch.from_numpy(np.stack(images)))
        prompts = [self.records[row].prompt for row in rows]
        own_columns: dict[str, Sequence[Any]] = {}
        for name, column in self._columns.items():
            own_columns[name] = [column[row] for row in rows]
        scores = asyncio.run(score_all(rewards, pil_images, prompts, own_columns, group_size))
        return gather_scores(self.procs, scores, group_size)

    def _shown(self, images: Sequence[np.ndarray], rows: Sequence[int]) -> np.ndarray:
        """The first images of all, on the main process."""
        own = [(row, image) for row, image in zip(rows, images) if row < self.shown]
        shown: list[tuple[int, np.ndarray]] = []
        for part in self.procs.gather(own) or []:
            shown += part
        if not shown:
            return np.empty((0, *self.size, 3), np.uint8)
        shown.sort(key=lambda pair: pair[0])
        return np.stack([image for _, image in shown])

    def _draw(
        self, jobs: Sequence[tuple[int, int]], settings: SamplingSettings, draw: Draw | None = None
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Images, uint8 (H, W, 3), and latents (N, C) of (prompt, seed) pairs."""
        k2, (height, width) = self.k2, self.size
        shape = (k2.image_tokens(height, width), k2.latent_channels)
        images: list[np.ndarray] = []
        latents: list[np.ndarray] = []
        if settings.guidance and self._null is None:  # encoded once, and only where guidance asks for it
            self._null = k2.text([""])
        for i in range(0, len(jobs), self.batch):
            rows, seeds, texts = [], [], []
            for row, seed in jobs[i : i + self.batch]:
                rows.append(row)
                seeds.append(seed)
                texts.append(self._fused[row].to(k2.device))
            noise, text = sampler.noise(seeds, shape), Text.of(texts)
            own = draw or self._drawn
            if own is None:
                x = k2.sample(text, noise, settings.steps, height, width, settings.guidance, self._null, settings.mu)
            else:
                x = own(rows, text, noise, settings, self._null)
            images += list(k2.decode(x, height, width).cpu().numpy())
            latents += list(x.cpu().numpy())
        return images, latents


def per_image_scores(scores: Scores) -> list[dict[str, Any]]:
    """By image: for each reward that could score it, `score` and whatever else the reward reported, as JSON can hold it
    (what it has no form for is there as text)."""
    images = []
    for n in range(len(scores.values_NK)):
        by_reward = {}
        for k, name in enumerate(scores.names):
            if scores.valid_NK[n, k]:
                by_reward[name] = plain(scores.details[name][n] or {}) | {"score": float(scores.values_NK[n, k])}
        images.append(by_reward)
    return images


def plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None  # JSON has no nan or inf
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def means(scores: Scores) -> dict[str, float | None]:
    """Mean of each reward over the images it could score; None where there are none."""
    found: dict[str, float | None] = {}
    for k, name in enumerate(scores.names):
        valid = scores.valid_NK[:, k]
        found[name] = float(scores.values_NK[valid, k].mean()) if valid.any() else None
    return found


def gather_scores(procs: Processes, own: Scores | None, group_size: int, places: Sequence[int] | None = None) -> Scores:
    """The scores of all groups in their global order, from those of each process; None: it has no group.

    `places` are the indices of this process's groups; None: `local_indices`. The times are the main process's.
    """
    count = len(own.values_NK) // group_size if own is not None else 0
    groups: list[int] = []
    parts: list[Scores] = []
    for part_groups, part in procs.all_gather((procs.places_of(places, count), own)):
        groups += part_groups
        if part is not None:
            parts.append(part)
    # Where each group of the step lies in the concatenation of what the processes sent.
    rows: list[int] = []
    for place in np.argsort(groups).tolist():
        rows += range(place * group_size, (place + 1) * group_size)
    scores = Scores.concat(parts).take(rows)
    scores.waited_seconds, scores.scoring_seconds = parts[0].waited_seconds, parts[0].scoring_seconds
    return scores
