"""Networks that are sharded over processes: FSDP2 or ZeRO (zero.py) divides, gathers and reduces.

    accelerate launch --config_file recipes/launch/fsdp2.yaml -m posttrain.cli grpo --config ...

Gathering needs all processes at once, but some have more groups or images than others. Before each pass through a
network, forward or backward, the processes therefore agree on which pass is next. A process that has nothing to do in
it (it waits in an exchange of messages) takes part with a single token and adds no gradient. Methods do not notice.

Under FSDP2 each process holds a part of the weight of every linear, its gradient and its moments, and gathers a block
while it runs, in the type that the forward computes in. Everything else is small: it stays whole in fp32, and its
gradient is summed like an adapter's. Results therefore equal those of one process.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from posttrain.distributed import shards
from posttrain.distributed.processes import Processes
from posttrain.errors import UserError
from posttrain.log import log
from posttrain.model import architecture, fp8, sequence, zero
from posttrain.model.blocks import VelocityModel
from posttrain.model.k2 import K2


@contextlib.contextmanager
def sharding(k2: K2, procs: Processes) -> Iterator[None]:
    """Shards the networks of the roles that are added inside it, if the launcher asks for that, or divides their tokens
    over processes (`sequence_parallel`). No role can be added later.
    """
    # A role of all weights becomes fp32 while it is divided, block by block: one GPU could not hold all of it.
    k2.deferred = procs.sharded
    yield
    if k2.blocks.float8 and procs.sharded and procs.engine != "FSDP2":
        raise UserError(f"model.float8: {procs.engine} does not go with it; use FSDP2, or leave it out")
    fp8.train_in_float8(k2)
    if k2.sequence_parallel > 1:
        sequence.enable(k2, procs)
    elif procs.sharded:
        _shard_all(k2, procs)


def _shard_all(k2: K2, procs: Processes) -> None:
    engine = procs.engine
    if k2.blocks.compiled:
        raise UserError(f"model.compile: {engine} does not go with it; leave it out")
    k2.blocks.compiled = False
    if any(map(is_traceable_wrapper_subclass, k2.transformer.parameters())):
        raise UserError(f"model.quantize: {engine} does not go with it; leave it out")
    # Free memory cannot be measured while weights come and go, so all blocks are recomputed.
    if k2.blocks.recompute is None:
        k2.blocks.recompute = len(architecture.blocks(k2.transformer))
    # Which parameters are trained has to be known before they are divided.
    for name in k2.roles:
        for parameter in k2.role_parameters(name):
            parameter.requires_grad_(True)
    networks = [k2.velocity_model, *filter(None, [k2.reference]), *k2.copies.values()]
    if engine == "FSDP2":
        sharded, settle = _fsdp2(k2, networks, procs), _nothing
    else:
        sharded, settle = zero.shard(k2, networks, procs)
    coordinator = ForwardCoordinator(k2, procs, sharded, settle)
    # The first pass fixes where the parts are, and the types of the gradients of parameters that require one then.
    with torch.no_grad():
        for network in sharded:
            network(*coordinator.single)
    k2.train_role(next(iter(k2.roles)))
    _print_sizes(k2, networks, procs)
    # From here on every forward of any role goes through the coordinator. The order is that of `networks`: the model,
    # its reference, copies.
    modules = [SynchronizedModule(coordinator, index) for index in range(len(networks))]
    k2.copies = {name: modules[networks.index(network)] for name, network in k2.copies.items()}
    k2.net = modules[0]
    if k2.reference is not None:
        k2.reference = modules[1]
    procs.attend_by(coordinator.attend)


def _fsdp2(k2: K2, networks: list[VelocityModel], procs: Processes) -> list[nn.Module]:
    """Shards the networks in place. The first one holds the trained parameters."""
    # The warning is about writing into an output that is a view; nothing writes into a velocity.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(procs.device.type, (procs.size,))
    for network in networks:
        _fully_shard(network, k2, mesh, trained=network is not k2.reference and None in k2.roles.values())
    return list(networks)


def _fully_shard(network: VelocityModel, k2: K2, mesh: Any, trained: bool) -> None:
    """With `trained`, the weights are a role, except those that fuse the text, which do not change."""
    net = network.transformer
    text = set(map(id, architecture.text_parameters(net)))
    sharded: set[int] = set()
    for module in net.modules():
        if isinstance(module, nn.Linear):
            # Adapters are small: they stay whole, and their gradients are summed like those of one process.
            for key, parameter in module.named_parameters():
                if not key.startswith("lora_") and id(parameter) not in text:
                    sharded.add(id(parameter))
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


def _nothing() -> None:
    """FSDP2 completes its gradients by itself."""


def _print_sizes(k2: K2, networks: list[VelocityModel], procs: Processes) -> None:
    """How many of the weights this process holds, and how many of the trained ones it updates."""
    if not procs.main:
        return
    # By id: networks share the weights that are not trained.
    weights: dict[int, nn.Parameter] = {}
    for network in networks:
        for parameter in network.parameters():
            weights[id(parameter)] = parameter
    held = total = own = whole = 0
    for parameter in weights.values():
        for part in shards.held(parameter):
            held += part.numel()
        total += shards.shape(parameter).numel()
    for name in k2.roles:
        for parameter in k2.role_parameters(name):
            own += shards.own(parameter).numel()
            whole += shards.shape(parameter).numel()
    log.info(
        f"{procs.engine}: each process holds {held / 1e6:.4g} of {total / 1e6:.4g} million weights and updates"
        f" {own / 1e6:.4g} of the {whole / 1e6:.4g} that are trained"
    )


class SynchronizedModule(nn.Module):
    """A network that all processes run at the same time."""

    def __init__(self, coordinator: ForwardCoordinator, index: int):
        super().__init__()
        self.coordinator, self.index = coordinator, index

    def forward(self, *inputs: Any) -> Tensor:
        return self.coordinator.forward(self.index, *inputs)


BACKWARD = 1
"""The turn of a backward pass. 0 is none, and 2 and above are forwards, in the order of `ForwardCoordinator.passes`."""


class ForwardCoordinator:
    """Agrees with the other processes on each pass through one of several networks."""

    def __init__(self, k2: K2, procs: Processes, networks: list[nn.Module], settle: Callable[[], None]):
        """`settle` completes the gradients of a pass before there is another."""
        self.k2, self.procs, self.networks, self.settle = k2, procs, networks, settle
        self.passes: list[tuple[bool, str | None, int]] = []
        """Kinds of forwards: with gradient or not, as which role, through which network. Of those that processes are
        at, the last in this list is next: a process at one without gradient has not begun what the others are at."""
        for gradient in (True, False):
            for role in (None, *k2.roles):
                self.passes += [(gradient, role, index) for index in range(len(networks))]
        # The least that a network takes: it gathers all weights, and costs next to nothing to compute.
        x = torch.zeros(1, 1, k2.latent_channels, dtype=k2.dtype, device=k2.device)
        tokens = torch.zeros(1, 1, architecture.text_width(k2.transformer), dtype=k2.dtype, device=k2.device)
        self.single = (x, torch.full((1,), 0.5, device=k2.device), tokens, None, (1, 1))
        self.open: list[Tensor] = []
        """Results of forwards with a single token, which have to go backward when the others do."""

    def forward(self, index: int, *inputs: Any) -> Tensor:
        role = self.k2.active
        trained = self.k2.role_parameters(role) if role is not None and torch.is_grad_enabled() else []
        graded = any(p.requires_grad for p in trained)
        self._join_until(self.passes.index((graded, role, index)) + 2)  # 0 and 1 are taken
        result = self.networks[index](*inputs)
        return _Backward.apply(result, self) if graded else result

    def backward(self) -> None:
        self._join_until(BACKWARD)
        self.settle()

    def attend(self) -> None:
        """Takes part in the passes of the others, until they are here too. Gradients are complete after it."""
        self._join_until(0)
        self.settle()

    def _join_until(self, turn: int) -> None:
        """Takes part in the passes of the others until this turn is next."""
        while (agreed := self.procs.greatest(turn)) != turn:
            if agreed == BACKWARD:
                self.settle()
                # Times 0: this process gathers and reduces like the others, and changes no gradient.
                with torch.enable_grad():
                    (self.open.pop(0).sum() * 0).backward()
                continue
            graded, role, index = self.passes[agreed - 2]
            with torch.set_grad_enabled(graded), self.k2.role(role):
                result = self.networks[index](*self.single)
            if graded:
                self.open.append(result)


class _Backward(torch.autograd.Function):
    """The identity. Its backward runs before that of the network, and waits for the other processes."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, coordinator: ForwardCoordinator) -> Tensor:
        ctx.coordinator = coordinator
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.coordinator.backward()
        return gradients[0], None
