"""Writes a set of images to train style references on with K2-nano, and held-out prompts with references.

    python -m posttrain.nano.world.many_styles runs/nano-referenced

Beside each of OUT/images/*.png is a .json with a `caption` that is silent on the style, the `full` one and the `style`.
With --looks N every second image has one of N looks instead: tones and patterns in its objects and other contrasts, so
that there are more styles to learn from than the world has.
OUT/heldout.jsonl has prompts of prompts/nano/heldout.jsonl that are silent on the style, each with a reference that
shows no object that the prompt asks for. Two in three have a style that is trained, tagged `trained`; the others one of
HELDOUT, tagged `unseen`. The functions below are rewards that measure what is drawn.
OUT/prompts.jsonl has prompts of prompts/nano/train.jsonl with references of trained styles, to draw pairs of. What a
judge is asked about their images is in the columns `styled` (the reference's style) and `leaks` (its objects).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from posttrain.nano.world import oracles, prompts, scenes
from posttrain.nano.world.scenes import Scene
from posttrain.nano.world.statements import parse

HELDOUT = ("striped", "pastel")
"""Styles that no image to train on has."""
TRAINED = tuple(style for style in scenes.STYLES if style not in HELDOUT)
SEED = 3001
"""Another than those of prompts.py and styled.py."""


def matches(images: Sequence, prompts: Sequence[str], style: Sequence[str], **_) -> list[float]:
    """1.0 where the image has the style of its reference."""
    return [float(found == wanted) for found, wanted in zip(oracles.styles(images), style)]


def style(
    images: Sequence, prompts: Sequence[str], style: Sequence[str], tags: Sequence[list[str]], **_
) -> list[float | None]:
    """1.0 where the image has the style of its reference, which is a trained one; None for others."""
    return _counted(matches(images, prompts, style), tags, "trained")


def unseen(
    images: Sequence, prompts: Sequence[str], style: Sequence[str], tags: Sequence[list[str]], **_
) -> list[float | None]:
    """The same for styles that were never trained on."""
    return _counted(matches(images, prompts, style), tags, "unseen")


def leak(
    images: Sequence, prompts: Sequence[str], requirements: Sequence[list[str]], shown: Sequence[list], **_
) -> list[float | None]:
    """1.0 where the image has an object, by colour and shape, of its reference that nobody asked for, else 0.0."""
    scores: list[float | None] = []
    for percept, need, own in zip(oracles.perceive(images), requirements, shown):
        # An object that the prompt asks for is no leak, though the reference may show one too.
        leaked = percept.scene.colour_shapes & (set(map(tuple, own)) - asked(need))
        scores.append(float(bool(leaked)))
    return scores


def _counted(scores: Sequence[float], tags: Sequence[list[str]], counted: str) -> list[float | None]:
    """None where the prompt has another tag."""
    return [score if own == [counted] else None for score, own in zip(scores, tags)]


def asked(requirements: Sequence[str]) -> set[tuple[str, str]]:
    """(colour, shape) of all that a prompt asks for."""
    found = set()
    for kind, parts in map(parse, requirements):
        if kind in ("exists", "count"):
            found.add((parts[-2], parts[-1]))
    return found


def silent(caption: str) -> str:
    """The caption without its style."""
    return ", ".join(part for part in caption.split(", ") if not part.endswith(" style"))


def scene_in(rng: np.random.Generator, style: str) -> Scene:
    return replace(scenes.random_scene(rng, prompts.TRAIN_WORDS), style=style)


def look(scene: Scene, number: int) -> np.ndarray:
    """Draws a scene in look `number`, uint8 (H, W, 3): in its objects another tone, all over or in a pattern, and of
    every third look another contrast of the whole image."""
    rng = np.random.default_rng([SEED, number, 1])
    plain = scenes.render(replace(scene, style="flat")) / 255
    ground = scenes.render(replace(scene, style="flat", objects=())) / 255
    inside = np.abs(plain - ground).max(-1) > 0.05
    rows, columns = np.indices(inside.shape)
    width = int(rng.integers(1, 4))
    patterns = {
        "whole": rows >= 0,
        "columns": columns // width % 2 == 0,
        "diagonals": (rows + columns) // (width + 1) % 2 == 0,
        "checks": (rows // width + columns // width) % 2 == 0,
        "rows": rows // width % 2 == 0,
    }
    pattern = str(rng.choice(list(patterns)))
    # Towards black or grey, or little or very much towards white: never as HELDOUT has it.
    tone = float(rng.choice((0.0, 0.3, 0.6, 1.0)))
    share = float(rng.choice((0.3, 0.8))) if tone == 1 and pattern in ("whole", "rows") else rng.uniform(0.3, 0.9)
    drawn = plain + ((inside & patterns[pattern]) * share)[..., None] * (tone - plain)
    if number % 3 == 0:
        low, high = rng.uniform(0, 0.3), rng.uniform(0.7, 1)
        drawn = low + (high - low) * drawn**2 ** rng.uniform(-0.7, 0.7)
    return (255 * drawn.clip(0, 1)).round().astype(np.uint8)


def write(out: Path, images: int, heldout: int, looks: int = 0, pairs: int = 0) -> None:
    for name in ("images", "references"):
        (out / name).mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(SEED)
    for i in range(images):
        scene = scene_in(rng, TRAINED[i % len(TRAINED)])
        full = scenes.describe(scene, rng, float(rng.choice((0.2, 0.6, 1.0)))).prompt
        drawn, named = scenes.render(scene), scene.style
        # Every second round of the styles, so that as many images are left to each.
        if looks and i // len(TRAINED) % 2:
            number = int(rng.integers(looks))
            drawn, named = look(scene, number), f"look {number}"
            full = f"{silent(full)}, {named} style"
        Image.fromarray(drawn).save(out / f"images/{i:05d}.png")
        row = {"caption": silent(full), "full": full, "style": named}
        (out / f"images/{i:05d}.json").write_text(json.dumps(row) + "\n")
    rows = []
    for i, row in enumerate(_silent("heldout")[:heldout]):
        # Of three prompts two have trained styles, all of them in turn.
        unseen, turn = i % 3 == 2, i // 3
        wanted = HELDOUT[turn % len(HELDOUT)] if unseen else TRAINED[(2 * turn + i % 3) % len(TRAINED)]
        tags = ["unseen" if unseen else "trained"]
        rows.append(_with_reference(out, f"{i:03d}", [SEED, i], {**row, "tags": tags}, wanted))
    prompts.write_lines(out / "heldout.jsonl", rows)
    rows = []
    for i, row in enumerate(_silent("train")[:pairs]):
        own = _with_reference(out, f"train-{i:03d}", [SEED, i, 2], row, TRAINED[i % len(TRAINED)])
        leaks = [f"there is {scenes.article(f'{colour} {shape}')}" for colour, shape in own["shown"]]
        rows.append({**own, "styled": [f"the style is {own['style']}"], "leaks": leaks})
    prompts.write_lines(out / "prompts.jsonl", rows)


def _silent(name: str) -> list[dict[str, Any]]:
    """Prompts of a set that name no style: one in the prompt would compete with the reference's."""
    rows = []
    for row in prompts.read(name):
        if not any(need.startswith("the style is ") for need in row["requirements"]):
            rows.append(row)
    return rows


def _with_reference(out: Path, name: str, seed: list[int], row: dict[str, Any], wanted: str) -> dict[str, Any]:
    """The row with a reference of its own in a style: the same whatever else is written."""
    rng = np.random.default_rng(seed)
    while True:
        scene = scene_in(rng, wanted)
        own = scene.colour_shapes
        # What the prompt asks for must come from the prompt: then an object of the reference in the image is a leak.
        if not own & asked(row["requirements"]):
            break
    path = f"references/{name}.png"
    Image.fromarray(scenes.render(scene)).save(out / path)
    return {**row, "references": [path], "style": wanted, "shown": sorted(map(list, own))}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--heldout", type=int, default=180, help="prompts")
    parser.add_argument("--pairs", type=int, default=600, help="prompts to draw pairs of")
    parser.add_argument("--looks", type=int, default=0, help="further styles, of every second image")
    args = parser.parse_args()
    write(args.out, args.images, args.heldout, args.looks, args.pairs)


if __name__ == "__main__":
    main()
