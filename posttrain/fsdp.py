"""FSDP2: each process holds a part of every matrix, and of what goes with it, and gathers a block while it runs.

    accelerate launch --config_file recipes/launch/fsdp2.yaml -m posttrain.cli grpo --config ...

Gathering takes all processes at once, but groups and pictures are dealt out as they come, so that some have more of
them than others. Hence before each pass through a network, forward or backward, they agree on which it is; who has
nothing to do there (it waits in an exchange of messages) takes part with a single token and leaves no gradient. No
method needs to know.

The factors of matrix products are sharded, and gathered in the type that arithmetic brings them to anyway. All else is
small, stays whole in fp32, and its gradient is summed like an adapter's. So results are those of one process.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from posttrain import shards
from posttrain.k2 import K2
from posttrain.processes import Processes
from posttrain.velocity import VelocityModel
from prompts.errors import UserError


@contextlib.contextmanager
def sharding(k2: K2, procs: Processes) -> Iterator[None]:
    """Shards the networks of the roles that are added inside, if the launcher asks for it; none can be added later.

    A role of all weights becomes fp32 only then, one block after the other: never is all of it in one GPU.
    """
    k2.deferred = procs.sharded
    yield
    if procs.sharded:
        _shard_all(k2, procs)


def _shard_all(k2: K2, procs: Processes) -> None:
    if k2.blocks.compiled:
        raise UserError("model.compile: FSDP2 does not go with it; leave it out")
    k2.blocks.compiled = False
    if any(map(is_traceable_wrapper_subclass, k2.transformer.parameters())):
        raise UserError("model.quantize: FSDP2 does not go with it; leave it out")
    if k2.blocks.recompute is None:  # kept activations would be measured together with gathered weights
        k2.blocks.recompute = len(k2.transformer.transformer_blocks)
    # An output that is a view may not be written into; nobody writes into a velocity.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(procs.device.type, (procs.size,))
    networks = [k2.velocity_model, *filter(None, [k2.reference]), *k2.copies.values()]
    for network in networks:
        _shard(network, k2.dtype, mesh, trained=network is not k2.reference and None in k2.roles.values())
    together = Together(k2, procs, networks)
    for name in k2.roles:
        for parameter in k2.role_parameters(name):
            parameter.requires_grad_(True)
    # The first pass settles where the parts lie, and what types the gradients have of parameters that want one then.
    with torch.no_grad():
        for network in networks:
            network(*together.single)
    k2.train_role(next(iter(k2.roles)))
    weights = {id(p): p for network in networks for p in network.parameters()}.values()
    held, total = (sum(p.numel() for p in part) / 1e6 for part in (map(shards.own, weights), weights))
    if procs.main:
        print(f"posttrain: FSDP2: each process holds {held:.4g} of {total:.4g} million weights", file=sys.stderr)
    k2.net = Joint(together, 0)
    if k2.reference is not None:
        k2.reference = Joint(together, 1)
    k2.copies = {name: Joint(together, networks.index(network)) for name, network in k2.copies.items()}
    procs.attend = together.attend


def _shard(network: VelocityModel, dtype: torch.dtype, mesh: Any, trained: bool) -> None:
    """With `trained`, its weights are a role, but for those that fuse the text, which stay as they are."""
    net = network.transformer
    parts = {id(p) for part in (net.text_fusion, net.txt_in) for p in part.parameters()}
    sharded = {
        id(p)
        for name, module in net.named_modules()
        if isinstance(module, nn.Linear) and ".lora_" not in name
        for p in module.parameters()
        if id(p) not in parts
    }
    options: dict[str, Any] = {
        "mesh": mesh,
        "reshard_after_forward": True,
        "mp_policy": MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False),
        "ignored_params": {p for p in network.parameters() if id(p) not in sharded},
    }
    for module in (*net.transformer_blocks, network):
        for parameter in module.parameters():
            if trained and id(parameter) not in parts:
                parameter.data = parameter.data.float()
        fully_shard(module, **options)


class Joint(nn.Module):
    """A network that all processes pass through together."""

    def __init__(self, together: Together, index: int):
        super().__init__()
        self.together, self.index = together, index

    def forward(self, *inputs: Any) -> Tensor:
        return self.together.forward(self.index, *inputs)


BACKWARD = 1


class Together:
    """Agrees with the other processes on each pass through one of several networks."""

    def __init__(self, k2: K2, procs: Processes, networks: list[VelocityModel]):
        self.procs, self.networks = procs, networks
        # It wants a gradient itself, so that there is one to take back where no adapter is active.
        x = torch.zeros(1, 1, k2.latent_channels, dtype=k2.dtype, device=k2.device, requires_grad=True)
        tokens = torch.zeros(1, 1, k2.transformer.txt_in.linear_2.out_features, dtype=k2.dtype, device=k2.device)
        self.single = (x, torch.full((1,), 0.5, device=k2.device), tokens, None, (1, 1))
        self.open: list[Tensor] = []
        """Of passes forward in which this process took part, results that have to go backward."""

    def forward(self, index: int, *inputs: Any) -> Tensor:
        graded = torch.is_grad_enabled() and any(p.requires_grad for p in self.networks[index].parameters())
        # Passes without gradient come first: whoever is at them has not begun what the others are at.
        self._until(2 + index + (0 if graded else len(self.networks)))
        result = self.networks[index](*inputs)
        return _Backward.apply(result, self) if graded else result

    def backward(self) -> None:
        self._until(BACKWARD)

    def attend(self) -> None:
        """Takes part in all that the others do, until they are here as well."""
        self._until(0)

    def _until(self, turn: int) -> None:
        """Takes part in what the others do until it is this turn."""
        while (agreed := self.procs.greatest(turn)) != turn:
            if agreed == BACKWARD:
                with torch.enable_grad():
                    (self.open.pop(0).sum() * 0).backward()
                continue
            index, free = (agreed - 2) % len(self.networks), agreed - 2 >= len(self.networks)
            with torch.set_grad_enabled(not free):
                result = self.networks[index](*self.single)
            if not free:
                self.open.append(result)


class _Backward(torch.autograd.Function):
    """The identity, which tells when the gradient comes back."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, together: Together) -> Tensor:
        ctx.together = together
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.together.backward()
        return gradients[0], None
