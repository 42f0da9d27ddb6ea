"""FSDP2: each process holds a part of every matrix, and of what goes with it, and gathers a block while it runs.

    accelerate launch --config_file recipes/launch/fsdp2.yaml -m posttrain.cli grpo --config ...

The factors of matrix products are sharded, and gathered in the type that arithmetic brings them to anyway. All else is
small, stays whole in fp32, and its gradient is summed like an adapter's. So results are those of one process.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from posttrain.distributed.processes import Processes
from posttrain.model.k2 import K2
from posttrain.model.velocity import VelocityModel


def shard(k2: K2, networks: list[VelocityModel], procs: Processes) -> list[nn.Module]:
    """Shards them in place; the first has what is trained."""
    # An output that is a view may not be written into; nobody writes into a velocity.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(procs.device.type, (procs.size,))
    for network in networks:
        _shard(network, k2, mesh, trained=network is not k2.reference and None in k2.roles.values())
    return list(networks)


def _shard(network: VelocityModel, k2: K2, mesh: Any, trained: bool) -> None:
    """With `trained`, its weights are a role, but for those that fuse the text, which stay as they are."""
    net = network.transformer
    parts = {id(p) for part in (net.text_fusion, net.txt_in) for p in part.parameters()}
    sharded = {
        id(p)
        for module in net.modules()
        if isinstance(module, nn.Linear)
        for key, p in module.named_parameters()
        if id(p) not in parts and not key.startswith("lora_")
    }
    options: dict[str, Any] = {
        "mesh": mesh,
        "reshard_after_forward": True,
        "mp_policy": MixedPrecisionPolicy(k2.dtype, torch.float32, cast_forward_inputs=False),
        "ignored_params": {p for p in network.parameters() if id(p) not in sharded},
    }
    for module in (*net.transformer_blocks, network):
        for parameter in module.parameters():
            if trained and id(parameter) not in parts:
                parameter.data = k2.master(parameter)
        fully_shard(module, **options)
