"""Sources of preference pairs: JSONL, parquet files, a dataset; reading the fields of a row, and counting bad rows.

Rows are read by number, and none stays in memory. Each source has `len`, `source[i]` (a row as a dict; ValueError with
the reason if it cannot be read), `name(i)` for messages, `columns`, `folder`, to which paths of images are relative,
and `fingerprint`, which changes with the content; of files it hashes names, sizes and modification times.
"""

from __future__ import annotations

import bisect
import hashlib
import math
import os
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.exceptions import DatasetsError
from PIL import Image

from posttrain import images
from posttrain.errors import UserError
from posttrain.preferences.config import ColumnMap
from prompts.parse import parse_json


class JsonLines:
    """One object a line; images are paths."""

    def __init__(self, path: Path):
        self.path, self.folder = path, path.parent
        # Where each row begins in the file, and its line number: 16 bytes a row, so millions of rows fit.
        self._starts, self._lines = array("q"), array("q")
        place = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    self._starts.append(place)
                    self._lines.append(number)
                place += len(line)
        try:
            self.columns = list(self[0]) if len(self) else []
        except ValueError as error:
            raise UserError(f"{self.name(0)}: {error}; write one object a line") from None

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, i: int) -> dict[str, Any]:
        with self.path.open("rb") as file:
            file.seek(self._starts[i])
            line = file.readline()
        row = parse_json(line)
        if not isinstance(row, dict):
            raise ValueError("is not an object")
        return row

    def name(self, i: int) -> str:
        return f"{self.path}:{self._lines[i]}"

    def fingerprint(self, images: Sequence[str]) -> str:
        """Of the file and of the files that the columns `images` name."""
        digest = hashlib.sha256(_stamp([self.path]).encode())
        for i in range(len(self)):
            try:
                row = self[i]
            except ValueError:
                continue
            files: list[Path] = []
            for name in images:
                value = row.get(name)
                paths = value if isinstance(value, list) else [value]
                files += [self.folder / path for path in paths if isinstance(path, str)]
            digest.update(_stamp([file for file in files if os.path.isfile(file)]).encode())
        return digest.hexdigest()


class Parquet:
    """Parquet files as one table. The last row group that was read stays in memory."""

    def __init__(self, folder: Path, files: Sequence[Path], fingerprint: str | None = None):
        self.folder, self.files = folder, list(files)
        self._groups: list[tuple[int, int]] = []
        """(index of the file, index of the row group in it)"""
        self._starts, self._firsts = [0], [0]
        """The first row of each row group and of each file; the last entry is the number of all rows."""
        for index, file in enumerate(self.files):
            try:
                meta = pq.read_metadata(file)
            except (OSError, ValueError) as error:
                raise UserError(f"{file}: is not a whole parquet file: {error}; copy or make it again") from None
            for group in range(meta.num_row_groups):
                self._groups.append((index, group))
                self._starts.append(self._starts[-1] + meta.row_group(group).num_rows)
            self._firsts.append(self._starts[-1])
        self.columns = pq.read_schema(self.files[0]).names
        self._cached: tuple[int, pa.Table] | None = None
        self._fingerprint = fingerprint

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, i: int) -> dict[str, Any]:
        # Rows are mostly read in order, and a row group can only be read whole.
        g = bisect.bisect_right(self._starts, i) - 1
        if self._cached is None or self._cached[0] != g:
            file, group = self._groups[g]
            try:
                self._cached = g, pq.ParquetFile(self.files[file]).read_row_group(group)
            except (OSError, ValueError) as error:
                raise ValueError(f"cannot be read: {error}") from None
        return self._cached[1].slice(i - self._starts[g], 1).to_pylist()[0]

    def name(self, i: int) -> str:
        file = bisect.bisect_right(self._firsts, i) - 1
        return f"{self.files[file]} row {i - self._firsts[file]}"

    def fingerprint(self, images: Sequence[str]) -> str:
        return self._fingerprint or _stamp(self.files)


class HubDataset:
    """A dataset that the `datasets` library has loaded."""

    def __init__(self, name: str, rows: datasets.Dataset):
        self._fingerprint = rows._fingerprint
        # Images stay encoded, so that a damaged one is a bad row instead of an exception of the library.
        for column, feature in rows.features.items():
            if isinstance(feature, datasets.Image):
                rows = rows.cast_column(column, datasets.Image(decode=False))
            elif isinstance(feature, datasets.List) and isinstance(feature.feature, datasets.Image):
                rows = rows.cast_column(column, datasets.List(datasets.Image(decode=False)))
        self._name, self._rows = name, rows
        self.folder, self.columns = Path(), rows.column_names

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self._rows[i]

    def name(self, i: int) -> str:
        return f"{self._name} row {i}"

    def fingerprint(self, images: Sequence[str]) -> str:
        return self._fingerprint


Source = JsonLines | Parquet | HubDataset


def open_source(path: str) -> Source:
    """JSONL, a parquet file or a directory of them, a directory of `save_to_disk`, or hf:NAME[:SPLIT]."""
    if path.startswith("hf:"):
        name, _, split = path.removeprefix("hf:").partition(":")
        if not name:
            raise UserError(f"{path}: names no dataset; write it as hf:NAME or hf:NAME:SPLIT")
        try:
            return HubDataset(path, datasets.load_dataset(name, split=split or "train"))
        except (OSError, ValueError, DatasetsError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{path}: cannot be loaded: {reason}; write it as hf:NAME or hf:NAME:SPLIT") from None
    place = Path(path)
    if os.path.isfile(path):  # not Path.is_file, which raises for names that no file can have
        try:
            return Parquet(place.parent, [place]) if place.suffix == ".parquet" else JsonLines(place)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if not os.path.isdir(path):
        raise UserError(f"{path}: no such file or directory; give pairs as a directory, a JSONL file or hf:NAME")
    if (place / "state.json").is_file():  # what `save_to_disk` writes
        try:
            loaded = datasets.load_from_disk(path)
        except (OSError, ValueError, DatasetsError) as error:
            raise UserError(f"{path}: cannot be loaded: {' '.join(str(error).split())}") from None
        assert isinstance(loaded, datasets.Dataset)
        return HubDataset(path, loaded)
    if files := sorted(place.glob("**/*.parquet")):
        return Parquet(place, files)
    raise UserError(f"{path}: holds no parquet file and no dataset; give a directory of pairs")


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
    """Counts the rows of a set that are left out."""

    path: str
    rows: int
    """All rows of the set."""
    max_bad: float
    bad: list[Skipped] = field(default_factory=list)
    ties: int = 0

    def add(self, row: Skipped) -> None:
        """Raises UserError, with the first reasons, if there are too many bad rows, or if no pair is left."""
        if row.tie:
            self.ties += 1
        else:
            self.bad.append(row)
        # Checked at each row, so that a set with wrong columns fails at once and not after hours of encoding.
        if len(self.bad) > self.max_bad * self.rows:
            raise UserError(
                f"{self.path}: more than {self.max_bad:g} of {self.rows} rows (max_bad) are bad: {self.first()};"
                " mend them or raise max_bad"
            )
        if len(self.bad) + self.ties == self.rows:
            reasons = f"; {self.first()}" if self.bad else ""
            raise UserError(f"{self.path}: no pair to learn from: all {self.rows} rows are ties or bad{reasons}")

    def first(self) -> str:
        """The first bad rows with their reasons."""
        reasons = [f"{row.where}: {row.reason}" for row in self.bad[:3]]
        return "; ".join(reasons) + ("; ..." if len(self.bad) > 3 else "")


# ---- fields of a row: ValueError with the reason for a bad one ------------------------------------------------


class Tie(Exception):
    """Neither image is preferred."""


def read_image(name: str, value: Any, folder: Path) -> Image.Image:
    """The image, as posttrain/images.py reads it, from a path, the bytes of a file, or {bytes, path} of `datasets`."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if value is None or value == "":
        raise ValueError(f"{name}: no image")
    if not isinstance(value, str | bytes):
        raise ValueError(f"{name}: is a {type(value).__name__}, neither a path nor an image")
    try:
        return images.read_image(folder / value if isinstance(value, str) else value)
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
    value = None if name is None else row.get(name)
    # In Python a bool is an int.
    if value is not None and (not isinstance(value, int | float) or isinstance(value, bool)):
        raise ValueError(f"{name}: is {value!r}, no number")
    return None if value is None else float(value)


def _stamp(files: Sequence[Path]) -> str:
    """A hash of names, sizes and modification times: hashing the images of a large set would take hours."""
    facts = []
    for file in files:
        status = file.stat()
        facts.append(f"{file.name} {status.st_size} {status.st_mtime_ns}")
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()
