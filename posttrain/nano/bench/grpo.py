"""Repeats a GRPO recipe, and variants of it, over seeds; tables what each gained and what it took.

    python -m posttrain.nano.bench.grpo --seeds 0 1 2 --output runs/bench-grpo                       # the demo
    python -m posttrain.nano.bench.grpo --recipe recipes/nano/ablations/base.yaml \\
        --variants recipes/nano/ablations/*.yaml --seeds 0 1 2 --jobs 12 --output runs/ablations

A variant is a recipe that is read after the first and overrides it. Each run is `posttrain grpo` in a process of its
own, so seconds hold start and end; with --jobs several run at once, on all GPUs in turn, and seconds mean little.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.nano.bench.jobs import Jobs


def run(jobs: Jobs, name: str, recipes: Sequence[str], seed: int, options: Sequence[str]) -> dict:
    """One run's row: figures before and after, each evaluation, and what it took."""
    folder = jobs.folder / f"{name}-{seed}"
    arguments = ["grpo"]
    for recipe in recipes:
        arguments += ["--config", recipe]
    arguments += ["--output", str(folder), "--seed", str(seed), *options]
    seconds = jobs(folder.name, "posttrain.cli", arguments)
    summary = json.loads((folder / "summary.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    # An evaluation has a line of its own; the number of images is in that of the step.
    images = {0: 0} | {metrics["step"]: metrics["images"] for metrics in rows if "images" in metrics}
    curve: list[dict[str, Any]] = []
    errors: list[float] = []
    for metrics in rows:
        evaluated = {key[5:]: value for key, value in metrics.items() if key.startswith("eval/")}
        if evaluated:
            curve.append({"step": metrics["step"], "images": images[metrics["step"]], **evaluated})
        if metrics.get("ratio_error") is not None:
            errors.append(metrics["ratio_error"])
    row = {"variant": name, "seed": seed, "before": summary["before"], "after": summary["after"], "curve": curve}
    return {**row, "seconds": round(seconds), "images": summary["images"], "ratio_error": max(errors)}


def table(rows: Sequence[dict[str, Any]], figures: Sequence[str]) -> str:
    """Markdown: a line a variant, each figure's mean before and after, and the seeds' least and greatest after."""
    lines = [f"| variant | {' | '.join(figures)} | images | seconds | \\|ratio - 1\\| |"]
    lines.append("|---|" + "---|" * (len(figures) + 3))
    for name in dict.fromkeys(row["variant"] for row in rows):
        own = [row for row in rows if row["variant"] == name]
        cells = [_cell(own, figure) for figure in figures]
        seconds = np.mean([row["seconds"] for row in own])
        error = max(row["ratio_error"] for row in own)
        lines.append(f"| {name} | {' | '.join(cells)} | {own[0]['images']} | {seconds:.0f} | {error:.0e} |")
    return "\n".join(lines)


def _cell(rows: Sequence[dict[str, Any]], figure: str) -> str:
    # None, of a figure that some seed has not, becomes nan.
    pairs = np.array([(row["before"].get(figure), row["after"].get(figure)) for row in rows], float)
    if np.isnan(pairs).any():
        return "-"
    before, after = pairs.T
    spread = f" ({after.min():.3f} to {after.max():.3f})" if len(after) > 1 else ""
    return f"{before.mean():.3f} -> {after.mean():.3f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", default="recipes/nano/demo.yaml")
    parser.add_argument("--variants", nargs="*", default=[], help="recipes that override the first, one run set each")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--output", type=Path, required=True, help="directory for the runs, table.json and table.md")
    parser.add_argument("options", nargs="*", help="further options for posttrain grpo, after --")
    args = parser.parse_args()
    base = Path(args.recipe)
    variants = {base.stem: [args.recipe]}
    variants |= {Path(v).stem: [args.recipe, v] for v in args.variants if Path(v).resolve() != base.resolve()}
    todo = [(name, recipes, seed) for seed in args.seeds for name, recipes in variants.items()]
    jobs = Jobs(args.output, args.jobs)
    with ThreadPoolExecutor(len(todo)) as pool:
        rows = list(pool.map(lambda one: run(jobs, one[0], one[1], one[2], args.options), todo))
    (args.output / "table.json").write_text(json.dumps(rows, indent=1) + "\n")
    text = table(rows, list(rows[0]["before"]))
    (args.output / "table.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
