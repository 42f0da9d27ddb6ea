"""Drawing with references: their strengths, in the attention or on the velocity, and guidance.

A user's strength k of a reference becomes s = k^KAPPA for `attention`, where it saturates: half a strength then gives
about half of the effect. `velocity` is linear, takes R more forwards, and also goes below 0 and above 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import compress, pairwise
from typing import Literal

import torch
from torch import Tensor

from posttrain.errors import UserError
from posttrain.model import references, sampler
from posttrain.model.k2 import K2, Text
from posttrain.model.references import References

How = Literal["attention", "velocity"]
Null = Literal["none", "same"]
MOST_VELOCITY = 4.0
"""Largest |strength| of `velocity`."""


@dataclass(frozen=True)
class Shown:
    """References and how strongly each acts, for all images of a batch."""

    references: References
    strengths: tuple[float, ...]
    how: How = "attention"
    null: Null = "none"
    """Whether guidance's empty prompt sees the references. none: guidance pulls to their style too."""

    def __post_init__(self) -> None:
        check_strengths(self.strengths, self.how, len(self.references.latents))


def check_strengths(strengths: Sequence[float], how: How, count: int) -> None:
    """Raises UserError unless there is one for each reference, in its range."""
    if len(strengths) != count:
        raise UserError(f"references: {count} images and {len(strengths)} strengths; give one for each")
    for value in strengths:
        if how == "attention" and not 0 <= value <= 1:
            raise UserError(
                f"references: a strength of {value:g} by attention must lie in 0 to 1; use --strength velocity, which"
                " takes others"
            )
        if not abs(value) <= MOST_VELOCITY:  # NaN too
            raise UserError(f"references: a strength of {value:g}: use at most {MOST_VELOCITY:g} either way")


def prepare(k2: K2, shown: Shown) -> list[tuple[References, float]]:
    """What each forward needs, cached under the role that is active: all references at once for `attention`, each
    alone, with its factor, for `velocity`. A reference of strength 0 is left out."""
    own, acts = shown.references, shown.strengths
    if not any(acts):
        return []
    if shown.how == "velocity":
        parts = []
        for latents, grid, place, strength in zip(own.latents, own.grids, own.places, acts):
            if strength != 0:
                alone = References((latents,), (grid,), (place,))
                parts.append((k2.cached(alone), strength))
        return parts
    # A reference keeps its place where others are left out: its rotary positions, and so its keys, stay the same.
    latents, grids, places = compress(own.latents, acts), compress(own.grids, acts), compress(own.places, acts)
    chosen = References(tuple(latents), tuple(grids), tuple(places))
    strengths = list(compress(acts, acts))
    # Without strengths there may be no attention bias at all, for which kernels are faster.
    if set(strengths) != {1}:
        powers = [strength**references.KAPPA for strength in strengths]
        chosen = replace(chosen, strength=torch.tensor([powers]))
    return [(k2.cached(chosen), 1.0)]


@torch.no_grad()
def draw(
    k2: K2,
    text: Text,
    noise: Tensor,
    steps: int,
    height: int,
    width: int,
    shown: Shown,
    guidance: float = 0.0,
    null_text: Text | None = None,
    mu: float | None = None,
) -> Tensor:
    """As `K2.sample`, in the style of references: latents (B, N, C) from noise of that shape."""
    parts = prepare(k2, shown)

    def velocity(x: Tensor, t: Tensor, words: Text, styled: bool) -> Tensor:
        # Without any strength, and in a branch of guidance that sees no reference, this is the plain model.
        if not (parts and styled):
            return k2.velocity(x, t, words, height, width)
        if shown.how == "attention":
            return k2.velocity(x, t, words, height, width, shown=parts[0][0])
        plain = k2.velocity(x, t, words, height, width)
        # Each reference's effect is a difference to the velocity without any, as guidance's is: effects add up, and a
        # negative strength leads away from a style.
        v = plain
        for one, strength in parts:
            v = v + strength * (k2.velocity(x, t, words, height, width, shown=one) - plain)
        return v

    x = noise.to(k2.device, torch.float32)
    times = sampler.schedule(steps, k2.mu(height, width) if mu is None else mu)
    for t, t_next in pairwise(times):
        v = velocity(x, t, text, True)
        if guidance > 0:
            if null_text is None:
                raise ValueError(f"guidance {guidance} needs null_text, the fused empty prompt")
            # What both branches see cancels in their difference: only with `none` does guidance raise the style too.
            v = sampler.guide(v, velocity(x, t, null_text, shown.null == "same"), guidance)
        x = sampler.ode_step(x, v, t, t_next)
    return x
