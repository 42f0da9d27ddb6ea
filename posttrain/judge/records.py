"""The training data of a judge: pairs from a preference set or JSONL, or images with and without faults.

Every image is read once at the start, so that a bad one is reported before a model is loaded. Images are not kept in
memory: training reads them again when it needs them.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import DataLoader, Dataset

from posttrain.errors import UserError, counted
from posttrain.image_reader import SUFFIXES, read_image
from posttrain.judge.config import JudgeConfig
from posttrain.log import log
from posttrain.preferences.dataset import Preference, Preferences, read_preferences
from posttrain.preferences.heldout import in_share
from posttrain.preferences.sources import Skipped
from posttrain.runs.progress import reading
from prompts.parse import parse_json
from prompts.tables import is_lines
from prompts.templates import Template

MARKS = "artifacts.jsonl"
"""File name of the records for mode artifact in a directory."""
SMALLEST, MOST_UNLIKE = 4, 200
"""Pixels of a side, and the largest ratio of sides, which is Qwen3-VL's."""
UNKNOWN = "unknown"
"""Policy of an image whose origin is not recorded."""


@dataclass(frozen=True)
class Files:
    """The images of a record, as image files."""

    paths: tuple[Path, ...]
    where: str
    """File and line, for messages."""

    def read(self) -> list[Image.Image]:
        """The images in RGB. Raises UserError for one that cannot be read."""
        images = []
        for path in self.paths:
            try:
                images.append(read_image(path.read_bytes()))  # the path is added below
                _check_shape(images[-1])
            except OSError as error:
                raise UserError(f"{self.where}: {path}: cannot be read: {error.strerror}; fix or remove it") from None
            except ValueError as error:
                raise UserError(f"{self.where}: {path}: {error}; fix or remove it") from None
        return images


def _check_shape(image: Image.Image) -> None:
    """Raises ValueError for an image on which the processor or a corruption would fail in the middle of a run."""
    if min(image.size) < SMALLEST or max(image.size) > MOST_UNLIKE * min(image.size):
        width, height = image.size
        raise ValueError(
            f"is {height}x{width} pixels, and a judge needs {SMALLEST} or more and no side over {MOST_UNLIKE} times"
            " the other"
        )


@dataclass(frozen=True)
class Row:
    """The two images of a row of a preference set."""

    preferences: Preferences
    row: int

    def read(self) -> list[Image.Image]:
        """Chosen and rejected, in RGB. Raises UserError if the row has become unreadable since the start."""
        pair = self.preferences[self.row]
        if isinstance(pair, Skipped):
            raise UserError(f"{pair.where}: {pair.reason}; restore {self.preferences.path} as it was at the start")
        return [pair.chosen, pair.rejected]


@dataclass
class Record:
    """One image, or a pair with the preferred one first."""

    images: Files | Row
    share: float
    """Share of votes for the first image (preference) or for a fault (artifact), in [0, 1]."""
    key: str
    """Identifies the images independently of the data's location: a pair's id, or the files' names and sizes."""
    prompt: str | None = None
    sources: tuple[str, ...] = ()
    """Generators of the images and, in a preference set, the kind of choice (human or synthetic); sorted."""
    chance: float | None = None
    """For simulated choices: the probability of this choice. Used only for the noise ceiling."""
    corrupt: bool = False
    """Whether a fault is added to the image when it is read for training."""

    @property
    def group(self) -> str:
        """Records of one group are on the same side of the held-out split."""
        return self.prompt if self.prompt is not None else self.key


def read_records(config: JudgeConfig) -> list[Record]:
    """All records of `config.data`. Raises UserError with the file and line, or row, of a bad one.

    In a preference set, bad rows are left out with a warning if their share is at most `max_bad`.
    """
    path = Path(config.data)
    if config.mode == "artifact" and path.is_dir() and not (path / MARKS).is_file():
        records = _good_images(path)
    elif config.mode == "artifact":
        records = _lines(path / MARKS if path.is_dir() else path, config.mode)
    elif config.columns is None and path.is_file() and is_lines(path):
        records = _lines(path, config.mode)
    else:
        return _pairs(read_preferences(config.data, config.columns, config.max_bad), config.workers)
    # A corrupted record has the file of a good one, which is read anyway.
    images = [r.images for r in records if not r.corrupt]
    for problem in _read_once(images, _problem, config.workers):
        if problem is not None:
            raise UserError(problem)
    return records


def fingerprint(records: Sequence[Record]) -> str:
    """A hash of the records and their order, which does not change when the data move to another place."""
    digest = hashlib.sha256()
    for r in records:
        fields = (r.key, r.share, r.prompt, r.sources, r.corrupt)
        digest.update(f"{fields!r}\n".encode())
    return digest.hexdigest()[:32]


def check_prompts(records: Sequence[Record], template: Template, path: str) -> None:
    if template.fields - {"prompt"}:
        raise UserError(f"template {template.name}: a judge's question may use $prompt and no other field")
    if template.fields and any(r.prompt is None for r in records):
        raise UserError(f"data: {path}: template {template.name} asks about $prompt, but a record has no prompt")


def split(records: Sequence[Record], config: JudgeConfig) -> tuple[list[Record], list[Record]]:
    """(training, held out) records.

    The hash of the prompt decides, so that all records of a prompt are on one side; and all records of a generator in
    `heldout_sources` are held out.
    """
    heldout_sources = set(config.heldout_sources)
    known: set[str] = set()
    training, heldout = [], []
    for record in records:
        known.update(record.sources)
        by_source = not heldout_sources.isdisjoint(record.sources)
        by_hash = in_share(f"{config.seed}:{record.group}", config.heldout)
        (heldout if by_source or by_hash else training).append(record)
    if missing := heldout_sources - known:
        raise UserError(
            f"heldout_sources: no record is from {sorted(missing)[0]}; the sources are"
            f" {', '.join(sorted(known)) or 'none'}"
        )
    if not training or not heldout:
        raise UserError(
            f"data: {config.data}: {counted(len(training), 'record')} to train on and {len(heldout)} held out; "
            "give more prompts or change heldout"
        )
    return training, heldout


# ---- a preference set -------------------------------------------------------------------------------------


def _pairs(preferences: Preferences, workers: int) -> list[Record]:
    records: list[Record] = []
    seen: set[str] = set()
    tally = preferences.tally()
    rows = range(len(preferences))
    for i, facts in enumerate(_read_once(rows, functools.partial(_facts, preferences), workers)):
        if isinstance(facts, Skipped):
            tally.add(facts)
            continue
        key, prompt, share, sources = facts
        if key not in seen:  # a set may hold a pair several times, one row for each vote
            records.append(Record(Row(preferences, i), share, key, prompt, sources))
            seen.add(key)
    repeated = len(rows) - len(records) - len(tally.bad) - tally.ties
    left_out = {"bad": len(tally.bad), "ties": tally.ties, "repeated": repeated}
    if any(left_out.values()):
        counts = ", ".join(f"{count} {name}" for name, count in left_out.items() if count)
        reasons = f": {tally.first()}" if tally.bad else ""
        log.warning(f"{preferences.path}: rows left out: {counts}{reasons}")
    return records


def _facts(preferences: Preferences, row: int) -> Skipped | tuple[str, str, float, tuple[str, ...]]:
    """(id, prompt, share, sources) of a row, without its images."""
    pair = preferences[row]
    if not isinstance(pair, Preference):
        return pair
    try:
        _check_shape(pair.chosen)
    except ValueError as error:
        return Skipped(preferences.name(row), f"an image {error}")
    drawn_by = {pair.chosen_policy, pair.rejected_policy} - {UNKNOWN}
    return pair.id, pair.prompt, pair.share, tuple(sorted({pair.source, *drawn_by}))


# ---- JSONL, or a directory of images ----------------------------------------------------------------------


def _good_images(folder: Path) -> list[Record]:
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)
    if not files:
        raise UserError(f"data: {folder} contains no {MARKS} and no image ({', '.join(SUFFIXES)})")
    records = []
    for file in files:
        key = _key([file], folder)
        # Each good image is shown as it is and with a fault, so that the judge learns the fault, not the subject.
        for corrupt in (False, True):
            records.append(Record(Files((file,), "data"), float(corrupt), key, corrupt=corrupt))
    return records


def _lines(path: Path, mode: str) -> list[Record]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # not splitlines, which also splits at U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data: {path} cannot be read as a JSONL file: {error}") from None
    records = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            records.append(_record(line, f"{path}:{number}", path.parent, mode))
    if not records:
        raise UserError(f"data: {path} contains no record; write one JSON object a line")
    return records


def _record(line: str, where: str, root: Path, mode: str) -> Record:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: is not a JSON object")
    if "annotations" in row:
        raise UserError(f"{where}: is a store of posttrain annotate; give the --output of posttrain annotations")
    paths = []
    for name in ("chosen", "rejected") if mode == "preference" else ("image",):
        if not isinstance(row.get(name), str):
            raise UserError(f"{where}: {name}: missing; write the path of an image file")
        paths.append(root / row[name])
        if not os.path.isfile(paths[-1]):  # not Path.is_file, which raises for names that no file can have
            raise UserError(f"{where}: {name}: {row[name]} cannot be read as an image (no such file)")
    share = _unit(row, "share" if mode == "preference" else "fault", where)
    if share is None:
        if mode == "artifact":
            raise UserError(f"{where}: fault: missing; write true, false or the share of people who saw one")
        share = 1.0
    for name in ("prompt", "source", "chosen_policy", "rejected_policy"):
        if not isinstance(row.get(name), str | None):
            raise UserError(f"{where}: {name}: is not text; put it in quotes")
    given = [row[name] for name in ("source", "chosen_policy", "rejected_policy") if row.get(name) is not None]
    sources = set(given) - {UNKNOWN}
    chance = _unit(row, "chance", where)
    files = Files(tuple(paths), where)
    return Record(files, share, _key(paths, root), row.get("prompt"), tuple(sorted(sources)), chance)


def _unit(row: dict, name: str, where: str) -> float | None:
    """A number in [0, 1], or true or false; None if it is missing."""
    value = row.get(name)
    if value is not None and not (isinstance(value, int | float) and 0 <= value <= 1):
        raise UserError(f"{where}: {name}: is {value!r}; use a number from 0 to 1")
    return None if value is None else float(value)


def _key(paths: Sequence[Path], root: Path) -> str:
    return " ".join(f"{os.path.relpath(path, root)} {path.stat().st_size}" for path in paths)


# ---- reading once -----------------------------------------------------------------------------------------


@dataclass
class _Read(Dataset):
    """What `read` gives for each part."""

    parts: Sequence[Any]
    read: Callable[[Any], Any]

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, i: int) -> Any:
        return self.read(self.parts[i])


def _problem(images: Files) -> str | None:
    """Why the images of a record cannot be read; None if they can."""
    try:
        images.read()
    except UserError as error:  # raised in a worker, it would arrive with that worker's traceback
        return str(error)
    return None


def _read_once(parts: Sequence[Any], read: Callable[[Any], Any], workers: int) -> Any:
    """What `read` gives for each part, in their order; `workers` processes share the reading."""
    # DataLoader's own function would turn a record's tuples into lists. Not a lambda: spawned workers get it by name.
    loader = DataLoader(_Read(parts, read), batch_size=None, num_workers=workers, collate_fn=_unchanged)
    return reading(loader, "images", len(parts))


def _unchanged(row: Any) -> Any:
    return row
