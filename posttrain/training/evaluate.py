"""Evaluation on held-out prompts: fixed seeds, deterministic sampling, every reward of the recipe and the figures
of figures.py. A reward that compares a group sees those groups that are drawn for their diversity.

Each process measures and scores the images that it has drawn. Numbers go to all processes; of the images, only those
that are shown go to the main one, and those of a group to the process that scores it, if a reward compares groups.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from posttrain.config.sections import EvalConfig
from posttrain.distributed.processes import Processes
from posttrain.model import sampler
from posttrain.model.k2 import K2, Text, to_pil
from posttrain.training import image_metrics as figures
from prompts.records import PromptRecord, columns
from rewards.base import Reward, Scores, score_all

SHOWN = 16
"""Images of each way that the main process gets, to show them."""


@dataclass(frozen=True)
class Way:
    """A way to draw pictures."""

    steps: int
    guidance: float = 0.0
    mu: float | None = None
    """The schedule's shift; None: the model's own."""
    suffix: str = ""
    """Of the names of its figures."""


@dataclass
class Evaluation:
    figures: dict[str, float | None]
    """`reward` (mean score; None where no picture could be scored), `image/...`, each with the suffix of its way."""
    shown: dict[str, np.ndarray]
    """By suffix: the first images of the way, uint8 (N, H, W, 3); N is 0 but on the main process."""
    measured: dict[str, dict[str, float]]
    """By suffix: the figures of figures.measure over all images of the way."""
    details: dict[str, float | None] = field(default_factory=dict)
    """Further figures, which are logged and not summed up."""
    said: list[dict[str, Any]] = field(default_factory=list)
    """By picture of the first way: what each reward that could score it said, as `told` gives it."""

    @property
    def images(self) -> np.ndarray:
        """uint8 (N, H, W, 3): the images shown of the first way; none but on the main process."""
        return next(iter(self.shown.values()))


class Evaluator:
    """Draws and scores the same pictures each time it is called, under the role that is active then."""

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
        ways: Sequence[Way] | None = None,
        shown: int = SHOWN,
    ):
        """Without `ways`: by each guidance of `config`, in its steps. `shown`: of each way's images, how many the
        evaluation holds."""
        self.shown = shown
        self.k2, self.config, self.size, self.batch, self.procs = k2, config, size, batch, procs
        self.ways = ways or [Way(config.steps, s, suffix=figures.suffix(s)) for s in config.guidance]
        self.rewards = [reward for reward in rewards if not reward.spec.group]
        self.group_rewards = [reward for reward in rewards if reward.spec.group]
        self.records = list(records[: config.prompts])
        self.seeds = [sampler.seed_for(config.seed, i) for i in range(len(self.records))]
        groups = range(min(config.groups, len(self.records)))
        self._groups = [(i, sampler.seed_for(config.seed, i, j)) for i in groups for j in range(config.group_size)]
        """Prompt and seed of each picture of the groups."""
        features = k2.encode([r.prompt for r in self.records], max_tokens).features
        self._fused = [k2.fuse(f).cpu() for f in features]
        self._columns = columns(self.records)
        self._null: Text | None = None

    def __call__(self, ways: Sequence[Way] | None = None) -> Evaluation:
        """With `ways`, by these instead."""
        result = Evaluation({}, {}, {})
        for way in ways or self.ways:
            rows = self.procs.mine(len(self.seeds))
            images, latents = self._draw([(row, self.seeds[row]) for row in rows], way)
            scores = self._score(self.rewards, images, rows, 1)
            result.said = result.said or told(scores)
            result.shown[way.suffix] = self._shown(images, rows)
            looks = self.procs.dealt_back([figures.measure(*drawn) for drawn in zip(images, latents)])
            result.measured[way.suffix] = measured = figures.means(looks)
            values = means(scores) | {name: measured[name] for name in figures.LOOK} | self._groups_by(way)
            result.figures |= {name + way.suffix: value for name, value in values.items()}
        return result

    def _groups_by(self, way: Way) -> dict[str, float | None]:
        """Figures of the groups: their diversity, and rewards that compare the images of a group."""
        if not self._groups:
            return {}
        size, places = self.config.group_size, self.procs.mine(len(self._groups))
        images, _ = self._draw([self._groups[place] for place in places], way)
        cells = [figures.cells(image[None])[0] for image in images]
        values: dict[str, float | None] = {
            figures.DIVERSITY: figures.diversity_of_cells(np.stack(self.procs.dealt_back(cells)), size)
        }
        if self.group_rewards:
            parcels: dict[int, list[tuple[int, np.ndarray]]] = {}
            for place, image in zip(places, images):
                parcels.setdefault(self.procs.owner(place // size), []).append((place, image))
            whole = sorted(itertools.chain(*self.procs.deliver(parcels).values()), key=operator.itemgetter(0))
            rows = [self._groups[place][0] for place, _ in whole]
            values |= means(self._score(self.group_rewards, [image for _, image in whole], rows, size))
        return values

    def _score(
        self, rewards: Sequence[Reward], images: Sequence[np.ndarray], rows: Sequence[int], group_size: int
    ) -> Scores:
        """The scores of all processes' images; these are the ones of this process, and `rows` their prompts."""
        if not images:
            return gather_scores(self.procs, None, group_size)
        pictures = to_pil(torch.from_numpy(np.stack(images)))
        prompts = [self.records[row].prompt for row in rows]
        taken: dict[str, Sequence[Any]] = {
            name: [column[row] for row in rows] for name, column in self._columns.items()
        }
        scores = asyncio.run(score_all(rewards, pictures, prompts, taken, group_size))
        return gather_scores(self.procs, scores, group_size)

    def _shown(self, images: Sequence[np.ndarray], rows: Sequence[int]) -> np.ndarray:
        """The first images of a way, on the main process."""
        parts = self.procs.gather([(row, image) for row, image in zip(rows, images) if row < self.shown])
        found = sorted(itertools.chain(*parts or []), key=operator.itemgetter(0))
        return np.stack([image for _, image in found]) if found else np.empty((0, *self.size, 3), np.uint8)

    def _draw(self, jobs: Sequence[tuple[int, int]], way: Way) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Images, uint8 (H, W, 3), and latents (N, C) of (prompt, seed) pairs."""
        k2, (height, width) = self.k2, self.size
        shape = (k2.image_tokens(height, width), k2.latent_channels)
        images: list[np.ndarray] = []
        latents: list[np.ndarray] = []
        if way.guidance and self._null is None:
            self._null = k2.text([""])
        for i in range(0, len(jobs), self.batch):
            part = jobs[i : i + self.batch]
            noise = sampler.noise([seed for _, seed in part], shape)
            text = Text.of([self._fused[row].to(k2.device) for row, _ in part])
            found = k2.sample(text, noise, way.steps, height, width, way.guidance, self._null, way.mu)
            images += list(k2.decode(found, height, width).cpu().numpy())
            latents += list(found.cpu().numpy())
        return images, latents


def told(scores: Scores) -> list[dict[str, Any]]:
    """By picture: the score of each reward that could score it, as `score`, with what else the reward told of it.

    JSON can hold it: what it has no form for is there as text.
    """
    return [
        {
            name: _plain(scores.details[name][n] or {}) | {"score": float(scores.values_NK[n, k])}
            for k, name in enumerate(scores.names)
            if scores.valid_NK[n, k]
        }
        for n in range(len(scores.values_NK))
    ]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def means(scores: Scores) -> dict[str, float | None]:
    """Mean of each reward over the pictures it could score; None where there are none."""
    return {
        name: float(scores.values_NK[:, k][valid].mean()) if (valid := scores.valid_NK[:, k]).any() else None
        for k, name in enumerate(scores.names)
    }


def gather_scores(
    procs: Processes, scores: Scores | None, group_size: int, places: Sequence[int] | None = None
) -> Scores:
    """The scores of all groups in their global order, from those of each process; None: it has no group.

    `places` are the indices of this process's groups; None: those of `Processes.mine`. The times are those of the main
    process.
    """
    count = len(scores.values_NK) // group_size if scores is not None else 0
    parts = procs.each((procs.places_of(places, count), scores))
    scored = [part for _, part in parts if part is not None]
    merged = Scores.concat(scored)
    # Rows of `merged` follow the processes; a group's rows stay together on the way to the global order.
    groups = [group for part, _ in parts for group in part]
    order = sorted(range(len(groups)), key=groups.__getitem__)
    ordered = merged.take([g * group_size + j for g in order for j in range(group_size)])
    ordered.waited_seconds, ordered.scoring_seconds = scored[0].waited_seconds, scored[0].scoring_seconds
    return ordered
