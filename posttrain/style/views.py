"""Views of an image for training on itself: what keeps its style and gives away little of its content.

`tiles`: squares in random order, each mirrored half the time, never rotated, because
light has a direction. `crop`: a square of something coloured. `other` is no view but another image of the same style;
see dataset.py.

Images are uint8 (H, W, 3), and so are views.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

View = Literal["tiles", "crop", "other"]
TRIES = 8
"""Crops of which the most varied is taken."""
MOST_OF_SUBJECT = 0.3
"""Share of a subject's box that a crop may show."""
Box = tuple[int, int, int, int]
"""top, left, bottom, right in pixels."""


def tiles(image: np.ndarray, rng: np.random.Generator, count: int) -> np.ndarray:
    """`count` x `count` tiles in random order. A remainder at the lower and right edge is left out."""
    height, width = image.shape[0] // count, image.shape[1] // count
    if not (height and width):
        raise ValueError(f"an image of {image.shape[1]} x {image.shape[0]} has no {count} x {count} tiles")
    squares = []
    for row in range(count):
        for column in range(count):
            squares.append(image[row * height : (row + 1) * height, column * width : (column + 1) * width])
    order = rng.permutation(len(squares))
    mirrored = rng.random(len(squares)) < 0.5
    placed = []
    for i, flip in zip(order, mirrored):
        placed.append(squares[i][:, ::-1] if flip else squares[i])
    rows = [np.concatenate(placed[first : first + count], axis=1) for first in range(0, len(placed), count)]
    return np.concatenate(rows, axis=0)


def crop(image: np.ndarray, rng: np.random.Generator, side: int, subject: Box | None = None) -> np.ndarray:
    """A square of `side` pixels that shows at most MOST_OF_SUBJECT of the subject's box; without one, the most varied
    of TRIES squares."""
    height, width = image.shape[:2]
    if side > min(height, width):
        raise ValueError(f"a crop of {side} pixels is larger than the image of {width} x {height}")
    found = []
    for _ in range(TRIES):
        top, left = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
        part = image[top : top + side, left : left + side]
        shown = 0.0 if subject is None else _overlap((top, left, top + side, left + side), subject)
        # Too much of the subject comes last; among the others the most varied first.
        found.append((shown > MOST_OF_SUBJECT, shown if shown > MOST_OF_SUBJECT else -float(part.std()), top, left))
    _, _, top, left = min(found)
    return np.ascontiguousarray(image[top : top + side, left : left + side])


def repeated(part: np.ndarray, height: int, width: int) -> np.ndarray:
    """A square and its mirror image, in turns, up to that size: for models that draw small images."""
    pair = np.concatenate([part, part[:, ::-1]], axis=1)
    rows, columns = -(-height // pair.shape[0]), -(-width // pair.shape[1])
    return np.tile(pair, (rows, columns, 1))[:height, :width]


def _overlap(box: Box, subject: Box) -> float:
    """Share of the subject's box that lies in `box`."""
    height = max(0, min(box[2], subject[2]) - max(box[0], subject[0]))
    width = max(0, min(box[3], subject[3]) - max(box[1], subject[1]))
    area = (subject[2] - subject[0]) * (subject[3] - subject[1])
    return height * width / area if area else 0.0
