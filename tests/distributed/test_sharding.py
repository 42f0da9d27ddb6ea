"""All weights under FSDP2 and ZeRO: the same run as one process with all of them; any goes on from any checkpoint."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from typing import Any

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from posttrain.config.sections import ModelConfig
from posttrain.distributed import launch
from posttrain.errors import UserError
from posttrain.model.k2 import K2
from posttrain.training import checkpoint
from tests.helpers import runs
from tests.training.test_stages import stage

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
"""What `accelerate launch` tells the processes."""
ZERO2, ZERO3 = ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": stage} for stage in "23")
ENGINES = {"one": {}, "fsdp2": FSDP2, "zero2": ZERO2, "zero3": ZERO3}


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


def compared(run) -> list[dict]:
    """A run's rows, without what is sampled from the part that the main process holds."""
    sampled = ("sqrt_v", "eps_share")
    return [{name: v for name, v in row.items() if not name.endswith(sampled)} for row in runs.untimed(run)]


def train(command, config, method: str, path, *args, engine: str, processes: int = 2) -> None:
    """Each process holds its part: of what is trained, and, but under ZeRO-2, of all weights."""
    result = command(
        method, "--config", runs.recipe(config, path), *args, processes=processes, **ENGINES.get(engine, {})
    )
    assert result.returncode == 0, result.stderr
    assert "view tensor" not in result.stderr, result.stderr
    assert "accelerator" not in result.stdout, result.stdout
    if engine in ("fsdp2", "zero2", "zero3"):
        pattern = r"each process holds (\S+) of (\S+) million weights and updates (\S+) of the (\S+) that are trained"
        [(held, total, own, trained)] = (map(float, found) for found in re.findall(pattern, result.stderr))
        assert engine == "zero2" or held < 0.65 * total
        assert (engine == "fsdp2" and config.lora) or own < 0.65 * trained


WHOLE = [("one",), ("fsdp2",)]
CUT = {
    "grpo": [("zero3",), ("fsdp2", "one"), ("one", "zero3"), ("zero3", "fsdp2")],
    "grpo ahead": [("zero3",), ("zero3", "fsdp2"), ("fsdp2", "one")],
    "stpo": [("zero2",), ("one", "fsdp2"), ("fsdp2", "zero2"), ("zero2", "one")],
}


@pytest.mark.long
@pytest.mark.parametrize("method", CUT)
def test_two_sharded_processes_equal_one(command, model, tmp_path, method):
    """What is dealt out does not divide by two. A run is cut in half and carried on under another engine."""
    halved = CUT[method]
    method, *ahead = method.split()
    config: Any = runs.config(tmp_path, model) if method == "grpo" else runs.stpo_config(tmp_path, model)
    config.lora, config.optim.lr, config.optim.ema = None, 1e-4, 0.5
    config.eval.prompts, config.eval.every = 1, 1
    if method == "grpo":
        config.rollout.ahead = len(ahead)
        config.groups.prompts_per_step, config.groups.group_size = 3, 2
        config.sampling.sizes = [[32, 32], [16, 48]]
    else:
        config.batch, config.micro_batch = 5, 2
    config.steps, config.checkpoint.every = 2, 1
    outputs = []
    for halves in [*WHOLE, *halved]:
        outputs.append(tmp_path / "-".join(halves))
        config.output = str(outputs[-1])
        if halves[1:]:  # the first half is that of the run under that engine alone, as a kill after it leaves it
            shutil.copytree(tmp_path / halves[0], outputs[-1], symlinks=True)
            shutil.rmtree(outputs[-1] / "checkpoints/step-000002")
        engine = halves[-1]
        args = ["--resume"] if halves[1:] else []
        train(command, config, method, tmp_path / "r.yaml", *args, engine=engine, processes=1 + (engine != "one"))
    begun = K2.load(model).base_state_dict()
    one, *others = outputs
    for other in others:
        assert len(runs.rows(one)) == len(runs.rows(other))
        for a, b in zip(compared(one), compared(other)):
            assert a == pytest.approx(b, rel=1e-3, abs=1e-6)
        assert_close(runs.latest(one), runs.latest(other), begun)


@pytest.mark.long
@pytest.mark.parametrize("rank", [None, 4])
def test_the_arithmetic_is_that_of_whole_weights(command, model, tmp_path, rank):
    """Student, fake score and teacher in bfloat16, on an earlier stage, with batches that differ between processes."""
    config = runs.tdm_config(tmp_path, model)
    config.model.start = str(stage(tmp_path / "start", ModelConfig(str(model), dtype="bfloat16"), 0.05, 1))
    config.model.dtype, config.student.steps, config.batch, config.micro_batch = "bfloat16", [2, 3], 5, 2
    if rank is None:
        config.lora, config.optim.lr = None, 1e-4
    for engine in ("ddp", "fsdp2", "zero2", "zero3"):
        config.output = str(tmp_path / engine)
        train(command, config, "tdm", tmp_path / "r.yaml", engine=engine)
    # Around ZeRO-3's hooks gradients in bfloat16 are added in another order.
    for engine, tolerance in (("fsdp2", 1e-4), ("zero2", 1e-4), ("zero3", 2e-2)):
        for a, b in zip(compared(tmp_path / "ddp"), compared(tmp_path / engine), strict=True):
            assert a == pytest.approx(b, rel=tolerance, abs=1e-6), engine


def test_what_is_not_supported_is_refused(command, model, tmp_path):
    config = runs.stpo_config(tmp_path, model)
    path = runs.recipe(config, tmp_path / "r.yaml")
    for environment, args, said in (
        (ZERO3 | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}, (), "zero_stage: is 1; take 2 or 3"),
        (
            ZERO3 | {"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"},
            (),
            "offload_param_device: is not supported; leave it out",
        ),
        (ZERO2, ("--lora", "null", "--model.compile", "true"), "model.compile: ZeRO-2 does not go with it"),
        (FSDP2 | {"FSDP_VERSION": "1"}, (), "fsdp_version: FSDP's first is not supported"),
        (FSDP2 | {"FSDP_OFFLOAD_PARAMS": "true"}, (), "fsdp_offload_params: is not supported; leave it out"),
        (FSDP2, ("--lora", "null", "--model.compile", "true"), "model.compile: FSDP2 does not go with it"),
        (FSDP2, (), "loss: FSDP2 cannot tell terms apart: set terms_every to 0"),
    ):
        result = command("stpo", "--config", path, *args, processes=2, **environment)
        assert result.returncode == 2 and said in result.stderr and "Traceback" not in result.stderr, result.stderr
    path = runs.recipe(runs.config(tmp_path, model), tmp_path / "r.yaml")
    result = command("preflight", "--config", path, processes=2, **FSDP2)
    assert result.returncode == 2 and "FSDP2 is for commands that train K2" in result.stderr, result.stderr


def test_deepspeed_that_is_missing_is_named(monkeypatch):
    for name, value in ZERO3.items():
        monkeypatch.setenv(name, value)
    assert launch._zero() == "ZeRO-3"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"DeepSpeed is not installed: pip install 'posttrain\[deepspeed\]'"):
        launch._zero()


@pytest.mark.long
def test_launching(model, tmp_path):
    """`accelerate launch` with the recipes gives processes what these tests give them; and it starts the command."""
    for name in ("one_gpu", "ddp", "fsdp2", "zero2", "zero3", "two_nodes"):
        args = launch_command_parser().parse_args(["--config_file", f"{runs.ROOT}/recipes/launch/{name}.yaml", "x"])
        args = _validate_launch_command(args)[0]
        args.deepspeed_fields_from_accelerate_config = ""
        told = prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else prepare_multi_gpu_env(args)
        for key in FSDP2 | ZERO3:
            assert told.get(key) == ENGINES.get(name, {}).get(key), name
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
