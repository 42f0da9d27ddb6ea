"""FSDP2: each process holds a part of every matrix, its gradient and its moments, and gathers a block while it runs.

    accelerate launch --config_file recipes/launch/fsdp2.yaml -m posttrain.cli grpo --config ...

Weights of linears are sharded, and gathered in the type that the forward computes in. Everything else is small: it
stays whole in fp32, and its gradient is summed like an adapter's. Results therefore equal those of one process.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from posttrain.distributed.processes import Processes
from posttrain.model import architecture
from posttrain.model.blocks import VelocityModel
from posttrain.model.k2 import K2


def shard(k2: K2, networks: list[VelocityModel], procs: Processes) -> list[nn.Module]:
    """Shards the networks in place. The first one holds the trained parameters."""
    # The warning is about writing into an output that is a view; nothing writes into a velocity.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(procs.device.type, (procs.size,))
    for network in networks:
        _shard(network, k2, mesh, trained=network is not k2.reference and None in k2.roles.values())
    return list(networks)


def _shard(network: VelocityModel, k2: K2, mesh: Any, trained: bool) -> None:
    """With `trained`, the weights are a role, except those that fuse the text, which do not change."""
    net = network.transformer
    text: set[int] = set()
    for part in architecture.text_modules(net):
        text.update(map(id, part.parameters()))
    sharded: set[int] = set()
    for module in net.modules():
        if isinstance(module, nn.Linear):
            # Adapters are small: they stay whole, and their gradients are summed like those of one process.
            base = [p for key, p in module.named_parameters() if not key.startswith("lora_")]
            sharded.update(id(p) for p in base if id(p) not in text)
    options: dict[str, Any] = {
        "mesh": mesh,
        "reshard_after_forward": True,
        "mp_policy": MixedPrecisionPolicy(k2.dtype, torch.float32, cast_forward_inputs=False),
        "ignored_params": {p for p in network.parameters() if id(p) not in sharded},
    }
    # Blocks first, so that the outer call takes only what they left. A trained block becomes fp32 just before it is
    # divided: all of K2 in fp32 would not fit into one GPU.
    for module in (*architecture.blocks(net), network):
        for parameter in module.parameters():
            if trained and id(parameter) not in text:
                parameter.data = k2.master(parameter)
        fully_shard(module, **options)
