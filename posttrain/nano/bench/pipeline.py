"""Repeats a pipeline over seeds; tables what each of its stages gained, how far that varies, and what it took.

    python -m posttrain.nano.bench.pipeline --seeds 0 1 2 --output runs/bench-pipeline           # the demo
    python -m posttrain.nano.bench.pipeline --seeds 0 1 2 --jobs 3 --output runs/bench-pipeline  # on GPUs, all at once

Each run is `posttrain run` in a process of its own, with the seed for all of its stages; one that was stopped goes on,
and one that is finished is only read. With --jobs several run at once, on all GPUs in turn, and seconds mean little.
Spread is the standard deviation of the gain over seeds (n - 1). posttrain/pipeline/gains.py says what the figures are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from posttrain import cli
from posttrain.nano.bench import common
from posttrain.pipeline.gains import gains
from posttrain.pipeline.plan import resolve
from posttrain.pipeline.run import read_state


def run(jobs: common.Jobs, recipe: str, seed: int, options: Sequence[str]) -> dict[str, Any]:
    """One seed's row: the gains of its stages, and their seconds."""
    folder = jobs.folder / f"seed-{seed}"
    words = [recipe, "--output", str(folder), "--seed", str(seed), *options]
    jobs(folder.name, "posttrain.cli", ["run", *words, "--resume"])
    rows = []
    for stage in resolve(cli.parse(["run", *words]).config):
        # The change is a property, which asdict leaves out.
        rows += [asdict(gain) | {"change": gain.change} for gain in gains(stage)]
    seconds = {name: entry["seconds"] for name, entry in read_state(folder).items()}
    return {"seed": seed, "gains": rows, "seconds": seconds}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line a figure of a stage, means over seeds; the seconds beside a stage's first."""
    head = ["stage", "figure", "", "before", "after", "gain", "spread", "least to most", "gain / spread", "seconds"]
    seconds: dict[str, float] = defaultdict(float)
    for row in rows:
        for name, took in row["seconds"].items():
            seconds[name] += took / len(rows)
    by_figure: dict[tuple[str, str, bool], list[dict[str, Any]]] = {}
    for row in rows:
        for gain in row["gains"]:
            by_figure.setdefault((gain["stage"], gain["figure"], gain["trained"]), []).append(gain)
    remaining = dict(seconds)  # of the stages that have not had a line yet
    lines = []
    for (stage, figure, trained), of_seeds in by_figure.items():
        took = f"{remaining.pop(stage):.0f}" if stage in remaining else ""
        lines.append([stage, figure, "trained" if trained else "", *_cells(of_seeds), took])
    # Stages without a figure, such as exports.
    for stage, took in [*remaining.items(), ("all", sum(seconds.values()))]:
        lines.append([stage, *[""] * 8, f"{took:.0f}"])
    return common.markdown(head, lines)


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
    return [*cells, f"{spread:.3f}", common.extent(change, "+.3f"), ratio]


def main() -> None:
    args = common.parser(__doc__, "run", "recipes/nano/pipeline.yaml").parse_args()
    jobs = common.Jobs(args.output, args.jobs)
    rows = common.side_by_side(run, [(jobs, args.recipe, seed, args.options) for seed in args.seeds])
    common.write(args.output, rows, table(rows))


if __name__ == "__main__":
    main()
