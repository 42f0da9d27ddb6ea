"""Evaluation on held-out prompts: fixed seeds, deterministic sampling, every reward of the recipe and the figures
of figures.py. A reward that compares a group sees those groups that are drawn for their diversity.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from posttrain import figures, sampler
from posttrain.config import EvalConfig
from posttrain.k2 import K2, Text, to_pil
from posttrain.processes import Processes
from prompts.records import PromptRecord, columns
from rewards.base import Reward, Scores, score_all


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
    drawn: dict[str, np.ndarray]
    """By suffix: uint8 (N, H, W, 3)."""
    details: dict[str, float | None] = field(default_factory=dict)
    """Further figures, which are logged and not summed up."""
    said: list[dict[str, Any]] = field(default_factory=list)
    """By picture of the first way: what each reward that could score it said, as `told` gives it."""

    @property
    def images(self) -> np.ndarray:
        """uint8 (N, H, W, 3), by the first way."""
        return next(iter(self.drawn.values()))


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
    ):
        """Without `ways`: by each guidance of `config`, in its steps."""
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
        self._fused = [k2.fuse(f) for f in features]
        self._columns = columns(self.records)
        self._null: Text | None = None

    def __call__(self, ways: Sequence[Way] | None = None) -> Evaluation:
        """With `ways`, by these instead."""
        found: dict[str, float | None] = {}
        drawn: dict[str, np.ndarray] = {}
        said: list[dict[str, Any]] = []
        for way in ways or self.ways:
            images, latents = self._draw(list(enumerate(self.seeds)), way)
            drawn[way.suffix] = images
            scores = self._score(self.rewards, images, range(len(images)), 1)
            said = said or told(scores)
            values = means(scores) | figures.look(images, latents)
            if self._groups:
                grouped, _ = self._draw(self._groups, way)
                size = self.config.group_size
                values[figures.DIVERSITY] = figures.diversity(grouped, size)
                if self.group_rewards:
                    rows = [row for row, _ in self._groups]
                    values |= means(self._score(self.group_rewards, grouped, rows, size))
            found |= {name + way.suffix: value for name, value in values.items()}
        return Evaluation(found, drawn, said=said)

    def _score(self, rewards: Sequence[Reward], images: np.ndarray, rows: Sequence[int], group_size: int) -> Scores:
        """Each process scores its share of the groups; `rows` are the prompts of the pictures."""
        groups = self.procs.mine(len(images) // group_size)
        mine = [g * group_size + j for g in groups for j in range(group_size)]
        if not mine:
            return self.procs.scores(None, group_size)
        pictures = to_pil(torch.from_numpy(images[mine]))
        prompts = [self.records[rows[i]].prompt for i in mine]
        taken: dict[str, Sequence[Any]] = {
            name: [column[rows[i]] for i in mine] for name, column in self._columns.items()
        }
        scores = asyncio.run(score_all(rewards, pictures, prompts, taken, group_size))
        return self.procs.scores(scores, group_size)

    def _draw(self, jobs: Sequence[tuple[int, int]], way: Way) -> tuple[np.ndarray, np.ndarray]:
        """Pictures and latents of (prompt, seed) pairs, of which each process draws its share."""
        k2, (height, width), drawn = self.k2, self.size, []
        shape = (k2.image_tokens(height, width), k2.latent_channels)
        mine = [jobs[i] for i in self.procs.mine(len(jobs))]
        if way.guidance and self._null is None:
            self._null = k2.text([""])
        for i in range(0, len(mine), self.batch):
            part = mine[i : i + self.batch]
            noise = sampler.noise([seed for _, seed in part], shape)
            text = Text.of([self._fused[row] for row, _ in part])
            latents = k2.sample(text, noise, way.steps, height, width, way.guidance, self._null, way.mu)
            drawn += zip(k2.decode(latents, height, width).cpu().numpy(), latents.cpu().numpy())
        images, latents = zip(*self.procs.dealt_back(drawn))
        return np.stack(images), np.stack(latents)


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
