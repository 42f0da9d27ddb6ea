"""report.html: a run on one page that opens anywhere without a network.

Everything is inside the file: style, charts as SVG, images as data URIs. There is no script. Text that comes
from prompts, recipes or metrics is escaped, and the page's own policy forbids it to load anything.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
from pathlib import Path
from typing import Any

from PIL import Image

from posttrain.chart import Point, line_chart, number
from posttrain.config import ReportConfig
from posttrain.group_page import STYLE as GROUPS_STYLE
from posttrain.group_page import groups_section
from posttrain.recipe import read_recipe
from posttrain.run_files import read_json, read_rows, read_tables, shaped
from prompts.errors import UserError
from prompts.parse import parse_json

MOST_PAIRS = 24  # images of each of the two steps shown
LARGEST = 512  # pixels of the longer side; larger images are reduced for the report
SHOWN_APART = ("before", "after", "teacher", "best", "stopped")
FIRST = ("reward", "loss", "ratio", "kl", "clip", "grad_norm", "diversity")  # order of the plain curves

STYLE = """
:root { color-scheme: light dark; --page: #fafaf8; --card: #fff; --text: #1d1d1b; --soft: #6a6a65;
  --rule: #e4e3df; --ink: #2f55cf; }
@media (prefers-color-scheme: dark) { :root { --page: #141413; --card: #1d1d1c; --text: #ecebe8;
  --soft: #a09f99; --rule: #33322f; --ink: #8ea7ff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); overflow-wrap: break-word;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1200px; margin: 0 auto; padding: 32px 16px 64px; }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 4px; }
h2 { font-size: 19px; margin: 40px 0 12px; }
h3 { font-size: 15px; margin: 24px 0 8px; color: var(--soft); font-weight: 600; }
p { margin: 4px 0; color: var(--soft); }
figure { margin: 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { text-align: left; padding: 6px 20px 6px 0;
  border-bottom: 1px solid var(--rule); vertical-align: top; }
th { font-weight: 600; font-size: 14px; color: var(--soft); }
td:last-child, .tables td { overflow-wrap: anywhere; }
td.n, th.n { text-align: right; white-space: nowrap; }
.tables { display: flex; flex-wrap: wrap; column-gap: 72px; }
.wide, .narrow > figure, .charts > figure, .pairs > figure { background: var(--card);
  border: 1px solid var(--rule); border-radius: 8px; padding: 12px; }
.narrow { display: none; }
.charts { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 320px), 1fr)); }
.chart figcaption { font-size: 14px; color: var(--soft);
  display: flex; justify-content: space-between; gap: 8px; }
.chart b { color: var(--text); font-weight: 600; }
svg { display: block; width: 100%; height: auto; }
svg text { font-size: 11px; fill: var(--soft); }
.rule { stroke: var(--rule); }
.line, .faint { fill: none; stroke: var(--ink); stroke-width: 2; stroke-linejoin: round; }
.faint { stroke-width: 1; opacity: .35; }
.dot { fill: var(--ink); }
.pairs { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 270px), 1fr)); }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 6px; }
.pair div { font-size: 12px; color: var(--soft); }
.pair img { display: block; width: 100%; border-radius: 4px; }
.pair img.small { image-rendering: pixelated; }
.pairs figcaption { font-size: 14px; margin-top: 6px; }
.pairs figcaption span { color: var(--soft); white-space: nowrap; }
pre { background: var(--card); border: 1px solid var(--rule); border-radius: 8px;
  padding: 12px; margin: 8px 0 0;
  overflow-x: auto; font: 13px/1.5 ui-monospace, "DejaVu Sans Mono", monospace; }
summary { cursor: pointer; }
@media (max-width: 640px) { .wide { display: none; } .narrow { display: block; } main { padding-top: 20px; }
  td, th { padding-right: 12px; } }
"""


def report(config: ReportConfig) -> None:
    """The command `posttrain report`: write the page and say where it is."""
    run = Path(config.run)
    path = write_report(run, Path(config.output) if config.output else run / "report.html")
    print(path)


def write_report(run: Path, path: Path | None = None) -> Path:
    """Write the report of a run directory, by default to report.html in it. Returns its path.

    Parts the run has not written yet are left out. Raises UserError if it is no run directory or a file in it
    cannot be read.
    """
    if not (run / "recipe.yaml").is_file():
        raise UserError(f"{run}: is not a run directory (no recipe.yaml); give the --output of a training run")
    path = path or run / "report.html"
    recipe = shaped(run / "recipe.yaml", read_recipe(run / "recipe.yaml"), model=dict)
    recipe_text = (run / "recipe.yaml").read_text()
    summary = read_json(run / "summary.json", before=dict, after=dict, teacher=dict, best=dict)
    environment = read_json(run / "environment.json", started=str, packages=dict)
    series = read_metrics(run / "metrics.jsonl")
    title = f"{run.resolve().name}: {_base(recipe)}"
    body = [
        f"<header><h1>{_text(run.resolve().name)}</h1>{_subtitle(recipe, environment, series)}</header>",
        summary_tables(summary),
        _curves(series),
        _prompts(read_tables(run / "prompts.json")),
        _images(run / "samples"),
        groups_section(run / "groups"),
        "<h2>Settings</h2>",
        f"<details><summary>Resolved recipe</summary><pre>{_text(recipe_text)}</pre></details>",
        _environment(environment),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(title, body), encoding="utf-8")
    return path


def page(title: str, body: list[str]) -> str:
    """A whole document of these parts, which may load nothing but what they hold; empty ones are left out."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:;'
        " style-src 'unsafe-inline'\">"
        f"<title>{_text(title)}</title><style>{STYLE}{GROUPS_STYLE}</style></head><body><main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main></body></html>\n"
    )


def read_metrics(path: Path) -> dict[str, list[Point]]:
    """metrics.jsonl as one series of (step, value or None) for each metric; a torn last line is left out.

    Raises UserError with the line number for any other line that is not JSON.
    """
    series: dict[str, list[Point]] = {}
    if not path.is_file():
        return series
    for line_number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            row = parse_json(line)
        except ValueError as error:
            raise UserError(f"{path}:{line_number}: {error}; remove the line") from None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise UserError(f"{path}:{line_number}: is of no step; remove the line")
        values = {name: value for name, value in row.items() if name not in ("step", "time")}
        if not all(value is None or _is_figure(value) for value in values.values()):
            raise UserError(f"{path}:{line_number}: holds what is no figure; remove the line")
        for name, value in values.items():
            series.setdefault(name, []).append((row["step"], value))
    return series


def _subtitle(recipe: dict, environment: dict, series: dict[str, list[Point]]) -> str:
    steps = max((points[-1][0] for points in series.values()), default=0)
    parts = [
        f"from {_base(recipe)}",
        f"{steps} of {recipe.get('steps', '?')} steps",
    ]
    if environment.get("started"):
        parts.append(f"started {environment['started'][:16].replace('T', ' ')}")
    lost = sum(value or 0 for _, value in series.get("non_finite", []))
    warning = f"<p><b>Metric values that were NaN or infinite: {number(lost)}</b></p>" if lost else ""
    return f"<p>{_text(' · '.join(parts))}</p>{warning}"


def summary_tables(summary: dict[str, Any]) -> str:
    parts: list[dict[str, Any]] = [summary.get(name) or {} for name in ("before", "after", "teacher")]
    before, after, teacher = parts
    rows = []
    for name in [*before, *(name for name in after if name not in before)]:
        old, new = before.get(name), after.get(name)
        change = _figure(new - old, "+") if isinstance(old, int | float) and isinstance(new, int | float) else ""
        values = [_figure(old), _figure(new), change, *([_figure(teacher.get(name))] if teacher else [])]
        cells = "".join(f'<td class="n">{_text(value)}</td>' for value in values)
        rows.append(f"<tr><td>{_text(name)}</td>{cells}</tr>")
    titles = ["before", "after", "change", *(["teacher"] if teacher else [])]
    head = "<tr><th></th>" + "".join(f'<th class="n">{title}</th>' for title in titles) + "</tr>"
    table = f"<div><h2>Before and after</h2><table>{head}{''.join(rows)}</table></div>" if rows else ""
    rest = {name: value for name, value in summary.items() if name not in SHOWN_APART}
    cost = "".join(f'<tr><td>{_text(k)}</td><td class="n">{_text(_value(v))}</td></tr>' for k, v in rest.items())
    took = f"<div><h2>What it took</h2><table>{cost}</table></div>" if cost else ""
    return f'{_outcome(summary)}<div class="tables">{table}{took}</div>'


def _outcome(summary: dict[str, Any]) -> str:
    lines = []
    if reason := summary.get("stopped"):
        lines.append(f"<p><b>Stopped early: {_text(reason)}</b></p>")
    if best := summary.get("best"):
        where = "the start: no step did better" if best["step"] == 0 else f"step {best['step']}, in checkpoints/best"
        lines.append(f"<p>Best {_text(best['metric'])}: {number(best['value'])} at {where}</p>")
    return "".join(lines)


def _curves(series: dict[str, list[Point]]) -> str:
    if not series:
        return "<h2>Curves</h2><p>No metrics yet.</p>"
    parts = ["<h2>Curves</h2>"]
    if "reward" in series:
        wide = line_chart("reward", series["reward"], width=1120, height=280)
        narrow = line_chart("reward", series["reward"])
        parts.append(f'<div class="wide">{wide}</div><div class="narrow">{narrow}</div>')
    sections: dict[str, list[str]] = {}
    for name in series:
        if name not in ("reward", "non_finite"):
            sections.setdefault(name.rpartition("/")[0], []).append(name)
    for section, names in sorted(sections.items(), key=lambda item: item[0] != ""):
        names.sort(key=_rank)
        charts = [line_chart(name.rpartition("/")[2], series[name]) for name in names]
        parts.append(f'<h3>{_text(section or "training")}</h3><div class="charts">{"".join(charts)}</div>')
    return "".join(parts)


def _rank(name: str) -> int:
    return next((i for i, start in enumerate(FIRST) if name.startswith(start)), len(FIRST))


def _prompts(tables: dict[str, list[dict[str, Any]]]) -> str:
    """The prompts at the ends of an adaptive pool; their classes over time are among the curves."""
    parts = ["<h2>Prompts</h2>"] if any(tables.values()) else []
    for title, rows in tables.items():
        if rows:
            numeric = [all(isinstance(row[name], int | float | None) for row in rows) for name in rows[0]]
            parts.append(f"<h3>{_text(title)}</h3>{_table(list(rows[0]), [list(r.values()) for r in rows], numeric)}")
    return "".join(parts)


def _table(head: list[str], rows: list[list[Any]], numeric: list[bool]) -> str:
    def line(tag: str, cells: list[str]) -> str:
        css = [' class="n"' if right else "" for right in numeric]
        return "<tr>" + "".join(f"<{tag}{c}>{_text(t)}</{tag}>" for c, t in zip(css, cells)) + "</tr>"

    return f"<table>{line('th', head)}{''.join(line('td', [_value(v) for v in row]) for row in rows)}</table>"


def _images(samples: Path) -> str:
    steps = sorted(samples.glob("step-*")) if samples.is_dir() else []
    if not steps:
        return ""
    prompts = read_rows(samples / "prompts.json")
    shown = [steps[0]] if len(steps) == 1 else [steps[0], steps[-1]]
    names = [path.name for path in sorted(shown[0].glob("*.png")) if (shown[-1] / path.name).is_file()]
    figures = []
    for i, name in enumerate(names[:MOST_PAIRS]):
        row = prompts[i] if i < len(prompts) else {}
        cells = []
        for directory in shown:
            uri, small = data_uri(directory / name)
            step = int(directory.name.removeprefix("step-"))
            css = ' class="small"' if small else ""
            cells.append(f'<div><img{css} src="{uri}" alt="step {step}">step {step}</div>')
        caption = f"{_text(row.get('prompt', name))} <span>seed {_text(row.get('seed', '?'))}</span>"
        figures.append(f'<figure><div class="pair">{"".join(cells)}</div><figcaption>{caption}</figcaption></figure>')
    more = f", {MOST_PAIRS} of {len(names)} shown" if len(names) > MOST_PAIRS else ""
    return (
        "<h2>Images</h2><p>The same prompts and seeds at the first and the last step"
        f'{more}.</p><div class="pairs">{"".join(figures)}</div>'
    )


def _environment(environment: dict[str, Any]) -> str:
    if not environment:
        return ""
    flat = {**environment, **(environment.get("packages") or {})}
    flat.pop("packages", None)
    rows = "".join(f"<tr><td>{_text(name)}</td><td>{_text(_value(value))}</td></tr>" for name, value in flat.items())
    return f"<h2>Environment</h2><details><summary>Versions and devices</summary><table>{rows}</table></details>"


def _figure(value: Any, sign: str = "") -> str:
    """A figure of the before/after table: four decimals, so that columns line up, unless it is large."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return _value(value)
    return f"{value:{sign}.4f}" if abs(value) < 100 else f"{value:{sign},.0f}"


def _value(value: Any) -> str:
    if value is None or value == []:
        return "–"
    if isinstance(value, list):
        return ", ".join(_value(item) for item in value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return number(value)
    return json.dumps(value) if isinstance(value, dict) else str(value)


def _text(value: object) -> str:
    return html.escape(str(value))


def _base(recipe: dict[str, Any]) -> str:
    return str((recipe.get("model") or {}).get("path", "K2"))


def _is_figure(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def data_uri(path: Path) -> tuple[str, bool]:
    """The image as a data URI, and whether it is so small that it should be enlarged without smoothing."""
    image = Image.open(path).convert("RGB")
    small = max(image.size) <= 128
    image.thumbnail((LARGEST, LARGEST))
    kind = "png" if max(image.size) <= 256 else "jpeg"
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=90)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}", small
