"""Merges adapters into one, as a checkpoint that training, sampling and export read. The base's weights are not read.

Ranks beside each other add up exactly. Brought to a rank, a sum has the error that an SVD leaves; so has TIES, which
makes each layer's changes as whole matrices, one layer at a time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain.errors import UserError
from posttrain.merge import algebra
from posttrain.merge.config import MergeConfig
from posttrain.merge.parents import Family
from posttrain.merge.report import Layer
from posttrain.model.adapters.low_rank import Factors, Truncated, concatenate, inner, truncate
from posttrain.model.load import empty_transformer
from posttrain.model.lora_file import A, B, padded, role_for
from posttrain.model.roles import Roles
from posttrain.training import checkpoint
from posttrain.training.policy import POLICY

METHOD = "merge"
"""Of a checkpoint that was merged and not trained."""


def by_layer(family: Family) -> dict[str, list[Factors | None]]:
    """The factors of each parent, None where it leaves a layer as it is. Raises UserError for layers that no role, and
    so no checkpoint, can hold."""
    factors = [parent.factors() for parent in family.parents]
    for parent, own in zip(family.parents, factors):
        role_for(_flat(own), f"parents: {parent.name}")
    layers = dict.fromkeys(itertools.chain(*factors))  # each once, in the order in which parents have them
    return {layer: [own.get(layer) for own in factors] for layer in layers}


def check_rank(layers: Mapping[str, Sequence[Factors | None]], rank: int) -> None:
    """Raises UserError for a rank that the sum does not have in any layer."""
    most = 0
    for pairs in layers.values():
        most = max(most, sum(a.shape[0] for _, a in filter(None, pairs)))
    if rank > most:
        raise UserError(f"rank: is {rank}, and the ranks of all parents together are {most}; leave it out to keep all")


def combine(
    layers: Mapping[str, Sequence[Factors | None]], weights: Sequence[float], config: MergeConfig,
    device: torch.device,
) -> tuple[dict[str, Factors], dict[str, Layer]]:  # fmt: skip
    """The merged factors, fp32 with scales in B, and what is known of each layer."""
    merged: dict[str, Factors] = {}
    known: dict[str, Layer] = {}
    for layer, pairs in layers.items():
        overlap = algebra.overlap_of_factors(pairs, weights)
        if config.method == "linear":
            found = _sum(pairs, weights, config.rank)
        else:
            found = _ties(pairs, weights, config, device)
        merged[layer] = (found.b.float().cpu(), found.a.float().cpu())
        known[layer] = Layer(overlap, found.a.shape[0], found.residual, found.norm)
    return merged, known


def _sum(pairs: Sequence[Factors | None], weights: Sequence[float], rank: int | None) -> Truncated:
    b, a = concatenate(*algebra.present_in(pairs, weights))
    b, a = b.double(), a.double()  # so that what is left out is told from rounding
    if rank is None or rank >= len(a):
        return Truncated(b, a, 0.0, math.sqrt(max(0.0, inner((b, a), (b, a)))))
    return truncate(b, a, rank)


def _ties(
    pairs: Sequence[Factors | None], weights: Sequence[float], config: MergeConfig, device: torch.device
) -> Truncated:
    changes = []
    b, a = next(filter(None, pairs))
    shape = (b.shape[0], a.shape[1])
    for pair in pairs:
        # A parent without this layer wants no change of it, and has no say in it either.
        changes.append(torch.zeros(shape, device=device) if pair is None else pair[0].to(device) @ pair[1].to(device))
    return algebra.low_rank(algebra.ties(changes, weights, config.density, config.scale), config.rank)


def save(family: Family, factors: Mapping[str, Factors], folder: Path, facts: Mapping[str, Any]) -> None:
    """Writes a checkpoint of step 0 into a run directory. `facts` go into its state, for the card of an export."""
    named = _flat(factors)
    role = role_for(named, "the merge")
    # Names and shapes of a role's parameters, without weights.
    roles = Roles(empty_transformer(family.model.path))
    roles.add_role(POLICY, role.rank, role.alpha, role.targets)
    state = {
        "method": METHOD,
        "model": asdict(family.model),
        "origin": family.origin(),
        "lora": asdict(role),
        "merge": dict(facts),
    }
    # Layers have different ranks where parents adapt different ones, and a role has one: the rest is 0.
    tensors = {"adapter": padded(named, roles.role_named_parameters(POLICY))}
    checkpoint.save(folder / "checkpoints", 0, tensors, state, keep=1)


def _flat(factors: Mapping[str, Factors]) -> dict[str, Tensor]:
    """By their names in a LoRA file."""
    named: dict[str, Tensor] = {}
    for layer, (b, a) in factors.items():
        named |= {f"{layer}.{A}": a, f"{layer}.{B}": b}
    return named
