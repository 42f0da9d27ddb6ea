"""Statements about a scene, as prompts require them, and whether an image as the oracle perceives it meets them."""

from __future__ import annotations

import difflib
import itertools
import re
from typing import TYPE_CHECKING

import numpy as np

from posttrain.nano.world import scenes
from posttrain.nano.world.scenes import COLOURS, COUNTS, SHAPES, SIZE, Object

if TYPE_CHECKING:
    from posttrain.nano.world.oracles import Percept

_COUNT = "|".join(COUNTS)
_NAME = rf"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_PLURAL = rf"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})e?s"
_PATTERNS = {
    "exists": rf"there is an? {_NAME}",
    "count": rf"there are exactly ({_COUNT}) {_PLURAL}",
    "total": rf"there (?:is|are) exactly ({_COUNT}) shapes?",
    "size": rf"the {_NAME} is (small|large)",
    "place": rf"the {_NAME} is at the ({'|'.join(sum(scenes.PLACES, ()))})",
    "relation": rf"the {_NAME} is ({'|'.join(scenes.RELATIONS)}) the {_NAME}",
    "style": rf"the style is ({'|'.join(scenes.STYLES)})",
    "background": rf"the background is ({'|'.join(scenes.BACKGROUNDS)})",
    "text": r'the text reads "([A-Z]+)"',
}


def parse(statement: str) -> tuple[str, tuple[str, ...]]:
    """(kind, parts) of a statement that `scenes.describe` writes; ValueError for any other sentence."""
    for kind, pattern in _PATTERNS.items():
        match = re.fullmatch(pattern, statement)  # re caches what it compiles
        if match:
            return kind, match.groups()
    raise ValueError(f"the nano oracle cannot read the statement {statement!r}")


def meets(percept: Percept, statement: str) -> bool:
    """Whether an image, as perceived, meets a statement."""
    kind, parts = parse(statement)
    scene = percept.scene

    def named(colour: str, shape: str) -> list[Object]:
        return [o for o in scene.objects if (o.colour, o.shape) == (colour, shape)]

    if kind == "style":
        return scene.style == parts[0]
    if kind == "background":
        return scene.background == parts[0]
    if kind == "text":
        return scene.text == parts[0]
    if kind == "total":
        return len(scene.objects) == COUNTS.index(parts[0])
    if kind == "count":
        return len(named(*parts[1:])) == COUNTS.index(parts[0])
    if kind == "exists":
        return bool(named(*parts))
    these = named(*parts[:2])
    if kind == "size":
        # A count of equal shapes has one size, which all of them must have.
        return bool(these) and all(o.size == parts[2] for o in these)
    if kind == "place":
        return any(o.place == parts[2] for o in these)
    pairs = itertools.product(these, named(*parts[3:]))
    return any(scenes.holds(parts[2], (a.x, a.y), (b.x, b.y)) for a, b in pairs)


def grade(percept: Percept, statement: str) -> float:
    """How nearly an image meets a statement, in [0, 1]: partial credit where `meets` has none, to learn from."""
    kind, parts = parse(statement)
    objects, overlaps = percept.scene.objects, percept.overlaps
    if kind in ("style", "background"):
        return float(meets(percept, statement))
    if kind == "text":
        return difflib.SequenceMatcher(None, percept.scene.text, parts[0]).ratio()
    if kind == "total":
        return max(0.0, 1 - abs(len(objects) - COUNTS.index(parts[0])) / 3)
    colour, shape = parts[1:3] if kind == "count" else parts[:2]
    likeness = []
    for o, overlap in zip(objects, overlaps):
        # What overlaps its shape by less than 0.6 is no object (`_find_objects`), so the scale begins there.
        in_shape = float(np.clip((overlap[shape] - 0.6) / 0.3, 0, 1))
        likeness.append(0.5 * (o.colour == colour) + 0.5 * in_shape)
    if not likeness:
        return 0.0
    if kind == "exists":
        return max(likeness)
    if kind == "count":
        # Half for how many have the colour, half for how like the n likeliest are to what is asked.
        n = COUNTS.index(parts[0])
        right = sum(o.colour == colour for o in objects)
        return 0.5 * max(0.0, 1 - abs(right - n) / n) + 0.5 * sum(sorted(likeness)[-n:]) / n
    # The object that is most like the one that is meant; the grade is scaled by how like it is.
    i = int(np.argmax(likeness))
    o, sure = objects[i], likeness[i]
    if kind == "size":
        # By the ratio of radii: 1 at the asked size, 0 at the other one.
        small, large = scenes.SIZES["small"], scenes.SIZES["large"]
        return sure * max(0.0, 1 - abs(np.log(o.radius / scenes.SIZES[parts[2]])) / np.log(large / small))
    if kind == "place":
        row, column = divmod(sum(scenes.PLACES, ()).index(parts[2]), 3)
        # The middle of that ninth of the image.
        x, y = SIZE / 6 * (2 * column + 1), SIZE / 6 * (2 * row + 1)
        return sure * max(0.0, 1 - float(np.hypot(o.x - x, o.y - y)) / (SIZE / 2))
    dx, dy = scenes.RELATIONS[parts[2]]
    best = 0.0
    for p in objects:
        if p is not o and p.colour == parts[3]:
            along = (o.x - p.x) * dx + (o.y - p.y) * dy
            # Half for standing level, all at 20 pixels in the right direction.
            best = max(best, float(np.clip(0.5 + along / 40, 0, 1)))
    return sure * best
