"""Reads the files of a run directory, which someone may have edited: they have the shape that posttrain writes, or a
UserError is raised. What the run has not written yet is empty.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any

from posttrain.config.recipe import read_recipe
from posttrain.errors import UserError
from prompts.parse import parse_json

Point = tuple[int, float | None]  # step, value; None is a gap

SECTIONS = {"loss": dict, "optim": dict, "eval": dict, "renderer": dict, "rewards": list}
"""Sections of a recipe that reports read, and their types."""


@dataclass(frozen=True)
class RunFiles:
    path: Path
    recipe_text: str
    recipe: dict[str, Any]
    summary: dict[str, Any]
    environment: dict[str, Any]
    series: dict[str, list[Point]]
    """By metric: (step, value or None)."""
    changes: list[dict[str, Any]] = field(default_factory=list)
    """Settings that were changed when the run was resumed: after_step, setting, before, now."""

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def steps(self) -> int:
        """How many are done."""
        return max((points[-1][0] for points in self.series.values()), default=0)


def read_run(path: Path) -> RunFiles:
    """Raises UserError if it is not a run directory or a file in it cannot be read."""
    recipe = path / "recipe.yaml"
    if (path / "stages.json").is_file():
        raise UserError(f"{path}: is a pipeline: open its index.html, or give the directory of a stage in it")
    if not recipe.is_file():
        raise UserError(f"{path}: is not a run directory (no recipe.yaml); give the --output of a training run")
    return RunFiles(
        path,
        recipe=shaped(recipe, read_recipe(recipe), model=dict | str, **SECTIONS),
        recipe_text=recipe.read_text(encoding="utf-8"),
        summary=read_json(
            path / "summary.json", before=dict, after=dict, teacher=dict, best=dict, memory=dict, rewards=dict,
            startup=dict, seconds=int | float,
        ),
        environment=read_json(path / "environment.json", started=str, packages=dict),
        series=read_metrics(path / "metrics.jsonl"),
        changes=read_changes(path),
    )  # fmt: skip


def read_changes(run: Path) -> list[dict[str, Any]]:
    """Settings that were changed when a run was resumed, as changes.json has them."""
    rows = read_rows(run / "changes.json")
    if any(row.keys() != {"after_step", "setting", "before", "now"} for row in rows):
        raise _damaged(run / "changes.json", "is not what posttrain writes there")
    return rows


def read_metrics(path: Path) -> dict[str, list[Point]]:
    """metrics.jsonl as one series of (step, value or None) for each metric; a torn last line is left out.

    Raises UserError with the line number for any other line that is not JSON.
    """
    series: dict[str, list[Point]] = {}
    if not path.is_file():
        return series
    # What comes after the last newline is empty, or a line that a killed process did not finish.
    for line_number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            row = parse_json(line)
        except ValueError as error:
            raise UserError(f"{path}:{line_number}: {error}; remove the line") from None
        # Reports divide and compare these values, so a wrong type is refused here, with its line.
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise UserError(f"{path}:{line_number}: is of no step; remove the line")
        for name, value in row.items():
            if name in ("step", "time"):
                continue
            if value is not None and not (isinstance(value, int | float) and math.isfinite(value)):
                raise UserError(f"{path}:{line_number}: contains a non-numeric value; remove the line")
            series.setdefault(name, []).append((row["step"], value))
    return series


def read_json(path: Path, **kinds: type | UnionType) -> dict[str, Any]:
    """A JSON object; see `shaped`."""
    return shaped(path, _parsed(path) if path.is_file() else {}, **kinds)


def shaped(path: Path, data: Any, **kinds: type | UnionType) -> dict[str, Any]:
    """The data, if it is an object whose fields have these types, where they are present and not null. Raises
    UserError."""
    if not isinstance(data, dict):
        raise _damaged(path, "is no object")
    for name, kind in kinds.items():
        if not isinstance(data.get(name), kind | None):
            raise _damaged(path, f"{name} is not what posttrain writes there")
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
        raise _damaged(path, "is not a list of objects")
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
