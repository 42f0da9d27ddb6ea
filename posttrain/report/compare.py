"""Several runs on one page. Runs whose recipes differ only in the seed are one line, with a band over them."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.config import metrics
from posttrain.config.diff import changes
from posttrain.errors import counted
from posttrain.report.before_after import Sample, by_key, read_samples, step_directories, step_name
from posttrain.report.charts import Chart, Section, runs_chart
from posttrain.report.format import aligned, all_keys, is_number, shown
from posttrain.report.public import public
from posttrain.report.render import image
from posttrain.runs.read import RunFiles

OWN = ("output", "seed", "track")
"""Settings that may differ between runs of one line."""
LONGEST = 120  # characters of a setting
MOST_STRIPS = 12  # prompts whose images are shown


@dataclass
class Line:
    """Runs that differ only in their seeds."""

    runs: list[RunFiles]
    name: str = ""


def comparison(runs: Sequence[RunFiles]) -> dict[str, Any]:
    """What templates/comparison.html shows."""
    lines = grouped(runs)
    names = all_keys(run.series for run in runs)
    drawn = []
    for name in names:
        longest = max(len(run.series.get(name, ())) for run in runs)
        # One point is no curve; the reward has the wide chart.
        if longest > 1 and name not in ("non_finite", "reward"):
            drawn.append(name)
    sections = metrics.by_section(drawn)
    # Evaluations first: they are what runs are compared by.
    sections.sort(key=lambda section: section[0] != "eval")
    curves = []
    for title, members in sections:
        charts = [_chart(name, name.rpartition("/")[2], lines) for name in members]
        curves.append(Section(title, charts))
    rows = []
    for i, line in enumerate(lines):
        for run in line.runs:
            rows.append(_run_row(i, run))
    return {
        "count": len(runs),
        "lines": [line.name for line in lines],
        "runs": rows,
        "settings": _settings(lines),
        "results": _results(lines),
        "reward": _reward(lines) if "reward" in names else None,
        "curves": curves,
        "strips": _strips(lines),
        "definitions": metrics.definitions(names),
    }


def grouped(runs: Sequence[RunFiles]) -> list[Line]:
    lines: list[Line] = []
    for run in runs:
        for line in lines:
            if alike(line.runs[0].recipe, run.recipe):
                line.runs.append(run)
                break
        else:
            lines.append(Line([run]))
    # As many parts of the path as it takes to give each line a name of its own.
    for depth in (1, 2, 3):
        for line in lines:
            line.name = _name(line.runs, depth)
        if len({line.name for line in lines}) == len(lines):
            break
    return lines


def _name(runs: Sequence[RunFiles], depth: int) -> str:
    """One name for all runs: numbers that differ become a star."""
    names = ["/".join(run.path.resolve().parts[-depth:]) for run in runs]
    if len(names) == 1:
        return names[0]
    # Digits and what is between them, in turn.
    parts = [re.split(r"(\d+)", name) for name in names]
    if len(set(map(len, parts))) > 1:
        return f"{names[0]} and {len(names) - 1} more"
    shared = ""
    for column in zip(*parts):
        shared += column[0] if len(set(column)) == 1 else "*"
    return f"{shared}, {len(names)} seeds"


def alike(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two recipes differ only in the seed, where they write, and in paths that name the seed, as in
    model.start: runs/stpo-0 with seed 0 and runs/stpo-1 with seed 1.
    """
    return not different(a, b)


def different(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Path of each setting that distinguishes two recipes, with its two values."""
    seeds = str(a.get("seed")), str(b.get("seed"))
    found = []
    # Rewards are matched by name, so that one more of them is one difference and not many.
    for path, first, second in changes(_by_name(a), _by_name(b)):
        if path.split(".")[0] not in OWN and not _same_but_seed(first, second, seeds):
            found.append((path, first, second))
    return found


def _by_name(value: Any) -> Any:
    """A recipe whose lists of named objects, such as rewards, are keyed by their names."""
    if isinstance(value, dict):
        return {key: _by_name(item) for key, item in value.items()}
    if isinstance(value, list) and value and all(isinstance(item, dict) and "name" in item for item in value):
        return {item["name"]: _by_name(item) for item in value}
    return value


def _same_but_seed(a: Any, b: Any, seeds: tuple[str, str]) -> bool:
    if not (isinstance(a, str) and isinstance(b, str)):
        return False
    # Whole numbers are compared: seed 1 must not match a part of 512.
    a_parts, b_parts = re.split(r"(\d+)", a), re.split(r"(\d+)", b)
    if len(a_parts) != len(b_parts):
        return False
    return all(x == y or (x, y) == seeds for x, y in zip(a_parts, b_parts))


def _run_row(line: int, run: RunFiles) -> dict[str, Any]:
    seconds = run.summary.get("seconds")
    return {
        "line": line,
        "cells": [public(run.path), run.recipe.get("seed"), run.steps],
        "seconds": f"{seconds:,.0f}\u00a0s" if seconds else "–",
        "ended": run.summary.get("stopped") or ("" if run.summary else "not finished"),
    }


def _settings(lines: Sequence[Line]) -> list[list[str]]:
    """The settings in which the lines differ: path, and the value of each line."""
    firsts: dict[str, Any] = {}
    own: list[dict[str, Any]] = []
    """Of each line; one without an entry has the first line's value."""
    for line in lines:
        own.append({})
        for path, first, value in different(lines[0].runs[0].recipe, line.runs[0].recipe):
            firsts[path] = first
            own[-1][path] = value
    rows = []
    for path, first in firsts.items():
        values = [shown(public(settings.get(path, first))) for settings in own]
        rows.append([path, *(textwrap.shorten(value, LONGEST) for value in values)])
    return rows


def _results(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Before and after: of several runs the mean, the smallest and the largest."""
    figures: list[dict[str, Any]] = []
    for line in lines:
        for run in line.runs:
            figures += (run.summary.get("before") or {}, run.summary.get("after") or {})
    rows = []
    for name in all_keys(figures):
        cells = []
        for line in lines:
            cells += (_spread(line, "before", name), _spread(line, "after", name))
        rows.append({"name": name, "definition": metrics.describe(f"eval/{name}"), "cells": cells})
    return rows


def _spread(line: Line, side: str, name: str) -> dict[str, str]:
    values: list[float] = []
    for run in line.runs:
        value = (run.summary.get(side) or {}).get(name)
        if is_number(value):
            values.append(value)
    if not values:
        return {"mean": "–", "note": ""}
    notes = []
    if min(values) < max(values):
        notes.append(f"{aligned(min(values))} to {aligned(max(values))}")
    # Some runs may have no value, such as one that has not come to its end.
    if len(values) < len(line.runs):
        notes.append(f"of {counted(len(values), 'run')}")
    return {"mean": aligned(sum(values) / len(values)), "note": ", ".join(notes)}


def _reward(lines: Sequence[Line]) -> dict[str, Chart]:
    wide = _chart("reward", "reward", lines, width=1120, height=280)
    return {"wide": wide, "narrow": _chart("reward", "reward", lines)}


def _chart(name: str, label: str, lines: Sequence[Line], **size: int) -> Chart:
    # A line without the metric stays, as an empty list, and keeps its colour.
    by_line = []
    for line in lines:
        by_line.append([run.series[name] for run in line.runs if name in run.series])
    return runs_chart(label, by_line, definition=metrics.describe(name), **size)


def _strips(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """The same prompts and seeds: the first line's start, and the end of the first run of each line with samples."""
    columns: list[tuple[str, dict[tuple[str, Any], Sample]]] = []
    for line in lines:
        run = line.runs[0]
        directories = step_directories(run.path / "samples")
        if not directories:
            continue
        # One column of the start is enough: it shows where the first line began.
        for directory in directories[-1:] if columns else (directories[0], directories[-1]):
            columns.append((f"{run.name}, {step_name(directory)}", by_key(read_samples(directory))))
    if len(columns) < 2:
        return []
    shared = list(columns[0][1])
    for _, samples in columns[1:]:
        shared = [key for key in shared if key in samples]
    strips = []
    for prompt, seed in shared[:MOST_STRIPS]:
        images = [{"alt": name, **image(samples[prompt, seed].file, 256)} for name, samples in columns]
        strips.append({"prompt": prompt, "seed": seed, "images": images})
    return strips
