"""`posttrain judge` keeps no checkpoints: one that was killed says what to do, and is not taken for finished."""

import os
import shutil
import signal
import time

from tests import runs
from tests.chaos.test_faults import fails
from tests.test_judge import config, data, model  # noqa: F401


def test_a_judge_that_was_killed_begins_again(command, model, data, tmp_path):  # noqa: F811
    path = runs.recipe(config(model, data, tmp_path, "preference", steps=30), tmp_path / "recipe.yaml")
    run = tmp_path / "run"
    (process,), began = command.start("judge", "--config", path), time.monotonic()
    while not (run / "metrics.jsonl").exists() or not runs.rows(run):
        assert time.monotonic() - began < 120
        time.sleep(0.01)
    os.kill(process, signal.SIGKILL)
    assert command.wait().returncode == -signal.SIGKILL and not (run / "adapter").exists()
    fails(command("judge", "--config", path), f"{run}: holds a run already; remove the directory or choose another")
    fails(command("judge", "--config", path, "--resume"), "command line: --resume: unknown option")
    shutil.rmtree(run)
    result = command("judge", "--config", path)
    assert result.returncode == 0, result.stderr
    assert (run / "adapter/adapter_model.safetensors").exists()
