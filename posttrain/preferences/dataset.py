"""Preference sets: two images of one prompt, of which one is preferred. Written in shards, read row by row.

A set is a directory of parquet files, with the images in them as PNG, and of preferences.json, which is written last.
`datasets.load_dataset(directory)` reads it. Its columns:

| column | type | what it is |
|---|---|---|
| prompt | text | |
| chosen, rejected | image | the preferred one and the other, of one size |
| source | text | synthetic or human |
| chosen_policy, rejected_policy | text | the checkpoint or setting that drew it |
| chosen_on_policy, rejected_on_policy | boolean | whether the policy that will be trained drew it |
| margin | number or null | how much better the chosen one is, in the unit of the judge |
| share | number | share of votes for the chosen one, 0.5 to 1 |
| seed | integer or null | seed of the noise |
| references | list | images that both were drawn in the style of, as `image` and `strength`; empty for none |
| id | text | a hash of prompt and pixels, the same wherever they are stored |

    with PreferenceWriter("pairs/a", resume=True) as writer:      for pair in read_preferences("pairs/a"):
        for pair in made[writer.written :]:                           pair.prompt, pair.chosen, pair.rejected
            writer.add(pair)
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
import pyarrow.parquet as pq
from PIL import Image

from posttrain.errors import UserError, counted
from posttrain.image_reader import to_rgb
from posttrain.preferences.config import ColumnMap
from posttrain.preferences.sources import Skipped, Tally, Tie, number, preferred, read_image, typed
from prompts.parse import parse_json
from prompts.tables import Parquet, open_table

VERSION = 1
CARD = "preferences.json"
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
        "references": datasets.List({"image": datasets.Image(), "strength": datasets.Value("float64")}),
    }
)
OWN = ColumnMap(chosen="chosen", rejected="rejected", share="share", margin="margin")
OPTIONAL = {"share": 1.0, "margin": None, "source": "human", "chosen_policy": "unknown", "rejected_policy": "unknown",
            "chosen_on_policy": False, "rejected_on_policy": False, "seed": None}  # fmt: skip
"""Columns that a set may leave out, and their defaults."""


@dataclass
class Reference:
    """An image that others are drawn in the style of; see posttrain/references."""

    image: Image.Image
    strength: float = 1.0

    def __post_init__(self) -> None:
        self.image = to_rgb(self.image)


@dataclass
class Preference:
    """One pair, both images in RGB; see the table above."""

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
    references: list[Reference] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.chosen, self.rejected = to_rgb(self.chosen), to_rgb(self.rejected)
        # Of pixels, not of files: another compression is the same pair.
        digest = hashlib.blake2b(self.prompt.encode(), digest_size=16)
        for image in (self.chosen, self.rejected):
            # With the size: 2 x 8 and 4 x 4 pixels may have the same bytes.
            digest.update(repr(image.size).encode() + image.tobytes())
        for shown in self.references:
            digest.update(repr((shown.image.size, shown.strength)).encode() + shown.image.tobytes())
        self.id = digest.hexdigest()


class Preferences:
    """The rows of a set, read one at a time."""

    def __init__(self, path: str, columns: ColumnMap | None, max_bad: float, resized: bool) -> None:
        self.path, self.max_bad, self._resized = path, max_bad, resized
        self.card: dict[str, Any] = {}
        """preferences.json, if the set was written by PreferenceWriter."""
        self._columns = columns or OWN
        self._own = columns is None
        if os.path.isfile(Path(path) / CARD):
            # The card's fingerprint stands for the content, so that a moved set is still the same set.
            self.card = _read_card(Path(path))
            files = [Path(path) / name for name in self.card["shards"]]
            self._source = Parquet(Path(path), files, self.card["fingerprint"])
        elif os.path.isdir(path) and shards_of(Path(path)):
            raise UserError(f"{path}: is unfinished: it has shards and no {CARD}; go on with what was writing it")
        else:
            self._source = open_table(path)
        if not len(self):
            raise UserError(f"{path}: holds no pair")
        self._check_columns()

    def __len__(self) -> int:
        """Number of rows, bad ones included."""
        return len(self._source)

    def __getitem__(self, i: int) -> Preference | Skipped:
        """Row i of 0 .. len - 1: a pair, or why it is skipped."""
        try:
            return self._pair(self._source[i])
        except Tie:
            return Skipped(self._source.name(i), "neither image is preferred", tie=True)
        except ValueError as error:
            return Skipped(self._source.name(i), str(error))

    def name(self, i: int) -> str:
        """The place of row i, for messages."""
        return self._source.name(i)

    def __iter__(self) -> Iterator[Preference]:
        """All pairs in order. Raises UserError if more than the share max_bad of all rows are bad."""
        tally = self.tally()
        for i in range(len(self)):
            row = self[i]  # read and decoded now: a set may be far larger than memory
            if isinstance(row, Preference):
                yield row
            else:
                tally.add(row)

    def tally(self) -> Tally:
        return Tally(self.path, len(self), self.max_bad)

    def fingerprint(self) -> str:
        """Changes when the set or the column map does."""
        c = self._columns
        # Images may be files beside the table, which can change while it stays the same.
        images = [name for name in (c.chosen, c.rejected, c.first, c.second, c.pair) if name is not None]
        return hashlib.sha256(f"{self._source.fingerprint(images)} {c!r} {self._own}".encode()).hexdigest()

    def _check_columns(self) -> None:
        c = self._columns
        # The three ways to name the images; exactly one must be used, and completely.
        kinds = [
            ((c.chosen, c.rejected), c.chosen and c.rejected),
            ((c.first, c.second), c.first and c.second and c.label),
            ((c.pair,), c.pair and c.label),
        ]
        used = [complete for names, complete in kinds if {*names} != {None}]
        if len(used) != 1 or not used[0]:
            raise UserError("columns: name chosen and rejected; or first, second and label; or pair and label")
        known = self._source.columns
        for key, name in asdict(c).items():
            if key != "source" and name not in (None, *known) and not (self._own and key in OPTIONAL):
                raise UserError(f"columns.{key}: '{name}' is no column of {self.path}; it has: {', '.join(known)}")

    def _pair(self, row: Mapping[str, Any]) -> Preference:
        """The pair of a row. Raises ValueError with the reason for a bad row, and Tie if neither image is preferred."""
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
                    raise ValueError(f"{c.pair}: is not a list of two images")
                names, values = (f"{c.pair}[0]", f"{c.pair}[1]"), (both[0], both[1])
            else:
                assert c.first and c.second
                names, values = (c.first, c.second), (row.get(c.first), row.get(c.second))
            if share < 0.5:  # most prefer the second
                names, values = names[::-1], values[::-1]
            other["share"] = max(share, 1 - share)
        if other["share"] == 0.5:
            raise Tie
        if self._own:
            for name in OPTIONAL:
                if row.get(name) is not None:
                    other.setdefault(name, typed(name, row[name]))  # share and margin were read above, as numbers
            other["source"] = row.get("source") or OPTIONAL["source"]
        # Images last: decoding them takes longer than all other checks.
        chosen = read_image(names[0], values[0], self._source.folder)
        rejected = read_image(names[1], values[1], self._source.folder)
        other["references"] = self._references(row.get("references")) if self._own else []
        pair = Preference(prompt, chosen, rejected, **other)
        if problem := problem_of(pair, self._resized):
            raise ValueError(problem)
        return pair

    def _references(self, values: Any) -> list[Reference]:
        """Raises ValueError with the reason for a list that is none."""
        if not isinstance(values, list | None):
            raise ValueError("references: is not a list")
        references = []
        for i, value in enumerate(values or []):
            name = f"references[{i}]"
            if not isinstance(value, Mapping) or "image" not in value:
                raise ValueError(f"{name}: holds no image")
            strength = 1.0 if (given := number(value, "strength")) is None else given
            references.append(Reference(read_image(name, value["image"], self._source.folder), strength))
        return references


def read_preferences(
    path: str | Path, columns: ColumnMap | None = None, max_bad: float = 0.01, resized: bool = False
) -> Preferences:
    """Opens a set of pairs: a directory of PreferenceWriter, or whatever `prompts.tables.open_table` opens, such as
    JSONL or CSV with paths of images (relative to its directory), parquet, a directory of `save_to_disk`, or
    hf:NAME[:SPLIT].

    Without `columns`, the columns are those of the table above; prompt, chosen and rejected are required. A row is bad
    if an image is missing, cut off or empty, if the images are the same or differ in size (unless `resized`: the caller
    resizes them), if the prompt is empty, or if a field has an invalid value. A row in which neither image is preferred
    is a tie. Both are skipped; if more than the share `max_bad` of all rows are bad, UserError names the first ones and
    their reasons.

    Raises UserError for a missing or unfinished set, and for a missing column.
    """
    return Preferences(str(path), columns, max_bad, resized)


def problem_of(pair: Preference, resized: bool = False) -> str | None:
    """What is wrong with a pair whose images could be read; None: nothing. `resized`: sizes may differ."""
    if not pair.prompt.strip():
        return "prompt: is empty"
    if pair.source not in SOURCES:
        return f"source: is {pair.source!r}, neither synthetic nor human"
    if not 0.5 <= pair.share <= 1:
        return f"share: is {pair.share}, and not of 0.5 to 1: chosen is what most preferred"
    if pair.margin is not None and not math.isfinite(pair.margin):
        return f"margin: is {pair.margin}"
    # Sets of other writers may have any type in these columns.
    types = {"chosen_policy": str, "rejected_policy": str, "chosen_on_policy": bool, "rejected_on_policy": bool}
    for name, kind in types.items():
        if not isinstance(value := getattr(pair, name), kind):
            return f"{name}: is {value!r}, and not {'text' if kind is str else 'true or false'}"
    if not (pair.seed is None or isinstance(pair.seed, int)):
        return f"seed: is {pair.seed!r}, no integer"
    a, b = pair.chosen.size, pair.rejected.size
    if a != b and not resized:
        return f"the images differ in size: {a[0]}x{a[1]} and {b[0]}x{b[1]} (posttrain stpo resizes them to pairs.size)"
    if pair.chosen.tobytes() == pair.rejected.tobytes():
        return "the images are the same"
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
        if (own_rows := _rows(path / name)) != rows:
            raise UserError(f"{path / name}: has {counted(own_rows, 'row')}, not {rows} as {CARD} says; copy it again")
        # The names in a parquet file have no checksum, and a column that is not found would take its default.
        columns = pq.read_schema(path / name).names
        # Sets that were written before pairs had references lack that column.
        if columns not in (list(FEATURES), [column for column in FEATURES if column != "references"]):
            raise UserError(f"{path / name}: has other columns than it was written with; copy the directory again")
    return card


def shards_of(path: Path) -> dict[str, int]:
    return {file.name: _rows(file) for file in sorted(path.glob("shard-*.parquet"))}


def _rows(file: Path) -> int:
    try:
        return pq.read_metadata(file).num_rows
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: is not a whole parquet file ({error}); copy or make it again") from None
