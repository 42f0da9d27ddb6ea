"""Yes/no questions and other tasks about scenes for the judges, with the right answers.

`ask` draws a statement about a scene, and whether it is true. Half of all statements are true, and most false ones
differ from a true one in a single attribute. `labels` says what each cell of the vision encoder shows.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np

from posttrain.nano.world import oracles, scenes, statements
from posttrain.nano.world.font import GLYPHS
from posttrain.nano.world.scenes import (
    BACKGROUNDS,
    COLOURS,
    COUNTS,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZE,
    SIZES,
    STYLES,
    Object,
    Scene,
)

FAULTS = {
    "broken": "a shape is broken",
    "doubled": "a shape is doubled",
    "smeared": "a shape is smeared",
    "garbled": "letters are garbled",
}
CELL = 8
"""Pixels along a side of one cell of `labels`."""
LABELS = {"colour": len(COLOURS) + 1, "shape": len(SHAPES) + 1, "size": 3, "letter": 27, "index": 5}
WHOLE = {"style": len(STYLES), "background": len(BACKGROUNDS), "objects": 6, "fault": 5}
_PLACES = sum(PLACES, ())


def ask(scene: Scene, rng: np.random.Generator, fault: str | None = None, words: list[str] | None = None):
    """(statement, whether it is true) about an image of a scene, perhaps with a fault.

    An image with a fault gets no question whose answer the fault makes doubtful.
    """
    # Weights of the kinds: hard questions are asked more often than easy ones.
    kinds = {"exists": 2.0, "style": 1.5, "background": 1.0, "fault": 2.0 if fault else 0.5}
    if fault != "garbled":
        kinds["text"] = 3.0 if scene.text else 0.2
    if fault is None:
        kinds |= {"total": 1.0, "size": 1.2}
        if scene.kind == "count":
            kinds["count"] = 3.0
        else:
            kinds |= {"place": 1.5, "count": 0.3}
        if len(scene.objects) > 1 and scene.kind != "count":
            kinds["relation"] = 2.5
    names, heap = list(kinds), np.cumsum(list(kinds.values()))
    # A writer returns None where no statement of its kind has a clear answer; then another kind is drawn.
    for _ in range(50):
        kind = names[int(np.searchsorted(heap, rng.random() * heap[-1], side="right"))]
        wanted = bool(rng.random() < 0.5)
        if kind == "fault":
            named = _pick(rng, FAULTS)
            if wanted and fault:
                named = fault
            return FAULTS[named], named == fault
        statement = _WRITERS[kind](scene, rng, wanted, words)
        if statement is not None:
            return statement, is_true(scene, statement)
    raise RuntimeError(f"no statement fits the scene {scene}")


def transcript(word: str) -> str:
    """The answer of `transcribe` for an image with that word, or with none."""
    return json.dumps({"lines": [word] if word else []})


def is_true(scene: Scene, statement: str) -> bool:
    # The oracle's own rule, on a scene as if it had been read from an image without error.
    return statements.meets(oracles.Percept(scene, 0.0, 0), statement)


def _pick(rng: np.random.Generator, options):
    options = list(options)
    return options[int(rng.integers(len(options)))]


def _other(rng: np.random.Generator, options, value: str) -> str:
    return _pick(rng, [o for o in options if o != value])


def _near_miss(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """(colour, shape) that no object has: one with one attribute changed, or two objects' attributes crossed."""
    taken = scene.colour_shapes
    while True:
        o = _pick(rng, scene.objects)
        p = _pick(rng, scene.objects)
        draw = rng.random()
        if draw < 0.3 and len(taken) > 1:
            name = (o.colour, p.shape)
        elif draw < 0.6:
            name = (_other(rng, COLOURS, o.colour), o.shape)
        elif draw < 0.9:
            name = (o.colour, _other(rng, SHAPES, o.shape))
        else:
            name = (_pick(rng, COLOURS), _pick(rng, SHAPES))
        if name not in taken:
            return name


def _name(scene: Scene, rng: np.random.Generator, known: bool) -> str:
    if known:
        return _pick(rng, scene.objects).name
    return " ".join(_near_miss(scene, rng))


def _exists(scene, rng, wanted, words):
    return f"there is {scenes.article(_name(scene, rng, wanted))}"


def _total(scene, rng, wanted, words):
    n = len(scene.objects)
    if not wanted:
        n = _pick(rng, [m for m in (n - 1, n + 1) if 1 <= m <= 5]) if rng.random() < 0.7 else int(rng.integers(1, 6))
    return "there is exactly one shape" if n == 1 else f"there are exactly {COUNTS[n]} shapes"


def _count(scene, rng, wanted, words):
    n = len(scene.objects) if scene.kind == "count" else int(rng.integers(2, 4))
    o: Object = scene.objects[0]
    if not wanted:
        if scene.kind == "count" and rng.random() < 0.6:
            n = _pick(rng, [m for m in (n - 1, n + 1) if 2 <= m <= 5])
        else:
            colour, shape = _near_miss(scene, rng)
            o = Object(shape, colour, o.size, o.x, o.y, o.radius)
    return f"there are exactly {COUNTS[n]} {o.plural}"


def _size(scene, rng, wanted, words):
    o = _pick(rng, scene.objects)
    if wanted or rng.random() < 0.85:
        return f"the {o.name} is {o.size if wanted else _other(rng, SIZES, o.size)}"
    return f"the {_name(scene, rng, False)} is {o.size}"


def _place(scene, rng, wanted, words):
    o = _pick(rng, scene.objects)
    third = SIZE / 3
    # On the border of two places no answer is right.
    if min(o.x % third, third - o.x % third, o.y % third, third - o.y % third) < 1:
        return None
    if wanted:
        return f"the {o.name} is at the {o.place}"
    if rng.random() < 0.15:
        return f"the {_name(scene, rng, False)} is at the {o.place}"
    column, row = min(2, int(o.x / third)), min(2, int(o.y / third))
    # Neighbouring places are the hardest to tell apart.
    near = []
    for r, names in enumerate(PLACES):
        near += [name for c, name in enumerate(names) if abs(r - row) + abs(c - column) == 1]
    return f"the {o.name} is at the {_pick(rng, near) if rng.random() < 0.5 else _other(rng, _PLACES, o.place)}"


def _relation(scene, rng, wanted, words):
    i, j = rng.permutation(len(scene.objects))[:2]
    a, b = scene.objects[i], scene.objects[j]
    true = _holding(a, b)
    draw = rng.random()
    if wanted or draw < 0.25:
        if not true:
            return None
        relation = _pick(rng, true)
        if wanted:
            return f"the {a.name} is {relation} the {b.name}"
        wrong = " ".join(_near_miss(scene, rng))
        first, second = (wrong, b.name) if rng.random() < 0.5 else (a.name, wrong)
        return f"the {first} is {relation} the {second}"
    # Mostly the reverse of what is true: a judge has to know which of the two is named first.
    relation = _pick(rng, _holding(b, a) or RELATIONS)
    if draw > 0.75:
        relation = _pick(rng, RELATIONS)
    dx, dy = RELATIONS[relation]
    along = (a.x - b.x) * dx + (a.y - b.y) * dy
    across = abs((a.x - b.x) * dy) + abs((a.y - b.y) * dx)
    if along > 3 and 0.6 * across < along < 1.0 * across:
        return None  # nearly diagonal: no one could say
    return f"the {a.name} is {relation} the {b.name}"


def _holding(a: Object, b: Object) -> list[str]:
    """The relations in which a stands to b."""
    return [relation for relation in RELATIONS if scenes.holds(relation, (a.x, a.y), (b.x, b.y))]


def _style(scene, rng, wanted, words):
    return f"the style is {scene.style if wanted else _other(rng, STYLES, scene.style)}"


def _background(scene, rng, wanted, words):
    return f"the background is {scene.background if wanted else _other(rng, BACKGROUNDS, scene.background)}"


def _text(scene, rng, wanted, words):
    word = scene.text
    if not word or (not wanted and rng.random() < 0.2):
        word = scenes.random_word(rng, words)
    elif not wanted:
        word = misspell(word, rng)
    return f'the text reads "{word}"'


def misspell(word: str, rng: np.random.Generator) -> str:
    """A word with one letter replaced (mostly), dropped, added or swapped with the next."""
    i, draw = int(rng.integers(len(word))), rng.random()
    if draw < 0.2 and len(word) > 1:
        return word[:i] + word[i + 1 :]
    if draw < 0.3 and len(word) < 4:
        return word[:i] + _pick(rng, GLYPHS) + word[i:]
    if draw < 0.45 and i + 1 < len(word) and word[i] != word[i + 1]:
        return word[:i] + word[i + 1] + word[i] + word[i + 2 :]
    return word[:i] + _other(rng, GLYPHS, word[i]) + word[i + 1 :]


_WRITERS: dict[str, Callable[..., str | None]] = {
    "exists": _exists, "total": _total, "count": _count, "size": _size, "place": _place, "relation": _relation,
    "style": _style, "background": _background, "text": _text,
}  # fmt: skip

_CENTRES = np.arange(CELL // 2 - 0.5, SIZE, CELL)


def labels(scene: Scene, fault: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """What each cell shows, uint8 (cells, LABELS), row by row, 0 for nothing; and the whole, uint8 (WHOLE)."""
    cells = np.zeros((len(_CENTRES), len(_CENTRES), len(LABELS)), np.uint8)
    yy, xx = np.meshgrid(_CENTRES, _CENTRES, indexing="ij")
    for o in scene.objects:
        inside = np.maximum(abs(xx - o.x), abs(yy - o.y)) < o.radius + 1.5
        cells[inside, :3] = (1 + [*COLOURS].index(o.colour), 1 + SHAPES.index(o.shape), 1 + [*SIZES].index(o.size))
    for i, letter in enumerate(scene.text):
        x, y = scene.text_x + i * scenes.GLYPH_W - 1, scene.text_y - 1
        inside = (xx >= x) & (xx < x + 12) & (yy >= y) & (yy < y + scenes.GLYPH_H + 2)
        cells[inside, 3:] = (1 + ord(letter) - ord("A"), 1 + i)
    whole = (
        STYLES.index(scene.style),
        BACKGROUNDS.index(scene.background),
        len(scene.objects),
        1 + list(FAULTS).index(fault) if fault else 0,
    )
    return cells.reshape(-1, len(LABELS)), np.array(whole, np.uint8)
