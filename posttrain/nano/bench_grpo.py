"""Repeats a GRPO recipe, and variants of it, over seeds; tables what each gained and what it took.

    python -m posttrain.nano.bench_grpo --seeds 0 1 2 --output runs/bench-grpo                       # the demo
    python -m posttrain.nano.bench_grpo --recipe recipes/nano/ablations/base.yaml \\
        --variants recipes/nano/ablations/*.yaml --seeds 0 1 2 --jobs 12 --output runs/ablations

A variant is a recipe that is read after the first and overrides it. Each run is `posttrain grpo` in a process of its
own, so seconds hold start and end; with --jobs several run at once, on all GPUs in turn, and seconds mean little.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch


def run(name: str, recipes: Sequence[str], seed: int, output: Path, options: Sequence[str], gpu: int | None) -> dict:
    """One run's row: figures before and after, each evaluation, and what it took."""
    folder = output / f"{name}-{seed}"
    command = [sys.executable, "-m", "posttrain.cli", "grpo"]
    command += [word for recipe in recipes for word in ("--config", recipe)]
    environment = os.environ if gpu is None else {**os.environ, "CUDA_VISIBLE_DEVICES": str(gpu)}
    start = time.time()
    log = (output / f"{name}-{seed}.log").open("w")
    command += ["--output", str(folder), "--seed", str(seed), *options]
    if subprocess.run(command, env=environment, stdout=log, stderr=log).returncode:
        raise SystemExit(f"{name}, seed {seed}: failed; see {log.name}")
    seconds = time.time() - start
    summary = json.loads((folder / "summary.json").read_text())
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    images = {0: 0} | {m["step"]: m["images"] for m in metrics if "images" in m}
    curve = [
        {"step": m["step"], "images": images[m["step"]], **{k[5:]: v for k, v in m.items() if k.startswith("eval/")}}
        for m in metrics
        if any(k.startswith("eval/") for k in m)
    ]
    errors = [m["ratio_error"] for m in metrics if m.get("ratio_error") is not None]
    row = {"variant": name, "seed": seed, "before": summary["before"], "after": summary["after"], "curve": curve}
    return {**row, "seconds": round(seconds), "images": summary["images"], "ratio_error": max(errors)}


def table(rows: Sequence[dict[str, Any]], figures: Sequence[str]) -> str:
    """Markdown: a line a variant, each figure's mean before and after, and the seeds' least and greatest after."""
    lines = [f"| variant | {' | '.join(figures)} | images | seconds | \\|ratio - 1\\| |"]
    lines.append("|---|" + "---|" * (len(figures) + 3))
    for name in dict.fromkeys(row["variant"] for row in rows):
        mine = [row for row in rows if row["variant"] == name]
        cells = [_cell(mine, figure) for figure in figures]
        seconds = np.mean([row["seconds"] for row in mine])
        error = max(row["ratio_error"] for row in mine)
        lines.append(f"| {name} | {' | '.join(cells)} | {mine[0]['images']} | {seconds:.0f} | {error:.0e} |")
    return "\n".join(lines)


def _cell(rows: Sequence[dict[str, Any]], figure: str) -> str:
    pairs = [(r["before"].get(figure), r["after"].get(figure)) for r in rows]
    if any(value is None for pair in pairs for value in pair):
        return "-"
    before, after = np.array(pairs, float).T
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
    args.output.mkdir(parents=True, exist_ok=True)
    base = Path(args.recipe)
    variants = {base.stem: [args.recipe]}
    variants |= {Path(v).stem: [args.recipe, v] for v in args.variants if Path(v).resolve() != base.resolve()}
    todo = [(name, recipes, seed) for seed in args.seeds for name, recipes in variants.items()]
    gpus = torch.cuda.device_count()
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = [
            pool.submit(run, name, recipes, seed, args.output, args.options, i % gpus if gpus else None)
            for i, (name, recipes, seed) in enumerate(todo)
        ]
        rows = [job.result() for job in jobs]
    (args.output / "table.json").write_text(json.dumps(rows, indent=1) + "\n")
    text = table(rows, list(rows[0]["before"]))
    (args.output / "table.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
