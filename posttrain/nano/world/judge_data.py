"""Writes data to train the nano judges on: pairs chosen by a hidden taste, and images with and without faults.

    python -m posttrain.nano.world.judge_data runs/nano-judge-data

The taste scores what a caption leaves open: style, background, sizes, colours that suit the ground, balance. Raters
choose the better of two images of one caption with probability sigma of the scores' difference, so no judge can
agree with them more often than the noise ceiling, the mean of max(p, 1 - p). `preferences.jsonl` holds the pairs,
`artifacts.jsonl` the others, `images/` the images.
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from posttrain.nano.world import damage, scenes
from posttrain.nano.world.prompts import write_lines
from posttrain.nano.world.scenes import BACKGROUNDS, SIZE, SIZES, STYLES, Scene

STYLE_TASTE: dict[str, float] = dict(zip(STYLES, (-0.3, -1.2, 1.5, 0.2, -0.6, 0.7, -0.9, -1.6, 1.9, 0.4)))
GROUND_TASTE: dict[str, float] = dict(zip(BACKGROUNDS, (0.2, -0.8, 0.6, 1.0, -1.0)))
WARM = ("red", "orange", "yellow", "pink")
CONTRAST = 1.0
"""Score of warm colours on dark ground or cold ones on light, all objects so; minus that where none is."""
LARGE, BALANCE = 0.8, 0.8
"""Score of large objects, and of objects whose middle is the image's."""
SHARPNESS = 1.5
"""How sure raters are: their log-odds for one point of score."""
GENERATORS = ("crisp", "soft", "noisy")
"""Ways in which pairs are drawn, as if by different models; the taste knows nothing of them."""


def taste(scene: Scene) -> float:
    """The hidden score of an image, about -4 to 5."""
    dark = scene.background == "black" or scene.style == "dark"
    # Warm colours suit a dark ground, cold ones a light one.
    suits = np.mean([(o.colour in WARM) == dark for o in scene.objects])
    large = np.mean([o.size == "large" for o in scene.objects])
    middle = np.mean([(o.x, o.y) for o in scene.objects], axis=0)
    off = np.hypot(*(middle - SIZE / 2)) / (SIZE / 2)
    return float(
        STYLE_TASTE[scene.style]
        + GROUND_TASTE[scene.background]
        + CONTRAST * (2 * suits - 1)
        + LARGE * large
        + BALANCE * (0.5 - off)
    )


def redrawn(scene: Scene, rng: np.random.Generator) -> Scene:
    """Another image of the same caption: style, ground and size drawn anew, objects moved a little together."""
    size = str(rng.choice(list(SIZES))) if len(scene.objects) == 1 else None
    objects = []
    dx, dy = rng.integers(-8, 9, size=2)
    for o in scene.objects:
        radius = SIZES[size] if size else o.radius
        low, high = radius + 2, SIZE - 3 - radius
        x, y = float(np.clip(o.x + dx, low, high)), float(np.clip(o.y + dy, low, high))
        # The word stays where it is, so the objects move beside it and not onto it.
        if scene.text:
            y = o.y if radius <= o.radius or low < o.y < high else SIZE / 2
        objects.append(replace(o, size=size or o.size, radius=radius, x=x, y=y))
    return replace(
        scene,
        objects=tuple(objects),
        style=str(rng.choice(STYLES)),
        background=str(rng.choice(BACKGROUNDS)),
        grain_seed=int(rng.integers(0, 2**31)),
    )


def draw(scene: Scene, generator: str, rng: np.random.Generator, fault: bool = False) -> Image.Image:
    """An image of a scene as one of GENERATORS would draw it."""
    pixels = scenes.render(scene)
    if fault:
        pixels = damage.damage(pixels, scene, rng)
    if generator == "soft":
        # Half of each pixel comes from its neighbours above and to the left.
        x = pixels.astype(np.float32)
        x = 0.5 * x + 0.25 * (np.roll(x, 1, 0) + np.roll(x, 1, 1))
        pixels = x.astype(np.uint8)
    elif generator == "noisy":
        pixels = np.clip(pixels + rng.normal(0, 5, pixels.shape), 0, 255).astype(np.uint8)
    return Image.fromarray(pixels)


def _pairs(out: Path, job: tuple[int, int, int]) -> list[dict]:
    seed, first, n = job
    rng, rows = np.random.default_rng([seed, first]), []
    for i in range(first, first + n):
        scene = scenes.random_scene(rng)
        prompt = scenes.describe(scene, rng, 0.0).prompt
        generator = str(rng.choice(GENERATORS))
        pair = [redrawn(scene, rng), redrawn(scene, rng)]
        p = 1 / (1 + math.exp(-SHARPNESS * (taste(pair[0]) - taste(pair[1]))))
        # The rater's choice, which is the worse one at times, as people's are.
        if rng.random() >= p:
            pair, p = pair[::-1], 1 - p
        # `chance` is the probability of this choice: the judges' noise ceiling is computed from it.
        row = {"prompt": prompt}
        for side, drawn in zip(("chosen", "rejected"), pair):
            row[side] = f"images/pair-{i:05d}-{side}.png"
            draw(drawn, generator, rng).save(out / row[side])
        rows.append(row | {"source": generator, "chance": round(p, 4)})
    return rows


def _faults(out: Path, job: tuple[int, int, int]) -> list[dict]:
    seed, first, n = job
    rng, rows = np.random.default_rng([seed, 1, first]), []
    for i in range(first, first + n):
        scene = scenes.random_scene(rng)
        prompt = scenes.describe(scene, rng, 0.0).prompt
        generator, fault = str(rng.choice(GENERATORS)), bool(rng.random() < 0.5)
        name = f"images/fault-{i:05d}.png"
        draw(scene, generator, rng, fault).save(out / name)
        rows.append({"prompt": prompt, "image": name, "fault": fault, "source": generator})
    return rows


def write(out: Path, pairs: int, faults: int, seed: int, workers: int) -> None:
    (out / "images").mkdir(parents=True, exist_ok=True)
    for name, make, total in (("preferences", _pairs, pairs), ("artifacts", _faults, faults)):
        # A seed for each part, so that the rows do not depend on the number of workers.
        jobs = [(seed, first, min(200, total - first)) for first in range(0, total, 200)]
        with multiprocessing.get_context("fork").Pool(workers) as pool:
            rows = itertools.chain(*pool.map(partial(make, out), jobs))
        write_lines(out / f"{name}.jsonl", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--pairs", type=int, default=8000)
    parser.add_argument("--faults", type=int, default=8000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write(args.out, args.pairs, args.faults, args.seed, os.cpu_count() or 1)


if __name__ == "__main__":
    main()
