"""report.html: one run on one page that opens anywhere without a network; or several runs side by side.

    posttrain report runs/a            # writes runs/a/report.html
    posttrain report runs/a runs/b     # writes runs/comparison.html

This module reads the files of a run and prepares what templates/report.html shows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from posttrain.config import metrics
from posttrain.errors import counted
from posttrain.report import verdict
from posttrain.report.before_after import run_images
from posttrain.report.charts import Chart, Limit, Section, areas_chart, line_chart
from posttrain.report.compare import comparison
from posttrain.report.config import ReportConfig
from posttrain.report.format import aligned, all_keys, change, number
from posttrain.report.groups import groups
from posttrain.report.limits import limits, watched
from posttrain.report.public import public
from posttrain.report.render import write_page
from posttrain.runs.read import Point, RunFiles, read_json, read_run, read_tables
from prompts.pool import Kind

SHOWN_APART = (
    "before", "after", "teacher", "best", "stopped", "memory", "rewards", "startup",
    "gains", "teachers", "retention", "first_distance",
)  # fmt: skip
"""Fields of summary.json that have a place of their own on the page, or (the last four) are shown as metrics."""
COSTS = ("steps", "images", "pairs", "seconds", "peak_ram_gib", "peak_gpu_gib")
"""Fields of summary.json that say what the run took."""
POOL = tuple(f"pool/{kind.name.lower()}" for kind in Kind)
WIDE = {"width": 1120, "height": 280}
"""Pixels of the reward's chart, which spans the page."""


def report(config: ReportConfig) -> None:
    """The command `posttrain report`: writes the page and prints its path."""
    runs = list(map(Path, config.runs))
    output = Path(config.output) if config.output else None
    if len(runs) == 1:
        path = write_report(runs[0], output)
    else:
        path = output or runs[0].resolve().parent / "comparison.html"
        write_page(path, "comparison.html", f"{len(runs)} runs", **comparison(list(map(read_run, runs))))
    print(path)


def write_report(run: Path, path: Path | None = None) -> Path:
    """Write the report of a run directory, by default to report.html in it. Returns its path.

    Parts that the run has not written yet are left out. Raises UserError if it is no run directory or a file in it
    cannot be read.
    """
    files = read_run(run)
    of_limits = limits(files.recipe, files.series)
    names_watched = watched(files.series, of_limits)
    # The reward has the wide chart, and non_finite is a warning at the top.
    shown_apart = {*POOL, "reward", "non_finite"}.union(*names_watched.values())
    curves = {}
    for name, points in files.series.items():
        # The teacher is measured once, so a curve would be one point; it stands in the table.
        in_table = name.startswith("teacher/") and files.summary.get("teacher")
        if name not in shown_apart and not in_table:
            curves[name] = points
    return write_page(
        path or run / "report.html", "report.html", f"{files.name}: {_base(files.recipe)}",
        name=files.name,
        subtitle=_subtitle(files),
        non_finite=_sum(files.series.get("non_finite", [])),
        verdict=verdict.of_run(run / "samples", files.summary, _lower(files.recipe)),
        summary=summary_tables(files.summary),
        images=run_images(run / "samples"),
        groups=groups(run / "groups"),
        alarms=_alarms(files, of_limits),
        watched=_watched(files, names_watched, of_limits),
        has_metrics=bool(files.series),
        reward=_reward(files.series),
        curves=[Section(title, _charts(names, curves)) for title, names in metrics.by_section(curves)],
        pool=_pool(files.series),
        tables=_tables(run / "prompts.json"),
        cost=_cost(files),
        judges=_judges(files),
        definitions=metrics.definitions(files.series),
        recipe_text=_recipe_text(files),
        changes=[list(public(row).values()) for row in files.changes],
        environment=_environment(files.environment),
    )  # fmt: skip


def _lower(recipe: dict[str, Any]) -> list[str]:
    """Figures of which the recipe says that less is better."""
    stop = (recipe.get("eval") or {}).get("stop") or {}
    return [stop["metric"]] if stop.get("better") == "lower" and stop.get("metric") else []


def _charts(names: Sequence[str], series: Mapping[str, list[Point]]) -> list[Chart]:
    charts = []
    for name in names:
        # The heading of the section has the rest of the name.
        label = name.rpartition("/")[2]
        charts.append(line_chart(label, series[name], definition=metrics.describe(name)))
    return charts


def _reward(series: Mapping[str, list[Point]]) -> dict[str, Chart] | None:
    if "reward" not in series:
        return None
    points, definition = series["reward"], metrics.describe("reward")
    wide = line_chart("reward", points, WIDE["width"], WIDE["height"], definition=definition)
    return {"wide": wide, "narrow": line_chart("reward", points, definition=definition)}


def _base(recipe: dict[str, Any]) -> str:
    model = recipe.get("model") or "K2"
    return public(model if isinstance(model, str) else str(model.get("path", "K2")))


def _recipe_text(files: RunFiles) -> str:
    # As it was written, except for paths, which may name a user.
    shown = public(files.recipe)
    return files.recipe_text if shown == files.recipe else yaml.safe_dump(shown, sort_keys=False, allow_unicode=True)


def _subtitle(files: RunFiles) -> str:
    # A run of `posttrain pairs` counts pairs, all others steps.
    pairs = files.recipe.get("pairs")
    count, noun = (pairs, "pair") if isinstance(pairs, int) else (files.recipe.get("steps", "?"), "step")
    total = counted(count, noun) if isinstance(count, int) else f"{count} {noun}s"
    parts = [f"from {_base(files.recipe)}", f"{files.steps} of {total}"]
    if files.environment.get("started"):
        parts.append(f"started {files.environment['started'][:16].replace('T', ' ')}")
    return " · ".join(parts)


def summary_tables(summary: dict[str, Any]) -> dict[str, Any]:
    """The metrics before and after, and what the run took, for the macro of the same name."""
    before, after, teacher = summary.get("before") or {}, summary.get("after") or {}, summary.get("teacher") or {}
    rows = []
    for name in all_keys([before, after]):
        old, new = before.get(name), after.get(name)
        values = [aligned(old), aligned(new), change(old, new)]
        if teacher:
            values.append(aligned(teacher.get(name)))
        rows.append({"name": name, "values": values, "definition": metrics.describe(f"eval/{name}")})
    took, other = [], []
    for name, value in summary.items():
        if name in COSTS:
            took.append([name, value])
        elif name not in SHOWN_APART:
            other.append([name, value])
    return {
        "stopped": summary.get("stopped"),
        "best": _best(summary),
        "head": ["before", "after", "change", *(["teacher"] if teacher else [])],
        "rows": rows,
        "took": took,
        "other": other,
    }


def _best(summary: dict[str, Any]) -> str:
    best = summary.get("best")
    if not best:
        return ""
    where = "the start: no step did better" if best["step"] == 0 else f"step {best['step']}, in checkpoints/best"
    if summary.get("stopped") and best["step"]:
        where += ": this step is handed on, and is shown as after"
    return f"Best {best['metric']}: {number(best['value'])} at {where}"


def _alarms(files: RunFiles, of_limits: Mapping[str, Sequence[Limit]]) -> list[str]:
    alarms = []
    for name, those in of_limits.items():
        points = files.series[name]
        for limit in those:
            steps = limit.crossed(points)
            if steps:
                count = f"{len(steps)} of {counted(len(points), 'point')}"
                alarms.append(f"{name} was {limit.bad} its limit at {count}, first at step {steps[0]}")
    return alarms


def _watched(
    files: RunFiles, names_watched: Mapping[str, Sequence[str]], of_limits: Mapping[str, Sequence[Limit]]
) -> list[Section]:
    sections = []
    for title, names in names_watched.items():
        charts = []
        for name in names:
            definition = metrics.describe(name)
            charts.append(line_chart(name, files.series[name], limits=of_limits.get(name, ()), definition=definition))
        sections.append(Section(title, charts, most_open=len(charts)))
    return sections


def _pool(series: Mapping[str, list[Point]]) -> Chart | None:
    """How many prompts of an adaptive pool are in each class over time."""
    by_class = {name.removeprefix("pool/"): series[name] for name in POOL if name in series}
    return areas_chart("prompts of each class", by_class) if by_class else None


def _tables(file: Path) -> list[dict[str, Any]]:
    """The prompts at the ends of an adaptive pool."""
    tables = []
    for title, rows in read_tables(file).items():
        # An adaptive pool may have no prompt at one of its ends yet.
        if rows:
            body = [list(row.values()) for row in rows]
            # Columns of numbers are aligned on the right; a missing value does not change that.
            numeric = []
            for values in zip(*body):
                numeric.append(all(isinstance(value, int | float | None) for value in values))
            tables.append({"title": title, "head": list(rows[0]), "rows": body, "numeric": numeric})
    return tables


def _cost(files: RunFiles) -> list[dict[str, Any]]:
    """Where the time and the memory went: bars, each of parts with the rest of the whole."""
    bars = []
    times: dict[str, float] = {}
    for name, points in files.series.items():
        if name.startswith("seconds/"):
            # A missing value is a step that did not have this part.
            times[name.partition("/")[2]] = _sum(points)
    if times:
        rest = (files.summary.get("seconds") or 0.0) - sum(times.values())
        bars.append({"title": "time", "parts": _with_rest(times, "evaluation, saving and the rest", rest), "unit": "s"})
    startup = dict(files.summary.get("startup") or {})
    # The total is the sum of the others, and compilation is part of the first step.
    startup.pop("total", None)
    startup.pop("compile", None)
    if startup:
        bars.append({"title": "time to the end of the first step", "parts": startup, "unit": "s"})
    memory = files.summary.get("memory") or {}
    if memory:
        # On the CPU the peak is that of the whole process, Python and its libraries included.
        on_gpu = "peak_gpu_gib" in files.summary
        peak = files.summary.get("peak_gpu_gib" if on_gpu else "peak_ram_gib", 0.0)
        label = "the rest at the peak: activations, gradients" + ("" if on_gpu else ", Python")
        parts = _with_rest(memory, label, peak - sum(memory.values()))
        bars.append({"title": f"memory of the {'GPU' if on_gpu else 'process'}", "parts": parts, "unit": "GiB"})
    return bars


def _sum(points: Sequence[Point]) -> float:
    return sum(value or 0.0 for _, value in points)


def _with_rest(parts: Mapping[str, float], label: str, rest: float) -> dict[str, float]:
    # Clocks and counters are read at different times, so the rest can come out below 0.
    return {**parts, label: rest} if rest > 0 else dict(parts)


def _judges(files: RunFiles) -> list[list[str]]:
    """What decides the scores: the judges' models and the hashes of the templates that they are asked with."""
    rows = []
    for reward, details in (files.summary.get("rewards") or {}).items():
        # A reward that asks no judge has no template, and one row all the same.
        for name, digest in (details.get("templates") or {"–": "–"}).items():
            rows.append([reward, public(details.get("model", "–")), name, digest])
    digest = read_json(files.path / "expander.json").get("template")
    if digest:
        rows.append(["prompt expander", _base(files.recipe), "expander", digest])
    return rows


def _environment(environment: dict[str, Any]) -> list[list[Any]]:
    flat = {**environment, **(environment.get("packages") or {})}
    # The launch names this machine, and hashes of prompts are for resuming.
    for name in ("packages", "prompts", "launch"):
        flat.pop(name, None)
    return list(map(list, flat.items()))
