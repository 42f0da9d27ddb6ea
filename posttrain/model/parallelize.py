"""Networks that processes hold between them: FSDP2 (fsdp.py) or ZeRO (zero.py) divides, gathers and reduces.

    accelerate launch --config_file recipes/launch/fsdp2.yaml -m posttrain.cli grpo --config ...

Gathering takes all processes at once, but groups and pictures are dealt out as they come, so that some have more of
them than others. Hence before each pass through a network, forward or backward, they agree on which it is; who has
nothing to do there (it waits in an exchange of messages) takes part with a single token and leaves no gradient. No
method needs to know.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from posttrain.distributed import shards
from posttrain.distributed.processes import Processes
from posttrain.errors import UserError
from posttrain.log import log
from posttrain.model import fsdp, zero
from posttrain.model.k2 import K2
from posttrain.model.velocity import VelocityModel


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
    engine = procs.engine
    if k2.blocks.compiled:
        raise UserError(f"model.compile: {engine} does not go with it; leave it out")
    k2.blocks.compiled = False
    if any(map(is_traceable_wrapper_subclass, k2.transformer.parameters())):
        raise UserError(f"model.quantize: {engine} does not go with it; leave it out")
    if k2.blocks.recompute is None:  # kept activations would be measured together with gathered weights
        k2.blocks.recompute = len(k2.transformer.transformer_blocks)
    for name in k2.roles:
        for parameter in k2.role_parameters(name):
            parameter.requires_grad_(True)
    networks = [k2.velocity_model, *filter(None, [k2.reference]), *k2.copies.values()]
    together = Together(k2, procs)
    if engine == "FSDP2":
        together.networks = fsdp.shard(k2, networks, procs)
    else:
        together.networks, together.settle = zero.shard(k2, networks, procs)
    together.passes = [(g, r, i) for g in (True, False) for r in (None, *k2.roles) for i in range(len(networks))]
    # The first pass settles where the parts lie, and what types the gradients have of parameters that want one then.
    with torch.no_grad():
        for network in together.networks:
            network(*together.single)
    k2.train_role(next(iter(k2.roles)))
    _say(k2, networks, procs)
    joint = [Joint(together, index) for index in range(len(networks))]
    k2.copies = {name: joint[networks.index(network)] for name, network in k2.copies.items()}
    k2.net = joint[0]
    if k2.reference is not None:
        k2.reference = joint[1]
    procs.attend, procs.settle = together.attend, together.settle


def _say(k2: K2, networks: list[VelocityModel], procs: Processes) -> None:
    """How much of the weights is in this process, and how much of what is trained it updates."""
    if procs.main:
        weights = {id(p): p for network in networks for p in network.parameters()}.values()
        trained = [p for name in k2.roles for p in k2.role_parameters(name)]
        counts = [
            sum(part.numel() for p in weights for part in shards.held(p)),
            sum(shards.shape(p).numel() for p in weights),
            sum(shards.own(p).numel() for p in trained),
            sum(shards.shape(p).numel() for p in trained),
        ]
        held, total, own, whole = (f"{count / 1e6:.4g}" for count in counts)
        log.info(
            f"{procs.engine}: each process holds {held} of {total} million weights and updates {own} of the {whole}"
            " that are trained"
        )


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

    def __init__(self, k2: K2, procs: Processes):
        self.k2, self.procs = k2, procs
        self.networks: list[nn.Module] = []
        self.passes: list[tuple[bool, str | None, int]] = []
        """Kinds of passes forward: with gradient or not, as which role, through which network. Of those that processes
        are at, the last one here is next: who is at one without gradient has not begun what the others are at."""
        self.settle: Callable[[], None] = lambda: None
        """Brings the gradients of the pass before to an end, before there is another."""
        x = torch.zeros(1, 1, k2.latent_channels, dtype=k2.dtype, device=k2.device)
        tokens = torch.zeros(1, 1, k2.transformer.txt_in.linear_2.out_features, dtype=k2.dtype, device=k2.device)
        self.single = (x, torch.full((1,), 0.5, device=k2.device), tokens, None, (1, 1))
        self.open: list[Tensor] = []
        """Of passes forward in which this process took part, results that have to go backward."""

    def forward(self, index: int, *inputs: Any) -> Tensor:
        role = self.k2.active
        trained = self.k2.role_parameters(role) if role is not None and torch.is_grad_enabled() else []
        graded = any(p.requires_grad for p in trained)
        self._until(self.passes.index((graded, role, index)) + 2)
        result = self.networks[index](*inputs)
        return _Backward.apply(result, self) if graded else result

    def backward(self) -> None:
        self._until(BACKWARD)
        self.settle()

    def attend(self) -> None:
        """Takes part in all that the others do, until they are here as well."""
        self._until(0)

    def _until(self, turn: int) -> None:
        """Takes part in what the others do until it is this turn."""
        while (agreed := self.procs.greatest(turn)) != turn:
            if agreed == BACKWARD:
                self.settle()
                with torch.enable_grad():
                    (self.open.pop(0).sum() * 0).backward()
                continue
            graded, role, index = self.passes[agreed - 2]
            with torch.set_grad_enabled(graded), self.k2.role(role):
                result = self.networks[index](*self.single)
            if graded:
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
