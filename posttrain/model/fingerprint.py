"""Hashes of weights: two models with the same fingerprint compute the same results."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

SAMPLES = 2**16
"""Values of each tensor that are hashed, evenly spread. Training changes nearly all values, and hashing all of K2 would
take minutes."""


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """A hash of names, shapes and values. Values are rounded to bf16, so the type a model is loaded in does not
    matter."""
    digest = hashlib.sha256()
    # One at a time: a mapping may read each from its file.
    for name in sorted(tensors):
        tensor = tensors[name]
        flat = tensor.detach().flatten()
        stride = -(-len(flat) // SAMPLES) or 1
        # numpy has no bfloat16, so the bits go through int16.
        bits = flat[::stride].to(torch.bfloat16).view(torch.int16).cpu()
        digest.update(f"{name} {tuple(tensor.shape)} ".encode() + bits.numpy().tobytes())
    return digest.hexdigest()[:32]
