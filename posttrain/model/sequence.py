"""Sequence parallelism: several processes share the tokens of each sample, for images that are too large for one GPU.

Each process has a part of every sample's tokens in all layers but attention, where it has a part of the heads instead:
diffusers' Ulysses exchange (ContextParallelConfig) moves them. The velocities are then gathered, so all processes of a
group compute the same loss. A parameter's gradient on one process is that of its own tokens; the sum over all processes
(Processes.sum_gradients) is the whole.

diffusers splits the inputs of its own transformer's forward by hooks, which VelocityModel does not call, and its
Ulysses without equal parts has no backward. So tokens are split here, and padded to equal parts behind a mask if need
be.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, ParallelConfig
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F

from posttrain.distributed.processes import Processes
from posttrain.errors import UserError
from posttrain.model import architecture
from posttrain.model.k2 import K2


def check(size: int) -> None:
    """Raises UserError unless the processes that were launched can be divided into groups of `size`."""
    launched = dist.get_world_size() if dist.is_initialized() else 1
    if launched % size:
        raise UserError(
            f"model.sequence_parallel: is {size}, which does not divide the {launched} processes of this run; launch a"
            f" multiple of it (torchrun --nproc-per-node {size})"
        )


def enable(k2: K2, procs: Processes) -> None:
    """Groups of `k2.sequence_parallel` neighbouring processes run each forward together from now on, and divide
    training's work as one process. Raises UserError for what does not go with it."""
    size = k2.sequence_parallel
    if procs.sharded:
        raise UserError(
            f"model.sequence_parallel: {procs.engine} does not go with it; use 1, or recipes/launch/ddp.yaml"
        )
    if k2.blocks.compiled:
        raise UserError("model.compile: model.sequence_parallel does not go with it; leave it out")
    heads = k2.transformer.config["num_attention_heads"]
    if heads % size:
        raise UserError(f"model.sequence_parallel: is {size}, which does not divide the model's {heads} heads")
    k2.blocks.compiled = False  # in place of None, which would compile on a GPU
    # Processes must recompute the same blocks, as these exchange tokens, and each measures its own free memory.
    if k2.blocks.recompute is None:
        k2.blocks.recompute = len(architecture.blocks(k2.transformer))
    mesh = init_device_mesh(
        procs.device.type, (procs.size // size, 1, size), mesh_dim_names=("data", "ring", "ulysses")
    )
    config = ParallelConfig(context_parallel_config=ContextParallelConfig(ulysses_degree=size))
    config.setup(procs.rank, procs.size, procs.device, mesh=mesh["ring", "ulysses"])
    tokens = SequenceParallel(mesh["ulysses"].get_group(), procs.rank % size, size)
    networks: list[Any] = [k2.velocity_model, *filter(None, [k2.reference]), *k2.copies.values()]
    for network in networks:
        network.sequence = tokens
        blocks: list[Any] = architecture.blocks(network.transformer)
        for block in blocks:
            block.attn.processor._parallel_config = config
    procs.share(size)


class SequenceParallel:
    """Splits tokens over the processes of a group, and gathers them."""

    def __init__(self, group: Any, rank: int, size: int):
        self.group, self.rank, self.size = group, rank, size

    def split(
        self, hidden: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor | None]:
        """This process's part of hidden (B, T, C) and rope ((T, head), (T, head)), and the mask (B, 1, 1, T) of all
        tokens, padded to a multiple of the group's size; None if there is nothing to mask."""
        total = hidden.shape[1]
        if missing := -total % self.size:
            if mask is None:
                mask = torch.ones(hidden.shape[0], 1, 1, total, dtype=torch.bool, device=hidden.device)
            mask = F.pad(mask, (0, missing))  # with False
            hidden = F.pad(hidden, (0, 0, 0, missing))
            rope = (F.pad(rope[0], (0, 0, 0, missing)), F.pad(rope[1], (0, 0, 0, missing)))
        # The mask stays whole: each process attends with a part of the heads, and with all tokens.
        length = hidden.shape[1] // self.size
        start = self.rank * length
        rope = (rope[0].narrow(0, start, length), rope[1].narrow(0, start, length))
        return hidden.narrow(1, start, length), rope, mask

    def gather(self, part: Tensor) -> Tensor:
        """(B, T / size, C) of each process to (B, T, C); gradients are those of a loss that all compute alike."""
        return _Gather.apply(part, self)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, tokens: SequenceParallel) -> Tensor:
        ctx.tokens = tokens
        part = part.contiguous()
        parts = [torch.empty_like(part) for _ in range(tokens.size)]
        dist.all_gather(parts, part, tokens.group)
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        # All compute the same loss, so each has the gradient of the whole; a sum over processes would be too large.
        tokens = ctx.tokens
        return gradients[0].chunk(tokens.size, dim=1)[tokens.rank].contiguous(), None
