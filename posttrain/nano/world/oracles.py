"""Oracles: programs that read a 64-pixel image back into a scene and judge statements about it.

Reading is analysis by synthesis. Coloured blobs are found by chroma (backgrounds and text are grey), and each is
matched to the shape that overlaps it best. Letters are matched to the alphabet. Style and background are those whose
rendering comes closest to the image. What no rendering explains is an artifact. The oracles measure; nothing is
trained on their gradient.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache

import numpy as np
import torch
from scipy import ndimage

from posttrain.nano.world import scenes
from posttrain.nano.world.scenes import COLOURS, GLYPH_H, SHAPES, SIZE, Object, Scene
from posttrain.nano.world.statements import grade, meets
from rewards.base import Scored

CLEAN = 0.15
"""Largest root-mean-square error (in [0, 1]) of an 8 x 8 window that still counts as free of artifacts."""


@dataclass
class Percept:
    """What the oracle sees: a scene, and how far its rendering is from the image."""

    scene: Scene
    residual: float
    """Worst root-mean-square difference over 8 x 8 windows, in [0, 1]."""
    strays: int
    """Coloured specks too small, or too little like any shape, to be an object."""
    overlaps: list[dict[str, float]] = field(default_factory=list)
    """How far each object overlaps each shape, in [0, 1]."""

    @property
    def clean(self) -> bool:
        return self.residual <= CLEAN and self.strays == 0


def perceive(images: Sequence) -> list[Percept]:
    """Reads images: PIL images or uint8 arrays (64, 64, 3)."""
    arrays = [np.asarray(i)[..., :3] for i in images]
    for a in arrays:
        if a.shape != (SIZE, SIZE, 3):
            raise ValueError(f"oracles read images of {SIZE} x {SIZE} pixels, got {a.shape[1]} x {a.shape[0]}")
    with _ONE_AT_A_TIME:  # several rewards ask about the same images at once: the first one looks
        return [_perceived(np.ascontiguousarray(a, np.uint8).tobytes()) for a in arrays]


def styles(images: Sequence) -> list[str]:
    """The style of each image."""
    return [percept.scene.style for percept in perceive(images)]


_ONE_AT_A_TIME = threading.Lock()


@lru_cache(maxsize=1024)
def _perceived(pixels: bytes) -> Percept:
    image = np.frombuffer(pixels, np.uint8).reshape(SIZE, SIZE, 3).astype(np.float32) / 255
    return _perceive(image, _read(image[None])[0])


def _perceive(image: np.ndarray, text: tuple[str, int, int]) -> Percept:
    # Shapes are settled last: which one fits best depends on the style that they are drawn in.
    choices, overlaps, strays = _find_objects(image)
    likeliest = tuple(options[0] for options in choices)
    scene = _explain(image, Scene("", likeliest, "flat", "white", *text))
    settled = _settle(image, scene, choices)
    if settled != scene:
        scene = _explain(image, settled)
    # Smoothed, because an edge that is half a pixel off is not an artifact.
    error = (_smooth(image) - _smooth(_render(scene))) ** 2
    residual = float(np.sqrt(ndimage.uniform_filter(error.mean(-1), 8).max()))
    return Percept(scene, residual, strays, overlaps)


# ---- objects ----------------------------------------------------------------------------------------------

_HUES = {name: np.arctan2(np.sqrt(3) * (g - b), 2 * r - g - b) for name, (r, g, b) in COLOURS.items()}


def _find_objects(image: np.ndarray) -> tuple[list[list[Object]], list[dict[str, float]], int]:
    """What each coloured blob may be, likeliest first; its overlap with each shape; how many are like no shape."""
    r, g, b = np.moveaxis(image, -1, 0)
    chroma = image.max(-1) - image.min(-1)
    hue = np.arctan2(np.sqrt(3) * (g - b), 2 * r - g - b)
    objects, overlaps, strays = [], [], 0
    labels, n = _components(chroma > 0.11)
    for i in range(1, n + 1):
        blob = labels == i
        if blob.sum() < 8:
            continue
        # Halos and blur join neighbours into one blob; their cores are apart.
        peak = np.percentile(chroma[blob], 90)
        core, m = _components(blob & (chroma > 0.42 * peak))
        for j in range(1, m + 1):
            part = core == j
            area = int(part.sum())
            if area < 8:
                continue
            full = np.asarray(ndimage.binary_fill_holes(part))
            # Hues are angles: their mean is that of their unit vectors, and grey pixels count little.
            weights = chroma * part
            mean = np.arctan2((weights * np.sin(hue)).sum(), (weights * np.cos(hue)).sum())
            colour = min(_HUES, key=lambda c: abs(np.angle(np.exp(1j * (_HUES[c] - mean)))))
            fits, overlap_of = _fit(full)
            overlap, radius = fits[0][-1], fits[0][3]
            if area < 30 or overlap < 0.6 or radius < 3.5:
                strays += area >= 20
                continue
            objects.append([Object(shape, colour, _size(r), x, y, r) for shape, x, y, r, _ in fits])
            overlaps.append(overlap_of)
    return objects, overlaps, strays


def _size(radius: float) -> str:
    return "small" if radius < sum(scenes.SIZES.values()) / 2 else "large"


def _components(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """Labels 1..n of the connected parts of a mask, diagonals included."""
    labels = np.zeros(mask.shape, np.int32)
    return labels, int(ndimage.label(mask, np.ones((3, 3)), output=labels))  # type: ignore[arg-type]


@cache
def _shape_facts(shape: str) -> tuple[float, float]:
    """(area, height of the centroid below the centre) of a shape of radius 1."""
    yy, xx = np.mgrid[-1.3:1.3:521j, -1.3:1.3:521j].astype(np.float32)
    inside = scenes.signed_distance(shape, xx, yy, 1.0) < 0
    return float(inside.mean() * 2.6 * 2.6), float(yy[inside].mean())


def _fit(mask: np.ndarray) -> tuple[list[tuple[str, float, float, float, float]], dict[str, float]]:
    """(shape, x, y, radius, overlap in [0, 1]) of the shapes that overlap a filled mask best, best first; and the
    overlap with every shape."""
    ys, xs = np.nonzero(mask)
    area, cx, cy = len(ys), xs.mean(), ys.mean()
    y0, y1, x0, x1 = max(0, ys.min() - 2), ys.max() + 3, max(0, xs.min() - 2), xs.max() + 3
    yy, xx = np.mgrid[y0 : min(SIZE, y1), x0 : min(SIZE, x1)].astype(np.float32)
    part = mask[y0:y1, x0:x1]

    def trial(shape: str, scale: float) -> tuple[str, float, float, float, float]:
        unit, offset = _shape_facts(shape)
        radius = scale * np.sqrt(area / unit)
        x, y = cx, cy - offset * radius
        cover = np.clip(0.5 - scenes.signed_distance(shape, xx - x, yy - y, radius), 0, 1)
        overlap = np.minimum(cover, part).sum() / np.maximum(cover, part).sum()
        return shape, float(x), float(y), float(radius), float(overlap)

    fits = sorted((trial(shape, 1.0) for shape in SHAPES), key=lambda fit: -fit[-1])
    # Only shapes that come near the best one are worth the finer search.
    best = []
    for shape, *_, overlap in fits[:3]:
        if overlap > fits[0][-1] - 0.2:
            # The area of a blurred or outlined shape is off by some per cent.
            trials = [trial(shape, scale) for scale in (0.94, 0.97, 1.0, 1.03, 1.06)]
            best.append(max(trials, key=lambda fit: fit[-1]))
    return best, {fit[0]: fit[-1] for fit in fits}


# ---- words ------------------------------------------------------------------------------------------------


@cache
def _glyph_bank() -> torch.Tensor:
    """Zero-mean, unit-norm letter templates with a margin of paper, (26, 1, 16, 14)."""
    bank = []
    for letter in scenes.GLYPHS:
        cell = np.full((GLYPH_H + 2, 14), 0.98, np.float32)
        cell[1:-1, 2:12][scenes.text_mask(letter)[:, :10]] = 0.04
        cell -= cell.mean()
        bank.append(cell / np.linalg.norm(cell))
    return torch.tensor(np.stack(bank))[:, None]


def _read(stack: np.ndarray) -> list[tuple[str, int, int]]:
    """(word, x, y of its first letter) in each image; the word is '' where there is none.

    Normalised cross-correlation with each letter, best first; the best row wins and letters of it that stand
    12 pixels apart make the word.
    """
    bank = _glyph_bank()
    h, w = bank.shape[-2:]
    grey = torch.nn.functional.pad(torch.tensor(stack.mean(-1))[:, None], (2, 2, 1, 1), mode="replicate")
    windows = torch.ones(1, 1, h, w) / (h * w)
    mean = torch.nn.functional.conv2d(grey, windows)
    spread = (torch.nn.functional.conv2d(grey**2, windows) - mean**2).clamp_min(0) * (h * w)
    # 0.5 keeps the score of plain ground, which has no spread, near 0.
    score = torch.nn.functional.conv2d(grey, bank) / (spread.sqrt() + 0.5)
    top, letter = score.max(1)
    words, letters = [], list(scenes.GLYPHS)
    for t, l in zip(top.numpy(), letter.numpy()):
        found: list[tuple[int, int, str]] = []
        # Generated letters may stand a pixel higher or lower than their row.
        row = int(t.max(1).argmax())
        strip = t[max(0, row - 1) : row + 2]
        line, which = strip.max(0), strip.argmax(0)
        while line.max() > 0.72:
            x = int(line.argmax())
            y = max(0, row - 1) + int(which[x])
            found.append((x, y, letters[l[y, x]]))
            # No second letter can begin within a letter.
            line = line.copy()
            line[max(0, x - 8) : x + 9] = -1
        found.sort()
        if any(b[0] - a[0] > 15 for a, b in zip(found, found[1:])):
            found = []  # letters of a word stand 12 pixels apart: with a gap these are something else
        first = (found[0][0], found[0][1]) if found else (0, 0)
        words.append(("".join(f[2] for f in found), *first))
    return words


# ---- style and background ---------------------------------------------------------------------------------


def _smooth(image: np.ndarray) -> np.ndarray:
    return ndimage.uniform_filter(image, (3, 3, 1))  # type: ignore[arg-type]


def _render(scene: Scene) -> np.ndarray:
    """Renders without grain, which no two images share."""
    style = "flat" if scene.style == "grainy" else scene.style
    return scenes.render(replace(scene, style=style)).astype(np.float32) / 255


def _explain(image: np.ndarray, scene: Scene) -> Scene:
    """The scene with the style and background whose rendering comes closest to the image."""
    # Bordered shapes reach farther than those of most styles, and a margin does the rest: what is free is ground.
    drawn = _render(replace(scene, style="bordered", background="white"))
    changed = np.abs(drawn - _render(Scene("", (), "flat", "white"))).max(-1) > 0.03
    free = np.logical_not(ndimage.binary_dilation(changed, iterations=3))
    grey = image.mean(-1)
    # Without a word or a shape to compare with, brightness alone tells a dark image from a light one.
    errors = {}
    for name, dim in itertools.product(scenes.BACKGROUNDS, (1.0, 0.5)):
        level = dim * scenes.background(name)
        difference = ndimage.uniform_filter(grey - level, 3)[free]
        errors[name, dim] = float((difference**2).mean()) if free.any() else 1.0
    fine = grey - ndimage.uniform_filter(grey, 4)
    best, picked = 1e9, scene
    for name in scenes.BACKGROUNDS:
        for style in scenes.STYLES:
            ground = errors[name, 0.5 if style == "dark" else 1.0]
            # A ground far from the best one is not worth rendering; grain is recognised by its texture, below.
            if ground > 1.5 * min(errors.values()) + 0.001 or style == "grainy":
                continue
            guess = replace(scene, style=style, background=name)
            guesses = [guess]
            if style == "glowing":  # a halo makes its blob look larger
                smaller = tuple(replace(o, radius=0.93 * o.radius) for o in guess.objects)
                guesses.append(replace(guess, objects=smaller))
            for guess in guesses:
                error = float(((image - _render(guess)) ** 2).mean()) + ground
                if error < best:
                    best, picked = error, guess
    # What is fine in the image and not in its rendering, so that stripes and edges do not count as grain.
    plain = _render(picked).mean(-1)
    texture = fine - (plain - ndimage.uniform_filter(plain, 4))
    if picked.style != "dark" and free.any() and float(texture[free].std()) > 0.02:
        picked = replace(picked, style="grainy")
    return picked


def _settle(image: np.ndarray, scene: Scene, choices: list[list[Object]]) -> Scene:
    """Where a blob may be one of several shapes, the one whose rendering in this style comes closest."""
    for i, options in enumerate(choices):
        if len(options) > 1:
            o = options[0]
            reach = int(1.3 * o.radius) + 3
            # Only the part around the object is compared: elsewhere all guesses are the same.
            window = np.s_[max(0, int(o.y) - reach) : int(o.y) + reach, max(0, int(o.x) - reach) : int(o.x) + reach]
            guesses, errors = [], []
            for option in options:
                guess = replace(scene, objects=(*scene.objects[:i], option, *scene.objects[i + 1 :]))
                guesses.append(guess)
                errors.append(float(((image[window] - _render(guess)[window]) ** 2).mean()))
            scene = guesses[int(np.argmin(errors))]
    return scene


# ---- as rewards -------------------------------------------------------------------------------------------


def rubric(images: Sequence, prompts: Sequence[str], requirements: Sequence[list[str]], **_) -> list[float | None]:
    """Share of a prompt's requirements that its image meets, in [0, 1]; None where it has none."""
    scores: list[float | None] = []
    for percept, need in zip(perceive(images), requirements):
        answers = [float(meets(percept, requirement)) for requirement in need]
        # Answers as a judge's rubric returns them, so that pages show them question by question.
        details = {"requirements": need, "answers": answers}
        scores.append(Scored(sum(answers) / len(answers), details) if need else None)
    return scores


def graded(images: Sequence, prompts: Sequence[str], requirements: Sequence[list[str]], **_) -> list[float | None]:
    """Mean grade of a prompt's requirements, in [0, 1]: a reward to train on where `rubric` measures."""
    grades: list[float | None] = []
    for percept, required in zip(perceive(images), requirements):
        values = [grade(percept, requirement) for requirement in required]
        grades.append(float(np.mean(values)) if values else None)
    return grades


def text(images: Sequence, prompts: Sequence[str], texts: Sequence[list[str]], **_) -> list[float | None]:
    """1.0 where the image shows exactly the wanted word, else 0.0; None where no word is wanted."""
    scores: list[float | None] = []
    for percept, wanted in zip(perceive(images), texts):
        scores.append(float(percept.scene.text == wanted[0]) if wanted else None)
    return scores


def artifact_free(images: Sequence, prompts: Sequence[str], **_) -> list[float | None]:
    """1.0 for an image that the renderer could have drawn, else 0.0."""
    return [float(p.clean) for p in perceive(images)]
