"""Merges into a whole model: a Krea2Pipeline directory, whose transformer is written tensor by tensor.

Adapters among the parents count by what they change of each weight, so they go with whole models. In memory are, at a
time, one tensor of each parent and a few copies of it in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from posttrain.errors import UserError
from posttrain.merge import algebra, weights
from posttrain.merge.config import MergeConfig
from posttrain.merge.parents import Family
from posttrain.merge.report import Layer
from posttrain.merge.weights import PART, SINGLE, Weights, Writer
from posttrain.model.files import check_directory
from posttrain.model.lora_file import linear_shapes
from posttrain.model.roles import Kept

OTHERS = "all tensors that are not a linear's weight"


@dataclass
class Result:
    """What is known of a whole model that was merged."""

    layers: dict[str, Layer] = field(default_factory=dict)
    kept: dict[str, Kept] = field(default_factory=dict)
    """By tensor: what rounding leaves of its change."""

    def rounding(self) -> tuple[float, str, float]:
        """(share of the change that is left, the tensor that keeps least, its share)."""
        whole = Kept(0.0, 0.0, 0.0)
        for one in self.kept.values():
            whole = whole + one
        least = min(self.kept, key=lambda name: self.kept[name].share)
        return whole.share, least, self.kept[least].share


def write(family: Family, config: MergeConfig, folder: Path, device: torch.device) -> Result:
    """Writes the pipeline into an empty directory. Raises UserError if the merge changes nothing."""
    base, result = family.open_base(), Result()
    weights.copy_parts(family.model.path, folder)
    linears, others = linear_shapes(family.like), list[algebra.Overlap]()
    shards = _shards(base)
    size = 0
    for file, names in shards.items():
        entries = {}
        for name in names:
            # In the types of the base's files, so that the merge is loaded as the base is.
            place = base.places[name]
            entries[name] = (torch.float32 if config.dtype else place.dtype, place.shape)
        with Writer(folder / PART / file, entries) as writer:
            for name in names:
                value, dtype = base[name].to(device), entries[name][0]
                merged, overlap = _merged(name, value, family, config)
                if overlap is not None:
                    result.kept[name] = Kept.of(value, merged - value, merged, dtype)
                    if name.removesuffix(".weight") in linears:
                        result.layers[name.removesuffix(".weight")] = Layer(overlap)
                    else:
                        others.append(overlap)
                size += merged.numel() * dtype.itemsize
                writer.add(name, merged.to(dtype).cpu())
    if others:
        result.layers[OTHERS] = Layer(algebra.total(others))
    if not result.kept:
        raise UserError("parents: none of them changes a weight of the base; give models that were trained")
    if len(shards) > 1:
        weights.write_index(folder / PART, shards, size)
    # Read back before the directory gets its name: whole files, and all names and shapes of the architecture.
    check_directory(str(folder))
    weights.of_pipeline(str(folder), family.like)
    return result


def _shards(base: Weights) -> dict[str, list[str]]:
    """The names in each file to write: as the base has them, in the order of their data."""
    shards: dict[str, list[str]] = {}
    for name, place in base.places.items():
        # One file has diffusers' own name, whatever that of the base is called.
        file = place.file.name if len(base.files) > 1 else SINGLE
        shards.setdefault(file, []).append(name)
    return shards


def _merged(name: str, value: Tensor, family: Family, config: MergeConfig) -> tuple[Tensor, algebra.Overlap | None]:
    """The merged tensor in fp32, and how far the parents' changes agree; None where none changes it."""
    # A change is counted from the base with the shared stages, and these are in the merge once.
    start = value.float()
    for stage in family.shared_stages:
        start = stage.applied(name, start)
    changes = []
    for parent in family.parents:
        own = start
        for stage in parent.stages:
            own = stage.applied(name, own)
        changes.append(own - start)
    if not any(bool(change.any()) for change in changes):
        return start, None
    # From here on in fp32: the sum is rounded once, when it is written.
    overlap = algebra.overlap(changes, family.weights)
    if config.method == "ties":
        return start + algebra.ties(changes, family.weights, config.density, config.scale), overlap
    merged = start.clone()
    for change, weight in zip(changes, family.weights):
        merged.add_(change, alpha=weight)
    return merged, overlap
