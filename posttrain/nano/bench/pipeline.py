"""Repeats a pipeline over seeds; tables what each of its stages gained, how far that varies, and what it took.

    python -m posttrain.nano.bench.pipeline --seeds 0 1 2 --output runs/bench-pipeline           # the demo
    python -m posttrain.nano.bench.pipeline --seeds 0 1 2 --jobs 3 --output runs/bench-pipeline  # on GPUs, all at once

Each run is `posttrain run` in a process of its own, with the seed for all of its stages; one that was stopped goes on,
and one that is finished is only read. With --jobs several run at once, on all GPUs in turn, and seconds mean little.
Spread is the standard deviation of the gain over seeds (n - 1). pipeline_gains.py says what the figures are.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from posttrain import cli
from posttrain.nano.bench.jobs import Jobs
from posttrain.pipeline.gains import gains
from posttrain.pipeline.plan import resolve
from posttrain.pipeline.run import read_state


def run(jobs: Jobs, recipe: str, seed: int, options: Sequence[str]) -> dict[str, Any]:
    """One seed's row: the gains of its stages, and their seconds."""
    folder = jobs.folder / f"seed-{seed}"
    words = [recipe, "--output", str(folder), "--seed", str(seed), *options]
    jobs(folder.name, "posttrain.cli", ["run", *words, "--resume"])
    rows: list[dict[str, Any]] = []
    for stage in resolve(cli.parse(["run", *words]).config):
        rows += [asdict(gain) | {"change": gain.change} for gain in gains(stage)]
    return {"seed": seed, "gains": rows, "seconds": {k: e["seconds"] for k, e in read_state(folder).items()}}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line a figure of a stage, means over seeds; the seconds beside a stage's first."""
    lines = ["| stage | figure | | before | after | gain | spread | least to most | gain / spread | seconds |"]
    lines.append("|---|---|---|" + "---|" * 7)
    seconds = {name: float(np.mean([row["seconds"][name] for row in rows])) for name in rows[0]["seconds"]}
    remaining = dict(seconds)
    for gain in rows[0]["gains"]:
        stage, name = gain["stage"], gain["figure"]
        own: list[dict[str, Any]] = []
        for row in rows:
            own += [one for one in row["gains"] if (one["stage"], one["figure"]) == (stage, name)]
        took = f"{remaining.pop(stage):.0f}" if stage in remaining else ""
        cells = [stage, name, "trained" if gain["trained"] else "", *_cells(own), took]
        lines.append(f"| {' | '.join(cells)} |")
    # Stages without a figure, such as exports.
    lines += [f"| {stage} |{' |' * 8} {took:.0f} |" for stage, took in remaining.items()]
    return "\n".join([*lines, f"| all |{' |' * 8} {sum(seconds.values()):.0f} |"])


def _cells(gains: Sequence[dict[str, Any]]) -> list[str]:
    """Before, after, gain, its spread, its least and most, and how many times its spread it is."""
    known = [(gain["before"], gain["after"], gain["change"]) for gain in gains if gain["change"] is not None]
    if not known:
        return ["-"] * 6
    before, after, change = np.array(known).T
    cells = [f"{before.mean():.3f}", f"{after.mean():.3f}", f"{change.mean():+.3f}"]
    if len(change) == 1:
        return [*cells, "-", "-", "-"]
    spread = change.std(ddof=1)
    ratio = f"{abs(change.mean()) / spread:.1f}" if spread else "-"
    return [*cells, f"{spread:.3f}", f"{change.min():+.3f} to {change.max():+.3f}", ratio]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", default="recipes/nano/pipeline.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--output", type=Path, required=True, help="directory for the runs, table.json and table.md")
    parser.add_argument("options", nargs="*", help="further options for posttrain run, after --")
    args = parser.parse_args()
    jobs = Jobs(args.output, args.jobs)
    with ThreadPoolExecutor(args.jobs) as pool:
        rows = list(pool.map(lambda seed: run(jobs, args.recipe, seed, args.options), args.seeds))
    (args.output / "table.json").write_text(json.dumps(rows, indent=1) + "\n")
    text = table(rows)
    (args.output / "table.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
