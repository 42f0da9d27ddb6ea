"""Several processes train as one: the same pictures, scores and update as one process, and one end for all.

They are real processes with the environment that a launcher gives them, forked from one that has imported torch.
"""

import itertools
import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from posttrain.distributed.processes import Processes, deal
from posttrain.model import flops
from posttrain.pipeline import ranks as traffic
from posttrain.training import checkpoint
from rewards.base import RewardSpec
from tests.helpers import runs
from tests.helpers.counted import COUNTED


@pytest.fixture
def config(tmp_path, model):
    return runs.config(tmp_path, model)


def used(costs, hands):
    """Share of the time for which processes have work: the mean of their sums over the largest."""
    sums = [sum(costs[i] for i in hand) for hand in hands]
    return sum(sums) / len(sums) / max(sums)


@pytest.mark.parametrize(("groups", "expected"), [(8, 0.615), (12, 0.923), (16, 1.0), (24, 0.923), (28, 0.965)])
def test_two_sizes_are_dealt_by_cost(groups, expected):
    """K2 at 512 and 1024 by turns on eight GPUs: 1 and 4.34. g to process g mod 8 gives all of one size to every other
    process. With one group each nothing else can be done; with 16 each gets one of both."""
    costs = [flops.forward(flops.Shape(28, 6144, 1536, 16384, 64, 256), n, 0) for n in (1024, 4096)] * (groups // 2)
    in_turn = used(costs, [range(rank, groups, 8) for rank in range(8)])
    hands = deal(costs, 8)
    assert in_turn < 0.62 and used(costs, hands) == pytest.approx(expected, abs=1e-3)
    assert sorted(i for hand in hands for i in hand) == list(range(groups))
    assert all(costs[a] >= costs[b] for hand in hands for a, b in itertools.pairwise(hand))


def test_like_costs_are_dealt_in_turn():
    for count, ranks in ((11, 4), (3, 8), (0, 2)):
        assert deal([0.3] * count, ranks) == [list(range(rank, count, ranks)) for rank in range(ranks)]


def test_a_sharded_model_gets_like_costs_at_a_time():
    procs = Processes()
    procs.size, procs.engine, procs.sharded = 2, "FSDP2", True
    hands = []
    for procs.rank in (0, 1):
        hands.append(procs.local_indices_by_cost([1, 4, 1, 4, 1, 1]))
    assert hands == [[1, 0, 4], [3, 2, 5]]


@pytest.mark.long
def test_four_processes_equal_two_and_one(command, config, tmp_path):
    """Five groups, which neither two nor four divide, one held-out prompt, two sizes; rank 0 writes. Of the images of
    an evaluation as many bytes travel as pipeline/ranks.py counts: those of a group, to the process that compares
    them."""
    config.groups.prompts_per_step, config.eval.prompts, config.eval.groups, config.eval.group_size = 5, 1, 1, 5
    config.sampling.sizes, config.optim.ema = [[32, 32], [16, 48]], 0.5
    config.optim.eps = 1e-8  # AdamW would make whole steps of gradients that are rounding alone, of other sums
    config.rewards.append(RewardSpec("far", "tests.helpers.runs:contrast", group=True))
    config.rewards.append(RewardSpec("counted", "tests.helpers.counted:constant", heldout_only=True))
    outputs = []
    for processes in (1, 2, 4):
        config.output = str(tmp_path / f"run-{processes}")
        path = runs.recipe(config, tmp_path / "recipe.yaml")
        folder = tmp_path / f"counted-{processes}"
        folder.mkdir()
        result = command("grpo", "--config", path, processes=processes, **{COUNTED: str(folder)})
        assert result.returncode == 0, result.stderr[-3000:]
        assert result.stderr.count("step 2/2  reward") == 1  # one process tells of all
        outputs.append(Path(config.output))
        sent = [size for file in folder.iterdir() for size in json.loads(file.read_text())]
        expected = 2 * traffic.evaluation_bytes(1, 1, 5, True, processes, traffic.Images(32, 32))
        assert expected == 2 * 32 * 32 * 3 * {1: 0, 2: 2, 4: 3}[processes]
        assert expected <= sum(sent) <= expected + 500 * len(sent)  # pickle's own, and nothing of most processes
    one, *others = outputs
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
            trained, again = (runs.flat(saved.tensors[name]) for saved in (a, b))
            assert (trained - again).norm() < 1e-3 * trained.norm()
        summary = json.loads((other / "summary.json").read_text())
        assert summary["images"] == 2 * 5 * 4 and (other / "report.html").is_file()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_process_ends_all(command, config, tmp_path, rank):
    config.steps = 100_000
    path, run = runs.recipe(config, tmp_path / "recipe.yaml"), Path(config.output)
    processes = command.start("grpo", "--config", path, processes=2)
    began = time.monotonic()
    while not (run / "metrics.jsonl").exists() or len(runs.rows(run)) < 3:
        assert time.monotonic() - began < 120
        time.sleep(0.02)
    os.kill(processes[rank], signal.SIGTERM)
    result = command.wait()
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    done = checkpoint.load(checkpoint.find(run)).step
    assert [row["step"] for row in runs.rows(run) if "loss" in row] == list(range(1, done + 1)) and 2 <= done < 1000
    assert json.loads((run / "summary.json").read_text())["steps"] == done and (run / "report.html").is_file()


@pytest.mark.long
@pytest.mark.parametrize(("rank", "sent", "waited"), [(0, "STOP", 3), (1, "STOP", 3), (1, "KILL", 0)])
def test_a_process_that_hangs_or_is_gone_is_named(command, config, tmp_path, rank, sent, waited):
    """Stopped, it does not end; the other one does, after the time it was told to wait. Killed, it does at once."""
    config.steps = 100_000
    path, run = runs.recipe(config, tmp_path / "recipe.yaml"), Path(config.output)
    processes = command.start("grpo", "--config", path, processes=2, POSTTRAIN_TIMEOUT="3")
    began = time.monotonic()
    while not (run / "metrics.jsonl").exists() or len(runs.rows(run)) < 3:
        assert time.monotonic() - began < 120
        time.sleep(0.02)
    os.kill(processes[rank], getattr(signal, f"SIG{sent}"))
    began = time.monotonic()
    while "start again with --resume" not in (said := Path(command.files[1]).read_text()):
        assert time.monotonic() - began < 60
        time.sleep(0.1)
    assert f"posttrain: error: processes: rank {1 - rank} of 2 waited {waited} s for the others: rank {rank} " in said
    assert "Traceback" not in said and (rank == 0 or f"(pid {processes[rank]} on " in said)
    while (state := Path(f"/proc/{processes[1 - rank]}/stat")).exists() and state.read_text().split(") ")[1][0] != "Z":
        assert time.monotonic() - began < 60
        time.sleep(0.1)
    if sent == "STOP":
        os.kill(processes[rank], signal.SIGKILL)
    assert command.wait().args == (["-9", "2"] if rank == 0 else ["2", "-9"])


def unlucky(images, prompts):
    """Fails in the second process."""
    if os.environ["RANK"] == "1":
        raise RuntimeError("no such weights")
    return runs.brightness(images, prompts)


def test_preflight(command, config, tmp_path):
    """One table, also where a process has no group, and with what failed in another than the main one."""
    path = runs.recipe(config, tmp_path / "recipe.yaml")
    sound = command("preflight", "--config", path, "--groups.prompts_per_step", 1, processes=2)
    assert sound.returncode == 0 and sound.stdout.count("none of 15 checks failed") == 1, sound
    assert "4 of 4 images different (2 processes)" in sound.stdout
    rewards = '[{name: a, function: "tests.distributed.test_processes:unlucky"}]'
    result = command("preflight", "--config", path, "--rewards", rewards, processes=2)
    assert result.returncode == 1 and result.stdout.count("1 of 14 checks failed") == 1, result
    assert "8 of 8 images different" in result.stdout and "reward a: 4 of the last 4 scores" in result.stdout


def test_two_processes_train_on_pairs_as_one(command, model, tmp_path):
    """Five pairs an update and seven held-out ones, of two sizes. The terms are kept apart in the first step and not in
    the second, each set of processes has a cache of its own."""
    config = runs.stpo_config(tmp_path, model)
    config.pairs.train = str(runs.pairs(tmp_path, 70, (32, 32), (32, 32), (16, 48)))  # two shards
    config.batch, config.micro_batch, config.loss.terms_every = 5, 2, 2
    config.pairs.measured, config.loss.beta, config.optim.ema = 7, 100.0, 0.5
    config.rewards, made = [], []
    for processes in (1, 2):
        config.pairs.cache = str(tmp_path / f"cache-{processes}")
        config.output = str(tmp_path / f"run-{processes}")
        result = command("stpo", "--config", runs.recipe(config, tmp_path / "recipe.yaml"), processes=processes)
        assert result.returncode == 0, result.stderr[-3000:]
        assert result.stderr.count("step 2/2  accuracy") == 1  # one process tells of all
        made.append(Path(config.output))
    first, second = (runs.untimed(run) for run in made)
    assert len(first) == len(second)
    for a, b in zip(first, second):
        assert a == pytest.approx(b, rel=2e-3, abs=1e-5)
    a, b = (checkpoint.load_latest(run / "checkpoints") for run in made)
    assert a is not None and b is not None and a.step == b.step == 2
    for name in ("adapter", "live"):
        trained, again = (runs.flat(saved.tensors[name]) for saved in (a, b))
        assert (trained - again).norm() < 1e-3 * trained.norm()
    caches = [tmp_path / "cache-1", tmp_path / "cache-2"]
    names = [sorted(file.relative_to(cache) for file in cache.rglob("*.*")) for cache in caches]
    assert names[0] == names[1] and len(names[0]) == 3
    assert all((caches[0] / name).read_bytes() == (caches[1] / name).read_bytes() for name in names[0])
