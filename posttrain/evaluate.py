"""Evaluation on held-out prompts: fixed seeds, deterministic sampling, every reward of the recipe and the figures
of figures.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
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


@dataclass
class Evaluation:
    figures: dict[str, float | None]
    """`reward` (mean score; None where no picture could be scored), `image/...`; with guidance s, `name@s`."""
    images: np.ndarray
    """uint8 (N, H, W, 3), by the first guidance of the recipe."""
    details: dict[str, float | None] = field(default_factory=dict)
    """Further figures, which are logged and not summed up."""


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
    ):
        self.k2, self.rewards, self.config, self.size, self.batch = k2, rewards, config, size, batch
        self.procs = procs
        self.records = list(records[: config.prompts])
        self.seeds = [sampler.seed_for(config.seed, i) for i in range(len(self.records))]
        groups = range(min(config.groups, len(self.records)))
        self._groups = [(i, sampler.seed_for(config.seed, i, j)) for i in groups for j in range(config.group_size)]
        """Prompt and seed of each picture of the groups."""
        features = k2.encode([r.prompt for r in self.records], max_tokens).features
        self._fused = [k2.fuse(f) for f in features]
        self._columns = columns(self.records)
        self._null = k2.text([""]) if any(config.guidance) else None

    def __call__(self) -> Evaluation:
        found: dict[str, float | None] = {}
        shown: np.ndarray | None = None
        prompts = [r.prompt for r in self.records]
        for guidance in self.config.guidance:
            images, latents = self._draw(list(enumerate(self.seeds)), guidance)
            shown = images if shown is None else shown
            values = means(self._score(images, prompts)) | figures.look(images, latents)
            if self._groups:
                grouped, _ = self._draw(self._groups, guidance)
                values[figures.DIVERSITY] = figures.diversity(grouped, self.config.group_size)
            found |= {name + figures.suffix(guidance): value for name, value in values.items()}
        assert shown is not None
        return Evaluation(found, shown)

    def _score(self, images: np.ndarray, prompts: list[str]) -> Scores:
        """Each process scores its share of the pictures."""
        mine = list(self.procs.mine(len(images)))
        if not mine:
            return self.procs.scores(None, 1)
        pictures = to_pil(torch.from_numpy(images[mine]))
        rows: dict[str, Sequence[Any]] = {name: [column[i] for i in mine] for name, column in self._columns.items()}
        scores = asyncio.run(score_all(self.rewards, pictures, [prompts[i] for i in mine], rows))
        return self.procs.scores(scores, 1)

    def _draw(self, jobs: Sequence[tuple[int, int]], guidance: float) -> tuple[np.ndarray, np.ndarray]:
        """Pictures and latents of (prompt, seed) pairs, of which each process draws its share."""
        k2, (height, width), drawn = self.k2, self.size, []
        shape = (k2.image_tokens(height, width), k2.latent_channels)
        mine = [jobs[i] for i in self.procs.mine(len(jobs))]
        for i in range(0, len(mine), self.batch):
            part = mine[i : i + self.batch]
            noise = sampler.noise([seed for _, seed in part], shape)
            text = Text.of([self._fused[row] for row, _ in part])
            latents = k2.sample(text, noise, self.config.steps, height, width, guidance, self._null)
            drawn += zip(k2.decode(latents, height, width).cpu().numpy(), latents.cpu().numpy())
        images, latents = zip(*self.procs.dealt_back(drawn))
        return np.stack(images), np.stack(latents)


def means(scores: Scores) -> dict[str, float | None]:
    """Mean of each reward over the pictures it could score; None where there are none."""
    return {
        name: float(scores.values_NK[:, k][valid].mean()) if (valid := scores.valid_NK[:, k]).any() else None
        for k, name in enumerate(scores.names)
    }
