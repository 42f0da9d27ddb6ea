"""Evaluation on held-out prompts: fixed seeds, deterministic sampling, every reward of the recipe."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from posttrain import sampler
from posttrain.config import EvalConfig
from posttrain.k2 import K2, Text, to_pil
from prompts.records import PromptRecord, columns
from rewards.base import Reward, Scores, score_all


@dataclass
class Evaluation:
    figures: dict[str, float | None]
    """`reward` (mean score) and, with guidance s, `reward@s`; None where no picture could be scored."""
    images: np.ndarray
    """uint8 (N, H, W, 3), by the first guidance of the recipe."""


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
    ):
        self.k2, self.rewards, self.config, self.size, self.batch = k2, rewards, config, size, batch
        self.records = list(records[: config.prompts])
        self.seeds = [sampler.seed_for(config.seed, i) for i in range(len(self.records))]
        features = k2.encode([r.prompt for r in self.records], max_tokens).features
        self._fused = [k2.fuse(f) for f in features]
        self._columns = columns(self.records)
        self._null = k2.text([""]) if any(config.guidance) else None

    def __call__(self) -> Evaluation:
        figures: dict[str, float | None] = {}
        shown: np.ndarray | None = None
        for guidance in self.config.guidance:
            images = self._draw(guidance)
            shown = images if shown is None else shown
            pictures = to_pil(torch.from_numpy(images))
            prompts = [r.prompt for r in self.records]
            scores = asyncio.run(score_all(self.rewards, pictures, prompts, self._columns))
            suffix = f"@{guidance:g}" if guidance else ""
            figures |= {name + suffix: mean for name, mean in means(scores).items()}
        assert shown is not None
        return Evaluation(figures, shown)

    def _draw(self, guidance: float) -> np.ndarray:
        k2, (height, width), images = self.k2, self.size, []
        shape = (k2.image_tokens(height, width), k2.latent_channels)
        for i in range(0, len(self.records), self.batch):
            part = slice(i, i + self.batch)
            noise = sampler.noise(self.seeds[part], shape)
            text = Text.of(self._fused[part])
            latents = k2.sample(text, noise, self.config.steps, height, width, guidance, self._null)
            images.append(k2.decode(latents, height, width).cpu().numpy())
        return np.concatenate(images)


def means(scores: Scores) -> dict[str, float | None]:
    """Mean of each reward over the pictures it could score; None where there are none."""
    return {
        name: float(scores.values_NK[:, k][valid].mean()) if (valid := scores.valid_NK[:, k]).any() else None
        for k, name in enumerate(scores.names)
    }
