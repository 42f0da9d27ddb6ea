"""A small preference set, so that the test of `posttrain stpo` needs no run of `posttrain pairs`."""

from pathlib import Path

import numpy as np
from PIL import Image

from posttrain.preferences.dataset import CARD, Preference, PreferenceWriter

PAIRS = 40


def image(generator: np.random.Generator, noise: float, side: int) -> Image.Image:
    """side x side: a smooth field of colours, with noise."""
    small = generator.uniform(0, 255, (4, 4, 3)).astype(np.uint8)
    smooth = np.asarray(Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC), float)
    return Image.fromarray((smooth + generator.normal(0, noise, smooth.shape)).clip(0, 255).astype(np.uint8))


def write_pairs(folder: Path, side: int = 512) -> Path:
    if (folder / CARD).exists():
        return folder
    generator = np.random.default_rng(0)
    with PreferenceWriter(folder) as writer:
        for i in range(PAIRS):
            chosen, rejected = image(generator, 2, side), image(generator, 40, side)
            writer.add(Preference(f"a field of colours, number {i}", chosen, rejected, "synthetic", margin=0.5, seed=i))
    return folder
