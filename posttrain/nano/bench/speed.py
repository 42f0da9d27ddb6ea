"""Seconds a step of GRPO takes here and took at an earlier revision: the same recipe on the same machine, in turns.

    python -m posttrain.nano.bench.speed --revision 596fa5e --output runs/bench-speed   # on two cores: twelve minutes

The recipe is that revision's; 596fa5e is where GRPO first landed, for one process, which gets all cores. Here it is
one process a core, with blocks as they are and compiled. A step's seconds are those of sampling, scoring and
optimising; the first two steps of a run, which compile, are left out. The table gives medians, and ratios of those.
"""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path

import numpy as np

from posttrain.nano.bench import common
from prompts.parse import read_lines

RECIPE = "recipes/nano/grpo.yaml"
LAUNCHER = "torch.distributed.run"
WARM = 2
"""Steps of a run that are not counted."""


def run(
    jobs: common.Jobs, name: str, tree: Path, recipe: Path, processes: int, cores: int, options: list[str]
) -> list[float]:
    """Seconds of each step but the first ones. Exits with the log's name if it failed."""
    output = jobs.folder / name
    arguments = ["grpo", "--config", str(recipe), *options, "--output", str(output)]
    arguments += ["--eval.every", "0", "--eval.prompts", "8", "--checkpoint.every", "0"]
    module = "posttrain.cli"
    if processes > 1:
        module, arguments = LAUNCHER, ["--nproc-per-node", str(processes), "-m", module, *arguments]
    # Without a GPU: what is compared is what the cores do.
    environment = {"OMP_NUM_THREADS": str(cores // processes), "PYTHONPATH": str(tree), "CUDA_VISIBLE_DEVICES": ""}
    jobs(name, module, arguments, tree, **environment)
    steps: list[float] = []
    for row in read_lines(output / "metrics.jsonl"):
        if "seconds/sample" in row:  # not an evaluation
            steps.append(sum((value for key, value in row.items() if key.startswith("seconds/")), 0.0))
    return steps[WARM:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--revision", required=True, help="of this repository, as git names it")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2, help="runs of each")
    parser.add_argument("--steps", type=int, default=6, help="of a run")
    parser.add_argument("--output", type=Path, required=True, help="a new directory")
    args = parser.parse_args()
    here, output = Path.cwd(), args.output.resolve()
    output.mkdir(parents=True)  # an earlier run's times would be read as this one's
    jobs = common.Jobs(output)
    there = output / "tree"
    subprocess.run(["git", "worktree", "add", "--detach", str(there), args.revision], check=True)
    try:
        ways = {
            args.revision: (there, 1, []),
            "here": (here, args.cores, []),
            "here, compiled": (here, args.cores, ["--model.compile", "true"]),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        # In turns, so that a machine that slows down does so for all of them.
        for turn in range(args.rounds):
            for i, (name, (tree, processes, options)) in enumerate(ways.items()):
                options = [*options, "--steps", str(args.steps)]
                times[name] += run(jobs, f"run-{i}-{turn}", tree, there / RECIPE, processes, args.cores, options)
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", str(there)], check=True)
    medians = {name: float(np.median(seconds)) for name, seconds in times.items()}
    lines = []
    for name, seconds in times.items():
        ratio = medians[args.revision] / medians[name]
        lines.append([name, f"{medians[name]:.2f}", common.extent(seconds, ".2f"), f"{ratio:.2f}"])
    head = ["tree", "seconds a step", "least to most", "steps a second, in those of the first"]
    common.write(output, times, common.markdown(head, lines))


if __name__ == "__main__":
    main()
