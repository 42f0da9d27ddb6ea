"""Repeats the GRPO demo over seeds and prints what it gained and what it took.

    python -m posttrain.nano.bench_grpo --seeds 0 1 2 --output runs/bench-grpo

Each seed is `posttrain grpo --config recipes/nano/demo.yaml` in a process of its own, so seconds hold start and end.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, required=True, help="directory for one run a seed and table.json")
    parser.add_argument("--recipe", default="recipes/nano/demo.yaml")
    parser.add_argument("options", nargs="*", help="further options for posttrain grpo, after --")
    args = parser.parse_args()
    rows = []
    for seed in args.seeds:
        run = args.output / f"seed-{seed}"
        start = time.time()
        command = [sys.executable, "-m", "posttrain.cli", "grpo", "--config", args.recipe]
        subprocess.run([*command, "--output", str(run), "--seed", str(seed), *args.options], check=True)
        seconds = time.time() - start
        summary = json.loads((run / "summary.json").read_text())
        metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        errors = [m["ratio_error"] for m in metrics if m.get("ratio_error") is not None]
        rows.append({"seed": seed, "before": summary["before"], "after": summary["after"], "seconds": round(seconds),
                     "images": summary["images"], "largest |ratio - 1|": max(errors)})  # fmt: skip
    (args.output / "table.json").write_text(json.dumps(rows, indent=1) + "\n")
    names = list(rows[0]["before"])
    print("| seed | " + " | ".join(names) + " | seconds | images | largest \\|ratio - 1\\| |")
    print("|---|" + "---|" * (len(names) + 3))
    for row in rows:
        changes = [f"{row['before'][n]:.3f} -> {row['after'][n]:.3f}" for n in names]
        tail = [str(row["seconds"]), str(row["images"]), f"{row['largest |ratio - 1|']:.1e}"]
        print("| " + " | ".join([str(row["seed"]), *changes, *tail]) + " |")


if __name__ == "__main__":
    main()
