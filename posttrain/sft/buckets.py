"""Aspect buckets: the sizes that images are trained in, and what of an image each shows. Pure; sizes are pixels.

A bucket has about as many pixels as a square of side R, so that images keep their shape and a batch its cost. An image
goes to the bucket with the nearest ratio of sides, is scaled to cover it, and is cropped at its centre.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Size = tuple[int, int]
"""Height and width."""
Box = tuple[float, float, float, float]
"""Left, top, right and bottom in an image's own pixels, with fractions."""


def buckets(side: int, multiple: int, max_ratio: float) -> list[Size]:
    """Of each height the greatest width, both multiples of `multiple`, that has no more pixels than side * side; those
    whose longer side is at most `max_ratio` times the shorter, by their height.

    (1024, 64, 2) gives 11 buckets of 3840 to 4096 tokens of 16 x 16 pixels.
    """
    found = []
    for height in range(multiple, int(side * max_ratio) + 1, multiple):
        width = side * side // height // multiple * multiple
        if width and max(height, width) <= max_ratio * min(height, width):
            found.append((height, width))
    return found


def nearest(size: Size, choices: Sequence[Size]) -> Size:
    """The bucket whose ratio of sides is nearest, in logarithms; the first of equals."""
    # In logarithms 2:1 is as far from 1:1 as 1:2 is.
    ratio = math.log(size[1] / size[0])
    return min(choices, key=lambda choice: abs(math.log(choice[1] / choice[0]) - ratio))


def enlargement(size: Size, bucket: Size) -> float:
    """How many times larger an image gets that covers a bucket; below 1 it gets smaller."""
    return max(bucket[0] / size[0], bucket[1] / size[1])


def crop(size: Size, bucket: Size) -> Box:
    """What of an image a bucket shows."""
    scale = enlargement(size, bucket)
    height, width = bucket[0] / scale, bucket[1] / scale
    left, top = (size[1] - width) / 2, (size[0] - height) / 2
    return left, top, left + width, top + height


def cut(size: Size, box: Box) -> float:
    """Share of an image's area that is outside of a box, in [0, 1]."""
    left, top, right, bottom = box
    return max(0.0, 1 - (right - left) * (bottom - top) / (size[0] * size[1]))
