"""DeepSpeed's ZeRO: each process updates a part of what is trained and holds its gradient and moments; ZeRO-3 divides
the weights too, and gathers a layer's while it runs.

    accelerate launch --config_file recipes/launch/zero3.yaml -m posttrain.cli grpo --config ...

DeepSpeed divides the parameters, gathers them around each layer and reduces gradients to where they belong. The update
is posttrain's own, on each process's pieces (loop.py), so that clipping, averages and checkpoints are those of one
process. ZeRO-2 is the same with nothing but what is trained divided, and whole copies of it kept.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from posttrain.distributed import shards
from posttrain.distributed.processes import Processes
from posttrain.model.k2 import K2
from posttrain.model.velocity import VelocityModel

BUCKET = 200_000_000
"""Elements that are reduced, gathered ahead, or updated, at a time."""


class _Parts(nn.Module):
    """A network but for what fuses the text, which stays whole, and what has no weights: all processes must pass
    through the same modules, and some is called for new sizes only."""

    def __init__(self, network: VelocityModel):
        super().__init__()
        for name, child in network.transformer.named_children():
            if name not in ("text_fusion", "txt_in") and any(True for _ in child.parameters()):
                self.add_module(name, child)
        self.run = (network.forward,)

    def forward(self, *inputs: Any) -> torch.Tensor:
        return self.run[0](*inputs)


def shard(k2: K2, networks: list[VelocityModel], procs: Processes) -> tuple[list[nn.Module], Callable[[], None]]:
    """What to call instead of these networks, and what brings the gradients of a pass to an end."""
    os.environ.setdefault("DS_ACCELERATOR", procs.device.type)
    import deepspeed

    warnings.filterwarnings("ignore", "`torch.distributed.*_tensor` is deprecated", FutureWarning)
    deepspeed.ops.__compatible_ops__.clear()  # so that it compiles nothing
    deepspeed.init_distributed(dist_init_required=False)
    trained = {id(p) for name in k2.roles for p in k2.role_parameters(name)}
    passed: list[nn.Module] = []
    optimizers = []
    for network in networks:
        parts = _Parts(network)
        own = [p for p in parts.parameters() if id(p) in trained]
        passed.append(parts if procs.engine == "ZeRO-3" else network)
        if procs.engine == "ZeRO-3":
            optimizers.append(_divided(k2, parts, own, max(p.numel() for p in parts.parameters() if p.ndim < 2)))
        elif own:
            optimizers.append(_divided(k2, nn.ParameterList(own), own, sys.maxsize))
            shards.gather(own)

    def settle() -> None:
        for optimizer in filter(None, optimizers):
            if any(bucket.params for bucket in optimizer.ipg_buckets.values()):
                optimizer.independent_gradient_partition_epilogue()
                optimizer.backward_epilogue()
                optimizer.clear_backward_seen_flag()

    return passed, settle


def _divided(k2: K2, module: nn.Module, trained: list[nn.Parameter], kept: int) -> Any:
    """Divides a module's parameters, of which those of at most `kept` elements stay whole as well; returns what reduces
    the gradients of those that are trained."""
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.utils.timer import NoopTimer

    wanted = {id(p) for p in trained}
    bucket = min(BUCKET, sum(p.numel() for p in trained))
    for parameter in module.parameters():
        if id(parameter) in wanted:
            parameter.data = k2.master(parameter)
        Init(nn.ParameterList([parameter]), mem_efficient_linear=False, dtype=torch.float32)
    options = {
        "overlap_comm": False,  # communication and updates are in one order, that of the default stream
        "prefetch_bucket_size": BUCKET,
        "max_live_parameters": 2 * BUCKET,
        "max_reuse_distance": BUCKET,
        "param_persistence_threshold": kept,
    }
    optimizer = None
    if trained:
        optimizer = DeepSpeedZeroOptimizer_Stage3(
            module,
            torch.optim.SGD(trained),  # which never steps
            {p: str(i) for i, p in enumerate(trained)},
            NoopTimer(),
            None,
            reduce_bucket_size=bucket,
            sub_group_size=BUCKET,
            communication_data_type=torch.float32,
            **options,
        )
        optimizer.micro_step_id = 1  # gradients are always added, to what was cleared
        for part in optimizer.fp32_partitioned_groups_flat:
            part.data = part.data.new_empty(0)  # a copy that only its own update would read
    else:
        DeepSpeedZeRoOffload(module, NoopTimer(), None, **options)
    for parameter in module.parameters():
        _set_piece(parameter, optimizer)
    return optimizer


def _set_piece(parameter: Any, optimizer: Any) -> None:
    size, numel = parameter.ds_tensor.numel(), parameter.ds_numel
    length = min(max(0, numel - dist.get_rank() * size), size)
    piece = shards.Piece(parameter.ds_tensor.data[:length], parameter.ds_shape, size)
    if optimizer is not None and parameter.requires_grad:
        piece.own.grad = optimizer.get_local_fp32_grad_for_param(parameter)[:length]
    parameter.piece = piece
