"""What two GPUs do: one only draws while the other trains, and both share the tokens of each image.

python -m pytest tests/gpu/test_two.py                # two GPUs of 80 GB, ten minutes
"""

import statistics

import pytest
import torch

from tests.gpu.measure import metrics
from tests.gpu.recipes import EVALUATION, SCALE, cut
from tests.gpu.test_commands import SHORT, SIZE

pytestmark = pytest.mark.skipif(SCALE == "k2" and torch.cuda.device_count() < 2, reason="there are no two GPUs")
JUDGE = {
    "name": "slow",
    "function": {
        "class_path": "tests.gpu.recipes.SlowWarmth",
        "init_args": {"seconds": 0.5 if SCALE == "k2" else 0.01},
    },
}


def seconds_of(row: dict) -> float:
    return sum(value for key, value in row.items() if key.startswith("seconds/"))


@pytest.mark.parametrize("ways", ["waits", "ahead", "draws"])
def test_a_slow_judge(command, parts, tmp_path, ways):
    """One GPU that waits for its judge, one that draws ahead, and two of which one only draws."""
    rollout = {"waits": {"ahead": 0}, "ahead": {"ahead": 1}, "draws": {"ahead": 1, "gpus": 1}}[ways]
    run = tmp_path / "run"
    recipe = cut("k2/grpo", parts, tmp_path, output=str(run), steps=6, eval={**EVALUATION, "best": None, "stop": {}},
                 checkpoint=SHORT | {"every": 6}, groups={"prompts_per_step": 1, "micro_batch": 8},
                 pool={"kind": "uniform"}, rewards=[JUDGE], rollout=rollout)  # fmt: skip
    words = ["--sampling.sizes", [list(SIZE)], "--optim.warmup_steps", 0]
    result = command.ok("grpo", "--config", recipe, *words, processes=2 if ways == "draws" else 1)
    assert [row["policy_age"] for row in metrics(run)[1:]] == [float(ways != "waits")] * 5
    rows = metrics(run)[2:-1]  # the first two compile, and the last has no step to draw ahead
    facts = {name: statistics.median(row[name] for row in rows if name in row) for name in ("score_wait",)}
    command.row(f"grpo, judge of 0.5 s an image, {ways}", "k2/grpo", result, run, images=16,
                step_parts=statistics.median(map(seconds_of, rows)), **facts)  # fmt: skip


@pytest.mark.parametrize("size", [1, 2])
def test_tokens_shared(command, parts, tmp_path, size):
    """A group at 1024 px on one GPU, and on two that share each image's tokens: their losses agree."""
    run = tmp_path / "run"
    side = 1024 if SCALE == "k2" else 64
    recipe = cut("k2/grpo", parts, tmp_path, output=str(run), steps=3, eval={**EVALUATION, "best": None, "stop": {}},
                 checkpoint=SHORT, groups={"prompts_per_step": 1, "group_size": 4, "micro_batch": 2},
                 pool={"kind": "uniform"}, rewards=[])  # fmt: skip
    words = ["--sampling.sizes", [[side, side]], "--optim.warmup_steps", 0, "--model.compile", "false"]
    result = command.ok("grpo", "--config", recipe, *words, "--model.sequence_parallel", size, processes=size)
    rows = metrics(run)
    assert all(row["ratio_error"] < 4e-5 for row in rows)
    command.row(f"grpo, 1024 px, tokens over {size}", "k2/grpo", result, run, images=4,
                grad_norms=[row["grad_norm"] for row in rows])  # fmt: skip
