"""Muon for the matrices of the blocks, and AdamW for everything else, as one optimiser.

    m <- .95 m + .05 g;   g~ = .05 g + .95 m;   O = NS5(g~ / |g~|);   W <- (1 - lr wd) W - lr .2 sqrt(max(out, in)) O

Nesterov momentum, five Newton-Schulz steps in bfloat16 with torch's coefficients, and an update whose root mean square
is about AdamW's (.17 to .18 of the rate), so that AdamW's rates carry over (arXiv:2502.16982). In one process it is
torch.optim.Muon(adjust_lr_fn="match_rms_adamw"), bit for bit.

FSDP2 holds rows of each matrix. Newton-Schulz of these rows alone would be another update, and its products of DTensors
would communicate fifteen times a matrix. So momentum stays where its rows are, and matrices are dealt to the processes
by their cost: the owner receives the rows of g~ in bfloat16, orthogonalises, and sends the rows of O back.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim._muon import _zeropower_via_newtonschulz

from posttrain.config.optimizer import OptimConfig
from posttrain.distributed import shards
from posttrain.distributed.processes import deal
from posttrain.errors import UserError
from posttrain.model.architecture import is_block_matrix

MOMENTUM = 0.95
COEFFICIENTS, STEPS = (3.4445, -4.775, 2.0315), 5
"""Of Newton-Schulz: torch.optim.Muon's defaults."""
EPS = 1e-20
"""Least norm that a matrix is divided by. torch's default of 1e-7 is near that of K2's smallest gradients."""
RMS = 0.2
"""Root mean square of AdamW's update in units of its rate, which Muon's is scaled to."""
SPIKE = 5.0
"""Gradients whose norm is above this many times the median of those before are left out. Newton-Schulz takes the size
out of a gradient, so one that is merely scaled down moves the weights as far as any other."""


def orthogonalised(matrix: Tensor) -> Tensor:
    """NS5 of a whole matrix (out, in), in bfloat16: singular values of .01 to 1 of its norm become .68 to 1.13."""
    return _zeropower_via_newtonschulz(matrix, COEFFICIENTS, STEPS, EPS)


def cost(shape: Sequence[int]) -> int:
    """Operations of `orthogonalised`. A step is a Gram matrix, its square, and a product with the matrix."""
    small, large = sorted(shape)
    return STEPS * (4 * small**2 * large + 2 * small**3)


def scale(shape: Sequence[int]) -> float:
    """What an orthogonalised update is multiplied by, in units of the rate."""
    return RMS * math.sqrt(max(shape))


def split(named: Mapping[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters that Muon moves, and those that AdamW does. Names decide: a table of modulations is a matrix too,
    and the first and the last linear have spikes under Muon."""
    matrices = [parameter for name, parameter in named.items() if is_block_matrix(name)]
    others = [parameter for name, parameter in named.items() if not is_block_matrix(name)]
    if not matrices:
        raise UserError("optim.kind: muon moves whole matrices of the blocks, and none of them is trained; use adamw")
    if any(shards.piece_of(parameter) for parameter in matrices):
        raise UserError("optim.kind: muon needs whole rows, which ZeRO does not keep together; use FSDP2 or adamw")
    return matrices, others


class Muon(torch.optim.Optimizer):
    """Takes this process's parts of the parameters."""

    def __init__(
        self, matrices: Sequence[Tensor], others: Sequence[Tensor], wholes: Sequence[Tensor], config: OptimConfig
    ):
        """`wholes` are what the matrices are parts of: DTensors, or the matrices themselves."""
        self._adamw = torch.optim.AdamW(
            others, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay
        )
        first = {"params": list(matrices), "lr": config.lr, "weight_decay": config.weight_decay, "momentum": MOMENTUM}
        super().__init__([first, *self._adamw.param_groups], {})
        self.wholes = list(wholes)
        self._square = self._elements = 0.0
        self._began: Any = None
        self._ended: Any = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update with the gradients that there are."""
        group, other = self.param_groups
        # One state for both optimisers, so that a checkpoint has it whole. Loading a state makes new objects of both.
        self._adamw.state, self._adamw.param_groups = self.state, [other]
        self._adamw.step()
        rate, decay, momentum = float(group["lr"]), group["weight_decay"], group["momentum"]
        self._square, self._elements, self._began = 0.0, 0.0, self._now(group["params"][0])
        moved: list[int] = []
        for index, parameter in enumerate(group["params"]):
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter.grad)
            state["momentum_buffer"].lerp_(parameter.grad, 1 - momentum)
            moved.append(index)
        updates = self._dealt if isinstance(self.wholes[0], DTensor) else self._whole
        for index, update in updates(moved):
            # Decay first and apart from the gradient, as in AdamW.
            parameter = group["params"][index]
            parameter.mul_(1 - rate * decay)
            parameter.add_(update, alpha=-rate * scale(self.wholes[index].shape))
        self._ended = self._now(group["params"][0])

    def metrics(self) -> dict[str, float]:
        """Of the last step: the root mean square of Muon's update in units of the rate, over the matrices that this
        process orthogonalised, and the seconds that it took. Nothing before there is one."""
        if not self._elements:
            return {}
        seconds = self._ended - self._began if isinstance(self._ended, float) else self._gpu_seconds()
        return {"update_rms": math.sqrt(float(self._square) / self._elements), "muon_seconds": seconds}

    # ---- one step -----------------------------------------------------------------------------------------------

    def _nesterov(self, index: int) -> Tensor:
        """g~ of a matrix, the part that this process holds."""
        parameter = self.param_groups[0]["params"][index]
        return parameter.grad.lerp(self.state[parameter]["momentum_buffer"], self.param_groups[0]["momentum"])

    def _whole(self, indices: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """Orthogonalised updates by index, where this process holds all matrices whole."""
        for index in indices:
            yield index, self._orthogonalised(self._nesterov(index))

    def _dealt(self, indices: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """The rows of these updates that this process holds. In each round every process owns one matrix, or none."""
        rank, size = dist.get_rank(), dist.get_world_size()
        hands = deal([cost(self.wholes[index].shape) for index in indices], size)
        for turn in range(max(map(len, hands))):
            owned: list[int | None] = []
            parts: list[Tensor | None] = []
            for hand in hands:
                index = indices[hand[turn]] if turn < len(hand) else None
                owned.append(index)
                parts.append(None if index is None else self._nesterov(index).bfloat16())
            sent = [0 if part is None else part.numel() for part in parts]
            mine, received = owned[rank], [0] * size
            if mine is not None:
                rows, columns = self.wholes[mine].shape
                received = [count * columns for count in rows_of(rows, size)]
            flat = torch.cat([part.flatten() for part in parts if part is not None])
            whole = flat.new_empty(sum(received))
            _exchange(whole, flat, received, sent)
            if mine is not None:
                whole = self._orthogonalised(whole.view(self.wholes[mine].shape)).contiguous().flatten()
            _exchange(flat, whole, sent, received)
            for index, part, update in zip(owned, parts, flat.split(sent)):
                if index is not None and part is not None:
                    yield index, update.view(part.shape)

    def _orthogonalised(self, matrix: Tensor) -> Tensor:
        update = orthogonalised(matrix)
        self._square = self._square + (update.float().norm() * scale(matrix.shape)).square()
        self._elements += matrix.numel()
        return update

    @staticmethod
    def _now(like: Tensor) -> Any:
        if not like.is_cuda:
            return time.perf_counter()
        # An event, which is read later: a clock on the CPU would have to wait for the GPU.
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _gpu_seconds(self) -> float:
        self._ended.synchronize()
        return self._began.elapsed_time(self._ended) / 1e3


def rows_of(rows: int, processes: int) -> list[int]:
    """How many of a matrix's rows each process holds under FSDP2: all as many, but for the last ones."""
    each = -(-rows // processes)
    return [max(0, min(each, rows - rank * each)) for rank in range(processes)]


def _exchange(received: Tensor, sent: Tensor, received_sizes: list[int], sent_sizes: list[int]) -> None:
    """all_to_all of bfloat16 numbers, as bytes: gloo has no such numbers."""
    splits = [2 * size for size in received_sizes], [2 * size for size in sent_sizes]
    dist.all_to_all_single(received.view(torch.uint8), sent.view(torch.uint8), splits[0], splits[1])
