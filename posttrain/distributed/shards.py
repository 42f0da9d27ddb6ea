"""Parts of tensors that processes hold between them, as FSDP2 and ZeRO leave them.

FSDP2 makes parameters DTensors, sharded along one dimension. ZeRO leaves a parameter empty or whole, and what this
process updates is a run of its elements, a `Piece`. Everything here takes plain tensors too, and then changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


@dataclass
class Piece:
    """A tensor of which each process holds a run of elements: of `size`, but for the last ones, which may lack some."""

    own: Tensor
    shape: torch.Size
    size: int

    @property
    def dtype(self) -> torch.dtype:
        return self.own.dtype

    def cut(self, whole: Tensor) -> Tensor:
        # Of a small tensor the last processes have nothing.
        begin = min(dist.get_rank() * self.size, whole.numel())
        return whole.reshape(-1)[begin : begin + len(self.own)].to(self.own.device)

    def whole(self) -> Tensor:
        """All of it; all processes must ask at once."""
        padded = self.own.new_zeros(self.size)  # the last processes may hold fewer elements than the others
        padded[: len(self.own)] = self.own
        gathered = padded.new_empty(dist.get_world_size() * self.size)
        dist.all_gather_into_tensor(gathered, padded)
        return gathered[: self.shape.numel()].view(self.shape)


def piece_of(tensor: Any) -> Piece | None:
    return tensor if isinstance(tensor, Piece) else getattr(tensor, "piece", None)


def is_parted(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor) or piece_of(tensor) is not None


def own(tensor: Tensor) -> Tensor:
    """This process's part, in the same memory."""
    if piece := piece_of(tensor):
        return piece.own
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor


def held(tensor: Tensor) -> list[Tensor]:
    """What this process has of it in memory."""
    return [own(tensor), *([tensor.data] if piece_of(tensor) else [])]


def shape(tensor: Tensor) -> torch.Size:
    """That of the whole."""
    piece = piece_of(tensor)
    return piece.shape if piece else tensor.shape


def part(whole: Tensor, like: Tensor) -> Tensor:
    """This process's part of a tensor that is whole in all of them, cut as `like` is."""
    if whole.shape != shape(like):  # such as an optimiser's step count, which every process has
        return whole
    if piece := piece_of(like):
        return piece.cut(whole)
    if not isinstance(like, DTensor):
        return whole
    whole = whole.to(like.device)
    # No source rank: all processes have the whole, so nothing needs to be sent.
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None).to_local()


def joined(part: Tensor, like: Tensor) -> Any:
    """The inverse of `part`, for `whole`: nothing is gathered yet."""
    if (piece := piece_of(like)) and part.shape == piece.own.shape:
        return Piece(part, piece.shape, piece.size)
    if not isinstance(like, DTensor) or part.ndim != like.ndim:
        return part
    mesh, placements = like.device_mesh, like.placements
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())


def whole(tensor: Any) -> Tensor:
    """All of it; all processes must ask at once."""
    if piece := piece_of(tensor):
        return piece.whole()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def norm(parameters: Sequence[Tensor]) -> Tensor:
    """The norm of all elements of all their gradients; all processes must ask at once."""
    pieces: list[Tensor] = []
    plain: list[Tensor] = []
    sharded: list[Tensor] = []
    for parameter in parameters:
        if piece := piece_of(parameter):
            if piece.own.grad is not None:
                pieces.append(piece.own.grad)
        elif parameter.grad is not None:
            (sharded if isinstance(parameter.grad, DTensor) else plain).append(parameter.grad)
    # torch's norm takes either plain tensors or DTensors, not both.
    norms = [whole(torch.nn.utils.get_total_norm(gradients)) for gradients in (plain, sharded) if gradients]
    if pieces:
        square = torch.nn.utils.get_total_norm(pieces).square()  # squares of disjoint elements add up
        dist.all_reduce(square)
        norms.append(square.sqrt())
    return torch.stack([torch.zeros_like(norms[0]), *norms]).norm() if norms else torch.zeros(())


def clear(parameter: Tensor, own: Tensor) -> None:
    """Removes its gradient, and that of the part."""
    if piece_of(parameter) and own.grad is not None:
        own.grad.zero_()  # a buffer of ZeRO's, which must stay where it is
    else:
        parameter.grad = own.grad = None


def spread(parameters: Sequence[Tensor]) -> None:
    """Brings what is whole in all processes up to date with the pieces that have changed; all must do so at once."""
    kept: list[Any] = [p for p in parameters if piece_of(p) and p.numel()]
    if kept:
        kept[0].partition(kept)
        gather(kept)


def gather(parameters: Sequence[Any]) -> None:
    """Makes parameters that ZeRO has divided whole in all processes; all must do so at once."""
    parameters[0].all_gather(parameters)
