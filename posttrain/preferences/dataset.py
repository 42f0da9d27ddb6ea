"""The preference record: two pictures of one prompt, of which one is preferred; written in shards, read row by row.

A set of pairs is a directory of parquet files with the pictures in them as PNG, and preferences.json, which is written
last. `datasets.load_dataset(directory)` reads it. Its columns:

| column | type | what it is |
|---|---|---|
| prompt | text | |
| chosen, rejected | picture | the preferred one and the other, of one size |
| source | text | synthetic or human |
| chosen_policy, rejected_policy | text | which checkpoint or setting drew it |
| chosen_on_policy, rejected_on_policy | boolean | whether the policy that will be trained drew it |
| margin | number or null | how much better the chosen one is, in the unit of whoever judged |
| share | number | share of votes for the chosen one, 0.5 to 1 |
| seed | integer or null | of the noise |
| id | text | a hash of prompt and pictures, the same wherever they are kept |

    with PreferenceWriter("pairs/a", resume=True) as writer:      for pair in read_preferences("pairs/a"):
        for pair in made[writer.written :]:                           pair.prompt, pair.chosen, pair.rejected
            writer.add(pair)
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from posttrain.errors import UserError
from posttrain.pairs.config import ColumnMap
from posttrain.preferences.sources import Parquet, Skipped, Tally, Tie, number, open_source, picture, preferred
from posttrain.runs.files import replacing
from posttrain.training.checkpoint import is_full
from prompts.parse import parse_json

VERSION = 1
CARD, README = "preferences.json", "README.md"
ROW_GROUP = 16
"""Rows that are read at once."""
SHARD_BYTES = 2**27
"""A shard is also full when its pictures take this much."""
SOURCES = ("synthetic", "human")
FEATURES = datasets.Features(
    {
        "prompt": datasets.Value("string"),
        "chosen": datasets.Image(),
        "rejected": datasets.Image(),
        "source": datasets.Value("string"),
        "chosen_policy": datasets.Value("string"),
        "rejected_policy": datasets.Value("string"),
        "chosen_on_policy": datasets.Value("bool"),
        "rejected_on_policy": datasets.Value("bool"),
        "margin": datasets.Value("float64"),
        "share": datasets.Value("float64"),
        "seed": datasets.Value("int64"),
        "id": datasets.Value("string"),
    }
)
OWN = ColumnMap(chosen="chosen", rejected="rejected", share="share", margin="margin")
OPTIONAL = {"share": 1.0, "margin": None, "source": "human", "chosen_policy": "unknown", "rejected_policy": "unknown",
            "chosen_on_policy": False, "rejected_on_policy": False, "seed": None}  # fmt: skip
"""Columns of ours that a set may lack, and what they are then."""


@dataclass
class Preference:
    """One pair, both pictures in RGB; see the table above."""

    prompt: str
    chosen: Image.Image
    rejected: Image.Image
    source: Literal["synthetic", "human"]
    chosen_policy: str = "unknown"
    rejected_policy: str = "unknown"
    chosen_on_policy: bool = False
    rejected_on_policy: bool = False
    margin: float | None = None
    share: float = 1.0
    seed: int | None = None
    id: str = ""

    def __post_init__(self) -> None:
        self.chosen, self.rejected = self.chosen.convert("RGB"), self.rejected.convert("RGB")
        digest = hashlib.blake2b(self.prompt.encode(), digest_size=16)
        for image in (self.chosen, self.rejected):
            digest.update(repr(image.size).encode() + image.tobytes())
        self.id = digest.hexdigest()


# ---- write ------------------------------------------------------------------------------------------------


def row_of(pair: Preference) -> dict[str, Any]:
    """A pair as a row of a set, its images as PNG. Raises ValueError for what is no pair."""
    if problem := _problem(pair):
        raise ValueError(f"{pair.prompt!r}: {problem}")
    row = {name: getattr(pair, name) for name in FEATURES}
    return row | {name: {"bytes": _png(row[name]), "path": None} for name in ("chosen", "rejected")}


class PreferenceWriter:
    """Writes a set in whole shards, so that a writer that was killed can go on after `written` pairs.

    `card` is what preferences.json says besides the counts: anything JSON can hold, and until the end of the block
    more can be put into it. The block's end writes it; after an exception, what is in no shard yet is lost, and the
    set is unfinished.
    """

    def __init__(
        self, path: str | Path, resume: bool = False, rows: int = 256, card: Mapping[str, Any] | None = None
    ) -> None:
        """`rows` of a shard at most. Raises UserError if there is a set and `resume` is off, or it is finished."""
        self.path, self.rows, self.card = Path(path), rows, dict(card or {})
        if (self.path / CARD).exists():
            raise UserError(f"{self.path}: holds a finished set of pairs; choose another directory")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be made: {error.strerror}; choose another directory") from None
        for left_over in self.path.glob(".shard-*"):  # of a writer that was killed
            left_over.unlink()
        if any(self.path.iterdir()) and not resume:
            raise UserError(f"{self.path}: is not empty; go on with what is there, or choose another directory")
        self._held: list[dict[str, Any]] = []
        self._bytes = 0
        self._shards = _shards(self.path)

    @property
    def written(self) -> int:
        """Pairs in whole shards."""
        return sum(self._shards.values())

    def add(self, pair: Preference) -> None:
        self.add_row(row_of(pair))

    def add_row(self, row: dict[str, Any]) -> None:
        """Adds what `row_of` gave, here or in another process."""
        self._bytes += sum(len(row[name]["bytes"]) for name in ("chosen", "rejected"))
        self._held.append(row)
        if len(self._held) >= self.rows or self._bytes >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what is held as a shard."""
        if not self._held:
            return
        name = f"shard-{len(self._shards):05d}.parquet"
        table = pa.Table.from_pylist(self._held, schema=FEATURES.arrow_schema)
        _replace(self.path / name, lambda file: pq.write_table(table, file, row_group_size=ROW_GROUP))
        self._shards[name] = len(self._held)
        self._held, self._bytes = [], 0

    def __enter__(self) -> PreferenceWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if kind is not None:
            return
        self.flush()
        digest, sources, on_policy = hashlib.sha256(), Counter(), 0
        names = ["id", "share", "source", "chosen_on_policy", "rejected_on_policy"]
        for shard in self._shards:
            for row in pq.read_table(self.path / shard, columns=names).to_pylist():
                digest.update(f"{row['id']} {row['share']!r}\n".encode())
                sources[row["source"]] += 1
                on_policy += row["chosen_on_policy"] or row["rejected_on_policy"]
        counts = {"rows": self.written, "sources": dict(sources), "on_policy": on_policy}
        files = {"shards": self._shards, "fingerprint": digest.hexdigest()}
        card = json.dumps({**self.card, "version": VERSION, **counts, **files}, indent=1, ensure_ascii=False)
        readme = '---\nconfigs:\n- config_name: default\n  data_files: "*.parquet"\n---\n'
        _replace(self.path / README, lambda file: file.write(f"{readme}{self.written} preference pairs.\n".encode()))
        _replace(self.path / CARD, lambda file: file.write(f"{card}\n".encode()))


# ---- read -------------------------------------------------------------------------------------------------


class Preferences:
    """The rows of a set, each read when it is asked for."""

    def __init__(self, path: str, columns: ColumnMap | None, max_bad: float) -> None:
        self.path, self.max_bad = path, max_bad
        self.card: dict[str, Any] = {}
        """preferences.json, where the set is one of ours."""
        self._columns = columns or OWN
        self._own = columns is None
        if os.path.isfile(Path(path) / CARD):
            self.card = _read_card(Path(path))
            files = [Path(path) / name for name in self.card["shards"]]
            self._source = Parquet(Path(path), files, self.card["fingerprint"])
        elif os.path.isdir(path) and _shards(Path(path)):
            raise UserError(f"{path}: is unfinished: it has shards and no {CARD}; go on with what was writing it")
        else:
            self._source = open_source(path)
        if not len(self):
            raise UserError(f"{path}: holds no pair")
        self._check_columns()

    def __len__(self) -> int:
        """Rows, the bad ones too."""
        return len(self._source)

    def __getitem__(self, i: int) -> Preference | Skipped:
        """Row i of 0 .. len - 1: a pair, or why it is none."""
        try:
            return self._pair(self._source[i])
        except Tie:
            return Skipped(self._source.name(i), "neither picture is preferred", tie=True)
        except ValueError as error:
            return Skipped(self._source.name(i), str(error))

    def name(self, i: int) -> str:
        """Where row i is, for messages."""
        return self._source.name(i)

    def __iter__(self) -> Iterator[Preference]:
        """The pairs in their order. Raises UserError when more than the share max_bad of all rows is bad."""
        tally = self.tally()
        for i in range(len(self)):
            row = self[i]
            if isinstance(row, Preference):
                yield row
            else:
                tally.add(row)

    def tally(self) -> Tally:
        return Tally(self.path, len(self), self.max_bad)

    def fingerprint(self) -> str:
        """Changes when the set or the column map does."""
        c = self._columns
        pictures = [name for name in (c.chosen, c.rejected, c.first, c.second, c.pair) if name is not None]
        return hashlib.sha256(f"{self._source.fingerprint(pictures)} {c!r} {self._own}".encode()).hexdigest()

    def _check_columns(self) -> None:
        c = self._columns
        given = [(c.chosen, c.rejected), (c.first, c.second), (c.pair,)]
        kinds = [any(name is not None for name in names) for names in given]
        whole = [c.chosen and c.rejected, c.first and c.second and c.label, c.pair and c.label]
        if sum(kinds) != 1 or not whole[kinds.index(True)]:
            raise UserError("columns: name chosen and rejected; or first, second and label; or pair and label")
        known = self._source.columns
        for key, name in asdict(c).items():
            if key != "source" and name not in (None, *known) and not (self._own and key in OPTIONAL):
                raise UserError(f"columns.{key}: '{name}' is no column of {self.path}; it has: {', '.join(known)}")

    def _pair(self, row: Mapping[str, Any]) -> Preference:
        """Raises ValueError with the reason for a bad row."""
        c = self._columns
        prompt = row.get(c.prompt)
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"{c.prompt}: is {'empty' if isinstance(prompt, str) else 'no text'}")
        other: dict[str, Any] = {"source": c.source, "margin": number(row, c.margin), "share": 1.0}
        if c.chosen and c.rejected:
            names, values = (c.chosen, c.rejected), (row.get(c.chosen), row.get(c.rejected))
            if (share := number(row, c.share)) is not None:
                other["share"] = share
        else:
            share = preferred(row, c)
            if c.pair:
                both = row.get(c.pair)
                if not isinstance(both, list) or len(both) != 2:
                    raise ValueError(f"{c.pair}: is not a list of two pictures")
                names, values = (f"{c.pair}[0]", f"{c.pair}[1]"), (both[0], both[1])
            else:
                assert c.first and c.second
                names, values = (c.first, c.second), (row.get(c.first), row.get(c.second))
            if share < 0.5:
                names, values = names[::-1], values[::-1]
            other["share"] = max(share, 1 - share)
        if other["share"] == 0.5:
            raise Tie
        if self._own:
            other |= {name: row[name] for name in OPTIONAL if row.get(name) is not None and name not in other}
            other["source"] = row.get("source") or OPTIONAL["source"]
        chosen, rejected = (picture(n, v, self._source.folder) for n, v in zip(names, values))
        pair = Preference(prompt, chosen, rejected, **other)
        if problem := _problem(pair):
            raise ValueError(problem)
        return pair


def read_preferences(path: str | Path, columns: ColumnMap | None = None, max_bad: float = 0.01) -> Preferences:
    """A set of pairs: a directory of ours, JSONL with paths of pictures (which count from its directory), a parquet
    file or a directory of them, a directory of `save_to_disk`, or hf:NAME[:SPLIT].

    Without `columns`, the columns are those of the table above, of which prompt, chosen and rejected must be there.
    A row is bad if a picture is missing, cut off or empty, if the two are the same or differ in size, if the prompt is
    empty, or if a field holds what it may not; one in which neither is preferred is a tie. Both are skipped; more bad
    rows than the share `max_bad` of all raise UserError, with the first ones and their reasons.

    Raises UserError for a path that is missing or unfinished, and for a column that is not there.
    """
    return Preferences(str(path), columns, max_bad)


def _problem(pair: Preference) -> str | None:
    """What is wrong with a pair whose pictures could be read."""
    if not pair.prompt.strip():
        return "prompt: is empty"
    if pair.source not in SOURCES:
        return f"source: is {pair.source!r}, neither synthetic nor human"
    if not 0.5 <= pair.share <= 1:
        return f"share: is {pair.share}, and not of 0.5 to 1: chosen is what most preferred"
    if pair.margin is not None and not math.isfinite(pair.margin):
        return f"margin: is {pair.margin}"
    types = {"chosen_policy": str, "rejected_policy": str, "chosen_on_policy": bool, "rejected_on_policy": bool}
    for name, kind in types.items():
        if not isinstance(value := getattr(pair, name), kind):
            return f"{name}: is {value!r}, and not {'text' if kind is str else 'true or false'}"
    if not (pair.seed is None or isinstance(pair.seed, int)):
        return f"seed: is {pair.seed!r}, no integer"
    a, b = pair.chosen.size, pair.rejected.size
    if a != b:
        return f"the pictures differ in size: {a[0]}x{a[1]} and {b[0]}x{b[1]}"
    if pair.chosen.tobytes() == pair.rejected.tobytes():
        return "the pictures are the same"
    return None


def _read_card(path: Path) -> dict[str, Any]:
    try:
        card = parse_json((path / CARD).read_bytes())
        version, shards, _ = card["version"], dict(card["shards"]), card["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path / CARD}: is damaged ({error!r}); make the pairs again") from None
    if version != VERSION:
        raise UserError(f"{path / CARD}: version {version}; this posttrain reads {VERSION}")
    for name, rows in shards.items():
        if not os.path.isfile(path / name):
            raise UserError(f"{path / name}: is missing; copy the whole directory")
        if (found := _rows(path / name)) != rows:
            raise UserError(f"{path / name}: has {found} rows, not {rows} as {CARD} says; copy the directory again")
    return card


def _shards(path: Path) -> dict[str, int]:
    return {file.name: _rows(file) for file in sorted(path.glob("shard-*.parquet"))}


def _rows(file: Path) -> int:
    try:
        return pq.read_metadata(file).num_rows
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: is not a whole parquet file ({error}); copy or make it again") from None


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


def _replace(path: Path, write: Any) -> None:
    try:
        with replacing(path) as temporary, temporary.open("wb") as file:
            write(file)
    except OSError as error:
        reason = "no space left; free some, then go on" if is_full(error) else f"cannot be written: {error.strerror}"
        raise UserError(f"{path}: {reason}") from error
