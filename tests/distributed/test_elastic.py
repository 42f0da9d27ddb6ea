"""torchrun starts the processes again when one is lost, and the run goes on by itself where it had been saved."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.helpers import runs
from tests.helpers.commands import TRAINING

TORCHRUN = """
import sys
from posttrain import cli
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
def main():
    sys.exit(cli.main(sys.argv[1:]))
launch = {"run_id": "test", "rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "start_method": "fork"}
elastic_launch(LaunchConfig(1, 1, 2, max_restarts=1, monitor_interval=0.1, **launch), main)()
"""
"""What torchrun does with --standalone --nproc-per-node=2 --max-restarts=1, but for forks, which need no imports."""


@pytest.mark.long
def test_a_process_that_is_killed_costs_the_steps_since_the_last_checkpoint(command, model, tmp_path):
    """The main one is, once there are steps after a checkpoint. The rest is a run without --resume, which is refused
    afterwards, by the same recipe, also under torchrun: another launch has begun it."""
    config = runs.config(tmp_path, model)
    config.steps, config.checkpoint.every, config.optim.ema = 10, 2, 0.5
    config.output = str(tmp_path / "through")
    result = command("grpo", "--config", runs.recipe(config, tmp_path / "recipe.yaml"), processes=2)
    assert result.returncode == 0, result.stderr[-3000:]

    run = Path(tmp_path / "killed")
    args = ["grpo", "--config", str(tmp_path / "recipe.yaml"), "--output", str(run)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with (tmp_path / "stderr").open("w+") as stderr:
        agent = subprocess.Popen(
            [sys.executable, "-c", TRAINING + TORCHRUN, *args], stderr=stderr, cwd=runs.ROOT, env=environment
        )
        try:
            began = time.monotonic()
            while not (run / "checkpoints/step-000002").exists() or runs.rows(run)[-1]["step"] < 3:
                assert time.monotonic() - began < 200 and agent.poll() is None, (tmp_path / "stderr").read_text()
                time.sleep(0.02)
            first = min(psutil.Process(agent.pid).children(), key=lambda child: child.pid)
            first.send_signal(signal.SIGKILL)
            assert agent.wait(200) == 0, (tmp_path / "stderr").read_text()[-3000:]
        finally:
            agent.terminate()
    said = (tmp_path / "stderr").read_text()
    assert "continues after step" in said
    assert runs.untimed(run) == runs.untimed(tmp_path / "through")
    first, again = runs.latest(tmp_path / "through"), runs.latest(run)
    assert first.step == again.step == 10 and first.tensors.keys() == again.tensors.keys()
    for name in first.tensors:
        runs.assert_equal(first.tensors[name], again.tensors[name])
    ranks = {"TORCHELASTIC_RESTART_COUNT": "1"}
    refused = command(*args, processes=2, **ranks)
    assert refused.returncode == 2 and "holds a run already; add --resume" in refused.stderr, refused.stderr
