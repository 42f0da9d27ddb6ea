"""Files of a run directory as someone may have left them: of the shape that posttrain wrote, or a UserError."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prompts.errors import UserError
from prompts.parse import parse_json


def read_json(path: Path, **kinds: type) -> dict[str, Any]:
    """An object, of which these fields, where they are there and not null, are of these types."""
    return shaped(path, _parsed(path) if path.is_file() else {}, **kinds)


def shaped(path: Path, data: Any, **kinds: type) -> dict[str, Any]:
    wrong = [n for n, k in kinds.items() if not isinstance(data.get(n), k | None)] if isinstance(data, dict) else [""]
    if wrong:
        raise _damaged(path, f"{wrong[0]} is not what posttrain writes there" if wrong[0] else "is no object")
    return data


def read_tables(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Rows by title; those of a table have the same columns."""
    tables = read_json(path)
    for title, rows in tables.items():
        if not _are_rows(rows) or any(row.keys() != rows[0].keys() for row in rows):
            raise _damaged(path, f"{title} is no table")
    return tables


def read_rows(path: Path) -> list[dict[str, Any]]:
    rows = _parsed(path) if path.is_file() else []
    if not _are_rows(rows):
        raise _damaged(path, "is no list of objects")
    return rows


def _are_rows(rows: Any) -> bool:
    return isinstance(rows, list) and all(isinstance(row, dict) for row in rows)


def _parsed(path: Path) -> Any:
    try:
        return parse_json(path.read_bytes())
    except ValueError as error:
        raise _damaged(path, str(error)) from None


def _damaged(path: Path, problem: str) -> UserError:
    return UserError(f"{path}: {problem}; remove the file and write the report again")
