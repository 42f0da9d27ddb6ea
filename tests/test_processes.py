"""Real processes under a launcher train as one: the same pictures, scores and update as one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from posttrain import checkpoint
from tests import runs, tiny


def launch(processes: int, config, folder: Path, command: str = "grpo") -> Path:
    """Runs the recipe in a directory of its own and returns that."""
    config.output = str(folder / f"run-{processes}")
    recipe = runs.recipe(config, folder / f"recipe-{processes}.json")
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    words += ["-m", "posttrain.cli", command, "--config", str(recipe)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(words, cwd=runs.ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    shown = {"grpo": "reward", "stpo": "accuracy"}[command]
    assert result.stderr.count(f"step 2/2  {shown}") == 1  # one process tells of all
    return Path(config.output)


def test_three_processes_equal_two_and_one(tmp_path):
    """Five groups and three held-out prompts, which no number of processes here divides; two sizes; rank 0 writes."""
    config = runs.config(tmp_path, tiny.save(tmp_path / "k2"))
    config.groups.prompts_per_step, config.eval.prompts, config.eval.groups, config.eval.group_size = 5, 1, 1, 2
    config.sampling.sizes, config.pool.kind, config.optim.ema = [[32, 32], [16, 48]], "uniform", 0.5
    one, *others = [launch(n, config, tmp_path) for n in (1, 2, 3)]
    first = runs.untimed(one)
    for other in others:
        assert len(runs.rows(other)) == len(first)
        for a, b in zip(first, runs.untimed(other)):
            assert a == pytest.approx(b, rel=1e-4, abs=1e-7)
        for path in one.glob("samples/step-*/*.png"):
            same = [np.asarray(Image.open(run / path.relative_to(one)), int) for run in (one, other)]
            assert np.abs(same[0] - same[1]).max() <= 1
        a, b = (checkpoint.load_latest(run / "checkpoints") for run in (one, other))
        assert a is not None and b is not None and a.step == b.step == 2
        for name in ("adapter", "live"):
            trained, again = (torch.cat([v.flatten() for v in saved.tensors[name].values()]) for saved in (a, b))
            assert (trained - again).norm() < 1e-3 * trained.norm()
        summary = json.loads((other / "summary.json").read_text())
        assert summary["images"] == 2 * 5 * 4 and (other / "report.html").is_file()


def test_two_processes_train_on_pairs_as_one(tmp_path):
    """Five pairs an update and seven held-out ones. The terms are kept apart in the first step and not in the second,
    each set of processes has a cache of its own."""
    config = runs.stpo_config(tmp_path, tiny.save(tmp_path / "k2"))
    config.pairs.train = str(runs.pairs(tmp_path, 70))  # two shards
    config.batch, config.micro_batch, config.loss.terms_every = 5, 2, 2
    config.pairs.measured, config.loss.beta, config.optim.ema = 7, 100.0, 0.5
    config.rewards, made = [], []
    for processes in (1, 2):
        config.pairs.cache = str(tmp_path / f"cache-{processes}")
        made.append(launch(processes, config, tmp_path, "stpo"))
    first, second = (runs.untimed(run) for run in made)
    assert len(first) == len(second)
    for a, b in zip(first, second):
        assert a == pytest.approx(b, rel=2e-3, abs=1e-5)
    a, b = (checkpoint.load_latest(run / "checkpoints") for run in made)
    assert a is not None and b is not None and a.step == b.step == 2
    for name in ("adapter", "live"):
        trained, again = (torch.cat([v.flatten() for v in saved.tensors[name].values()]) for saved in (a, b))
        assert (trained - again).norm() < 1e-3 * trained.norm()
    caches = [tmp_path / "cache-1", tmp_path / "cache-2"]
    names = [sorted(file.relative_to(cache) for file in cache.rglob("*.*")) for cache in caches]
    assert names[0] == names[1] and len(names[0]) == 3
    assert all((caches[0] / name).read_bytes() == (caches[1] / name).read_bytes() for name in names[0])
