"""Seconds a step of GRPO on K2-nano with a slow judge: waited for, hidden by drawing ahead, and with one process that
only draws, in turns.

    python -m posttrain.nano.bench.ahead --output runs/bench-ahead       # on two cores: twenty minutes

The judge takes `--seconds` an image and answers `--concurrency` images at a time, as a server elsewhere would: it
sleeps, and takes nothing from the cores. A step's seconds are those of drawing, waiting and training. The first two
steps of a run are left out, and the last, which has no step to draw ahead. The table gives medians, and ratios of
those.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.nano.bench import common
from posttrain.nano.world import oracles
from prompts.parse import read_lines

RECIPE = "recipes/nano/demo.yaml"
WARM = 2
"""Steps of a run that are not counted."""


class SlowJudge:
    """The demo's reward from a judge that takes its time."""

    def __init__(self, seconds: float, concurrency: int):
        self.seconds = seconds
        self._places = asyncio.Semaphore(concurrency)

    async def __call__(
        self, images: Sequence[Any], prompts: Sequence[str], requirements: Sequence[list[str]]
    ) -> list[float | None]:
        # One wait for each image, as many at a time as the judge has places.
        await asyncio.gather(*[self._take() for _ in images])
        return oracles.graded(images, prompts, requirements)

    async def _take(self) -> None:
        async with self._places:
            await asyncio.sleep(self.seconds)


def run(
    jobs: common.Jobs, name: str, processes: int, cores: int, judge: dict[str, Any], options: Sequence[str]
) -> list[dict[str, float]]:
    """The metrics of the steps that count. Exits with the log's name if it failed."""
    output = jobs.folder / name
    reward = {"name": "graded", "function": {"class_path": "posttrain.nano.bench.ahead.SlowJudge", "init_args": judge}}
    arguments = ["grpo", "--config", RECIPE, "--rewards", f"[{json.dumps(reward)}]", *options]
    arguments += ["--output", str(output), "--eval.every", "0", "--eval.prompts", "8", "--eval.groups", "0"]
    module, arguments = common.launched(processes, arguments)
    jobs(name, module, arguments, OMP_NUM_THREADS=str(max(1, cores // processes)), CUDA_VISIBLE_DEVICES="")
    rows = [row for row in read_lines(output / "metrics.jsonl") if "seconds/sample" in row]
    return rows[WARM:-1]


def table(rows: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: a line for each way, and how many times as fast as the first it is."""
    seconds = {name: list(map(common.step_seconds, own)) for name, own in rows.items()}
    first = float(np.median(next(iter(seconds.values()))))
    lines = []
    for name, own in rows.items():
        median = float(np.median(seconds[name]))
        wait, spread = np.median(common.column(own, "score_wait")), np.median(common.column(own, "log_ratio_std"))
        figures = [f"{median:.2f}", common.extent(seconds[name], ".2f"), f"{first / median:.2f}"]
        lines.append([name, *figures, f"{wait:.2f}", f"{spread:.1e}"])
    head = ["", "seconds a step", "least to most", "times as fast", "waits, s", "standard deviation of log-ratios"]
    return common.markdown(head, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.5, help="of the judge, for an image")
    parser.add_argument("--concurrency", type=int, default=4, help="images that it judges at a time")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], choices=[1, 2])
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2, help="runs of each")
    parser.add_argument("--steps", type=int, default=8, help="of a run")
    parser.add_argument("--output", type=Path, required=True, help="a new directory")
    args = parser.parse_args()
    args.output.mkdir(parents=True)  # an earlier run's times would be read as this one's
    jobs = common.Jobs(args.output.resolve())
    ahead, apart = ["--rollout.ahead", "1", "--rollout.keep_graphs", "false"], ["--rollout.gpus", "1"]
    # Processes, those of them that ask the judge, and options.
    ways = {
        "one process, waits": (1, 1, []),
        "one process, ahead": (1, 1, ahead),
        "two processes, wait": (2, 2, []),
        "two processes, ahead": (2, 2, ahead),
        "two processes, one only draws": (2, 1, [*ahead, *apart]),
    }
    ways = {name: way for name, way in ways.items() if way[0] in args.processes}
    rows: dict[str, list[dict[str, float]]] = {}
    # In turns, so that a machine that slows down does so for all of them.
    for turn in range(args.rounds):
        for i, (name, (processes, asking, options)) in enumerate(ways.items()):
            # Each process has a judge of its own here; together they are as fast as one server.
            judge = {"seconds": args.seconds, "concurrency": args.concurrency // asking}
            options = [*options, "--steps", str(args.steps)]
            rows.setdefault(name, []).extend(run(jobs, f"run-{i}-{turn}", processes, args.cores, judge, options))
    common.write(args.output, rows, table(rows))


if __name__ == "__main__":
    main()
