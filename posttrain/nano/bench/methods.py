"""Compares methods that learn from rewards on K2-nano at equal images and at equal seconds, over seeds: grpo, nft and
reward-weighted finetuning.

    python -m posttrain.nano.bench.methods --seeds 0 1 2 --output runs/bench-methods     # an hour on one core

Each run draws the same number of images, is evaluated with the same prompts, seeds and steps, and is a command in a
process of its own; one that is finished is only read. Seconds are those of training steps, without evaluations and the
start, so they mean little where something else uses the machine. At equal seconds each run's figures are interpolated
between its evaluations, at the time that the fastest run took. `curves.html` has all curves, with a band over seeds.

A method with the same sections in its recipe is another line of ARMS.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from posttrain.nano.bench import common
from posttrain.report.config import ReportConfig
from posttrain.report.format import all_keys
from posttrain.report.page import report
from prompts.parse import read_lines

FIGURES = {
    "graded": "trained reward, held out",
    "graded@8steps": "the same in 8 steps",
    "oracle": "requirements met",
    "artifact_free": "free of artifacts",
    "image/diversity": "diversity",
    "image/high_frequency": "high frequencies",
}
SHARED = [
    "--steps", "32", "--groups.prompts_per_step", "4", "--groups.group_size", "8", "--eval.every", "8",
    "--eval.prompts", "96", "--eval.steps", "16", "--eval.groups", "8", "--eval.group_size", "4",
    "--optim.warmup_steps", "5", "--optim.ema", "0",
]  # fmt: skip
"""Options of all runs: 1,024 images of 32 prompts a quarter."""


@dataclass(frozen=True)
class Arm:
    """A method with its recipe and its own options."""

    command: list[str]
    """The module, and its words before the options."""
    recipe: str
    options: list[str] = field(default_factory=list)


ARMS = {
    "grpo": Arm(["posttrain.cli", "grpo"], "recipes/nano/demo.yaml", ["--optim.lr", "5e-4"]),
    "nft": Arm(["posttrain.cli", "nft"], "recipes/nano/nft.yaml"),
    "rwr": Arm(["posttrain.nano.bench.reward_weighted"], "recipes/nano/demo.yaml", ["--optim.lr", "1e-3"]),
}


def run(jobs: common.Jobs, name: str, seed: int, options: Sequence[str]) -> dict[str, Any]:
    """One run's row: its figures before and after, and at each evaluation with the images and seconds until then."""
    arm = ARMS[name]
    module, *command = arm.command
    words = [*command, "--config", arm.recipe, "--seed", str(seed), *SHARED, *arm.options, *options]
    rows = read_lines(jobs.run(f"{name}-{seed}", words, module) / "metrics.jsonl")
    images, seconds = {0: 0}, {0: 0.0}
    for row in rows:
        if "images" in row:
            # `images` counts all until then; seconds are those of the step alone.
            images[row["step"]] = row["images"]
            seconds[row["step"]] = seconds[row["step"] - 1] + common.step_seconds(row)
    curve = common.evaluations(rows)
    for evaluation in curve:
        step = evaluation["step"]
        evaluation |= {"images": images[step], "seconds": seconds[step]}
    return {"method": name, "seed": seed, "curve": curve, "rewards": common.known(rows, "reward")}


def at_seconds(curve: Sequence[dict[str, Any]], seconds: float, figure: str) -> float:
    """A figure at a time between two evaluations, or of the last one."""
    known = [point for point in curve if point.get(figure) is not None]
    # np.interp gives the last value for a time after the last evaluation.
    return float(np.interp(seconds, common.column(known, "seconds"), common.column(known, figure)))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line a method, the mean of each figure over seeds with the least and the greatest; the base first."""
    starts = [row["curve"][0] for row in rows]
    ends = [row["curve"][-1] for row in rows]
    # The fastest run's time: the others have reached it too, so nothing is extrapolated.
    least = min(common.column(ends, "seconds"))
    measured = all_keys(ends)
    figures = [name for name in FIGURES if name in measured]
    lines: list[list[Any]] = [["base", 0, "", *common.cells(starts, figures)]]
    methods = common.grouped(rows, "method")
    for name, own in methods.items():
        ends = [row["curve"][-1] for row in own]
        seconds = common.mean_and_extent(common.column(ends, "seconds"), ".0f")
        lines.append([name, ends[0]["images"], seconds, *common.cells(ends, figures)])
    for name, own in methods.items():
        curves = common.column(own, "curve")
        cells = []
        for figure in figures:
            having = [curve for curve in curves if curve[-1].get(figure) is not None]
            cells.append(common.mean_and_extent([at_seconds(curve, least, figure) for curve in having]))
        images = np.mean([at_seconds(curve, least, "images") for curve in curves])
        lines.append([f"{name}, equal seconds", f"{images:.0f}", f"{least:.0f}", *cells])
    return common.markdown(["", "images", "seconds", *map(FIGURES.__getitem__, figures)], lines)


def main() -> None:
    parser = common.parser(__doc__, "grpo, nft or rwr")
    parser.add_argument("--methods", nargs="+", default=list(ARMS), choices=list(ARMS))
    args = parser.parse_args()
    jobs = common.Jobs(args.output, args.jobs)
    todo = list(itertools.product(args.seeds, args.methods))
    rows = common.side_by_side(run, [(jobs, name, seed, args.options) for seed, name in todo])
    common.write(args.output, rows, table(rows))
    folders = [str(args.output / f"{name}-{seed}") for seed, name in todo]
    if len(folders) > 1:
        report(ReportConfig(folders, str(args.output / "curves.html")))


if __name__ == "__main__":
    main()
