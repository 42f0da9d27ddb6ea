"""Rollouts: one prompt's group of images, sampled without guidance, with the steps that training will revisit.

Images that share their first noise differ from the window's first step on, by the noise of that step. Until then, and
in that step too, one image stands for all: its velocity is theirs.

Legend: G images of a group; S states that they begin a step from, 1 where they share it, else G; N image tokens of C
channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from posttrain.model import sampler
from posttrain.model.k2 import K2, Text


@dataclass
class Transition:
    """One stochastic step of a group, as it was taken: all fp32, on the model's device."""

    index: int
    t: Tensor
    t_next: Tensor
    x: Tensor
    """(S, N, C) before the step."""
    x_next: Tensor
    """(G, N, C) after it; its likelihood is what training changes."""
    mean: Tensor
    """(S, N, C) mean of the policy that took it."""
    std: Tensor
    log_prob: Tensor
    """(G,) mean over elements, under the policy that took it."""
    velocities: list[Tensor] = field(default_factory=list)
    """The policy's, of each part, with what their backward needs; empty if that was not kept."""

    def parts(self, micro_batch: int) -> Iterator[tuple[slice, Transition]]:
        """The step in parts that each take one forward of at most `micro_batch` images, and which images they are.

        Images that share x need the same forward, so they are one part, however many they are.
        """
        images = len(self.x_next)
        if len(self.x) < images:
            yield slice(0, images), self
            return
        for i, start in enumerate(range(0, images, micro_batch)):
            rows = slice(start, min(start + micro_batch, images))
            # Slices are views, so that `restate` of a part writes into the whole.
            x, x_next, mean, log_prob = self.x[rows], self.x_next[rows], self.mean[rows], self.log_prob[rows]
            own = self.velocities[i : i + 1]
            yield rows, replace(self, x=x, x_next=x_next, mean=mean, log_prob=log_prob, velocities=own)

    @torch.no_grad()
    def restate(self, mean: Tensor, std: Tensor) -> Tensor:
        """Takes `mean` for that of the policy that took the step; returns (S,) root mean squares of the difference.

        In place, so the whole step has what its parts are given.
        """
        gap = root_mean_square(mean - self.mean)
        self.mean.copy_(mean)
        self.log_prob.copy_(sampler.log_prob(self.x_next, self.mean, std))
        return gap


@dataclass
class Trajectory:
    latents: Tensor
    """(G, N, C) at t = 0."""
    transitions: list[Transition]


@torch.no_grad()
def rollout(
    k2: K2,
    text: Text,
    seeds: Sequence[Sequence[int]],
    times: Tensor,
    window: range,
    dynamics: sampler.Dynamics,
    eta: float,
    height: int,
    width: int,
    micro_batch: int,
    shared: bool,
    keep: bool = False,
) -> Trajectory:
    """Samples a group: SDE steps inside `window`, ODE steps elsewhere, under the active role.

    `text` is one prompt. `seeds[g]` holds one seed for the noise of image g and one for each step of the window.
    Shared means that all start from the first image's noise, so one forward is made in each step up to the window's
    first one. `keep` keeps what backward needs of the window's steps.
    """
    if not 0 <= window.start < window.stop <= len(times) - 2:
        raise ValueError(f"window {window} must lie in the first {len(times) - 2} of {len(times) - 1} steps")
    shape = (k2.image_tokens(height, width), k2.latent_channels)
    first = seeds[:1] if shared else seeds
    # Fused once for all steps: one role draws, and nothing changes it on the way.
    x, text = sampler.noise([s[0] for s in first], shape).to(k2.device), k2.fused(text)
    transitions = []
    for i, (t, t_next) in enumerate(zip(times[:-1], times[1:])):
        # Micro-batches set memory; the result is the same within rounding.
        with torch.set_grad_enabled(keep and i in window):
            parts = [k2.velocity(part, t, text, height, width) for part in x.split(micro_batch)]
        v = torch.cat(parts)
        if i not in window:
            x = sampler.ode_step(x, v, t, t_next)
            continue
        mean, std = sampler.sde_moments(x, v, t, t_next, dynamics, eta, times[1])
        # Seed 0 is that of the first noise, 1 that of the window's first step, and so on.
        noise = sampler.noise([s[1 + i - window.start] for s in seeds], shape).to(k2.device)
        x_next = mean + std * noise  # G images, from one mean if they shared x until here
        log_prob = sampler.log_prob(x_next, mean, std)
        transitions.append(Transition(i, t, t_next, x, x_next, mean, std, log_prob, parts if keep else []))
        x = x_next
    return Trajectory(x, transitions)


def root_mean_square(x: Tensor) -> Tensor:
    """(B,) over all but the first dimension."""
    return x.float().square().flatten(1).mean(1).sqrt()
