"""Short names of weights: two models with the same fingerprint compute the same."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

SAMPLES = 2**16
"""Values of each tensor that count, evenly spread: training changes nearly all, and all of K2 would take minutes."""


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Of names, shapes and values rounded to bf16, so that it does not depend on the type a model is loaded in."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        flat = tensor.detach().flatten()
        some = flat[:: -(-len(flat) // SAMPLES) or 1].to(torch.bfloat16).view(torch.int16).cpu()
        digest.update(f"{name} {tuple(tensor.shape)} ".encode() + some.numpy().tobytes())
    return digest.hexdigest()[:32]
