"""Exact sums of a few numbers of a device: in float64 on the CPU, since Apple's GPUs have none."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def total(values: Tensor) -> float:
    """The sum of a small tensor of any shape, such as one number for each image."""
    return sum(values.detach().flatten().tolist(), 0.0)


def total_of(values: Sequence[Tensor]) -> float:
    """The sum of numbers that lie on one device; waits for the device once."""
    return total(torch.stack(tuple(values)))
