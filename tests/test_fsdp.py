"""All weights under FSDP2: the same run as one process with all of them, and checkpoints that either goes on from."""

import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from posttrain import checkpoint
from posttrain.k2 import K2
from tests import runs

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
"""What `accelerate launch` tells the processes."""


def assert_close(a: checkpoint.Checkpoint, b: checkpoint.Checkpoint, begun: dict) -> None:
    """The same files of the same tensors, whose values agree; of weights, how far they moved."""
    assert a.step == b.step and a.tensors.keys() == b.tensors.keys() >= {"weights", "live", "optimizer"}
    for name, group in a.tensors.items():
        form = [{key: (value.shape, value.dtype) for key, value in part.items()} for part in (group, b.tensors[name])]
        assert form[0] == form[1]
        first, second = (
            torch.cat([(t[k] - begun.get(k, 0)).flatten() for k in group]) for t in (group, b.tensors[name])
        )
        assert first.norm() > 0 and (first - second).norm() < 1e-2 * first.norm(), name


def train(command, config, method: str, path, *args, sharded: bool, processes: int = 2) -> None:
    result = command(
        method, "--config", runs.recipe(config, path), *args, processes=processes, **FSDP2 if sharded else {}
    )
    assert result.returncode == 0, result.stderr
    assert "view tensor" not in result.stderr, result.stderr
    if sharded:
        [(held, total)] = re.findall(r"each process holds (\S+) of (\S+) million", result.stderr)
        assert float(held) < 0.65 * float(total)


@pytest.mark.parametrize("method", ["grpo", "stpo"])
def test_two_sharded_processes_equal_one(command, model, tmp_path, method):
    """What is dealt out does not divide by two. A run is cut in half and carried on by the other kind of processes."""
    config: Any = runs.config(tmp_path, model) if method == "grpo" else runs.stpo_config(tmp_path, model)
    config.lora, config.optim.lr, config.optim.ema = None, 1e-4, 0.5
    config.eval.prompts, config.eval.every = 1, 1
    if method == "grpo":
        config.groups.prompts_per_step, config.groups.group_size = 3, 2
        config.sampling.sizes, config.optim.max_grad_norm = [[32, 32], [16, 48]], 1e-3
    else:
        config.batch, config.micro_batch = 5, 2
    outputs = [tmp_path / name for name in ("one", "two", "cut", "mended")]
    for output, halves in zip(outputs, ([False], [True], [True, False], [False, True])):
        config.output = str(output)
        for i, sharded in enumerate(halves):
            args = "--steps", 3 - len(halves) + i, "--resume"
            train(command, config, method, tmp_path / "r.yaml", *args, sharded=sharded, processes=1 + sharded)
    begun = K2.load(model).base_state_dict()
    one, *others = outputs
    for other in others:
        assert len(runs.rows(one)) == len(runs.rows(other))
        for a, b in zip(runs.untimed(one), runs.untimed(other)):
            assert a == pytest.approx(b, rel=1e-3, abs=1e-6)
        assert_close(runs.latest(one), runs.latest(other), begun)


@pytest.mark.parametrize("rank", [None, 4])
def test_the_arithmetic_is_that_of_whole_weights(command, model, tmp_path, rank):
    """Student, fake score and teacher in bfloat16, with batches that differ between the processes."""
    config = runs.tdm_config(tmp_path, model)
    config.model.dtype, config.student.steps, config.batch, config.micro_batch = "bfloat16", [2, 3], 5, 2
    if rank is None:
        config.lora, config.optim.lr = None, 1e-4
    for name in ("plain", "sharded"):
        config.output = str(tmp_path / name)
        train(command, config, "tdm", tmp_path / "r.yaml", sharded=name == "sharded")
    for a, b in zip(runs.untimed(tmp_path / "plain"), runs.untimed(tmp_path / "sharded")):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)


def test_what_is_not_supported_is_refused(command, model, tmp_path):
    config = runs.stpo_config(tmp_path, model)
    path = runs.recipe(config, tmp_path / "r.yaml")
    for environment, args, said in (
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, (), "DeepSpeed is not supported: use recipes/launch/fsdp2.yaml"),
        (FSDP2 | {"FSDP_VERSION": "1"}, (), "fsdp_version: FSDP's first is not supported"),
        (FSDP2 | {"FSDP_OFFLOAD_PARAMS": "true"}, (), "fsdp_offload_params: is not supported; leave it out"),
        (FSDP2, ("--lora", "null", "--model.compile", "true"), "model.compile: FSDP2 does not go with it"),
        (FSDP2, (), "loss: FSDP2 cannot tell terms apart: set terms_every to 0"),
    ):
        result = command("stpo", "--config", path, *args, processes=2, **environment)
        assert result.returncode == 2 and said in result.stderr and "Traceback" not in result.stderr, result.stderr
    path = runs.recipe(runs.config(tmp_path, model), tmp_path / "r.yaml")
    result = command("preflight", "--config", path, processes=2, **FSDP2)
    assert result.returncode == 2 and "FSDP2 is for grpo, stpo and tdm" in result.stderr, result.stderr


def test_launching(model, tmp_path):
    """`accelerate launch` with the recipes gives processes what these tests give them; and it starts the command."""
    for name in ("one_gpu", "ddp", "fsdp2", "two_nodes"):
        args = launch_command_parser().parse_args(["--config_file", f"{runs.ROOT}/recipes/launch/{name}.yaml", "x"])
        told = prepare_multi_gpu_env(_validate_launch_command(args)[0])
        assert {key: told.get(key) for key in FSDP2} == (FSDP2 if name == "fsdp2" else dict.fromkeys(FSDP2)), name
    config = runs.config(tmp_path, model)
    config.steps = 1
    launch = ["accelerate.commands.launch", "--config_file", "recipes/launch/ddp.yaml", "--main_process_port", "0"]
    command = [*launch, "-m", "posttrain.cli", "grpo", "--config", str(runs.recipe(config, tmp_path / "r.yaml"))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, cwd=runs.ROOT, env=environment
    )
    assert result.returncode == 0, result.stderr
    assert runs.latest(config.output).step == 1
    assert json.loads((tmp_path / "run/environment.json").read_text())["processes"] == 2
