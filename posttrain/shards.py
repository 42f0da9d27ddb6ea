"""Parts of tensors that processes hold between them, as FSDP2 leaves them: DTensors, sharded along one dimension.

Everything here takes plain tensors too, and is then no more than the identity.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def own(tensor: Tensor) -> Tensor:
    """This process's part, in the same memory."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor


def part(whole: Tensor, like: Tensor) -> Tensor:
    """This process's part of a tensor that is whole in all of them, cut as `like` is."""
    if not isinstance(like, DTensor) or whole.shape != like.shape:
        return whole
    whole = whole.to(like.device)
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None).to_local()


def joined(part: Tensor, like: Tensor) -> Tensor:
    """The inverse of `part`, as a DTensor: nothing is gathered yet."""
    if not isinstance(like, DTensor) or part.ndim != like.ndim:
        return part
    mesh, placements = like.device_mesh, like.placements
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())


def whole(tensor: Tensor) -> Tensor:
    """All of it; all processes must ask at once."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def norm(gradients: Sequence[Tensor]) -> Tensor:
    """The norm of all elements of all tensors; all processes must ask at once."""
    kinds = [[g for g in gradients if isinstance(g, DTensor) is sharded] for sharded in (False, True)]
    norms = [whole(torch.nn.utils.get_total_norm(kind)) for kind in kinds if kind]
    return torch.stack([torch.zeros_like(norms[0]), *norms]).norm() if norms else torch.zeros(())
