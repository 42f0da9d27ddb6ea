"""The ablation of the diversity reward: GDPO of the expander with it, without it, and with it annealed away.

    python -m posttrain.nano.bench.expander --seeds 0 1 2 --output runs/bench-expander

Each run is `posttrain expander gdpo` in a process of its own, from the same start; with --jobs several run at once, on
all GPUs in turn. Writes table.json, table.md and figure.svg: what each figure was before and is after, and how a reward
and the diversity change over the steps, in which each run is a line and each arm a colour.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any

from posttrain.nano.bench import common
from posttrain.report.charts import panels_svg
from posttrain.runs.read import Point

ARMS = {"full": "kept", "diversity off": "removed", "annealed": "annealed"}
LEFT_OUT = ("format/", "missing", "cut")
"""Figures that the table has no room for; table.json has them all."""


def run(jobs: common.Jobs, arm: str, seed: int, recipe: str, options: Sequence[str]) -> dict[str, Any]:
    """One run's row: figures before and after, and each evaluation."""
    name = f"{arm.replace(' ', '-')}-{seed}"
    words = ["expander", "gdpo", "--config", recipe, "--output", str(jobs.folder / name), "--seed", str(seed)]
    seconds = jobs(name, "posttrain.cli", [*words, "--ablation.diversity", ARMS[arm], *options])
    curve = json.loads((jobs.folder / name / "evaluations.json").read_text())
    before, after = curve[0]["figures"], curve[-1]["figures"]
    return {"arm": arm, "seed": seed, "before": before, "after": after, "curve": curve, "seconds": seconds}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line a figure; its value before, and each arm's mean after with the seeds' least and greatest."""
    arms = common.grouped(rows, "arm")
    before = rows[0]["before"]
    lines = []
    for name in before:
        if name.startswith(LEFT_OUT):
            continue
        cells = [name, common.mean_and_extent([before[name]])]
        for own in arms.values():
            cells.append(common.mean_and_extent(common.column(common.column(own, "after"), name)))
        lines.append(cells)
    shares = [common.mean_and_extent(list(map(_share, own))) for own in arms.values()]
    lines.append(["diversity, share of before", "1", *shares])
    return common.markdown(["figure", "before", *arms], lines)


def _share(row: dict[str, Any]) -> float | None:
    before, after = row["before"]["diversity"], row["after"]["diversity"]
    return None if not before or after is None else after / before


def figure(rows: Sequence[dict[str, Any]], reward: str) -> str:
    """An SVG file: a reward and the diversity of held-out prompts by step."""
    panels: dict[str, dict[str, list[list[Point]]]] = {}
    for name in (reward, "diversity"):
        panel = panels[f"{name}, held out"] = {}
        for row in rows:
            points = [(evaluation["step"], evaluation["figures"].get(name)) for evaluation in row["curve"]]
            panel.setdefault(row["arm"], []).append(points)
    return panels_svg(panels)


def main() -> None:
    parser = common.parser(__doc__, "expander gdpo", "recipes/nano/expander_gdpo.yaml")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--reward", default="aesthetic", help="the reward that the figure shows beside the diversity")
    args = parser.parse_args()
    jobs = common.Jobs(args.output, args.jobs)
    todo = itertools.product(args.seeds, args.arms)
    rows = common.side_by_side(run, [(jobs, arm, seed, args.recipe, args.options) for seed, arm in todo])
    (args.output / "figure.svg").write_text(figure(rows, args.reward))
    common.write(args.output, rows, table(rows))


if __name__ == "__main__":
    main()
