"""The ablation of the diversity reward: GDPO of the expander with it, without it, and with it annealed away.

    python -m posttrain.nano.bench.expander --seeds 0 1 2 --output runs/bench-expander

Each run is `posttrain expander gdpo` in a process of its own, from the same start; with --jobs several run at once, on
all GPUs in turn. Writes table.json, table.md and figure.svg: what each figure was before and is after, and the course
of a reward and of the diversity, in which a line is the mean over seeds and a band reaches from the least to the most.
"""

from __future__ import annotations

import argparse
import html
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.nano.bench.jobs import Jobs
from posttrain.report.charts import nice_ticks
from posttrain.report.format import number

ARMS = {"full": "kept", "diversity off": "removed", "annealed": "annealed"}
COLOURS = {"full": "#2f55cf", "diversity off": "#c2410c", "annealed": "#15803d"}
LEFT_OUT = ("format/", "missing", "cut")
"""Figures that the table has no room for; table.json has them all."""


def run(jobs: Jobs, arm: str, seed: int, recipe: str, options: Sequence[str]) -> dict[str, Any]:
    """One run's row: figures before and after, and each evaluation."""
    name = f"{arm.replace(' ', '-')}-{seed}"
    words = ["expander", "gdpo", "--config", recipe, "--output", str(jobs.folder / name), "--seed", str(seed)]
    seconds = jobs(name, "posttrain.cli", [*words, "--ablation.diversity", ARMS[arm], *options])
    curve = json.loads((jobs.folder / name / "evaluations.json").read_text())
    before, after = curve[0]["figures"], curve[-1]["figures"]
    return {"arm": arm, "seed": seed, "before": before, "after": after, "curve": curve, "seconds": seconds}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line a figure; its mean before, and each arm's after with the seeds' least and greatest."""
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    figures = [name for name in rows[0]["before"] if not name.startswith(LEFT_OUT)]
    lines = [f"| figure | before | {' | '.join(arms)} |", "|---|" + "---|" * (len(arms) + 1)]
    for name in figures:
        before = [row["before"].get(name) for row in rows]
        cells = [_cell([row["after"].get(name) for row in rows if row["arm"] == arm]) for arm in arms]
        lines.append(f"| {name} | {_cell(before[:1])} | {' | '.join(cells)} |")
    share = [_cell([_share(row) for row in rows if row["arm"] == arm]) for arm in arms]
    lines.append(f"| diversity, share of before | 1 | {' | '.join(share)} |")
    return "\n".join(lines)


def _share(row: dict[str, Any]) -> float | None:
    before, after = row["before"]["diversity"], row["after"]["diversity"]
    return None if not before or after is None else after / before


def _cell(values: Sequence[float | None]) -> str:
    there = [value for value in values if value is not None]
    if not there:
        return "–"
    spread = f" ({min(there):.3f} to {max(there):.3f})" if len(there) > 1 else ""
    return f"{np.mean(there):.3f}{spread}"


def figure(rows: Sequence[dict[str, Any]], reward: str) -> str:
    """An SVG that stands by itself: the reward on the left and the diversity on the right, by step."""
    width, height = 460, 300
    panels = [_panel(rows, name, i * width, width, height) for i, name in enumerate((reward, "diversity"))]
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    legend = "".join(
        f'<circle cx="{60 + 150 * i}" cy="{height + 14}" r="5" fill="{COLOURS[arm]}"/>'
        f'<text x="{70 + 150 * i}" y="{height + 18}">{arm}</text>'
        for i, arm in enumerate(arms)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * width} {height + 30}" width="{2 * width}"'
        f' height="{height + 30}" font-family="system-ui, sans-serif" font-size="12">'
        f'<rect width="100%" height="100%" fill="#fff"/>{"".join(panels)}{legend}</svg>\n'
    )


def _panel(rows: Sequence[dict[str, Any]], name: str, start: int, width: int, height: int) -> str:
    courses = {arm: _course([row for row in rows if row["arm"] == arm], name) for arm in ARMS}
    points = [point for course in courses.values() for point in course]
    values = [value for _, *three in points for value in three]
    if not values:
        return ""
    ticks = nice_ticks(min(values), max(values))
    low, high = min(ticks), max(ticks)
    last = max(step for step, *_ in points) or 1

    def x(step: float) -> float:
        return start + 56 + (width - 76) * step / last

    def y(value: float) -> float:
        return 34 + (height - 70) * (1 - (value - low) / (high - low))

    parts = [f'<text x="{start + 56}" y="20" font-weight="600">{html.escape(name)}, held out</text>']
    for tick in ticks:
        parts.append(f'<line x1="{x(0)}" x2="{x(last)}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" stroke="#e4e3df"/>')
        parts.append(f'<text x="{x(0) - 6}" y="{y(tick) + 4:.1f}" text-anchor="end" fill="#555">{number(tick)}</text>')
    for step in (0, last):
        end = "end" if step else "start"
        parts.append(f'<text x="{x(step)}" y="{height - 18}" text-anchor="{end}" fill="#555">step {step}</text>')
    for arm, course in courses.items():
        if not course:
            continue
        upper = [f"{x(step):.1f} {y(most):.1f}" for step, _, _, most in course]
        lower = [f"{x(step):.1f} {y(least):.1f}" for step, _, least, _ in reversed(course)]
        line = " L".join(f"{x(step):.1f} {y(mean):.1f}" for step, mean, *_ in course)
        parts.append(f'<path d="M{" L".join(upper + lower)}Z" fill="{COLOURS[arm]}" opacity=".15"/>')
        parts.append(f'<path d="M{line}" fill="none" stroke="{COLOURS[arm]}" stroke-width="2"/>')
    return "".join(parts)


def _course(rows: Sequence[dict[str, Any]], name: str) -> list[tuple[int, float, float, float]]:
    """(step, mean, least, most) over seeds, at the steps that all of them have."""
    courses = [
        {e["step"]: e["figures"][name] for e in row["curve"] if e["figures"].get(name) is not None} for row in rows
    ]
    steps = sorted(set.intersection(*map(set, courses))) if courses else []
    values = {step: [course[step] for course in courses] for step in steps}
    return [(step, float(np.mean(v)), min(v), max(v)) for step, v in values.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", default="recipes/nano/expander_gdpo.yaml")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--reward", default="aesthetic", help="the reward that the figure shows beside the diversity")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--output", type=Path, required=True, help="directory for the runs, the table and the figure")
    parser.add_argument("options", nargs="*", help="further options for posttrain expander gdpo, after --")
    args = parser.parse_args()
    jobs = Jobs(args.output, args.jobs)
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = [
            pool.submit(run, jobs, arm, seed, args.recipe, args.options) for seed in args.seeds for arm in args.arms
        ]
        rows = [row.result() for row in runs]
    (args.output / "table.json").write_text(json.dumps(rows, indent=1) + "\n")
    (args.output / "figure.svg").write_text(figure(rows, args.reward))
    text = table(rows)
    (args.output / "table.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
