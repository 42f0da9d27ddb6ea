"""A small preference set, so that the test of `posttrain stpo` needs no run of `posttrain pairs`; and images with
captions, as people have them."""

from pathlib import Path

import numpy as np
from PIL import Image

from posttrain.preferences.dataset import CARD, Preference
from posttrain.preferences.writer import PreferenceWriter

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


def write_captioned(folder: Path, side: int, count: int = 24) -> Path:
    """Images somewhat larger than side x side, of three ratios, with a caption beside each."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(1)
    for i in range(count):
        large = image(generator, 2, 2 * side)
        width, height = ((side, side), (side * 3 // 2, side), (side, side * 3 // 2))[i % 3]
        large.crop((0, 0, width, height)).save(folder / f"{i:03d}.jpg", quality=95)
        (folder / f"{i:03d}.txt").write_text(f"a field of colours, number {i}, painted")
    return folder
