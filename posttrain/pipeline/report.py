"""index.html: a pipeline on one page. The metrics along its stages, its first images against its last, and for each
stage what it changed and a link to its own report. templates/pipeline.html shows what this module prepares."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

from posttrain.pipeline.gains import gains, read_json
from posttrain.pipeline.plan import Stage
from posttrain.report.before_after import grid, matched, read_samples, step_directories, step_name, step_of
from posttrain.report.format import aligned, is_number
from posttrain.report.page import summary_tables
from posttrain.report.public import public
from posttrain.report.render import image, page
from posttrain.runs.files import replace_text
from posttrain.runs.progress import duration

FEW = 6  # images of each stage
LARGEST = 256  # pixels of their longer side
MOST_CHARACTERS = 4000  # of quality.json


def write_index(folder: Path, stages: list[Stage], state: dict[str, Any]) -> Path:
    """Written anew after each stage; opens without a network, links lead to files beside it."""
    summaries = {stage.name: read_json(stage.output / "summary.json") for stage in stages}
    title = folder.resolve().name
    text = page(
        "pipeline.html",
        title,
        stages=[_overview(stage, state.get(stage.name, {}), folder) for stage in stages],
        gains=_gains(stages),
        along=_along(stages, summaries),
        first_and_last=_first_and_last(stages),
        parts=[_stage(stage, summaries[stage.name], folder) for stage in stages],
    )
    file = folder / "index.html"
    replace_text(file, text)
    return file


def _overview(stage: Stage, entry: dict[str, Any], folder: Path) -> dict[str, Any]:
    finished = entry.get("finished")
    return {
        "name": stage.name,
        "link": _link(stage, folder),
        "command": stage.command,
        "begun": bool(entry),
        "finished": finished[:16].replace("T", " ") if finished else None,
        "took": duration(entry["seconds"]) if entry else "",
        "reads": ", ".join(f"{field}: {name}" for field, name in stage.reads.items()),
    }


def _link(stage: Stage, folder: Path) -> str | None:
    report = stage.output / "report.html"
    return str(report.relative_to(folder)) if report.is_file() else None


def _gains(stages: list[Stage]) -> list[list[str]]:
    """What each stage is for, before and after it."""
    rows = []
    for stage in stages:
        for i, gain in enumerate(gains(stage)):
            name = f"{gain.figure}, trained" if gain.trained else gain.figure
            # The stage's name stands in the first of its rows only.
            rows.append(["" if i else stage.name, name, aligned(gain.before), aligned(gain.after),
                         aligned(gain.change, "+")])  # fmt: skip
    return rows


def _along(stages: list[Stage], summaries: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """Metrics that at least two stages measured: before the first of them, and after each."""
    after: dict[str, dict[str, Any]] = {}
    for name, summary in summaries.items():
        if summary.get("after"):
            after[name] = summary["after"]
    stages_of = Counter(itertools.chain.from_iterable(after.values()))
    shared = [name for name, count in stages_of.items() if count > 1]
    if not shared:
        return None
    # A stage that measured none of them gets no column.
    after = {stage: metrics for stage, metrics in after.items() if not metrics.keys().isdisjoint(shared)}
    start = summaries[next(iter(after))].get("before") or {}
    columns = [start, *after.values()]
    rows = []
    for name in shared:
        cells = []
        for column in columns:
            value = column.get(name)
            cells.append(f"{value:.4f}" if is_number(value) else "–")
        rows.append({"name": name, "cells": cells})
    return {"head": ["start", *after], "rows": rows}


def _first_and_last(stages: list[Stage]) -> dict[str, Any] | None:
    """The images before the first stage with samples against those after the last, of the same prompts and seeds."""
    sampled = []
    for stage in stages:
        directories = _sampled(stage)
        if directories:
            sampled.append((stage, directories))
    if len(sampled) < 2:
        return None
    (first, start), (last, end) = sampled[0], sampled[-1]
    pairs = matched(read_samples(start[0]), read_samples(end[-1]))
    return grid(pairs[: 2 * FEW], f"before {first.name}", f"after {last.name}", LARGEST)


def _stage(stage: Stage, summary: dict[str, Any], folder: Path) -> dict[str, Any]:
    directories = _sampled(stage)
    images = None
    if directories:
        pairs = matched(read_samples(directories[0]), read_samples(directories[-1]))[:FEW]
        images = grid(pairs, step_name(directories[0]), step_name(directories[-1]), LARGEST)
    quality = read_json(stage.output / "quality.json")
    sheet = stage.output / "pairs.png"
    return {
        "name": stage.name,
        "link": _link(stage, folder),
        "images": images,
        "summary": summary_tables(summary) if summary.get("after") else None,
        "quality": json.dumps(public(quality), indent=1)[:MOST_CHARACTERS] if quality else None,
        "sheet": image(sheet, 1024) if sheet.is_file() else None,
    }


def _sampled(stage: Stage) -> list[Path]:
    """The directories of the steps with samples, up to the step that the stage hands on."""
    # A run that its stop rule ended hands on its best step; samples of later steps show what was thrown away.
    summary = read_json(stage.output / "summary.json")
    last = summary["best"]["step"] if "stopped" in summary and summary.get("best") else None
    directories = step_directories(stage.output / "samples")
    return [path for path in directories if last is None or step_of(path) <= last]
