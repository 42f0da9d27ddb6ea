"""index.html: a pipeline on one page. The figures along its stages, its first pictures against its last, and for each
stage what it changed and a link to its own report."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

from posttrain.pipeline.gains import gains, read_json
from posttrain.pipeline.plan import Stage
from posttrain.report.before_after import matched, read_samples, step_name, step_of, steps, wipe_grid
from posttrain.report.html import breakable, data_uri, figure, page, table
from posttrain.report.page import summary_tables
from posttrain.runs.files import replace_text
from posttrain.runs.progress import duration

FEW = 6  # pictures of each stage
LARGEST = 256  # pixels of their longer side


def write_index(folder: Path, stages: list[Stage], state: dict[str, Any]) -> Path:
    """Written anew after each stage; opens without a network, links lead to files beside it."""
    summaries = {stage.name: read_json(stage.output / "summary.json") for stage in stages if stage.output.is_dir()}
    body = [
        f"<header><h1>{html.escape(folder.resolve().name)}</h1><p>{len(stages)} stages</p></header>",
        _overview(stages, state, folder),
        _gains(stages),
        _along(stages, summaries),
        _first_and_last(stages),
        *(_stage(stage, summaries.get(stage.name, {}), folder) for stage in stages),
    ]
    file = folder / "index.html"
    replace_text(file, page(folder.resolve().name, body))
    return file


def _overview(stages: list[Stage], state: dict[str, Any], folder: Path) -> str:
    rows = []
    for stage in stages:
        entry = state.get(stage.name, {})
        how = "not finished"
        if entry.get("finished"):
            how = f'finished <span class="once">{entry["finished"][:16].replace("T", " ")}</span>'
        took = duration(entry["seconds"]) if entry else ""
        reads = ", ".join(f"{field}: {name}" for field, name in stage.reads.items())
        cells = (_link(stage, folder), stage.command, how if entry else "to do", took, html.escape(reads))
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{name}</th>" for name in ("stage", "command", "state", "took", "reads"))
    return f'<h2>Stages</h2><div class="scroll"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _gains(stages: list[Stage]) -> str:
    """What each stage is for, before and after it."""
    rows = []
    for stage in stages:
        for i, gain in enumerate(gains(stage)):
            name = f"{gain.figure}, trained" if gain.trained else gain.figure
            change = figure(gain.change, "+")
            rows.append(["" if i else stage.name, name, figure(gain.before), figure(gain.after), change])
    if not rows:
        return ""
    note = "<p>Held out, by the stage's own evaluation. What is not called trained is only measured.</p>"
    held = table(["stage", "figure", "before", "after", "change"], rows, [False] * 2 + [True] * 3)
    return f"<h2>What each stage gained</h2>{note}{held}"


def _along(stages: list[Stage], summaries: dict[str, dict[str, Any]]) -> str:
    """Figures that at least two stages measured: before the first of them, and after each."""
    after = {stage.name: found for stage in stages if (found := summaries.get(stage.name, {}).get("after"))}
    names = dict.fromkeys(key for figures in after.values() for key in figures)
    shared = [key for key in names if sum(key in figures for figures in after.values()) > 1]
    after = {name: figures for name, figures in after.items() if any(key in figures for key in shared)}
    if not shared:
        return ""
    start = summaries[next(iter(after))].get("before") or {}
    rows = []
    for key in shared:
        cells = [start.get(key), *(figures.get(key) for figures in after.values())]
        rows.append(f"<tr><td>{breakable(key)}</td>{''.join(map(_cell, cells))}</tr>")
    head = "".join(f'<th class="n">{html.escape(name)}</th>' for name in ["start", *after])
    note = "<p>As each stage measured what it hands on; compare only where they evaluate alike.</p>"
    shown = f'<div class="scroll"><table><tr><th></th>{head}</tr>{"".join(rows)}</table></div>'
    return f"<h2>Along the stages</h2>{note}{shown}"


def _first_and_last(stages: list[Stage]) -> str:
    """The pictures before the first stage that drew any against those after the last, where prompts and seeds agree."""
    drawn = [(stage, found) for stage in stages if (found := _drawn(stage))]
    if len(drawn) < 2:
        return ""
    (first, began), (last, ended) = drawn[0], drawn[-1]
    pairs = matched(read_samples(began[0]), read_samples(ended[-1]))
    if not pairs:
        return ""
    grid = wipe_grid(pairs[: 2 * FEW], f"before {first.name}", f"after {last.name}", LARGEST)
    return f"<h2>From first to last</h2><p>The same prompts and seeds.</p>{grid}"


def _stage(stage: Stage, summary: dict[str, Any], folder: Path) -> str:
    parts = [f"<h2>{_link(stage, folder)}</h2>"]
    if found := _drawn(stage):
        pairs = matched(read_samples(found[0]), read_samples(found[-1]))[:FEW]
        parts.append(wipe_grid(pairs, step_name(found[0]), step_name(found[-1]), LARGEST))
    if summary.get("after"):
        parts.append(summary_tables(summary))
    quality = read_json(stage.output / "quality.json") if stage.output.is_dir() else {}
    if quality:
        shown = html.escape(json.dumps(quality, indent=1)[:4000])
        parts.append(f"<details><summary>quality.json</summary><pre>{shown}</pre></details>")
    sheet = stage.output / "pairs.png"
    if sheet.is_file():
        parts.append(f'<div class="scroll"><img src="{data_uri(sheet, 1024)[0]}" alt="some pairs"></div>')
    return "".join(parts) if len(parts) > 1 else ""


def _drawn(stage: Stage) -> list[Path]:
    """The directories of the steps that drew pictures, up to the one that the stage hands on."""
    summary = read_json(stage.output / "summary.json") if stage.output.is_dir() else {}
    last = summary["best"]["step"] if "stopped" in summary and summary.get("best") else None
    return [path for path in steps(stage.output / "samples") if last is None or step_of(path) <= last]


def _link(stage: Stage, folder: Path) -> str:
    report = stage.output / "report.html"
    name = html.escape(stage.name)
    return f'<a href="{html.escape(str(report.relative_to(folder)))}">{name}</a>' if report.is_file() else name


def _cell(value: Any) -> str:
    shown = f"{value:.4f}" if isinstance(value, int | float) else "–"
    return f'<td class="n">{shown}</td>'
