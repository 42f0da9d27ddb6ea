"""What a launcher tells each of its processes, checked before anything is loaded. Never imports torch."""

from __future__ import annotations

import importlib.util
import os

from posttrain.errors import UserError

ZERO_OPTIONS = (
    "deepspeed_offload_optimizer_device", "deepspeed_offload_param_device", "deepspeed_config_file",
    "gradient_clipping", "deepspeed_moe_layer_cls_names",
)  # fmt: skip
"""Settings of accelerate's for DeepSpeed that are not supported, or are the recipe's."""
VARIABLES = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def check() -> None:
    """Raises UserError where WORLD_SIZE says that there are several processes, and how they meet is not said."""
    size = _number("WORLD_SIZE", "1")
    if size <= 1:
        return
    absent = [name for name in VARIABLES if not os.environ.get(name)]
    if absent:
        raise UserError(
            f"WORLD_SIZE: is {size}, and {', '.join(absent)} not set: start it with `accelerate launch` or `torchrun`,"
            " which set all of them, or unset WORLD_SIZE for a single process"
        )
    rank = _number("RANK")
    if rank >= size:
        raise UserError(f"RANK: is {rank} of WORLD_SIZE={size}: ranks count from 0")


def engine() -> str | None:
    """What divides the model between processes: FSDP2, ZeRO-2, ZeRO-3 or nothing. Raises UserError for what is not
    supported."""
    return _fsdp() or _zero()


def _env_flag(name: str) -> bool:
    return os.environ.get(name, "false").lower() == "true"


def _fsdp() -> str | None:
    if not _env_flag("ACCELERATE_USE_FSDP"):
        return None
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError("accelerate: fsdp_version: FSDP's first is not supported; set it to 2")
    for option in ("offload_params", "activation_checkpointing"):
        if _env_flag(f"FSDP_{option.upper()}"):
            raise UserError(f"accelerate: fsdp_{option}: is not supported; leave it out (model.recompute saves memory)")
    # accelerate's default is that transformers loads weights in one process only, for accelerate to send them on.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    return "FSDP2"


def _zero() -> str | None:
    if not _env_flag("ACCELERATE_USE_DEEPSPEED"):
        return None
    for name in ZERO_OPTIONS:
        # accelerate passes its settings on to the processes in these variables.
        if os.environ.get(f"ACCELERATE_{name.upper()}", "none").lower() not in ("none", "false"):
            raise UserError(f"accelerate: {name.removeprefix('deepspeed_')}: is not supported; leave it out")
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    if stage not in ("2", "3"):
        raise UserError(f"accelerate: zero_stage: is {stage}; take 2 or 3, or recipes/launch/ddp.yaml instead")
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError("accelerate: DeepSpeed is not installed: pip install 'posttrain[deepspeed]'")
    return f"ZeRO-{stage}"


def _number(name: str, default: str = "") -> int:
    given = os.environ.get(name) or default
    if not given.isdecimal():
        raise UserError(f"{name}: is '{given}', not a number: leave it to `accelerate launch` or `torchrun`")
    return int(given)
