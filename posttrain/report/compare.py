"""Several runs on one page. Runs whose recipes differ only in the seed are one line, with a band over them."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.config.diff import changes
from posttrain.report.before_after import Sample, read_samples, step_name, steps
from posttrain.report.chart_many import runs_chart
from posttrain.report.html import by_section, colour, figure, legend, picture, section, shown, table, text
from posttrain.runs.read import RunFiles

OWN = ("output", "seed", "track")
"""Settings that may differ between runs of one line."""
LONGEST = 120  # characters of a setting
MOST_STRIPS = 12  # prompts whose pictures are shown


@dataclass
class Line:
    """Runs that differ only in their seeds."""

    runs: list[RunFiles]
    name: str = ""


def comparison(runs: Sequence[RunFiles]) -> list[str]:
    """The parts of the page."""
    lines = grouped(runs)
    names = [line.name for line in lines]
    told = f"{len(runs)} runs, {len(lines)} {'recipe' if len(lines) == 1 else 'recipes'} besides the seed"
    return [
        f"<header><h1>{text(', '.join(names))}</h1><p>{told}</p></header>",
        _runs(lines),
        _different(lines),
        _figures(lines),
        _charts(lines),
        _strips(lines),
    ]


def grouped(runs: Sequence[RunFiles]) -> list[Line]:
    lines: list[Line] = []
    for run in runs:
        line = next((line for line in lines if alike(line.runs[0].recipe, run.recipe)), None)
        if line is None:
            lines.append(Line([run]))
        else:
            line.runs.append(run)
    for depth in (1, 2, 3):  # of a path, as much as tells the lines apart
        for line in lines:
            line.name = _name(line.runs, depth)
        if len({line.name for line in lines}) == len(lines):
            break
    return lines


def _name(runs: Sequence[RunFiles], depth: int) -> str:
    names = ["/".join(run.path.resolve().parts[-depth:]) for run in runs]
    if len(names) == 1:
        return names[0]
    parts = [re.split(r"(\d+)", name) for name in names]
    if len({len(part) for part in parts}) > 1:
        return f"{names[0]} and {len(names) - 1} more"
    return "".join(part[0] if len({*part}) == 1 else "*" for part in zip(*parts)) + f", {len(names)} seeds"


def alike(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two recipes differ only in the seed, where they write, and in paths that name the seed, as in
    model.start: runs/stpo-0 with seed 0 and runs/stpo-1 with seed 1.
    """
    return not different(a, b)


def different(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Path of each setting that tells two recipes apart, with its two values."""
    seeds = str(a.get("seed")), str(b.get("seed"))
    found = changes(_by_name(a), _by_name(b))
    return [c for c in found if c[0].split(".")[0] not in OWN and not _same_but_seed(c[1], c[2], seeds)]


def _by_name(value: Any) -> Any:
    """A recipe whose lists of named things, such as rewards, are held by their names."""
    if isinstance(value, dict):
        return {key: _by_name(item) for key, item in value.items()}
    if isinstance(value, list) and value and all(isinstance(item, dict) and "name" in item for item in value):
        return {item["name"]: _by_name(item) for item in value}
    return value


def _same_but_seed(a: Any, b: Any, seeds: tuple[str, str]) -> bool:
    if not (isinstance(a, str) and isinstance(b, str)):
        return False
    mine, its = (re.split(r"(\d+)", text) for text in (a, b))
    return len(mine) == len(its) and all(x == y or (x, y) == seeds for x, y in zip(mine, its))


def _runs(lines: Sequence[Line]) -> str:
    rows = []
    for i, line in enumerate(lines):
        for run in line.runs:
            cells = [_mark(i, line), *(text(shown(cell)) for cell in (run.path, run.recipe.get("seed"), run.steps))]
            took = run.summary.get("seconds")
            ended = run.summary.get("stopped") or ("" if run.summary else "not finished")
            cells += [text(f"{took:,.0f}\u00a0s" if took else "–"), text(ended)]
            rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{name}</th>" for name in ("line", "run", "seed", "steps", "took", ""))
    return f'<h2>Runs</h2><div class="scroll"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _mark(i: int, line: Line) -> str:
    return f'<ul class="legend"><li class="{colour(i)}">{text(line.name)}</li></ul>'


def _different(lines: Sequence[Line]) -> str:
    """The settings in which the lines differ."""
    found = [different(lines[0].runs[0].recipe, line.runs[0].recipe) for line in lines]
    firsts = {path: value for changed in found for path, value, _ in changed}
    if not firsts:
        return ""
    own = [{path: value for path, _, value in changed} for changed in found]
    rows = [
        [path, *(textwrap.shorten(shown(values.get(path, first)), LONGEST) for values in own)]
        for path, first in firsts.items()
    ]
    head = ["", *(line.name for line in lines)]
    return f"<h2>Settings that differ</h2>{table(head, rows, [False] * len(head))}"


def _figures(lines: Sequence[Line]) -> str:
    """Before and after: of several runs the mean, and the least and the greatest."""
    names = dict.fromkeys(
        name
        for line in lines
        for run in line.runs
        for side in ("before", "after")
        for name in run.summary.get(side) or {}
    )
    if not names:
        return ""
    top = "".join(f'<th colspan="2" class="n">{_mark(i, line)}</th>' for i, line in enumerate(lines))
    head = '<th class="n">before</th><th class="n">after</th>' * len(lines)
    rows = []
    for name in names:
        cells = "".join(
            f'<td class="n">{_spread(line, side, name)}</td>' for line in lines for side in ("before", "after")
        )
        rows.append(f"<tr><td>{text(name)}</td>{cells}</tr>")
    return (
        "<h2>Before and after</h2><p>Of several runs the mean, and from the least to the greatest.</p>"
        f'<div class="scroll"><table><tr><th></th>{top}</tr><tr><th></th>{head}</tr>{"".join(rows)}</table></div>'
    )


def _spread(line: Line, side: str, name: str) -> str:
    held = [(run.summary.get(side) or {}).get(name) for run in line.runs]
    values = [value for value in held if isinstance(value, int | float)]
    if not values:
        return "–"
    mean = figure(sum(values) / len(values))
    spread = f"{figure(min(values))} to {figure(max(values))}" if min(values) < max(values) else ""
    missing = f"of {len(values)} runs" if len(values) < len(held) else ""
    told = ", ".join(filter(None, [spread, missing]))
    return f"{mean}<br><small>{told}</small>" if told else mean


def _charts(lines: Sequence[Line]) -> str:
    key = legend([line.name for line in lines])
    names = dict.fromkeys(name for line in lines for run in line.runs for name in run.series)
    runs = [run for line in lines for run in line.runs]
    held = [n for n in names if n != "non_finite" and any(len(run.series.get(n, ())) > 1 for run in runs)]

    def chart(name: str, shown: str, **size: int) -> str:
        return runs_chart(shown, [[r.series[name] for r in line.runs if name in r.series] for line in lines], **size)

    parts = [f"<h2>Curves</h2>{key}"]
    if "reward" in names:
        wide, narrow = chart("reward", "reward", width=1120, height=280), chart("reward", "reward")
        parts.append(f'<div class="wide">{wide}</div><div class="narrow">{narrow}</div>')
    found = by_section(name for name in held if name != "reward")
    for title, part in sorted(found, key=lambda item: item[0] != "eval"):
        parts.append(section(title, [chart(name, name.rpartition("/")[2]) for name in part]))
    return "".join(parts)


def _strips(lines: Sequence[Line]) -> str:
    """The same prompts and seeds: the first line's start, and the end of the first run of each line that drew them."""
    starts = {run.path: steps(run.path / "samples") for line in lines for run in line.runs[:1]}
    columns: list[tuple[str, dict[tuple[str, Any], Sample]]] = []
    for line in lines:
        if found := starts[line.runs[0].path]:
            if not columns:
                columns.append((f"{line.runs[0].name}, {step_name(found[0])}", _keyed(read_samples(found[0]))))
            columns.append((f"{line.runs[0].name}, {step_name(found[-1])}", _keyed(read_samples(found[-1]))))
    if len(columns) < 2:
        return ""
    shared = [key for key in columns[0][1] if all(key in held for _, held in columns)][:MOST_STRIPS]
    figures = []
    for key in shared:
        cells = "".join(f"<div>{picture(held[key].file, name, 256)}{text(name)}</div>" for name, held in columns)
        caption = f"<figcaption>{text(key[0])} <span>seed {text(key[1])}</span></figcaption>"
        figures.append(f'<figure class="card"><div class="strip">{cells}</div>{caption}</figure>')
    if not figures:
        return ""
    return f'<h2>Images</h2><p>The same prompts and seeds.</p><div class="strips">{"".join(figures)}</div>'


def _keyed(samples: Sequence[Sample]) -> dict[tuple[str, Any], Sample]:
    return {(sample.prompt, sample.seed): sample for sample in samples}
