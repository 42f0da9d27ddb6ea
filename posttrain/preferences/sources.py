"""Fields of a row of a set of pairs, and counting of bad rows. Where rows come from is in prompts/tables.py."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from posttrain import image_reader
from posttrain.errors import UserError, counted
from posttrain.preferences.config import ColumnMap
from prompts.parse import parse_json

# ---- bad rows and ties -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Skipped:
    """A row that is left out."""

    where: str
    reason: str
    tie: bool = False
    """The row is valid, but neither image is preferred."""


@dataclass
class Tally:
    """Counts the rows of a set of pairs or of images that are left out."""

    path: str
    rows: int
    """All rows of the set."""
    max_bad: float
    bad: list[Skipped] = field(default_factory=list)
    ties: int = 0
    noun: str = "pair"
    """What a row is."""

    def add(self, row: Skipped) -> None:
        """Raises UserError, with the first reasons, if there are too many bad rows, or if no pair is left."""
        if row.tie:
            self.ties += 1
        else:
            self.bad.append(row)
        # Checked at each row, so that a set with wrong columns fails at once and not after hours of encoding.
        if len(self.bad) > self.max_bad * self.rows:
            raise UserError(
                f"{self.path}: more than {self.max_bad:g} of {counted(self.rows, 'row')} are bad (max_bad):"
                f" {self.first()}; fix them or raise max_bad"
            )
        if len(self.bad) + self.ties == self.rows:
            reasons = f"; {self.first()}" if self.bad else ""
            what = "ties or bad" if self.noun == "pair" else "bad"
            raise UserError(
                f"{self.path}: no {self.noun} to learn from: {counted(self.rows, 'row')}, all {what}{reasons}"
            )

    def first(self) -> str:
        """The first bad rows with their reasons."""
        reasons = [f"{row.where}: {row.reason}" for row in self.bad[:3]]
        return "; ".join(reasons) + ("; ..." if len(self.bad) > 3 else "")


# ---- fields of a row: ValueError with the reason for a bad one ------------------------------------------------


class Tie(Exception):
    """Neither image is preferred."""


def read_image(name: str, value: Any, folder: Path) -> Image.Image:
    """The image, as image_reader.py reads it, from a path, the bytes of a file, or {bytes, path} of `datasets`."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if value is None or value == "":
        raise ValueError(f"{name}: no image")
    if not isinstance(value, str | bytes):
        raise ValueError(f"{name}: is a {type(value).__name__}, neither a path nor an image")
    if isinstance(value, str) and value.startswith(("data:", "http://", "https://")):
        raise ValueError(f"{name}: is a URL, which is not fetched; write the images into files")
    try:
        # As bytes: a message about a row names its file and line, and the column.
        return image_reader.read_image((folder / value).read_bytes() if isinstance(value, str) else value)
    except FileNotFoundError:
        raise ValueError(f"{name}: {value} is missing") from None
    except OSError as error:
        raise ValueError(f"{name}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def preferred(row: Mapping[str, Any], c: ColumnMap) -> float:
    """Share of preference for the first image, in [0, 1], from its label. Raises Tie if the labels are equal."""
    assert c.label is not None
    label = row.get(c.label)
    labels = label if isinstance(label, list) else [label]
    if c.label_second and not isinstance(label, list):
        labels = [label, row.get(c.label_second)]
    labels = list(map(_from_text, labels))
    votes = [float(v) for v in labels if isinstance(v, int | float) and math.isfinite(v) and v >= 0]
    # One label is a share; two are votes or scores of any size.
    if len(votes) != len(labels) or len(votes) not in (1, 2) or (len(votes) == 1 and votes[0] > 1):
        raise ValueError(f"{c.label}: is {label!r}, no share of preference")
    if len(votes) == 1:
        return votes[0]
    if votes[0] == votes[1]:
        raise Tie
    return votes[0] / sum(votes)


def number(row: Mapping[str, Any], name: str | None) -> float | None:
    """A number or null; None without a column."""
    value = None if name is None else _from_text(row.get(name))
    # In Python a bool is an int.
    if value is not None and (not isinstance(value, int | float) or isinstance(value, bool)):
        raise ValueError(f"{name}: is {value!r}, no number")
    return None if value is None else float(value)


def typed(name: str, value: Any) -> Any:
    """The value of a column of this project's sets, from text where it is neither a text nor null."""
    return _from_text(value) if name in ("seed", "chosen_on_policy", "rejected_on_policy") else value


def _from_text(value: Any) -> Any:
    """The number or boolean that a text says, as all cells of CSV are text; any other value as it is."""
    if not isinstance(value, str):
        return value
    try:
        parsed = parse_json(value.strip().lower())  # Python writes True and False, JSON true and false
    except ValueError:
        return value
    return parsed if isinstance(parsed, int | float) else value
