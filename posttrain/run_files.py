"""What a run directory says, read for reports; whatever the run has not written yet is empty."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from posttrain.chart import Point
from prompts.errors import UserError


@dataclass(frozen=True)
class RunFiles:
    path: Path
    recipe_text: str
    recipe: dict[str, Any]
    summary: dict[str, Any]
    environment: dict[str, Any]
    series: dict[str, list[Point]]
    """By metric: (step, value or None)."""

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def steps(self) -> int:
        """How many are done."""
        return max((points[-1][0] for points in self.series.values()), default=0)


def read_run(path: Path) -> RunFiles:
    """Raises UserError if it is no run directory or a file in it cannot be read."""
    recipe = path / "recipe.yaml"
    if (path / "stages.json").is_file():
        raise UserError(f"{path}: is a pipeline: open its index.html, or give the directory of a stage in it")
    if not recipe.is_file():
        raise UserError(f"{path}: is not a run directory (no recipe.yaml); give the --output of a training run")
    recipe_text = recipe.read_text()
    try:
        settings = yaml.safe_load(recipe_text) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{recipe}: not YAML: {error}; put back what the run wrote") from None
    summary, environment = read_json(path / "summary.json"), read_json(path / "environment.json")
    return RunFiles(path, recipe_text, settings, summary, environment, read_metrics(path / "metrics.jsonl"))


def read_metrics(path: Path) -> dict[str, list[Point]]:
    """metrics.jsonl as one series of (step, value or None) for each metric; a torn last line is left out.

    Raises UserError with the line number for any other line that is not JSON.
    """
    series: dict[str, list[Point]] = {}
    if not path.is_file():
        return series
    for line_number, line in enumerate(path.read_text().split("\n")[:-1], start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            raise UserError(f"{path}:{line_number}: not JSON; remove the line") from None
        for name, value in row.items():
            if name not in ("step", "time"):
                series.setdefault(name, []).append((row["step"], value))
    return series


def read_json(path: Path) -> Any:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON; remove the file and write the report again") from None
