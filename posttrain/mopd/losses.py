"""On-policy distillation for rectified flow: pure functions. No config, no printing, no collectives; all in fp32.

At a state x_i of the student's own trajectory the prompt's teacher k has the velocity c_k and, without the prompt, u_k:

    target = c_k + s_k (c_k - u_k)                                     its guided velocity, held constant
    L = w_i |v - target|^2 + reference |v - v_ref|^2                   means over latent elements

This is regression (DiffusionOPD, arXiv:2605.15055) on states that come from the student, not a reward of -KL
(Flow-OPD, arXiv:2605.08063). For a stochastic step of variance S^2 with dmean / dv = C the KL to the teacher's step is
exactly w_i |v - target|^2 with w_i = C^2 / 2 S^2.

Where the student is the teacher and s_k = 0, loss and gradient are 0.
"""

from __future__ import annotations

import itertools
from typing import Literal

import torch
from torch import Tensor

from posttrain.model import sampler

Weight = Literal["velocity", "kl", "mean"]


def weights(times: Tensor, weight: Weight, eta: float) -> Tensor:
    """(K,) weight of each step of a grid of K + 1 times, on the CPU. With `kl` the last one is 0: it has no noise."""
    t, t_next = times[:-1], times[1:]
    if weight == "velocity":
        return torch.ones(len(t))
    if weight == "mean":
        return (t - t_next).square() / 2
    # The last step is left out: its t_next is 0, where a stochastic step has no noise and so no likelihood.
    c = sampler.kl_coefficient(t[:-1], t_next[:-1], "flow", eta, times[1])
    # The deviation does not depend on the state, so any will do.
    zeros = torch.zeros(len(t) - 1, 1)
    _, std = sampler.sde_moments(zeros, zeros, t[:-1], t_next[:-1], "flow", eta, times[1])
    return torch.cat([c.square() / (2 * std.flatten().square()), torch.zeros(1)])


def distance(v: Tensor, target: Tensor) -> Tensor:
    """(B,) mean squared distance of velocities (B, N, C); only `v` carries a gradient."""
    return (v - target.detach()).square().flatten(1).mean(1)


def row_weight(rows: int, teachers: int) -> float:
    """What one of a teacher's rows counts in a step's loss: a mean over its rows, then over the teachers, so that
    teachers have equal weight whatever their shares."""
    return 1 / (rows * teachers)


def cosines(gradients: dict[str, Tensor]) -> dict[str, float]:
    """Cosine of each two teachers' flat gradients, in [-1, 1], by `NAME/NAME`; 0 where one has none."""
    found = {}
    for (first, a), (second, b) in itertools.combinations(gradients.items(), 2):
        size = a.norm() * b.norm()
        found[f"{first}/{second}"] = float((a @ b) / size) if size > 0 else 0.0
    return found
