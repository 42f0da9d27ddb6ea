"""What the noise floor of judges does to GRPO of K2-nano: recipes/nano/grpo.yaml with it and without it, over seeds.

    python -m posttrain.nano.bench.noise --seeds 0 1 2 --jobs 6 --output runs/bench-noise

The judges answer in the training processes, so no server is needed. The arm `floor` is the recipe; in the arm `none`
each judge's `noise` is 0, so that every difference counts, as before there was a floor. Both arms of a seed start from
the same images. Each run is `posttrain grpo` in a process of its own; with --jobs several run at once.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from posttrain.nano.bench import common, grpo
from prompts.parse import read_lines

RECIPE = "recipes/nano/grpo.yaml"
ARMS = ("none", "floor")


def recipes(folder: Path) -> dict[str, str]:
    """Writes the recipe of each arm, and returns their paths."""
    recipe = yaml.safe_load(Path(RECIPE).read_text())
    # By the name that a reward asks for: a server's own model, or one of its adapters.
    weights = {}
    for server in recipe.pop("servers"):
        weights[server["name"]] = {"path": server["model"]}
        for name, adapter in server["adapters"].items():
            weights[name] = {"path": server["model"], "adapter": adapter}
    paths = {}
    for arm in ARMS:
        made = copy.deepcopy(recipe)
        for reward in made["rewards"]:
            if isinstance(reward["function"], dict):
                # Judges of a server by its address become models of the training process.
                judge = reward["function"]["init_args"]["judge"]
                del judge["base_urls"]
                judge |= weights[judge.pop("model")]
                if arm == "none":
                    reward["noise"] = 0.0
        path = folder / f"{arm}.yaml"
        path.write_text(yaml.safe_dump(made, sort_keys=False))
        paths[arm] = str(path)
    return paths


def run(jobs: common.Jobs, arm: str, recipe: str, seed: int, options: Sequence[str]) -> dict[str, Any]:
    """A row of nano/bench/grpo.py, with the means over steps of what the floor changes."""
    row = grpo.run(jobs, arm, [recipe], seed, options)
    steps = read_lines(jobs.folder / f"{arm}-{seed}" / "metrics.jsonl")
    for name in ("flat_groups", "noise_share", "advantage"):
        values = common.known(steps, name)
        row[name] = float(np.mean(values)) if values else None
    return row


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line a figure of held-out prompts, its gain in both arms, and how they differ by seed."""
    # In the order of the seeds, which pairs the arms: both start from the same images.
    arms = common.grouped(sorted(rows, key=lambda row: row["seed"]), "variant")
    lines = []
    for name in rows[0]["before"]:
        none, floor = grpo.before_and_after(arms["none"], name), grpo.before_and_after(arms["floor"], name)
        if none is None or floor is None:
            continue
        gain_none, gain_floor = none[1] - none[0], floor[1] - floor[0]
        gains = [common.mean_and_extent(gain.tolist(), "+.4f") for gain in (gain_none, gain_floor)]
        difference = ", ".join(f"{value:+.4f}" for value in gain_floor - gain_none)
        lines.append([name, f"{floor[0].mean():.4f}", *gains, difference])
    text = common.markdown(["figure", "before", "gain, no floor", "gain, floor", "difference by seed"], lines)
    for arm in ARMS:
        own = arms[arm]
        text += f"\n\n{arm}: "
        for name in ("flat_groups", "noise_share"):
            values = common.known(own, name)
            text += f"{name} {np.mean(values):.4f}, " if values else ""
        text += f"{np.mean(common.column(own, 'seconds')):.0f} s a run"
    return text


def main() -> None:
    args = common.parser(__doc__, "grpo").parse_args()
    jobs = common.Jobs(args.output, args.jobs)
    paths = recipes(args.output)
    todo = itertools.product(args.seeds, paths.items())
    rows = common.side_by_side(run, [(jobs, arm, path, seed, args.options) for seed, (arm, path) in todo])
    common.write(args.output, rows, table(rows))


if __name__ == "__main__":
    main()
