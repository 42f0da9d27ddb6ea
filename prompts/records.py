"""Prompt records: a JSONL file with one object a line, or any other table with the same fields as columns.

`prompt` is the text. Optional: `requirements` (yes/no statements the image should meet), `texts` (strings
to render in it), `tags`, and `id`. Every other field is kept as a column and handed to the rewards.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.errors import UserError
from prompts.parse import parse_json
from prompts.tables import is_lines, open_table

LISTS = ("requirements", "texts", "tags")


@dataclass(slots=True)
class PromptRecord:
    """One prompt. `id` is stable from run to run: the file's own, or the SHA-1 of the prompt in hex."""

    prompt: str
    requirements: list[str] | None = None
    """None: nobody has said, and a rubric finds them; empty: there are none."""
    texts: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    id: str = ""
    columns: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.id = self.id or hashlib.sha1(self.prompt.encode()).hexdigest()


def read_prompts(source: str | Path, references: bool = False, repeats: bool = False) -> list[PromptRecord]:
    """The records of a JSONL file, or of what else `prompts.tables.open_table` opens, in their order: CSV, parquet,
    datasets saved to disk, `hf:NAME[:SPLIT]`.

    Raises UserError with file and line (table and row) for a source that is missing, empty or cannot be read, a line
    that is not a JSON object, a missing or empty prompt, a field of the wrong type and an id (or, without ids, a
    prompt) that comes twice, unless `repeats` has the later ones left out; and for `references` (images whose style is
    drawn) unless the caller draws with them.
    """
    records: list[PromptRecord] = []
    place_of_id: dict[str, str] = {}
    for place, row in _rows(str(source)):
        record = _record(row, place)
        if record.id in place_of_id and repeats:
            continue
        if record.id in place_of_id:
            raise UserError(
                f"{place}: id '{record.id}' was used at {place_of_id[record.id]} (without an id it comes from the"
                " prompt); remove the duplicate or give each its own id"
            )
        if record.columns.get("references") and not references:
            raise UserError(
                f"{place}: references: are drawn with by style, sample, pairs and stpo alone; remove the field"
            )
        place_of_id[record.id] = place
        records.append(record)
    _fill_columns(records)
    if not records:
        raise UserError(f'{source}: holds no prompt; write one object a line, such as {{"prompt": "a red cube"}}')
    return records


def as_row(record: PromptRecord) -> dict[str, Any]:
    """The object from which `read_prompts` makes this record."""
    row: dict[str, Any] = {"prompt": record.prompt, "id": record.id, **record.columns}
    # None has a rubric find them, an empty list says that there are none.
    if record.requirements is not None:
        row["requirements"] = record.requirements
    lists = {"texts": record.texts, "tags": record.tags}
    return row | {name: values for name, values in lists.items() if values}


def _fill_columns(records: Sequence[PromptRecord]) -> None:
    """Gives every record every column, None where its line lacks the field: rewards see some of the records at once."""
    names: dict[str, None] = {}  # a set that keeps the order
    for record in records:
        if record.columns.keys() != names.keys():
            names |= dict.fromkeys(record.columns)
    for record in records:
        if len(record.columns) < len(names):
            record.columns = {name: record.columns.get(name) for name in names}


def _rows(source: str) -> Iterator[tuple[str, Any]]:
    """Place and value of each row."""
    path = Path(source)
    if not source.startswith("hf:") and (not os.path.exists(source) or (os.path.isfile(source) and is_lines(path))):
        yield from _jsonl_rows(path)
        return
    table = open_table(source)
    for i in range(len(table)):
        try:
            row = table[i]
        except ValueError as error:
            raise UserError(f"{table.name(i)}: {error}") from None
        yield table.name(i), row


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Place and value of each line that is not blank."""
    try:
        with path.open("rb") as file:  # bytes, so that a line that is not UTF-8 is named by its number
            for number, line in enumerate(file, start=1):
                if line.strip():
                    place = f"{path}:{number}"
                    yield place, _parse(line, place)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give the path of a file of prompts, or hf:NAME") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:  # a path with a null in it
        raise UserError(f"{path}: cannot be read: {error}; give the path of a file of prompts") from None


def _parse(line: bytes, where: str) -> Any:
    try:
        return parse_json(line)
    except ValueError as error:
        raise UserError(f"{where}: {error}; write one object a line, in UTF-8") from None


def _record(row: Any, where: str) -> PromptRecord:
    if not isinstance(row, dict):
        raise UserError(f'{where}: is {_kind(row)}, not an object; write {{"prompt": ...}}')
    prompt = row.pop("prompt", None)
    if prompt is None:
        raise UserError(f"{where}: prompt: missing; every line needs one")
    if not isinstance(prompt, str):
        raise UserError(f"{where}: prompt: is {_kind(prompt)}, not text; put it in quotes")
    if not prompt.strip():
        raise UserError(f"{where}: prompt: is empty; write what the image should show or drop the line")

    lists: dict[str, list[str] | None] = {}
    for name in LISTS:
        value = row.pop(name, None)
        if value is None:
            lists[name] = None if name == "requirements" else []
            continue
        value = _from_cell(value)
        if not isinstance(value, list):
            raise UserError(f"{where}: {name}: is {_kind(value)}, not a list; write [...]")
        for item in value:
            if not isinstance(item, str):
                raise UserError(f"{where}: {name}: holds {_kind(item)}, not text; put each item in quotes")
        if name == "tags":
            value = tuple(map(sys.intern, value))  # they repeat, and a file may hold a million prompts
        lists[name] = list(value)  # a copy has no spare room, here and below

    for name in ("images", "prompts"):
        if name in row:
            raise UserError(f"{where}: {name}: rewards get images and prompts under these names; rename the field")
    # What is left of the row after this is its own columns, for rewards.
    id = row.pop("id", None)
    if isinstance(id, int) and not isinstance(id, bool):  # as many datasets have it
        id = str(id)
    if id is not None and not (isinstance(id, str) and id):
        raise UserError(f"{where}: id: is {_kind(id)}; use a non-empty text in quotes")
    return PromptRecord(prompt=prompt, id=id or "", columns=dict(row), **lists)  # type: ignore[arg-type]


def _from_cell(value: Any) -> Any:
    """The list in a text, as CSV holds it; any other value as it is."""
    if isinstance(value, str) and value.startswith("["):
        with contextlib.suppress(ValueError):
            return parse_json(value)
    return value


def _kind(value: object) -> str:
    if value is None:
        return "null"
    names = {str: "text", bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "empty text" if value == "" else names.get(type(value), f"a {type(value).__name__}")


def columns(records: Sequence[PromptRecord]) -> dict[str, Sequence[Any]]:
    """The records' fields as the columns that rewards take; a field that a record lacks is None there."""
    extra: dict[str, None] = {}  # a set that keeps the order
    for record in records:
        extra |= dict.fromkeys(record.columns)
    table: dict[str, Sequence[Any]] = {}
    for name in extra:
        table[name] = [record.columns.get(name) for record in records]
    for name in (*LISTS, "id"):
        table[name] = [getattr(record, name) for record in records]
    return table
