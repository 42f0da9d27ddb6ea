"""DeepSpeed's ZeRO: each process updates a part of the trained parameters, and holds their gradients and moments.
ZeRO-3 divides the weights too, and gathers those of a layer while it runs.

    accelerate launch --config_file recipes/launch/zero3.yaml -m posttrain.cli grpo --config ...

DeepSpeed divides the parameters, gathers them around each layer and reduces the gradients. The update is posttrain's
own, on the pieces of each process (training/stepper.py), so that clipping, averages and checkpoints equal those of one
process. ZeRO-2 divides only what is trained, and keeps a whole copy of it. This file uses private parts of DeepSpeed
0.19.
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
from posttrain.model.adapters.targets import TEXT
from posttrain.model.blocks import VelocityModel
from posttrain.model.k2 import K2

BUCKET = 200_000_000
"""Elements that are reduced, gathered ahead, or updated, at a time."""


class _Parts(nn.Module):
    """A network without its text fusion, which stays whole, and without modules that have no weights: all processes
    must pass through the same modules, and some of those are called for new sizes only."""

    def __init__(self, network: VelocityModel):
        super().__init__()
        for name, child in network.transformer.named_children():
            has_weights = next(child.parameters(), None) is not None
            if name not in TEXT and has_weights:
                self.add_module(name, child)
        self.run = network.forward

    def forward(self, *inputs: Any) -> torch.Tensor:
        return self.run(*inputs)


def shard(k2: K2, networks: list[VelocityModel], procs: Processes) -> tuple[list[nn.Module], Callable[[], None]]:
    """The modules to call instead of these networks, and a function that completes the gradients of a pass."""
    # DeepSpeed picks its accelerator when it is imported, by what it finds installed.
    os.environ.setdefault("DS_ACCELERATOR", procs.device.type)
    import deepspeed

    warnings.filterwarnings("ignore", "`torch.distributed.*_tensor` is deprecated", FutureWarning)
    deepspeed.ops.__compatible_ops__.clear()  # so that it compiles nothing
    deepspeed.init_distributed(dist_init_required=False)
    trained: set[int] = set()
    for name in k2.roles:
        trained.update(map(id, k2.role_parameters(name)))
    modules: list[nn.Module] = []
    optimizers = []
    for network in networks:
        parts = _Parts(network)
        own = [p for p in parts.parameters() if id(p) in trained]
        # The weights of ZeRO-2 stay whole, so its network is called as it is.
        modules.append(parts if procs.engine == "ZeRO-3" else network)
        if procs.engine == "ZeRO-3":
            # Vectors stay whole as well: they are small, and gathering each of them would cost a message.
            largest_vector = max(p.numel() for p in parts.parameters() if p.ndim < 2)
            optimizers.append(_divided(k2, parts, own, largest_vector))
        elif own:
            optimizers.append(_divided(k2, nn.ParameterList(own), own, sys.maxsize))
            shards.gather(own)

    def settle() -> None:
        for optimizer in filter(None, optimizers):
            # Only where a backward left gradients: these calls are collective, and must match in all processes.
            if any(bucket.params for bucket in optimizer.ipg_buckets.values()):
                optimizer.independent_gradient_partition_epilogue()
                optimizer.backward_epilogue()
                optimizer.clear_backward_seen_flag()

    return modules, settle


def _divided(k2: K2, module: nn.Module, trained: list[nn.Parameter], kept: int) -> Any:
    """Divides a module's parameters; those of at most `kept` elements also stay whole. Returns the object that reduces
    the gradients of the trained ones."""
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
        "overlap_comm": False,  # communication and updates are in order on the default stream
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
        optimizer.micro_step_id = 1  # gradients are always added; the stepper clears them
        for part in optimizer.fp32_partitioned_groups_flat:
            part.data = part.data.new_empty(0)  # a copy that only DeepSpeed's own update would read
    else:
        DeepSpeedZeRoOffload(module, NoopTimer(), None, **options)
    for parameter in module.parameters():
        _set_piece(parameter, optimizer)
    return optimizer


def _set_piece(parameter: Any, optimizer: Any) -> None:
    """Tells shards.py which part of the parameter is this process's."""
    size, numel = parameter.ds_tensor.numel(), parameter.ds_numel
    # All pieces have one size; the last ones are padded, and some may be nothing but padding.
    length = min(max(0, numel - dist.get_rank() * size), size)
    piece = shards.Piece(parameter.ds_tensor.data[:length], parameter.ds_shape, size)
    if optimizer is not None and parameter.requires_grad:
        piece.own.grad = optimizer.get_local_fp32_grad_for_param(parameter)[:length]
    parameter.piece = piece
