"""Attention to the real keys of a batch whose texts have several lengths, without a mask.

With a mask torch leaves its flash kernel for slower ones. The same kernel takes sequences of several lengths that stand
one behind the other, so the keys and values of real tokens are moved together; queries stay as they are, as nobody reads
what padding has seen.
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
    """Whether torch has the kernel: on an NVIDIA GPU, in 16 bits."""
    return varlen_attn is not None and device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)


def packed(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Of a (B, T) mask: (B T,) places of the real tokens in a flat batch, and (B + 1,) where each sample's begin.

    Places are filled up with 0 behind the last sample's end, where no query looks: so all shapes are those of the batch.
    """
    flat = mask.flatten()
    # A stable sort puts real tokens first, in their order, without asking the GPU how many there are.
    places = flat.logical_not().sort(stable=True).indices
    places = places.where(torch.arange(len(flat), device=flat.device) < flat.sum(), 0)
    ends = mask.sum(1).cumsum(0)
    return places, torch.cat([ends.new_zeros(1), ends]).int()


def attention(query: Tensor, key: Tensor, value: Tensor, places: Tensor, ends: Tensor) -> Tensor:
    """(B, T, heads, head) of queries of that shape and keys and values (B, T, fewer heads, head)."""
    batch, tokens, heads, _ = query.shape
    key, value = key.flatten(0, 1)[places], value.flatten(0, 1)[places]
    words: dict[str, Any] = {"enable_gqa": True} if _SHARED_HEADS else {}
    if not words:
        groups = heads // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    begins = torch.arange(0, (batch + 1) * tokens, tokens, device=query.device, dtype=torch.int32)
    # Under autocast a custom operator gets its inputs as they are.
    query, key = query.to(value.dtype), key.to(value.dtype)
    attended: Any = varlen_attn(query.flatten(0, 1), key, value, begins, ends, tokens, tokens, **words)
    return attended.unflatten(0, (batch, tokens))
