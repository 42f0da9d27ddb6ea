"""Repeats a GRPO recipe, and variants of it, over seeds; tables what each gained and what it took.

    python -m posttrain.nano.bench.grpo --seeds 0 1 2 --output runs/bench-grpo                       # the demo
    python -m posttrain.nano.bench.grpo --recipe recipes/nano/ablations/base.yaml \\
        --variants recipes/nano/ablations/*.yaml --seeds 0 1 2 --jobs 12 --output runs/ablations

A variant is a recipe that is read after the first and overrides it. Each run is `posttrain grpo` in a process of its
own, so seconds hold start and end; with --jobs several run at once, on all GPUs in turn, and seconds mean little.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.nano.bench import common
from prompts.parse import read_lines


def run(jobs: common.Jobs, name: str, recipes: Sequence[str], seed: int, options: Sequence[str]) -> dict[str, Any]:
    """One run's row: figures before and after, each evaluation, and what it took."""
    folder = jobs.folder / f"{name}-{seed}"
    arguments = ["grpo"]
    for recipe in recipes:
        arguments += ["--config", recipe]
    seconds = jobs(folder.name, "posttrain.cli", [*arguments, "--output", str(folder), "--seed", str(seed), *options])
    summary = json.loads((folder / "summary.json").read_text())
    rows = read_lines(folder / "metrics.jsonl")
    # An evaluation has a line of its own; the number of images is in that of the step.
    images = {0: 0}
    for row in rows:
        if "images" in row:
            images[row["step"]] = row["images"]
    curve = common.evaluations(rows)
    for evaluation in curve:
        evaluation["images"] = images[evaluation["step"]]
    return {
        "variant": name, "seed": seed, "before": summary["before"], "after": summary["after"], "curve": curve,
        "seconds": round(seconds), "images": summary["images"], "ratio_error": max(common.known(rows, "ratio_error")),
    }  # fmt: skip


def table(rows: Sequence[dict[str, Any]], figures: Sequence[str]) -> str:
    """Markdown: a line a variant, each figure's mean before and after, and the seeds' least and greatest after."""
    lines = []
    for name, own in common.grouped(rows, "variant").items():
        cells = [_cell(own, figure) for figure in figures]
        seconds, error = np.mean(common.column(own, "seconds")), max(common.column(own, "ratio_error"))
        lines.append([name, *cells, own[0]["images"], f"{seconds:.0f}", f"{error:.0e}"])
    return common.markdown(["variant", *figures, "images", "seconds", "\\|ratio - 1\\|"], lines)


def before_and_after(rows: Sequence[dict[str, Any]], figure: str) -> tuple[np.ndarray, np.ndarray] | None:
    """A figure's values over the rows; None if one of them is missing."""
    # A missing one, None, becomes nan.
    before = np.array(common.column(common.column(rows, "before"), figure), float)
    after = np.array(common.column(common.column(rows, "after"), figure), float)
    return None if np.isnan(before + after).any() else (before, after)


def _cell(rows: Sequence[dict[str, Any]], figure: str) -> str:
    values = before_and_after(rows, figure)
    return "-" if values is None else f"{values[0].mean():.3f} -> {common.mean_and_extent(values[1].tolist())}"


def main() -> None:
    parser = common.parser(__doc__, "grpo", "recipes/nano/demo.yaml")
    parser.add_argument("--variants", nargs="*", default=[], help="recipes that override the first, one run set each")
    args = parser.parse_args()
    base = Path(args.recipe)
    variants = {base.stem: [args.recipe]}
    for path in map(Path, args.variants):
        # A pattern such as ablations/*.yaml matches the base too.
        if path.resolve() != base.resolve():
            variants[path.stem] = [args.recipe, str(path)]
    jobs = common.Jobs(args.output, args.jobs)
    todo = itertools.product(args.seeds, variants.items())
    rows = common.side_by_side(run, [(jobs, *variant, seed, args.options) for seed, variant in todo])
    common.write(args.output, rows, table(rows, list(rows[0]["before"])))


if __name__ == "__main__":
    main()
