"""Seconds a step of GRPO takes here and took at an earlier revision: the same recipe on the same machine, in turns.

    python -m posttrain.nano.bench.speed --revision 7d01825 --output runs/bench-speed   # on two cores: ten minutes
    python -m posttrain.nano.bench.speed --revision 596fa5e --before 1 --compiled --output runs/bench-first

The recipe is that revision's; 596fa5e is where GRPO first landed, for one process, which gets all cores. A step's
seconds are those of sampling, scoring and optimising. Its CPU seconds are those of all processes of the run, with its
judges' servers, and hardly change where other work shares the machine. The first two steps of a run are left out. The
table gives medians, and ratios of those.
"""

from __future__ import annotations

import argparse
import os
import subprocess
from pathlib import Path

import numpy as np

from posttrain.nano.bench import common
from prompts.parse import read_lines

MOVED = {"posttrain.nano.oracles": "posttrain.nano.world.oracles"}
"""Modules that earlier revisions' recipes name, by what they are now."""
WARM = 2
"""Steps of a run that are not counted."""


def run(
    jobs: common.Jobs, name: str, path: str, recipe: Path, processes: int, cores: int, options: list[str]
) -> list[dict[str, float]]:
    """Seconds of each part of each step but the first ones, and `cpu`. Exits with the log's name if it failed.

    `path` is where Python looks for packages, the tree to measure first.
    """
    output = jobs.folder / name
    arguments = ["grpo", "--config", str(recipe), *options, "--output", str(output)]
    arguments += ["--eval.every", "0", "--eval.prompts", "8", "--checkpoint.every", "0"]
    module, arguments = common.launched(processes, arguments)
    # Without a GPU: what is compared is what the cores do.
    environment = {"OMP_NUM_THREADS": str(cores // processes), "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    meter = common.Meter(output / "metrics.jsonl")
    jobs(name, module, arguments, Path(path.split(os.pathsep)[0]), meter, **environment)
    steps: list[dict[str, float]] = []
    for i, row in enumerate(read_lines(output / "metrics.jsonl")):
        if "seconds/sample" in row:  # not an evaluation
            parts = {key[8:]: value for key, value in row.items() if key.startswith("seconds/")}
            # What went by since the line before, so not of a first step, which the first evaluation is before.
            steps.append({**parts, "cpu": meter.seconds[i] - meter.seconds[i - 1] if i else np.nan})
    return steps[WARM:]


def table(steps: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: a line for each way, and its medians in those of the first way."""
    lines, first = [], None
    for name, own in steps.items():
        wall = [sum(value for part, value in step.items() if part != "cpu") for step in own]
        cpu = common.column(own, "cpu")
        parts = [f"{part} {np.median(common.column(own, part)):.2f}" for part in own[0] if part != "cpu"]
        medians = float(np.median(wall)), float(np.median(cpu))
        first = first or medians
        ratios = [f"{own / of_first:.2f}" for own, of_first in zip(medians, first)]
        cells = [f"{medians[0]:.2f} ({common.extent(wall, '.2f')})", f"{medians[1]:.2f} ({common.extent(cpu, '.2f')})"]
        lines.append([name, *cells, ", ".join(parts), *ratios])
    head = ["tree", "seconds a step (least to most)", "CPU seconds (least to most)", "parts", "x seconds", "x CPU"]
    return common.markdown(head, lines)


def _written(recipe: Path, path: Path) -> Path:
    """The recipe with today's names of modules."""
    text = recipe.read_text()
    for old, new in MOVED.items():
        text = text.replace(old, new)
    path.write_text(text)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--revision", required=True, help="of this repository, as git names it")
    parser.add_argument("--recipe", default="recipes/nano/grpo.yaml", help="of the revision")
    parser.add_argument("--site", help="directory of packages that the revision needs and this one does not")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--processes", type=int, help="that share the cores; default: one a core")
    parser.add_argument("--before", type=int, help="processes of the revision; default: as many as here")
    parser.add_argument("--compiled", action="store_true", help="measure this tree with compiled blocks too")
    parser.add_argument("--kept", action="store_true", help="measure this tree with rollout.keep_graphs too")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each")
    parser.add_argument("--steps", type=int, default=6, help="of a run")
    parser.add_argument("--output", type=Path, required=True, help="a new directory")
    parser.add_argument("options", nargs="*", help="further options for posttrain grpo, after --")
    args = parser.parse_args()
    here, output = Path.cwd(), args.output.resolve()
    output.mkdir(parents=True)  # an earlier run's times would be read as this one's
    jobs = common.Jobs(output)
    there, processes = output / "tree", args.processes or args.cores
    subprocess.run(["git", "worktree", "add", "--detach", str(there), args.revision], check=True)
    try:
        recipe = _written(there / args.recipe, output / "recipe.yaml")
        if (here / ".venv-vllm").exists():  # servers of judges are the same ones
            (there / ".venv-vllm").symlink_to((here / ".venv-vllm").resolve())
        earlier = os.pathsep.join([str(there), *([args.site] if args.site else [])])
        ways = {
            args.revision: (earlier, there / args.recipe, args.before or processes, []),
            "here": (str(here), recipe, processes, []),
        }
        if args.kept:
            ways["here, graphs kept"] = (str(here), recipe, processes, ["--rollout.keep_graphs", "true"])
        if args.compiled:
            ways["here, compiled"] = (str(here), recipe, processes, ["--model.compile", "true"])
        steps: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
        # In turns, so that a machine that slows down does so for all of them.
        for turn in range(args.rounds):
            for i, (name, (path, own, count, options)) in enumerate(ways.items()):
                options = [*options, *args.options, "--steps", str(args.steps)]
                steps[name] += run(jobs, f"run-{i}-{turn}", path, own, count, args.cores, options)
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", str(there)], check=True)
    common.write(output, steps, table(steps))


if __name__ == "__main__":
    main()
