"""Scenes: small images drawn from a graph, and the words that describe them.

A `Scene` is 1 to 5 coloured shapes on a grey-scale background in one of ten styles, with at times a word on a
plate. `render` draws it (64 x 64 pixels), `describe` says it: a caption that mentions part of the graph, and one
yes/no statement for each thing mentioned. What a caption leaves out is open, so a short prompt has many right
images. Coordinates are pixels, x to the right and y down, a pixel's centre at its index.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache

import numpy as np

from posttrain.nano.world.font import GLYPHS, WORDS

SIZE = 64
COLOURS = {
    "red": (0.92, 0.10, 0.12),
    "orange": (1.00, 0.55, 0.05),
    "yellow": (0.96, 0.90, 0.10),
    "green": (0.10, 0.70, 0.20),
    "cyan": (0.10, 0.80, 0.85),
    "blue": (0.12, 0.28, 0.95),
    "purple": (0.55, 0.15, 0.88),
    "pink": (1.00, 0.35, 0.72),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "star")
SIZES = {"small": 7.5, "large": 12.0}
"""Radius in pixels; a drawn shape is within 6 % of it."""
STYLES = ("flat", "outline", "shaded", "striped", "dotted", "pastel", "dark", "grainy", "glowing", "bordered")
BACKGROUNDS = ("white", "grey", "black", "gradient", "checked")
PLACES = (
    ("top left", "top", "top right"),
    ("left", "center", "right"),
    ("bottom left", "bottom", "bottom right"),
)
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
COUNTS = ("zero", "one", "two", "three", "four", "five")
KINDS = {"single": 0.2, "pair": 0.22, "count": 0.18, "trio": 0.1, "text": 0.3}
GLYPH_W, GLYPH_H = 12, 14
"""Pixels a letter takes: 5 x 7 cells of 2 x 2 pixels and 2 pixels of space."""


@dataclass(frozen=True)
class Object:
    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def plural(self) -> str:
        return self.name + ("es" if self.shape == "cross" else "s")

    @property
    def place(self) -> str:
        return place_of(self.x, self.y)


@dataclass(frozen=True)
class Scene:
    kind: str
    objects: tuple[Object, ...]
    style: str
    background: str
    text: str = ""
    text_x: int = 0
    """Left edge of the first letter, pixels."""
    text_y: int = 0
    """Top edge of the letters, pixels."""
    grain_seed: int = 0

    @property
    def colour_shapes(self) -> set[tuple[str, str]]:
        """(colour, shape) of each object."""
        return {(o.colour, o.shape) for o in self.objects}


@dataclass
class Description:
    prompt: str
    requirements: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)


def place_of(x: float, y: float) -> str:
    """Name of the ninth of the image that holds a point."""
    return PLACES[_third(y)][_third(x)]


def _third(v: float) -> int:
    """Which third of a side a coordinate is in; one outside the image counts as the nearest."""
    return min(2, max(0, int(v * 3 / SIZE)))


def holds(relation: str, a: tuple[float, float], b: tuple[float, float]) -> bool:
    """Whether a point a stands in `relation` to a point b: at least 5 pixels along it, and mainly along it."""
    dx, dy = RELATIONS[relation]
    along = (a[0] - b[0]) * dx + (a[1] - b[1]) * dy
    across = abs((a[0] - b[0]) * dy) + abs((a[1] - b[1]) * dx)
    return along >= 5 and along >= 0.8 * across


# ---- sampling a scene -------------------------------------------------------------------------------------


def random_word(rng: np.random.Generator, words: list[str] | None = None) -> str:
    """A word of the list, or (half the time where no list is given) one to four random letters."""
    if words is None and rng.random() < 0.5:
        return "".join(rng.choice(list(GLYPHS), size=rng.integers(1, 5)))
    return str(rng.choice(words or WORDS))


def random_scene(rng: np.random.Generator, words: list[str] | None = None, kind: str | None = None) -> Scene:
    """Draws a scene whose objects are at least three pixels apart and inside the image."""
    kind = kind or str(rng.choice(list(KINDS), p=list(KINDS.values())))
    style, background = str(rng.choice(STYLES)), str(rng.choice(BACKGROUNDS))
    # Rejection sampling: a layout that breaks a rule is thrown away whole, so none is favoured.
    while True:
        scene = _layout(rng, kind, style, background, words)
        if scene is not None:
            return scene


def _layout(rng: np.random.Generator, kind: str, style: str, background: str, words: list[str] | None) -> Scene | None:
    text, text_x, text_y, free = "", 0, 0, (0, SIZE)
    if kind == "text":
        text = random_word(rng, words)
        text_x = (SIZE - GLYPH_W * len(text) + 2) // 2 + int(rng.integers(-2, 3))
        top = rng.random() < 0.5
        text_y = int(rng.integers(4, 7)) if top else SIZE - GLYPH_H - int(rng.integers(4, 7))
        free = (24, SIZE) if top else (0, SIZE - 24)
    n = {"single": 1, "text": 1, "pair": 2, "trio": 3}.get(kind) or int(rng.integers(2, 6))
    # No two objects are alike, except in a count, so that every statement is about one of them.
    names = [(str(rng.choice(SHAPES)), str(rng.choice(list(COLOURS)))) for _ in range(n)]
    if kind == "count":
        names = names[:1] * n
    elif len(set(names)) < n:
        return None
    size = str(rng.choice(list(SIZES))) if n <= 3 else "small"
    placed: list[Object] = []
    for shape, colour in names:
        if kind == "pair":
            size = str(rng.choice(list(SIZES)))
        radius = SIZES[size] * rng.uniform(0.94, 1.06)
        # Where the objects before leave no room, more attempts would not help.
        for _ in range(20):
            x = rng.uniform(radius + 2, SIZE - 3 - radius)
            y = rng.uniform(free[0] + radius + 2, free[1] - 3 - radius)
            third = SIZE / 3
            if min(x % third, third - x % third, y % third, third - y % third) < 2.5:
                continue  # too near a border between two places to be named
            # Corners reach beyond the radius, hence the factor.
            if all(math.hypot(x - o.x, y - o.y) > 1.15 * (radius + o.radius) + 4 for o in placed):
                placed.append(Object(shape, colour, size, float(x), float(y), float(radius)))
                break
        else:
            return None
    # On a diagonal neither is left of the other nor above it.
    if kind == "pair" and not any(holds(r, *_points(placed)) for r in RELATIONS):
        return None
    return Scene(kind, tuple(placed), style, background, text, text_x, text_y, int(rng.integers(0, 2**31)))


def _points(objects: list[Object] | tuple[Object, ...]) -> tuple[tuple[float, float], tuple[float, float]]:
    return (objects[0].x, objects[0].y), (objects[1].x, objects[1].y)


def mutate(scene: Scene, rng: np.random.Generator, rate: float, text_rate: float | None = None) -> Scene:
    """A copy in which each attribute is redrawn with probability `rate` (letters with `text_rate`).

    Describing the copy while showing the original gives captions as unreliable as those of the web.
    """

    def redraw(value: str, options, p: float = rate) -> str:
        return str(rng.choice(list(options))) if rng.random() < p else value

    objects = []
    for o in scene.objects:
        # Mirrored at the centre, an object is at another place and in another relation.
        x, y = (o.x, o.y) if rng.random() >= rate else (SIZE - 1 - o.x, SIZE - 1 - o.y)
        size = redraw(o.size, SIZES)
        radius = o.radius if size == o.size else SIZES[size]
        objects.append(Object(redraw(o.shape, SHAPES), redraw(o.colour, COLOURS), size, x, y, radius))
    if scene.kind == "count":
        n = len(objects)
        if rng.random() < rate:
            n = min(5, max(2, n + int(rng.choice([-1, 1]))))
        # All alike again, or the scene would not be one that counts.
        objects = [replace(o, shape=objects[0].shape, colour=objects[0].colour) for o in objects]
        objects = (objects + objects)[:n]
    text_rate = rate if text_rate is None else text_rate
    letters = [redraw(letter, GLYPHS, text_rate) for letter in scene.text]
    return replace(
        scene,
        objects=tuple(objects),
        style=redraw(scene.style, STYLES),
        background=redraw(scene.background, BACKGROUNDS),
        text="".join(letters),
    )


# ---- describing a scene -----------------------------------------------------------------------------------


def article(noun: str) -> str:
    """The noun after a or an."""
    return ("an " if noun[0] == "o" else "a ") + noun


def describe(scene: Scene, rng: np.random.Generator, detail: float = 1.0) -> Description:
    """A caption and the statements that an image of it must meet.

    `detail` in [0, 1] is the chance that each of style, background, size and place is mentioned; shapes, colours,
    counts, relations and words always are. 1 gives a dense caption, 0 what a hurried user types.
    """
    say = {k: rng.random() < detail for k in ("style", "background", "size", "place")}
    objects, requirements, texts = scene.objects, [], []
    if scene.kind == "count":
        o, n = objects[0], len(objects)
        size = f"{o.size} " if say["size"] else ""
        subject = f"{COUNTS[n]} {size}{o.plural}"
        requirements.append(f"there are exactly {COUNTS[n]} {o.plural}")
        if say["size"]:
            requirements.append(f"the {o.name} is {o.size}")
    else:
        parts = []
        for o in objects:
            part = article((f"{o.size} " if say["size"] else "") + o.name)
            requirements.append(f"there is {article(o.name)}")
            if say["size"]:
                requirements.append(f"the {o.name} is {o.size}")
            if say["place"] and scene.kind in ("single", "text"):
                part += f" at the {o.place}"
                requirements.append(f"the {o.name} is at the {o.place}")
            parts.append(part)
        if scene.kind == "pair":
            # After `mutate` no relation may hold; then the caption is wrong, as it may be.
            relation = next((r for r in RELATIONS if holds(r, *_points(objects))), "left of")
            subject = f"{parts[0]} {relation} {parts[1]}"
            requirements.append(f"the {objects[0].name} is {relation} the {objects[1].name}")
        else:
            subject = parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
        requirements.append(f"there {'is' if len(objects) == 1 else 'are'} exactly {COUNTS[len(objects)]} "
                            f"shape{'' if len(objects) == 1 else 's'}")  # fmt: skip
    if scene.text:
        subject = f'the word "{scene.text}" and {subject}'
        requirements.append(f'the text reads "{scene.text}"')
        texts.append(scene.text)
    extras = []
    if say["style"]:
        extras.append(f"{scene.style} style")
        requirements.append(f"the style is {scene.style}")
    if say["background"]:
        extras.append(f"{scene.background} background")
        requirements.append(f"the background is {scene.background}")
    # In any order, so that a model learns words and not their places.
    if rng.random() < 0.5:
        extras.reverse()
    prompt = ", ".join([*extras, subject] if extras and rng.random() < 0.3 else [subject, *extras])
    return Description(prompt, requirements, texts)


# ---- drawing a scene --------------------------------------------------------------------------------------

YY, XX = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)


@cache
def _polygon(shape: str) -> np.ndarray:
    """Corners of a polygon of radius 1, in order, y down."""
    if shape == "square":
        return np.array([(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)], np.float32)
    if shape == "triangle":
        return np.array([(0, -1.0), (1.05, 0.85), (-1.05, 0.85)], np.float32)
    if shape == "diamond":
        return np.array([(0, -1.1), (0.85, 0), (0, 1.1), (-0.85, 0)], np.float32)
    if shape == "cross":
        a = 0.36
        half = np.array([(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a)], np.float32)
        return np.concatenate([half, -half])  # the other half is the first one turned by 180 degrees
    angles = np.pi * (np.arange(10) / 5 - 0.5)
    radii = np.where(np.arange(10) % 2 == 0, 1.15, 0.48)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], 1).astype(np.float32)


@cache
def _edges(shape: str) -> np.ndarray:
    """x and y of the first end of each edge and of its second end, (4, E, 1, 1), of a polygon of radius 1."""
    corners = _polygon(shape)
    ends = np.concatenate([corners, np.roll(corners, -1, axis=0)], axis=1)
    return np.ascontiguousarray(ends.T)[..., None, None]


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Pixels from the edge of a shape at the origin, negative inside; x, y and the result are (H, W)."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    # All edges at once, (E, 1, 1): the arrays are small, so calls are what takes time.
    x0, y0, x1, y1 = _edges(shape) * radius
    ex, ey, px, py = x1 - x0, y1 - y0, x - x0, y - y0
    along = ((px * ex + py * ey) / (ex * ex + ey * ey)).clip(0, 1)
    best = ((px - along * ex) ** 2 + (py - along * ey) ** 2).min(0)
    # Even-odd rule: a point is inside if a ray to the right crosses an odd number of edges. Level ones are not crossed.
    crossed = ((y0 <= y) != (y1 <= y)) & (px < py * (ex / np.where(ey == 0, 1, ey)))
    return np.where(np.logical_xor.reduce(crossed), -1, 1) * np.sqrt(best)


@cache
def background(name: str) -> np.ndarray:
    """Grey levels in [0, 1], (SIZE, SIZE), read-only."""
    if name == "gradient":
        grey = 0.95 - 0.6 * YY / (SIZE - 1)
    elif name == "checked":
        grey = np.where((XX // 8 + YY // 8) % 2 == 0, 0.92, 0.70).astype(np.float32)
    else:
        grey = np.full((SIZE, SIZE), {"white": 0.97, "grey": 0.58, "black": 0.05}[name], np.float32)
    grey.flags.writeable = False  # cached: a caller that drew into it would change every later image
    return grey


@lru_cache(1024)  # the oracles draw a word in every style
def text_mask(text: str) -> np.ndarray:
    """Ink of a word, bool (14, 12 * letters), read-only."""
    mask = np.zeros((GLYPH_H, GLYPH_W * len(text)), bool)
    for i, letter in enumerate(text):
        # A cell of the font is 2 x 2 pixels, so that letters survive the VAE.
        mask[:, i * GLYPH_W : i * GLYPH_W + 10] = np.kron(GLYPHS[letter], np.ones((2, 2), bool))
    mask.flags.writeable = False
    return mask


def render(scene: Scene) -> np.ndarray:
    """Draws a scene: uint8 (64, 64, 3)."""
    ground = background(scene.background)
    image = np.repeat(ground[..., None], 3, axis=2)
    for o in scene.objects:
        _draw(image, o, scene.style, float(ground.mean()))
    if scene.text:
        mask = text_mask(scene.text)
        h, w = mask.shape
        x, y = scene.text_x, scene.text_y
        plate(image, x - 4, y - 3, w + 6, h + 6)
        x0, x1 = max(0, x), min(SIZE, x + w)  # two words in one may be wider than the image
        image[y : y + h, x0:x1][mask[:, x0 - x : x1 - x]] = 0.04
    if scene.style == "dark":
        image *= 0.5
    elif scene.style == "grainy":
        grain = np.random.default_rng(scene.grain_seed).normal(0, 0.09, (SIZE // 2, SIZE // 2)).astype(np.float32)
        image += np.kron(grain, np.ones((2, 2), np.float32))[..., None]
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def plate(image: np.ndarray, x: int, y: int, w: int, h: int) -> None:
    """Draws the framed white ground of a word, so that it can be read in any style."""
    x0, y0, x1, y1 = max(0, x), max(0, y), min(SIZE, x + w), min(SIZE, y + h)
    image[y0:y1, x0:x1] = 0.15
    image[y0 + 1 : y1 - 1, x0 + 1 : x1 - 1] = 0.98


@lru_cache(64)  # the oracles draw each object in every style
def _distance(shape: str, x: float, y: float, radius: float, x0: int, x1: int, y0: int, y1: int) -> np.ndarray:
    """`signed_distance` to an object in a window of the image, read-only."""
    d = signed_distance(shape, XX[y0:y1, x0:x1] - x, YY[y0:y1, x0:x1] - y, radius)
    d.flags.writeable = False
    return d


def _draw(image: np.ndarray, o: Object, style: str, ground: float) -> None:
    # As far as the halo of `glowing` and the border of `bordered` can be seen.
    reach = 1.25 * o.radius + 6
    x0, x1 = max(0, int(o.x - reach)), min(SIZE, int(o.x + reach) + 2)
    y0, y1 = max(0, int(o.y - reach)), min(SIZE, int(o.y + reach) + 2)
    part, xx, yy = image[y0:y1, x0:x1], XX[y0:y1, x0:x1], YY[y0:y1, x0:x1]
    d = _distance(o.shape, o.x, o.y, o.radius, x0, x1, y0, y1)
    colour = np.asarray(COLOURS[o.colour], np.float32)
    fill = np.broadcast_to(colour, (*d.shape, 3))
    cover = np.clip(0.5 - d, 0, 1)  # edges are antialiased over one pixel
    if style == "outline":
        cover = np.clip(0.5 - (np.abs(d + 1.2) - 1.2), 0, 1)
    elif style == "shaded":
        light = 1.1 - 0.55 * np.clip((yy - o.y) / o.radius * 0.5 + 0.5, 0, 1)
        fill = np.clip(colour * light[..., None], 0, 1)
    elif style in ("striped", "dotted"):
        pale = (yy // 2) % 2 == 0
        if style == "dotted":
            pale = pale & ((xx // 2) % 2 == 0)
        fill = np.where(pale[..., None], 0.5 * colour + 0.5, colour)
    elif style == "pastel":
        fill = np.broadcast_to(0.45 * colour + 0.55, fill.shape)
    elif style == "glowing":
        halo = (0.38 * np.exp(-np.clip(d, 0, None) / 3.0))[..., None]
        part[:] = part * (1 - halo) + colour * halo
    elif style == "bordered":
        edge = np.clip(0.5 - (d - 2.0), 0, 1)[..., None]
        # White on dark ground and black on light, or the border would not show.
        part[:] = part * (1 - edge) + (0.98 if ground < 0.3 else 0.02) * edge
    cover = cover[..., None]
    part[:] = part * (1 - cover) + fill * cover
