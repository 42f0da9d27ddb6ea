"""The loss of supervised finetuning: a pure function, in fp32."""

from __future__ import annotations

from torch import Tensor


def flow_loss(v: Tensor, target: Tensor) -> Tensor:
    """(B,) rectified flow's error of velocities, both (B, N, C): the mean over an image's elements of (v - u)^2, where
    u is the target velocity eps - x0. Every time weighs the same (arXiv:2209.03003, as K2 was trained)."""
    return (v.float() - target.float()).square().flatten(1).mean(1)
