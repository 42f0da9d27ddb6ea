"""What a large adaptive pool costs: `python -m prompts.bench_pool`.

A million prompts in a file, a tenth of them visited before and half of those resting, then steps of 64 prompts: memory
of records and pool (the process's peak, less what it had before), and the time of a draw and an update.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from prompts.parse import json_line
from prompts.pool import Pool, PoolConfig
from prompts.records import read_prompts


def gigabytes() -> float:
    """Peak memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def write(path: Path, count: int) -> None:
    """Prompts of about 120 characters, each with two requirements, a tag and no id of its own."""
    words = [f"word{i:03d}" for i in range(500)]
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        for i in range(count):
            drawn = [words[k] for k in rng.integers(500, size=14)]
            row = {"prompt": " ".join([f"image {i}:", *drawn]), "requirements": [drawn[0], drawn[1]]}
            file.write(json_line(row | {"texts": [], "tags": ["text" if i % 4 else "people"]}))


def milliseconds(times: list[float]) -> str:
    return f"median {np.median(times) * 1e3:.1f} ms, longest {max(times) * 1e3:.1f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompts", type=int, default=1_000_000)
    parser.add_argument("--rewards", type=int, default=4)
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prompts.jsonl"
        write(path, args.prompts)
        before, began = gigabytes(), time.perf_counter()
        records = read_prompts(path)
    read, read_seconds = gigabytes(), time.perf_counter() - began
    weights = {f"reward{k}": 1.0 for k in range(args.rewards)}
    pool = Pool(records, weights, PoolConfig(kind="adaptive", quotas={"text": 0.25}), 64, seed=0)
    pool_seconds = time.perf_counter() - began - read_seconds

    rng = np.random.default_rng(0)
    seen = rng.choice(args.prompts, args.prompts // 10, replace=False)
    pool.visits[seen], pool.drawn[seen], pool.spread_K[:] = 3, 1, 0.2
    pool.mean_NK[seen] = rng.random((len(seen), args.rewards))
    pool.variance_NK[seen] = np.square(0.3 * rng.random((len(seen), 1)))
    pool.returns[seen[::2]] = 10_000  # far beyond the last step, so that they rest all the time
    draws, updates = [], []
    for step in range(2, 2 + args.steps):
        began = time.perf_counter()
        rows = pool.draw(step)
        draws.append(time.perf_counter() - began)
        scores = rng.random((64, 16, args.rewards))
        began = time.perf_counter()
        pool.update(step, rows, scores, np.ones(scores.shape, bool))
        pool.counts()
        updates.append(time.perf_counter() - began)
    print(f"{args.prompts} prompts, {args.rewards} rewards, {args.steps} steps of 64 prompts")
    print(f"records: {read - before:.2f} GB, read in {read_seconds:.1f} s")
    print(f"pool: {gigabytes() - read:.2f} GB more, made in {pool_seconds:.1f} s")
    print(f"draw: {milliseconds(draws)}")
    print(f"update and counts: {milliseconds(updates)}")


if __name__ == "__main__":
    main()
