"""What the noise floor of judges does to GRPO of K2-nano: recipes/nano/grpo.yaml with it and without it, over seeds.

    python -m posttrain.nano.bench.noise --seeds 0 1 2 --jobs 6 --output runs/bench-noise

The judges answer in the training processes, so no server is needed. The arm `floor` is the recipe; in the arm `none`
each judge's `noise` is 0, so that every difference counts, as before there was a floor. Both arms of a seed start from
the same images. Each run is `posttrain grpo` in a process of its own; with --jobs several run at once.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from posttrain.nano.bench import grpo
from posttrain.nano.bench.jobs import Jobs

RECIPE = "recipes/nano/grpo.yaml"
ARMS = ("none", "floor")


def recipes(folder: Path) -> dict[str, str]:
    """Writes the recipe of each arm, and returns their paths."""
    recipe = yaml.safe_load(Path(RECIPE).read_text())
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
                judge = reward["function"]["init_args"]["judge"]
                del judge["base_urls"]
                judge |= weights[judge.pop("model")]
                if arm == "none":
                    reward["noise"] = 0.0
        path = folder / f"{arm}.yaml"
        path.write_text(yaml.safe_dump(made, sort_keys=False))
        paths[arm] = str(path)
    return paths


def run(jobs: Jobs, arm: str, recipe: str, seed: int, options: Sequence[str]) -> dict[str, Any]:
    """A row of bench_grpo, with the means over steps of what the floor changes."""
    row = grpo.run(jobs, arm, [recipe], seed, options)
    lines = (jobs.folder / f"{arm}-{seed}" / "metrics.jsonl").read_text().splitlines()
    steps = [step for step in map(json.loads, lines) if "flat_groups" in step]
    for name in ("flat_groups", "noise_share", "advantage"):
        values = [step[name] for step in steps if step[name] is not None]
        row[name] = float(np.mean(values)) if values else None
    return row


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line a figure of held-out prompts, its gain in both arms, and how they differ by seed."""
    lines = ["| figure | before | gain, no floor | gain, floor | difference by seed |", "|---|---|---|---|---|"]
    for name in rows[0]["before"]:
        cells = {}
        for arm in ARMS:
            # In the order of the seeds, which pairs the arms: both start from the same images.
            own = sorted((row for row in rows if row["variant"] == arm), key=lambda row: row["seed"])
            pairs = np.array([(row["before"][name], row["after"][name]) for row in own], float)
            if not np.isnan(pairs).any():
                cells[arm] = pairs
        if len(cells) < len(ARMS):
            continue
        gains, spread = {}, {}
        for arm, pairs in cells.items():
            gains[arm] = gain = pairs[:, 1] - pairs[:, 0]
            spread[arm] = f"{gain.mean():+.4f} ({gain.min():+.4f} to {gain.max():+.4f})"
        difference = ", ".join(f"{value:+.4f}" for value in gains["floor"] - gains["none"])
        lines.append(
            f"| {name} | {cells['floor'][:, 0].mean():.4f} | {spread['none']} | {spread['floor']} | {difference} |"
        )
    for arm in ARMS:
        own = [row for row in rows if row["variant"] == arm]
        parts = []
        for name in ("flat_groups", "noise_share"):
            values = [row[name] for row in own if row[name] is not None]
            parts += [f"{name} {np.mean(values):.4f}"] if values else []
        lines.append(f"\n{arm}: {', '.join(parts)}, {np.mean([row['seconds'] for row in own]):.0f} s a run")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--output", type=Path, required=True, help="directory for the runs, table.json and table.md")
    parser.add_argument("options", nargs="*", help="further options for posttrain grpo, after --")
    args = parser.parse_args()
    jobs = Jobs(args.output, args.jobs)
    paths = recipes(args.output)
    todo = [(arm, seed) for seed in args.seeds for arm in ARMS]
    with ThreadPoolExecutor(len(todo)) as pool:
        rows = list(pool.map(lambda one: run(jobs, one[0], paths[one[0]], one[1], args.options), todo))
    (args.output / "table.json").write_text(json.dumps(rows, indent=1) + "\n")
    text = table(rows)
    (args.output / "table.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
