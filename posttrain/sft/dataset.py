"""A set of images with captions, whatever it is stored as: rows by number, or the reason why one is bad."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from posttrain.errors import UserError
from posttrain.preferences.sources import Tally, read_image
from posttrain.sft.config import ImageSetConfig
from posttrain.sft.sources import open_source


@dataclass(frozen=True)
class Caption:
    """One caption of an image, and how often it is taken, relative to the others."""

    text: str
    weight: float


@dataclass(frozen=True)
class Example:
    """A row that can be trained on."""

    image: Image.Image
    captions: list[Caption]

    def digest(self) -> int:
        """63 bits of a hash of the pixels: another compression is the same image."""
        # One bit less than there are, as numpy's int64 has a sign.
        pixels = repr(self.image.size).encode() + self.image.tobytes()
        return int.from_bytes(hashlib.blake2b(pixels, digest_size=8).digest(), "big") >> 1


class ImageSet:
    """The rows of a set, bad ones included."""

    def __init__(self, config: ImageSetConfig):
        """Raises UserError for a set that is missing, empty or without the columns that are asked for."""
        self.path, self.config = config.train, config
        self._source = open_source(config.train)
        if not len(self._source):
            raise UserError(f"{self.path}: holds no image")
        # Columns of the file, not of each row: a cell that is empty makes its row a bad one, and is counted as such.
        known = self._source.columns
        for key, names in self.asked().items():
            for name in names:
                if name not in known:
                    raise UserError(
                        f"images.columns.{key}: '{name}' is no column of {self.path}; it has: {', '.join(known)}"
                    )

    def asked(self) -> dict[str, list[str]]:
        """By setting of `images.columns`, the columns that the set must have."""
        columns = self.config.columns
        return {"image": [columns.image], "captions": list(columns.captions)}

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, i: int) -> Example:
        """Raises ValueError with the reason for a bad row."""
        row = self._source[i]
        captions = self._captions(row)
        # The image last: decoding it takes longer than all other checks.
        name = self.config.columns.image
        return Example(read_image(name, row.get(name), self._source.folder), captions)

    def captions(self, i: int) -> list[Caption]:
        """Those of a row without its image. Raises ValueError as above."""
        return self._captions(self._source[i])

    def name(self, i: int) -> str:
        """The place of a row, for messages."""
        return self._source.name(i)

    def tally(self) -> Tally:
        return Tally(self.path, len(self), self.config.max_bad, noun="image")

    def fingerprint(self) -> str:
        """Changes when the set or the columns that are read do."""
        columns = self.config.columns
        return hashlib.sha256(f"{self._source.fingerprint([columns.image])} {columns!r}".encode()).hexdigest()

    def _captions(self, row: Mapping[str, Any]) -> list[Caption]:
        captions: list[Caption] = []
        problems = []
        for name, weight in self.config.columns.captions.items():
            texts = _texts(name, row.get(name))
            if not texts:
                problems.append(f"{name}: is {'missing' if row.get(name) is None else 'empty'}")
            # A cell with several captions weighs as much as one with a single caption.
            captions += [Caption(text, weight / len(texts)) for text in texts]
        if not captions:
            raise ValueError("; ".join(problems))
        return captions


def _texts(name: str, value: Any) -> list[str]:
    """The captions in a cell, which is a text or a list of texts, without empty ones."""
    cell = [] if value is None else value
    texts: list[str] = []
    for text in cell if isinstance(cell, list) else [cell]:
        if not isinstance(text, str):
            raise ValueError(f"{name}: is neither text nor a list of texts")
        if text.strip():
            texts.append(text.strip())
    return texts
