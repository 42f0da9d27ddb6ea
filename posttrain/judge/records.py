"""What a judge is trained on: pairs of a preference set or of JSONL, or images with and without faults.

Every image is read once at the start, so that a bad one is named before a model is loaded. None is held in memory:
training reads an image again when it needs it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.progress import track
from torch.utils.data import DataLoader, Dataset

from posttrain.errors import UserError
from posttrain.judge.config import JudgeConfig
from posttrain.log import log
from posttrain.preferences.dataset import Preference, Preferences, read_preferences
from posttrain.preferences.sources import Skipped
from prompts.parse import parse_json
from prompts.templates import Template

IMAGES = (".png", ".jpg", ".jpeg", ".webp")
MARKS = "artifacts.jsonl"
"""In a directory: its records for mode artifact."""
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Files:
    """Images in files of their own."""

    paths: tuple[Path, ...]
    where: str
    """For messages."""

    def read(self) -> list[Image.Image]:
        """In RGB. Raises UserError for one that cannot be read."""
        images = []
        for path in self.paths:
            try:
                with Image.open(path) as image:
                    images.append(image.convert("RGB"))
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                name = type(error).__name__
                raise UserError(
                    f"{self.where}: {path} is no image that can be read ({name}); mend or drop it"
                ) from None
        return images


@dataclass(frozen=True)
class Row:
    """The two images of a row of a preference set."""

    preferences: Preferences
    row: int

    def read(self) -> list[Image.Image]:
        """Chosen and rejected, in RGB. Raises UserError if the row has gone bad since the start."""
        pair = self.preferences[self.row]
        if isinstance(pair, Skipped):
            raise UserError(f"{pair.where}: {pair.reason}; restore {self.preferences.path} as it was at the start")
        return [pair.chosen, pair.rejected]


@dataclass
class Record:
    """One image, or a pair with the preferred one first."""

    images: Files | Row
    share: float
    """Of votes for the first image (preference) or for a fault (artifact), in [0, 1]."""
    key: str
    """Names the images, wherever the data lie: the id of a pair, or the files' names and sizes."""
    prompt: str | None = None
    sources: tuple[str, ...] = ()
    """Who drew the images, and, of a preference set, who preferred: human or synthetic. Each once, sorted."""
    chance: float | None = None
    """Where choices are simulated: how probable this one was. Only for the noise ceiling."""
    corrupt: bool = False
    """The image is corrupted when it is read."""

    @property
    def group(self) -> str:
        """Records of one group are on one side of the held-out split."""
        return self.prompt if self.prompt is not None else self.key


def read_records(config: JudgeConfig) -> list[Record]:
    """All records of `config.data`. Raises UserError with the file and line, or row, of a bad one; of a preference set
    only if more than the share `max_bad` is bad, and else warns of those left out."""
    path = Path(config.data)
    if config.mode == "artifact" and path.is_dir() and not (path / MARKS).is_file():
        records = _good_images(path)
    elif config.mode == "artifact":
        records = _lines(path / MARKS if path.is_dir() else path, config.mode)
    elif config.columns is None and path.is_file() and path.suffix != ".parquet":
        records = _lines(path, config.mode)
    else:
        return _pairs(read_preferences(config.data, config.columns, config.max_bad), config.workers)
    for problem in _read_once([r.images for r in records if not r.corrupt], config.workers):
        if problem is not None:
            raise UserError(problem)
    return records


def fingerprint(records: Sequence[Record]) -> str:
    """Changes when a record does, or their order; not when the data are moved elsewhere."""
    digest = hashlib.sha256()
    for r in records:
        digest.update(f"{(r.key, r.share, r.prompt, r.sources, r.corrupt)!r}\n".encode())
    return digest.hexdigest()[:32]


def check_prompts(records: Sequence[Record], template: Template, path: str) -> None:
    if template.fields - {"prompt"}:
        raise UserError(f"template {template.name}: a judge's question may hold $prompt and no other field")
    if template.fields and any(r.prompt is None for r in records):
        raise UserError(f"data: {path}: template {template.name} asks about $prompt, but a record has no prompt")


def split(records: Sequence[Record], config: JudgeConfig) -> tuple[list[Record], list[Record]]:
    """(training, held out): by the hash of the prompt, so that a prompt is on one side; and by generator."""

    def kept_back(record: Record) -> bool:
        digest = hashlib.sha256(f"{config.seed}:{record.group}".encode()).digest()
        return int.from_bytes(digest[:8], "big") < config.heldout * 2**64

    known = {source for r in records for source in r.sources}
    foreign = set(config.heldout_sources)
    if missing := foreign - known:
        raise UserError(
            f"heldout_sources: no record is from {sorted(missing)[0]}; the data have: {', '.join(sorted(known)) or '-'}"
        )
    training = [r for r in records if not kept_back(r) and foreign.isdisjoint(r.sources)]
    heldout = [r for r in records if kept_back(r) or not foreign.isdisjoint(r.sources)]
    if not training or not heldout:
        raise UserError(
            f"data: {config.data}: {len(training)} records to train on and {len(heldout)} held out; "
            "give more prompts or change heldout"
        )
    return training, heldout


# ---- a preference set -------------------------------------------------------------------------------------


def _pairs(preferences: Preferences, workers: int) -> list[Record]:
    records: list[Record] = []
    seen: set[str] = set()
    tally = preferences.tally()
    rows = [_Facts(preferences, i) for i in range(len(preferences))]
    for i, facts in enumerate(_read_once(rows, workers)):
        if isinstance(facts, Skipped):
            tally.add(facts)
            continue
        key, prompt, share, sources = facts
        if key not in seen:
            records.append(Record(Row(preferences, i), share, key, prompt, sources))
            seen.add(key)
    repeated = len(rows) - len(records) - len(tally.bad) - tally.ties
    left_out = {"bad": len(tally.bad), "ties": tally.ties, "repeated": repeated}
    if any(left_out.values()):
        counts = ", ".join(f"{count} {name}" for name, count in left_out.items() if count)
        reasons = f": {tally.first()}" if tally.bad else ""
        log.warning(f"{preferences.path}: rows left out: {counts}{reasons}")
    return records


@dataclass(frozen=True)
class _Facts:
    """What a row is, without its images."""

    preferences: Preferences
    row: int

    def read(self) -> Skipped | tuple[str, str, float, tuple[str, ...]]:
        pair = self.preferences[self.row]
        if not isinstance(pair, Preference):
            return pair
        drawn_by = {pair.chosen_policy, pair.rejected_policy} - {UNKNOWN}
        return pair.id, pair.prompt, pair.share, tuple(sorted({pair.source, *drawn_by}))


# ---- JSONL, or a directory of images ----------------------------------------------------------------------


def _good_images(folder: Path) -> list[Record]:
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGES)
    if not files:
        raise UserError(f"data: {folder} holds no {MARKS} and no image ({', '.join(IMAGES)})")
    return [
        Record(Files((file,), "data"), float(corrupt), _key([file], folder), corrupt=corrupt)
        for file in files
        for corrupt in (False, True)
    ]


def _lines(path: Path, mode: str) -> list[Record]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data: {path} cannot be read as a JSONL file: {error}") from None
    records = [_record(line, f"{path}:{n}", path.parent, mode) for n, line in enumerate(lines, 1) if line.strip()]
    if not records:
        raise UserError(f"data: {path} holds no record; write one JSON object a line")
    return records


def _record(line: str, where: str, root: Path, mode: str) -> Record:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: is not an object")
    if "annotations" in row:
        raise UserError(f"{where}: is a store of posttrain annotate; give the --output of posttrain annotations")
    paths = []
    for name in ("chosen", "rejected") if mode == "preference" else ("image",):
        if not isinstance(row.get(name), str):
            raise UserError(f"{where}: {name}: missing; write the path of an image file")
        paths.append(root / row[name])
        if not os.path.isfile(paths[-1]):  # not Path.is_file, which raises for names that no file can have
            raise UserError(f"{where}: {name}: {row[name]} is no image that can be read (no such file)")
    share = _unit(row, "share" if mode == "preference" else "fault", where)
    if share is None:
        if mode == "artifact":
            raise UserError(f"{where}: fault: missing; write true, false or the share of people who saw one")
        share = 1.0
    for name in ("prompt", "source", "chosen_policy", "rejected_policy"):
        if not isinstance(row.get(name), str | None):
            raise UserError(f"{where}: {name}: is not text; put it in quotes")
    given = [row[name] for name in ("source", "chosen_policy", "rejected_policy") if row.get(name) is not None]
    chance = _unit(row, "chance", where)
    files = Files(tuple(paths), where)
    return Record(files, share, _key(paths, root), row.get("prompt"), tuple(sorted({*given} - {UNKNOWN})), chance)


def _unit(row: dict, name: str, where: str) -> float | None:
    value = row.get(name)
    if value is not None and not (isinstance(value, int | float) and 0 <= value <= 1):
        raise UserError(f"{where}: {name}: is {value!r}; use a number from 0 to 1")
    return None if value is None else float(value)


def _key(paths: Sequence[Path], root: Path) -> str:
    return " ".join(f"{os.path.relpath(path, root)} {path.stat().st_size}" for path in paths)


# ---- reading once -----------------------------------------------------------------------------------------


@dataclass
class _Read(Dataset):
    """What each of `parts` reads; of Files, None or what is wrong with them."""

    parts: Sequence[Files | _Facts]

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, i: int) -> Any:
        part = self.parts[i]
        if isinstance(part, _Facts):
            return part.read()
        try:
            part.read()
        except UserError as error:
            return str(error)
        return None


def _read_once(parts: Sequence[Any], workers: int) -> Any:
    """In the order of `parts`; `workers` processes share the reading."""
    loader = DataLoader(_Read(parts), batch_size=None, num_workers=workers, collate_fn=_as_it_is)
    shown = Console(stderr=True)
    return track(
        loader, "reading images", total=len(parts), console=shown, transient=True, disable=not shown.is_terminal
    )


def _as_it_is(row: Any) -> Any:
    return row
