"""Writes a small set of images in one style, with captions, to finetune K2-nano on; and prompts to measure it with.

    python -m posttrain.nano.world.one_style runs/nano-styled

Beside each of OUT/images/*.png is a .json with a dense `caption` and a `short` one, which name the style.
OUT/heldout.jsonl has prompts for that style, tagged `styled`, and as many of prompts/nano/heldout.jsonl that ask for
another style or none: `style` and `elsewhere` are rewards that measure the one and the other.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from posttrain.nano.world import oracles, prompts, scenes
from posttrain.nano.world.scenes import Description, Scene

STYLE = "outline"
"""K2-nano draws it worst of all."""
STYLED = "styled"
SEED = 2001
"""Another than those of prompts.py."""


def style(
    images: Sequence, prompts: Sequence[str], requirements: Sequence[list[str]], tags: Sequence[list[str]], **_
) -> list[float | None]:
    """1.0 where the image has the style that its prompt is tagged for, else 0.0; None for other prompts."""
    scores: list[float | None] = []
    for percept, need, own in zip(oracles.perceive(images), requirements, tags):
        scores.append(float(f"the style is {percept.scene.style}" in need) if STYLED in own else None)
    return scores


def elsewhere(
    images: Sequence, prompts: Sequence[str], requirements: Sequence[list[str]], tags: Sequence[list[str]], **_
) -> list[float | None]:
    """`oracles.rubric` of the prompts that are not tagged for the style; None for those that are."""
    # None, not 0: a prompt of the other kind says nothing here.
    scores = oracles.rubric(images, prompts, requirements)
    return [None if STYLED in own else score for score, own in zip(scores, tags)]


def described(
    rng: np.random.Generator, wanted: str, words: list[str], details: Sequence[float]
) -> Iterator[tuple[Scene, list[Description]]]:
    """Scenes in a style, each with a caption of each detail; all of them name the style."""
    while True:
        scene = replace(scenes.random_scene(rng, words), style=wanted)
        captions = []
        for detail in details:
            caption = scenes.describe(scene, rng, detail)
            while f"the style is {wanted}" not in caption.requirements:
                # What a caption mentions is drawn anew; one of little detail seldom names the style.
                caption = scenes.describe(scene, rng, max(detail, 0.1))
            captions.append(caption)
        yield scene, captions


def others(wanted: str) -> list[dict[str, Any]]:
    """The held-out prompts that do not ask for a style."""
    return [row for row in prompts.read("heldout") if f"the style is {wanted}" not in row["requirements"]]


def write(out: Path, wanted: str, images: int, heldout: int, seed: int) -> None:
    folder = out / "images"
    folder.mkdir(parents=True, exist_ok=True)
    rows = described(np.random.default_rng([SEED, seed]), wanted, prompts.TRAIN_WORDS, (1.0, 0.2))
    for i, (scene, (dense, short)) in zip(range(images), rows):
        Image.fromarray(scenes.render(scene)).save(folder / f"{i:04d}.png")
        captions = {"caption": dense.prompt, "short": short.prompt}
        (folder / f"{i:04d}.json").write_text(json.dumps(captions) + "\n")
    # The same prompts whatever the seed, so that runs on several sets can be compared.
    records = []
    taken: set[str] = set()
    for _, (dense, _) in described(np.random.default_rng(SEED), wanted, prompts.HELDOUT_WORDS, (0.6, 1.0)):
        if len(records) == heldout:
            break
        if dense.prompt not in taken:
            taken.add(dense.prompt)
            records.append({**vars(dense), "tags": [STYLED]})
    # In turn, so that the first prompts of the file have both.
    mixed = itertools.chain(*zip(records, others(wanted)))
    prompts.write_lines(out / "heldout.jsonl", mixed)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--style", default=STYLE, choices=scenes.STYLES)
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--heldout", type=int, default=200, help="prompts of each kind")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write(args.out, args.style, args.images, args.heldout, args.seed)


if __name__ == "__main__":
    main()
