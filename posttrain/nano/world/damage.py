"""Visible faults in an image of a scene, which the artifact judge learns to see and the oracle must detect."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from posttrain.nano.world.scenes import GLYPH_H, GLYPH_W, SIZE, XX, YY, Scene, render

ARTIFACTS = ("broken", "doubled", "smeared", "garbled")


def damage(image: np.ndarray, scene: Scene, rng: np.random.Generator, kind: str | None = None) -> np.ndarray:
    """A copy with one visible fault: an object broken, doubled or smeared, or (with a word) letters garbled."""
    kind = kind or str(rng.choice(ARTIFACTS if scene.text else ARTIFACTS[:3]))
    out = image.copy()
    o = scene.objects[rng.integers(len(scene.objects))]
    reach = int(o.radius * 1.15) + 1
    x0, x1 = max(0, round(o.x) - reach), min(SIZE, round(o.x) + reach + 1)
    y0, y1 = max(0, round(o.y) - reach), min(SIZE, round(o.y) + reach + 1)
    # The scene without the object: what a hole shows, and what the object's pixels differ from.
    bare = render(replace(scene, objects=tuple(p for p in scene.objects if p is not o)))
    if kind == "broken":
        angle = rng.uniform(0, 2 * math.pi)
        side = (XX - o.x) * math.cos(angle) + (YY - o.y) * math.sin(angle)
        # A gap right across the object, but not through its neighbours.
        hole = np.abs(side) < rng.uniform(0.25, 0.4) * o.radius
        hole[: max(0, y0 - 3)] = hole[y1 + 3 :] = False
        hole[:, : max(0, x0 - 3)] = hole[:, x1 + 3 :] = False
        out[hole] = bare[hole]
    elif kind == "doubled":
        angle, reach = rng.uniform(0, 2 * math.pi), rng.uniform(0.6, 1.0) * o.radius
        shift = (round(reach * math.sin(angle)), round(reach * math.cos(angle)))
        ghost = np.roll(image, shift, axis=(0, 1)).astype(np.int16)
        # Where the object differs from the bare scene: its pixels alone are drawn a second time.
        changed = np.abs(np.roll(image.astype(np.int16) - bare, shift, axis=(0, 1))).max(-1) > 30
        out[changed] = (0.8 * ghost[changed] + 0.2 * out[changed]).astype(np.uint8)
    elif kind == "smeared":
        length = round(rng.uniform(0.7, 1.0) * o.radius)
        axis = int(rng.integers(2))
        change = image.astype(np.float32) - bare
        # Of the difference to the bare scene, so that the ground is not smeared along.
        shifted = [np.roll(change, s, axis=axis) for s in range(-length, length + 1)]
        total = np.mean(shifted, axis=0)
        out = np.clip(bare + total, 0, 255).astype(np.uint8)
    else:
        x, y = scene.text_x, scene.text_y
        for i in range(len(scene.text)):
            left = max(0, x + i * GLYPH_W)
            cell = out[y : y + GLYPH_H, left : left + 10]
            # In rows of two pixels, the size of a cell of the font: the pieces stay letter-like.
            rows = rng.permutation(len(cell) // 2)
            shuffled = cell.reshape(len(rows), 2, *cell.shape[1:])[rows]
            out[y : y + GLYPH_H, left : left + 10] = shuffled.reshape(cell.shape)[:, :: int(rng.choice([-1, 1]))]
    return out
