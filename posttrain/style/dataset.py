"""A set of images whose styles are known or not, and what is shown of each as a reference while it is trained on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from posttrain.errors import UserError, counted
from posttrain.log import log
from posttrain.sft.cache import EncodedImages
from posttrain.sft.dataset import Caption, ImageSet
from posttrain.style import views
from posttrain.style.config import StyleConfig, StyleSetConfig
from posttrain.style.views import Box, View


class StyleSet(ImageSet):
    """The rows of a set. The last caption of each is the full one, which is never drawn by its weight."""

    config: StyleSetConfig

    def asked(self) -> dict[str, list[str]]:
        asked = super().asked()
        columns = self.config.columns
        for key, name in {"full": columns.full, "style_of": columns.style_of, "subject": columns.subject}.items():
            if name is not None:
                asked[key] = [name]
        return asked

    def style_of(self, row: int) -> str | None:
        """What style a row has; None where the set does not say."""
        name = self.config.columns.style_of
        value = None if name is None else self._source[row].get(name)
        return None if value is None or value == "" else str(value)

    def subject(self, row: int) -> Box | None:
        """The subject's box in the image's pixels, as top, left, bottom, right. Raises UserError if it is none."""
        name = self.config.columns.subject
        value = None if name is None else self._source[row].get(name)
        if value is None:
            return None
        numbers = value if isinstance(value, list | tuple) else []
        fits = len(numbers) == 4 and all(isinstance(v, int | float) and math.isfinite(v) for v in numbers)
        if not fits or numbers[0] >= numbers[2] or numbers[1] >= numbers[3]:
            raise UserError(f"{self.name(row)}: {name}: is {value!r}; write [left, top, right, bottom] in pixels")
        left, top, right, bottom = map(round, numbers)
        return top, left, bottom, right

    def _captions(self, row: Mapping[str, Any]) -> list[Caption]:
        captions = super()._captions(row)
        full = self.config.columns.full
        if full is None:
            text = captions[0].text
        else:
            text = row.get(full)
            if not (isinstance(text, str) and text.strip()):
                raise ValueError(f"{full}: is {'missing' if text is None else 'no text'}")
        # Of weight 0, so that no draw by weight takes it; batches.LAST does.
        return [*captions, Caption(text.strip(), 0.0)]


KEPT = 2**30
"""Bytes of squares that a process keeps, since to open and scale an image takes longer than to cut it up."""


class Views:
    """Draws references of the images that are trained on."""

    def __init__(self, source: StyleSet, images: EncodedImages, config: StyleConfig):
        """Raises UserError for styles that are held out and not there, and where nothing is left to train on."""
        self.source, self.images, self.config = source, images, config.references
        styles = {image.row: source.style_of(image.row) for image in images.images}
        known = set(filter(None, styles.values()))
        for style in config.heldout_styles:
            if style not in known:
                names = ", ".join(sorted(known)[:10])
                raise UserError(f"heldout_styles: '{style}' is not in {source.path}; it has: {names}")
        self.train = [entry for entry in images.train.tolist() if styles[self.row(entry)] not in config.heldout_styles]
        """Entries to train on."""
        if not self.train:
            raise UserError(f"heldout_styles: no image of {source.path} is left to train on; hold fewer out")
        # A row has several entries, one for each resolution, and counts once.
        self._others: dict[str, list[int]] = {}
        for row in dict.fromkeys(map(self.row, self.train)):
            if (own := styles[row]) is not None:
                self._others.setdefault(own, []).append(row)
        self._styles = styles
        self._squares: dict[tuple[int, int], tuple[tuple[int, int], np.ndarray]] = {}
        """By row and side: the size of the image, and its middle."""
        self._bytes = 0
        alone = [style for style, rows in self._others.items() if len(rows) == 1]
        if self.config.other and alone:
            log.warning(
                f"{source.path}: of {counted(len(self._others), 'style')} {len(alone)} have one image, such as"
                f" '{alone[0]}', which is then never shown another of its style"
            )

    def row(self, entry: int) -> int:
        return self.images.row(entry)

    def draw(self, entry: int, size: int, rng: np.random.Generator) -> np.ndarray:
        """One reference of an entry: uint8 (size, size, 3)."""
        row = self.row(entry)
        kind = self._kind(row, rng)
        if kind == "other":
            # Not the image itself, which would show the content too.
            others = [other for other in self._others[self._styles[row] or ""] if other != row]
            return self._square(others[int(rng.integers(len(others)))], size)[1]
        image_size, pixels = self._square(row, size)
        if kind == "tiles":
            count = self.config.tile_counts[int(rng.integers(len(self.config.tile_counts)))]
            # A side that the count does not divide leaves a few pixels out, and all references need one size.
            return whole(views.tiles(pixels, rng, count), size)
        side = max(1, round(size * rng.uniform(self.config.crop_least, self.config.crop_most)))
        box = self.source.subject(row)
        part = views.crop(pixels, rng, side, None if box is None else _in_square(box, image_size, size))
        return views.repeated(part, size, size)

    def _square(self, row: int, size: int) -> tuple[tuple[int, int], np.ndarray]:
        found = self._squares.get((row, size))
        if found is None:
            image = self.source[row].image
            found = image.size, square(image, size)
            found[1].flags.writeable = False
            # What is there stays: each image is as likely to be asked for as any other.
            if self._bytes + found[1].nbytes <= KEPT:
                self._squares[row, size] = found
                self._bytes += found[1].nbytes
        return found

    def _kind(self, row: int, rng: np.random.Generator) -> View:
        config, style = self.config, self._styles[row]
        alone = style is None or len(self._others.get(style, [])) < 2
        kinds: Sequence[View] = ("tiles", "crop", "other")
        # Where there is no other image of the style, the two other kinds keep their ratio.
        shares = np.array([config.tiles, config.crop, 0.0 if alone else config.other])
        if not shares.sum():  # only others were asked for, and there is none
            return "tiles"
        return kinds[int(np.searchsorted(shares.cumsum() / shares.sum(), rng.random(), side="right"))]


def square(image: Image.Image, size: int) -> np.ndarray:
    """The middle of an image as uint8 (size, size, 3)."""
    side = min(image.size)
    # In fractions of pixels, which Pillow's resize takes.
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = (left, top, left + side, top + side)
    return np.asarray(image.resize((size, size), Image.Resampling.LANCZOS, box=box))


def whole(image: np.ndarray, size: int) -> np.ndarray:
    """An image that is a few pixels short of a square, up to it, by its edge."""
    missing = [(0, size - image.shape[0]), (0, size - image.shape[1]), (0, 0)]
    return np.pad(image, missing, mode="edge") if max(missing)[1] else image


def _in_square(box: Box, image: tuple[int, int], size: int) -> Box:
    """A box of an image of (width, height) in the pixels of its `square`, cut to it."""
    side = min(image)
    top, left = (image[1] - side) / 2, (image[0] - side) / 2
    places = (box[0] - top, box[1] - left, box[2] - top, box[3] - left)
    at = [min(max(round(place * size / side), 0), size) for place in places]
    return at[0], at[1], at[2], at[3]
