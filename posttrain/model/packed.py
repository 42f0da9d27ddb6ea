"""Attention to the real keys of a batch whose texts have several lengths, without a mask.

With a mask torch leaves its flash kernel for slower ones. The same kernel takes sequences of several lengths that stand
one behind the other, so the keys and values of real tokens are moved together. Queries stay as they are: outputs at
padding are not used.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before torch 2.10
    varlen_attn: Any = None

_SHARED_HEADS = varlen_attn is not None and "enable_gqa" in inspect.signature(varlen_attn).parameters


def available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch has the kernel: on an NVIDIA GPU from Ampere on, in 16 bits."""
    if varlen_attn is None or device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def packed(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Of a (B, T) mask: (B T,) places in a flat batch, those of real tokens first and padding behind, where no query
    looks; and (B + 1,) where each sample's begin and the last one's end."""
    # A stable sort keeps the order of real tokens, and does not ask the GPU how many there are.
    places = mask.flatten().logical_not().sort(stable=True).indices
    ends = mask.sum(1).cumsum(0)
    return places, torch.cat([ends.new_zeros(1), ends]).int()


def attention(query: Tensor, key: Tensor, value: Tensor, places: Tensor, ends: Tensor) -> Tensor:
    """(B, T, heads, head) of queries of that shape and keys and values (B, T, fewer heads, head)."""
    batch, tokens, heads, _ = query.shape
    # The kernel does not write the gradients of padding, so they are whatever its memory held.
    real = (torch.arange(len(places), device=places.device) < ends[-1])[:, None, None]
    key = key.flatten(0, 1)[places].where(real, 0)
    value = value.flatten(0, 1)[places].where(real, 0)
    options: dict[str, Any] = {"enable_gqa": True} if _SHARED_HEADS else {}
    if not options:
        groups = heads // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    begins = torch.arange(0, (batch + 1) * tokens, tokens, device=query.device, dtype=torch.int32)
    # Under autocast a custom operator gets its inputs as they are.
    query, key = query.to(value.dtype), key.to(value.dtype)
    attended: Any = varlen_attn(query.flatten(0, 1), key, value, begins, ends, tokens, tokens, **options)
    return attended.unflatten(0, (batch, tokens))
