"""report.html: a run on one page that opens anywhere without a network, or several runs side by side on one.

    posttrain report runs/a            # writes runs/a/report.html
    posttrain report runs/a runs/b     # writes runs/comparison.html

Everything is inside the file: style, charts as SVG, images as data URIs, and the few lines of script of the slider.
Text that comes from prompts, recipes or metrics is escaped, and the page's own policy forbids it to load anything and
to run any other script.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from posttrain.report.before_after import pictures
from posttrain.report.chart_many import areas_chart
from posttrain.report.charts import Point, line_chart, number
from posttrain.report.compare import comparison
from posttrain.report.config import ReportConfig
from posttrain.report.groups import groups_section
from posttrain.report.html import by_section, figure, page, section, shares, shown, table, text
from posttrain.report.limits import limits, watched
from posttrain.runs.read import RunFiles, read_json, read_run, read_tables
from prompts.pool import Kind

SHOWN_APART = ("before", "after", "teacher", "best", "stopped", "memory", "rewards", "startup")
POOL = tuple(f"pool/{kind.name.lower()}" for kind in Kind)


def report(config: ReportConfig) -> None:
    """The command `posttrain report`: write the page and say where it is."""
    runs = [Path(run) for run in config.runs]
    output = Path(config.output) if config.output else None
    if len(runs) == 1:
        path = write_report(runs[0], output)
    else:
        path = output or runs[0].resolve().parent / "comparison.html"
        write_page(path, f"{len(runs)} runs", comparison([read_run(run) for run in runs]))
    print(path)


def write_report(run: Path, path: Path | None = None) -> Path:
    """Write the report of a run directory, by default to report.html in it. Returns its path.

    Parts the run has not written yet are left out. Raises UserError if it is no run directory or a file in it
    cannot be read.
    """
    files = read_run(run)
    held = limits(files.recipe, files.series)
    watches = watched(files.series, held)
    held_once = {name for name in files.series if name.startswith("teacher/") and files.summary.get("teacher")}
    apart = (
        held_once
        | {name for part in watches.values() for name in part}
        | {name for name in POOL if name in files.series}
    )
    body = [
        f"<header><h1>{text(files.name)}</h1>{_subtitle(files)}</header>",
        summary_tables(files.summary),
        pictures(run / "samples"),
        groups_section(run / "groups"),
        _watches(files, watches, held),
        _curves({name: points for name, points in files.series.items() if name not in apart}),
        _pool(files.series),
        _prompts(read_tables(run / "prompts.json")),
        _cost(files),
        _judges(files),
        f"<h2>Settings</h2><details><summary>Resolved recipe</summary><pre>{text(files.recipe_text)}</pre></details>",
        _environment(files.environment),
    ]
    return write_page(path or run / "report.html", f"{files.name}: {_base(files.recipe)}", body)


def write_page(path: Path, title: str, body: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    # A recipe's text may hold half a character.
    path.write_text(page(title, body), encoding="utf-8", errors="backslashreplace")
    return path


def _base(recipe: dict[str, Any]) -> str:
    model = recipe.get("model") or "K2"
    return model if isinstance(model, str) else str(model.get("path", "K2"))


def _subtitle(files: RunFiles) -> str:
    wanted = files.recipe.get("pairs")
    counted = f"{wanted} pairs" if isinstance(wanted, int) else f"{files.recipe.get('steps', '?')} steps"
    parts = [f"from {_base(files.recipe)}", f"{files.steps} of {counted}"]
    if files.environment.get("started"):
        parts.append(f"started {files.environment['started'][:16].replace('T', ' ')}")
    lost = sum(value or 0 for _, value in files.series.get("non_finite", []))
    warning = f"<p><b>Metric values that were NaN or infinite: {number(lost)}</b></p>" if lost else ""
    return f"<p>{text(' · '.join(parts))}</p>{warning}"


def summary_tables(summary: dict[str, Any]) -> str:
    parts: list[dict[str, Any]] = [summary.get(name) or {} for name in ("before", "after", "teacher")]
    before, after, teacher = parts
    rows = []
    for name in [*before, *(name for name in after if name not in before)]:
        old, new = before.get(name), after.get(name)
        change = figure(new - old, "+") if isinstance(old, int | float) and isinstance(new, int | float) else ""
        values = [figure(old), figure(new), change, *([figure(teacher.get(name))] if teacher else [])]
        rows.append([name, *values])
    head = ["", "before", "after", "change", *(["teacher"] if teacher else [])]
    figures = table(head, rows, [False] + [True] * (len(head) - 1))
    result = f"<div><h2>Before and after</h2>{figures}</div>" if rows else ""
    rest = [[name, shown(value)] for name, value in summary.items() if name not in SHOWN_APART]
    took = f"<div><h2>What it took</h2>{table(['', ''], rest, [False, True])}</div>" if rest else ""
    return f'{_outcome(summary)}<div class="tables">{result}{took}</div>'


def _outcome(summary: dict[str, Any]) -> str:
    lines = []
    if reason := summary.get("stopped"):
        lines.append(f"<p><b>Stopped early: {text(reason)}</b></p>")
    if best := summary.get("best"):
        where = "the start: no step did better" if best["step"] == 0 else f"step {best['step']}, in checkpoints/best"
        if summary.get("stopped") and best["step"]:
            where += ": what the run hands on, and what is shown as after"
        lines.append(f"<p>Best {text(best['metric'])}: {number(best['value'])} at {where}</p>")
    return "".join(lines)


def _watches(files: RunFiles, watches: dict[str, list[str]], held: dict[str, Any]) -> str:
    if not watches:
        return ""
    parts = ["<h2>Watches</h2>"]
    for limit, name in ((limit, name) for name, those in held.items() for limit in those):
        if crossed := limit.crossed(files.series[name]):
            parts.append(
                f'<p class="alarm">{text(name)} was {limit.bad} its limit at {len(crossed)} of'
                f" {len(files.series[name])} points, first at step {crossed[0]}</p>"
            )
    for title, names in watches.items():
        charts = [line_chart(name, files.series[name], limits=held.get(name, ())) for name in names]
        parts.append(section(title, charts, most=len(charts)))
    return "".join(parts)


def _curves(series: dict[str, list[Point]]) -> str:
    if not series:
        return "<h2>Curves</h2><p>No metrics yet.</p>"
    parts = ["<h2>Curves</h2>"]
    if "reward" in series:
        wide = line_chart("reward", series["reward"], width=1120, height=280)
        narrow = line_chart("reward", series["reward"])
        parts.append(f'<div class="wide">{wide}</div><div class="narrow">{narrow}</div>')
    for title, names in by_section(name for name in series if name not in ("reward", "non_finite")):
        charts = [line_chart(name.rpartition("/")[2], series[name]) for name in names]
        parts.append(section(title, charts))
    return "".join(parts)


def _pool(series: dict[str, list[Point]]) -> str:
    """How many prompts of an adaptive pool are in each class over time."""
    held = {name.removeprefix("pool/"): series[name] for name in POOL if name in series}
    if not held:
        return ""
    return f'<h2>Prompt pool</h2><div class="card">{areas_chart("prompts of each class", held)}</div>'


def _prompts(tables: dict[str, list[dict[str, Any]]]) -> str:
    """The prompts at the ends of an adaptive pool."""
    parts = ["<h2>Prompts</h2>"] if any(tables.values()) else []
    for title, rows in tables.items():
        if rows:
            numeric = [all(isinstance(row[name], int | float | None) for row in rows) for name in rows[0]]
            parts.append(f"<h3>{text(title)}</h3>{table(list(rows[0]), [list(r.values()) for r in rows], numeric)}")
    return "".join(parts)


def _cost(files: RunFiles) -> str:
    """Where the time and the memory went."""
    parts = []
    named = {n: p for n, p in files.series.items() if n.startswith("seconds/")}
    times = {name.partition("/")[2]: sum(value or 0.0 for _, value in points) for name, points in named.items()}
    if times:
        if (rest := (files.summary.get("seconds") or 0.0) - sum(times.values())) > 0:
            times["evaluation, saving and the rest"] = rest
        parts.append(f"<h3>time</h3>{shares(times, 's')}")
    begun = {name: s for name, s in (files.summary.get("startup") or {}).items() if name not in ("compile", "total")}
    if begun:
        parts.append(f"<h3>time to the end of the first step</h3>{shares(begun, 's')}")
    if kept := dict(files.summary.get("memory") or {}):
        device = "gpu" if "peak_gpu_gib" in files.summary else "ram"
        if (rest := files.summary.get(f"peak_{device}_gib", 0.0) - sum(kept.values())) > 0:
            kept["the rest at the peak: activations, gradients" + ("" if device == "gpu" else ", Python")] = rest
        parts.append(f"<h3>memory of the {'GPU' if device == 'gpu' else 'process'}</h3>{shares(kept, 'GiB')}")
    return f"<h2>Time and memory</h2>{''.join(parts)}" if parts else ""


def _judges(files: RunFiles) -> str:
    """What decides the scores: the judges' models and the hashes of what they are asked."""
    rows = [
        [reward, said.get("model", "–"), name, digest]
        for reward, said in (files.summary.get("rewards") or {}).items()
        for name, digest in (said.get("templates") or {"–": "–"}).items()
    ]
    if digest := read_json(files.path / "expander.json").get("template"):
        rows.append(["prompt expander", _base(files.recipe), "expander", digest])
    head = ["reward", "model", "template", "hash"]
    return f"<h2>Judges and templates</h2>{table(head, rows, [False] * 4)}" if rows else ""


def _environment(environment: dict[str, Any]) -> str:
    if not environment:
        return ""
    flat = {**environment, **(environment.get("packages") or {})}
    flat.pop("packages", None)
    rows = table(["", ""], [list(item) for item in flat.items()], [False, False])
    return f"<h2>Environment</h2><details><summary>Versions and devices</summary>{rows}</details>"
