"""Trajectories of the student, and the points of them at which it is judged and the fake score learns.

Legend: B images of a micro-batch, N image tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.model import sampler
from posttrain.model.k2 import K2, Text
from posttrain.tdm import losses
from posttrain.tdm.config import StudentConfig
from posttrain.training.policy import POLICY

MU = sampler.TURBO_MU


@dataclass
class Draw:
    """A point of each of B trajectories, and how the step that leaves it is judged."""

    k: Tensor
    """(B,) which step; on the CPU."""
    t: Tensor
    """(B,) its time."""
    m: Tensor
    """(B,) the time at which the step is judged."""
    tau: Tensor
    """(B,) the noise level that it is judged at, above m."""
    z: Tensor
    """(B, N, C) the noise that is put on again."""


@dataclass
class Points(Draw):
    """With what the student did there."""

    x: Tensor
    """(B, N, C) the point."""
    v: Tensor
    """(B, N, C) its velocity when the trajectory was drawn."""


@dataclass
class Batch:
    text: Text
    size: tuple[int, int]
    points: list[Points]
    """For each update of the fake score; and, last, for the student's."""


@torch.no_grad()
def roll_out(
    k2: K2,
    student: StudentConfig,
    fused: Sequence[Tensor],
    keys: Sequence[tuple[int, ...]],
    size: tuple[int, int],
    micro_batch: int,
    updates: int,
) -> list[Batch]:
    """Micro-batches of the student's trajectories, with points for so many updates.

    What is drawn for an image comes from its key, a few global indices, alone.
    """
    shape, choices = (k2.image_tokens(*size), k2.latent_channels), student.steps
    # Of several numbers of steps each trajectory takes one; shorter grids are padded with the last time, 0.
    grids: dict[int, Tensor] = {}
    for n in choices:
        grids[n] = torch.cat([sampler.schedule(n, MU), torch.zeros(max(choices) - n)])
    batches = []
    for first in range(0, len(keys), micro_batch):
        part = keys[first : first + micro_batch]
        text = Text.of(fused[first : first + micro_batch])
        counts, seeds = [], []
        for key in part:
            seeds.append(sampler.seed_for(*key, 0))
            counts.append(choices[int(_uniform(key, 1) * len(choices))])
        steps, times = torch.tensor(counts), torch.stack([grids[n] for n in counts])
        # Drawn before the walk, which goes no further than the last of them.
        draws = [_draw_point(k2, student, part, update, steps, times, shape) for update in range(updates)]
        with k2.role(POLICY):
            noise = sampler.noise(seeds, shape).to(k2.device)
            visited = _walk(k2, noise, times, k2.fused(text), size, [draw.k for draw in draws])
        points = []
        for drawn, (x, v) in zip(draws, visited):
            points.append(Points(**vars(drawn), x=x, v=v))
        batches.append(Batch(text, size, points))
    return batches


def _draw_point(
    k2: K2,
    student: StudentConfig,
    keys: Sequence[tuple[int, ...]],
    update: int,
    steps: Tensor,
    times: Tensor,
    shape: tuple[int, int],
) -> Draw:
    """Which point of each trajectory an update takes, and how it is judged: uniform in step, time and noise level."""
    uniform = []
    for choice in range(3):  # of the step, the time and the noise level
        uniform.append(torch.tensor([_uniform(key, update, choice) for key in keys]))
    u_k, u_m, u_tau = uniform
    k = (u_k * steps).long()  # below `steps`, as the uniform numbers are below 1
    m, tau = losses.point_times(k, steps, u_m, u_tau, MU, student.midpoints, student.levels == "separate")
    z = sampler.noise([sampler.seed_for(*key, update, 3) for key in keys], shape)
    t = times.gather(1, k[:, None])[:, 0]
    return Draw(k, t.to(k2.device), m.to(k2.device), tau.to(k2.device), z.to(k2.device))


def _walk(
    k2: K2, x: Tensor, times: Tensor, text: Text, size: tuple[int, int], ks: Sequence[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Takes each trajectory as far as the last of its points; returns x and v at each of them, (B, N, C).

    `ks` has, for each point, the step that leaves it, (B,).
    """
    last = torch.stack(list(ks)).amax(0)
    xs, vs = [x], []  # of all times, as each trajectory's points are at other ones
    for i in range(int(last.max()) + 1):
        chosen = (last >= i).nonzero()[:, 0]  # the others have no point further on
        t, t_next = times[chosen, i : i + 2].to(x.device).unbind(1)
        rows = chosen.to(x.device)
        # Those that have ended stay where they are, and have no velocity that is read.
        v, after = torch.zeros_like(x), xs[-1].clone()
        v[rows] = k2.velocity(xs[-1][rows], t, text.rows(rows), *size)
        after[rows] = sampler.ode_step(xs[-1][rows], v[rows], t, t_next)
        xs.append(after)
        vs.append(v)
    every = torch.arange(len(x), device=x.device)
    stacked_x, stacked_v = torch.stack(xs), torch.stack(vs)
    visited = []
    for k in ks:
        k = k.to(x.device)
        visited.append((stacked_x[k, every], stacked_v[k, every]))
    return visited


def _uniform(key: tuple[int, ...], *index: int) -> float:
    """In [0, 1)."""
    # 24 bits, as many as fp32 has: more could be rounded up to 1.
    return (sampler.seed_for(*key, *index) >> 39) / 2**24
