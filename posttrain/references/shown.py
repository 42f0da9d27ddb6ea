"""References that a user names, for drawing: files with strengths, and columns of prompt files.

    a.png:0.8        an image and its strength; 1 where none is given

In a file of prompts, `references` is a list of such texts or of {"image": PATH, "strength": NUMBER}; paths are from the
directory of the file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from posttrain.errors import UserError, counted
from posttrain.image_reader import read_image
from posttrain.model.k2 import K2, Text
from posttrain.model.references import MOST, References
from posttrain.references.draw import MOST_VELOCITY, How, Null, Shown, check_strengths, draw
from posttrain.training.evaluate import SamplingSettings
from prompts.records import PromptRecord

LONGEST = 512
"""Longest side in pixels that a reference is scaled to, unless it is told otherwise; never longer than the image."""
LEAST = 4
"""Shortest side that a reference may have, in tokens."""


@dataclass(frozen=True)
class Named:
    """A reference as it is named."""

    path: Path
    strength: float


def named(value: Any, folder: Path, where: str) -> Named:
    """Raises UserError for what does not name an image, and for a strength that it cannot read as a number."""
    if isinstance(value, Mapping):
        text, strength = value.get("image"), value.get("strength", 1.0)
        if not isinstance(text, str) or not isinstance(strength, int | float) or isinstance(strength, bool):
            raise UserError(f'{where}: is {dict(value)}; write {{"image": PATH, "strength": NUMBER}}')
    elif isinstance(value, str) and value:
        text, colon, number = value.rpartition(":")
        # A path may have a colon of its own.
        if not colon or (folder / value).exists():
            text, number = value, "1"
        try:
            strength = float(number)
        except ValueError:
            raise UserError(f"{where}: {value}: '{number}' is not a number; write IMAGE:STRENGTH") from None
    else:
        raise UserError(f"{where}: is {value!r}; name an image, such as a.png:0.8")
    if not (math.isfinite(strength) and abs(strength) <= MOST_VELOCITY):
        raise UserError(f"{where}: a strength of {strength:g}: use at most {MOST_VELOCITY:g} either way")
    if not (folder / text).is_file():
        raise UserError(f"{where}: {folder / text}: no such file; correct the path")
    return Named(folder / text, float(strength))


def of_record(record: PromptRecord, folder: Path) -> list[Named]:
    """The references that a prompt names; none where it has no such column. Raises UserError."""
    values = record.columns.get("references") or []
    where = f"prompt '{record.prompt[:40]}': references"
    # Counted before any file is looked for.
    if not isinstance(values, list) or len(values) > MOST:
        raise UserError(f"{where}: give a list of at most {MOST} images")
    return [named(value, folder, where) for value in values]


def of_records(records: Sequence[PromptRecord], path: str | None) -> list[list[Named]]:
    """Those of each prompt of a file. Raises UserError, before a model is read."""
    return [of_record(record, Path(path or ".").parent) for record in records]


def scaled(image: Image.Image, longest: int, multiple: int, where: str) -> np.ndarray:
    """An image as uint8 (H, W, 3): no side longer than `longest`, both multiples of `multiple`.

    Raises UserError for one that is too small.
    """
    least = LEAST * multiple
    if min(image.size) < least:
        raise UserError(f"{where}: is {image.width} x {image.height} pixels; a reference has {least} or more each way")
    scale = min(1.0, longest / max(image.size))
    # Rounded down to whole tokens. The shorter side of a long image stays at `least`, which changes its shape a little.
    width, height = (max(least, int(side * scale) // multiple * multiple) for side in image.size)
    return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS))


@dataclass(frozen=True)
class Encoded:
    """References of one image as they were read, and as the network takes them."""

    images: list[np.ndarray]
    """uint8 (H, W, 3) each."""
    references: References
    """(1, N_i, C) latents of each."""


def encoded(k2: K2, images: Sequence[np.ndarray]) -> Encoded:
    latents: list[Tensor] = []
    grids: list[tuple[int, int]] = []
    for image in images:
        # One at a time, as sizes differ. Copied, since the arrays of PIL cannot be written to, which torch warns of.
        pixels = torch.from_numpy(image.copy())[None]
        latents.append(k2.encode_images(pixels).to(k2.device))
        grids.append(k2.grid(*image.shape[:2]))
    return Encoded([*images], References(tuple(latents), tuple(grids)))


def read(k2: K2, own: Sequence[Named], longest: int) -> Encoded:
    """Raises UserError for an image that is refused."""
    if not 0 < len(own) <= MOST:
        raise UserError(f"references: {counted(len(own), 'image')}; give 1 to {MOST}")
    images = []
    for one in own:
        try:
            image = read_image(one.path)
        except (ValueError, OSError) as error:
            raise UserError(f"references: {error}") from None
        images.append(scaled(image, longest, k2.pixel_multiple, f"references: {one.path}"))
    return encoded(k2, images)


class Drawer:
    """Draws each prompt of an evaluation with its own references; those without any as ever."""

    def __init__(
        self,
        k2: K2,
        own: Sequence[Encoded | None],
        strengths: Sequence[tuple[float, ...]],
        size: tuple[int, int],
        how: How = "attention",
        null: Null = "none",
    ):
        """Of each prompt its references and strengths. Raises UserError for strengths that `how` does not take."""
        self.k2, self.own, self.strengths = k2, own, strengths
        self.size = size
        self.how: How = how
        self.null: Null = null
        for one, values in zip(own, strengths, strict=True):
            check_strengths(values, how, 0 if one is None else len(one.images))

    @staticmethod
    def of(k2: K2, named: Sequence[Sequence[Named]], size: tuple[int, int], longest: int | None = None,
           how: How = "attention", null: Null = "none") -> Drawer:  # fmt: skip
        """Reads the images that are named, at most `longest` pixels a side; None: those of the image, up to LONGEST."""
        longest = longest or min(LONGEST, max(size))
        own: list[Encoded | None] = []
        strengths: list[tuple[float, ...]] = []
        for part in named:
            own.append(read(k2, part, longest) if part else None)
            strengths.append(tuple(one.strength for one in part))
        return Drawer(k2, own, strengths, size, how, null)

    def preview(self, row: int, height: int, width: int) -> np.ndarray:
        """The first reference of a prompt at that size; grey where it has none."""
        one = self.own[row]
        if one is None:
            return np.full((height, width, 3), 128, np.uint8)
        return np.asarray(Image.fromarray(one.images[0]).resize((width, height)))

    def at(self, strength: float) -> Drawer:
        """The same with all references at one strength: by attention within 0 to 1, on the velocity beyond."""
        how: How = self.how if 0 <= strength <= 1 else "velocity"
        strengths = [(strength,) * len(own) for own in self.strengths]
        return Drawer(self.k2, self.own, strengths, self.size, how, self.null)

    def __call__(
        self, rows: Sequence[int], text: Text, noise: Tensor, settings: SamplingSettings, null: Text | None
    ) -> Tensor:
        """As `evaluate.Draw`: latents (B, N, C)."""
        # One forward takes images whose references have the same sizes and strengths, so these are drawn together.
        alike: dict[Any, list[int]] = {}
        for place, row in enumerate(rows):
            one = self.own[row]
            key = None if one is None else (one.references.grids, self.strengths[row])
            alike.setdefault(key, []).append(place)
        found: dict[int, Tensor] = {}
        for key, places in alike.items():
            chosen = torch.tensor(places, device=text.tokens.device)
            # A text of one prompt serves any number of images.
            part, words = noise[places], text if len(text) == 1 else text.rows(chosen)
            if key is None:
                drawn = self.k2.sample(
                    words, part, settings.steps, *self.size, settings.guidance, null, settings.mu
                )  # fmt: skip
            else:
                shown = Shown(self._joined([rows[place] for place in places]), key[1], self.how, self.null)
                drawn = draw(
                    self.k2, words, part, settings.steps, *self.size, shown, settings.guidance, null, settings.mu
                )  # fmt: skip
            found |= dict(zip(places, drawn))
        return torch.stack([found[place] for place in range(len(rows))])

    def _joined(self, rows: Sequence[int]) -> References:
        """One batch of the references of prompts that have as many, of the same sizes."""
        parts: list[References] = []
        for row in rows:
            one = self.own[row]
            assert one is not None
            parts.append(one.references)
        first = parts[0]
        if all(part is first for part in parts):
            return first  # kept once for all images
        columns = zip(*[part.latents for part in parts])
        return replace(first, latents=tuple(map(torch.cat, columns)))
