"""People's answers, stored so that a kill loses nothing and edits are noticed; and the order in which they see items.

A store is a JSONL file that only grows. Its first line holds the settings of the schedule, each other line one
choice, or one choice taken back. A line ends with the hash of itself and the line before it, so a line that was
changed, removed or moved is named; only lines cut off the end leave no trace. No secret enters the hash: it guards
against accidents and careless edits, not against forgery.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from posttrain.errors import UserError
from posttrain.log import log
from posttrain.runs.files import sync

Mode = Literal["preference", "artifact"]
"""preference: which of two images is better; artifact: whether one image has faults."""
Side = Literal["chosen", "rejected"]
Answer = Literal["left", "right", "tie", "faulty", "fine", "unsure", "skip"]
ANSWERS: dict[Mode, tuple[Answer, ...]] = {
    "preference": ("left", "right", "tie", "skip"),
    "artifact": ("faulty", "fine", "unsure", "skip"),
}
SHARES = {"tie": 0.5, "faulty": 1.0, "fine": 0.0, "unsure": 0.5, "skip": None}
VERSION = 1
MIN_GAP, MAX_GAP = 10, 30  # other pairs between a pair and its repeat, where the set is large enough
MAX_CHARACTERS = 64  # of an annotator's name


@dataclass(frozen=True)
class Schedule:
    """What the order of an annotator's pairs follows from, besides the name and the pairs' ids."""

    seed: int
    repeats: float
    """Share of the pairs or images that are shown twice, in [0, 0.5]."""
    mode: Mode = "preference"


@dataclass(frozen=True)
class Showing:
    """A pair or an image as it is put before someone."""

    pair: str
    """Id of the preference record or of the image: a hash of prompt and pixels."""
    again: bool
    """The second time."""
    left: Side | None
    """Which of the record's two images is on the left; None for a single image."""


@dataclass(frozen=True)
class Choice:
    """What someone answered to a showing."""

    annotator: str
    pair: str
    again: bool
    left: Side | None
    choice: Answer
    seconds: float
    """From all images being on the page to the answer."""
    time: str
    """UTC, ISO 8601."""

    @property
    def share(self) -> float | None:
        """How far the record's `chosen` was preferred, or the image called faulty: 1, 0, 0.5 for a tie or unsure, None
        for a skip."""
        if self.choice in SHARES:
            return SHARES[self.choice]
        return float((self.choice == "left") == (self.left == "chosen"))


@dataclass
class Annotations:
    """What a store holds. Choices that were taken back are not in it."""

    schedule: Schedule
    choices: dict[str, list[Choice]] = field(default_factory=dict)
    """Annotator -> choices, in the order they were made."""
    hash: str = ""
    """Hash of the last line."""
    size: int = 0
    """Bytes of whole lines."""

    def items(self) -> set[str]:
        """Ids of all pairs or images that someone answered."""
        ids: set[str] = set()
        for choices in self.choices.values():
            ids.update(choice.pair for choice in choices)
        return ids


def schedule(ids: Sequence[str], annotator: str, settings: Schedule) -> list[Showing]:
    """All showings for one annotator, in order.

    Pairs come in an order of the annotator's own, each on sides of its own. int(repeats * pairs) of them, spread
    evenly, come a second time with the sides swapped, so that who always presses one key contradicts himself each
    time; 10 to 30 other pairs lie between, fewer only in sets of less than 20. All of it follows from hashes of ids:
    the same with any version of any library, and pairs that are added later leave the order of the others alone.
    Single images (mode artifact) have no sides; all else is the same for them.
    """
    order = sorted(ids, key=lambda pair: _draw(settings.seed, annotator, pair))
    shortest = min(MIN_GAP, len(order) // 2)
    # Repeats are spread over the pairs after which there is still room for the shortest gap.
    count, early = int(len(order) * settings.repeats), len(order) - shortest
    repeated = {k * early // count for k in range(count)}
    showings: list[tuple[float, Showing]] = []
    for i, pair in enumerate(order):
        first, second = _sides(settings, annotator, pair)
        showings.append((i, Showing(pair, False, first)))
        if i in repeated:
            longest = min(MAX_GAP, len(order) - 1 - i)
            gap = shortest + _draw(settings.seed, annotator, pair, "gap") % (longest - shortest + 1)
            # Half a place later, so that it comes after the first showing of the pair at that place.
            showings.append((i + gap + 0.5, Showing(pair, True, second)))
    return [showing for _, showing in sorted(showings, key=lambda item: item[0])]


def _sides(settings: Schedule, annotator: str, pair: str) -> tuple[Side | None, Side | None]:
    """Which image is on the left the first and the second time."""
    if settings.mode == "artifact":
        return None, None
    return ("chosen", "rejected") if _draw(settings.seed, annotator, pair, "left") % 2 else ("rejected", "chosen")


def person(name: str) -> str:
    """A name as the store has it: spaces and case do not make another person. Raises UserError if it is no name."""
    name = " ".join(name.split()).casefold()
    if not name or len(name) > MAX_CHARACTERS or not name.isprintable():
        raise UserError(f"name: is empty or longer than {MAX_CHARACTERS} letters; give the name or initials you go by")
    return name


def read(path: Path) -> Annotations:
    """A store as it is now, also while someone is choosing: a line that is not whole yet is left out.

    Raises UserError if there is none, or it was edited (`file:line: ...`).
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the --store of posttrain annotate") from None
    stored = _replay(path, data)
    if stored is None:
        raise UserError(f"{path}: holds no choice yet; give the --store of posttrain annotate")
    return stored


class Store:
    """A store that only this process writes to. Must be closed; safe to use from several threads."""

    def __init__(self, path: Path, settings: Schedule):
        """Takes the lock and reads what is there; a last line that a kill cut off is dropped with a warning.

        Raises UserError if another process has the lock, a line was edited, or the settings are not those that the
        store was started with.
        """
        self.path = path
        self._mutex = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror}); choose another --store") from None
        try:
            self._lock()
            data = path.read_bytes()
            stored = _replay(path, data)
            if stored is None:
                self._annotations = Annotations(settings)
            else:
                self._annotations = stored
                for name, value in asdict(stored.schedule).items():
                    given = getattr(settings, name)
                    if given != value:
                        raise UserError(
                            f"{path}: was started with {name} {value}, not {given}; pass --{name} {value},"
                            " or choose another --store"
                        )
            if cut := len(data) - self._annotations.size:
                log.warning(f"{path}: the last line was cut off ({cut} bytes); dropped")
                os.ftruncate(self._file, self._annotations.size)
            if stored is None:
                self._append({"annotations": VERSION, **asdict(settings)})
                sync(path.parent)  # after a power cut the name of a new file could be missing
        except BaseException:
            os.close(self._file)  # which gives the lock back
            raise

    @property
    def schedule(self) -> Schedule:
        return self._annotations.schedule

    def choices(self, annotator: str) -> list[Choice]:
        """The choices that were not taken back, in the order they were made."""
        with self._mutex:
            return list(self._annotations.choices.get(annotator, ()))

    def pairs(self) -> set[str]:
        """Ids of all pairs or images that someone answered."""
        with self._mutex:
            return self._annotations.items()

    def add(self, annotator: str, showing: Showing, choice: Answer, seconds: float) -> bool:
        """Save a choice; it is on disk when this returns. False if that showing had been answered already.

        Raises UserError if it cannot be written; then nothing has changed.
        """
        new = Choice(annotator, **asdict(showing), choice=choice, seconds=seconds, time=_now())
        with self._mutex:
            standing = self._annotations.choices.setdefault(annotator, [])
            # A key pressed twice, or the same person in two windows.
            if any((c.pair, c.again) == (showing.pair, showing.again) for c in standing):
                return False
            self._append(asdict(new))
            standing.append(new)
            return True

    def undo(self, annotator: str) -> Choice | None:
        """Take back the annotator's last choice that stands, and return it. Raises as `add` does."""
        with self._mutex:
            standing = self._annotations.choices.get(annotator, [])
            if not standing:
                return None
            last = standing[-1]
            self._append({"undo": True, "annotator": annotator, "pair": last.pair, "again": last.again, "time": _now()})
            return standing.pop()

    def close(self) -> None:
        os.close(self._file)  # and with it the lock

    def _lock(self) -> None:
        # The kernel drops this lock when the process ends, however it ends, so a kill leaves no stale one.
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{self.path}: is locked by another posttrain annotate; several people share one server,"
                " so open its page, stop it, or choose another --store"
            ) from None
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be locked ({error.strerror}); choose a --store on a local disk"
            ) from None

    def _append(self, record: Mapping[str, Any]) -> None:
        total = _hash(self._annotations.hash, record)
        line = (json.dumps({**record, "hash": total}, ensure_ascii=False, allow_nan=False) + "\n").encode()
        try:
            # write() may take a part of it only.
            written = 0
            while written < len(line):
                written += os.write(self._file, line[written:])
            # The page shows the next pair only after this, so an answer that was seen is never lost.
            os.fsync(self._file)
        except OSError as error:
            # Half a line in the middle would make every later line unreadable.
            os.ftruncate(self._file, self._annotations.size)
            raise UserError(f"{self.path}: nothing was saved ({error.strerror}); free some space, then again") from None
        self._annotations.hash, self._annotations.size = total, self._annotations.size + len(line)


def _replay(path: Path, data: bytes) -> Annotations | None:
    """The annotations of all complete lines; None if there is no line."""
    stored: Annotations | None = None
    for number, line in enumerate(data.splitlines(keepends=True), 1):
        # A kill while writing leaves half a line at the end, whose answer was not confirmed.
        if not line.endswith(b"\n"):
            break
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if stored is None:
            if not (isinstance(record, dict) and "annotations" in record):
                raise UserError(f"{path}:1: is no annotation store; choose another --store")
            if record["annotations"] != VERSION:
                raise UserError(f"{path}:1: was written by another version of posttrain; use that one")
        total = str(record.pop("hash", "")) if isinstance(record, dict) else ""
        if not isinstance(record, dict) or total != _hash(stored.hash if stored else "", record):
            raise UserError(
                f"{path}:{number}: was edited, or a line before it was removed; restore the file from a copy,"
                " or start another --store"
            )
        if stored is None:
            # Stores written before single images could be marked have no mode.
            stored = Annotations(Schedule(record["seed"], record["repeats"], record.get("mode", "preference")))
        elif "undo" in record:
            stored.choices[record["annotator"]].pop()
        else:
            stored.choices.setdefault(record["annotator"], []).append(Choice(**record))
        stored.hash, stored.size = total, stored.size + len(line)
    return stored


def _hash(before: str, record: Mapping[str, Any]) -> str:
    # Sorted, so that the hash is of the fields and not of their order.
    text = before + json.dumps(record, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _draw(*parts: Any) -> int:
    # As JSON, in which ("ab", "c") and ("a", "bc") differ.
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:8], "big")


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
