"""What a merge says of its layers: short on the terminal, whole in merge.json."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.merge.algebra import Overlap, total
from posttrain.runs.progress import columns

WORST = 5
"""Layers that are named on the terminal."""
HIGH_ERROR = 0.1
"""Relative error of a merge that was brought to a rank, above which it is warned of."""
HIGH_CONFLICT = 0.3
"""Sign conflict above which TIES is worth a try: two changes that have nothing to do with each other have about .17."""


@dataclass(frozen=True)
class Layer:
    """What is known of a merged layer."""

    overlap: Overlap
    rank: int | None = None
    """Of the merged adapter; None in a whole model."""
    residual: float = 0.0
    """Norm of what an SVD left out."""
    norm: float = 0.0
    """Norm of the merged change, before an SVD."""

    @property
    def error(self) -> float:
        return self.residual / self.norm if self.norm else 0.0


def as_json(layers: Mapping[str, Layer]) -> dict[str, dict[str, Any]]:
    """By layer: norms, the cosine of each pair of parents as `1-2`, sign conflict, rank, and the error of an SVD."""
    rows = {}
    for name, layer in layers.items():
        row = _figures(layer.overlap)
        if layer.rank is not None:
            row |= {"rank": layer.rank, "error": layer.error}
        rows[name] = row
    return rows


def _figures(overlap: Overlap) -> dict[str, Any]:
    cosines = {}
    # Parents are numbered from 1, as the table on the terminal numbers them.
    for i, j in itertools.combinations(range(len(overlap.products)), 2):
        cosines[f"{i + 1}-{j + 1}"] = overlap.cosine(i, j)
    return {"norms": overlap.norms, "cosines": cosines, "conflict": overlap.conflict}


def overall(layers: Mapping[str, Layer]) -> dict[str, Any]:
    """The same over all layers together."""
    row = _figures(total([layer.overlap for layer in layers.values()]))
    residual = norm = 0.0
    for layer in layers.values():
        residual += layer.residual**2
        norm += layer.norm**2
    # The squared norm of the whole is the sum of those of its layers.
    if any(layer.rank is not None for layer in layers.values()):
        row["error"] = (residual / norm) ** 0.5 if norm else 0.0
    return row


def table(names: Sequence[str], weights: Sequence[float], layers: Mapping[str, Layer]) -> str:
    """The parents with the norms of their changes, how far they agree over all layers, and the most opposed layers."""
    whole = overall(layers)
    rows: list[Sequence[str]] = [("", "parent", "weight", "norm of its change")]
    for i, (name, weight, norm) in enumerate(zip(names, weights, whole["norms"], strict=True), 1):
        rows.append((str(i), name, f"{weight:g}", f"{norm:.4g}"))
    lines = [columns(rows)]
    if len(names) > 1:
        pairs = [f"{pair} {_number(value)}" for pair, value in whole["cosines"].items()]
        lines.append(f"cosines of the changes, over all layers: {', '.join(pairs)}")
        # None, of a layer that no parent changes, cannot be sorted.
        by_layer = {name: layer.overlap.conflict or 0.0 for name, layer in layers.items()}
        lines.append(f"sign conflict: {_number(whole['conflict'])}; highest: {_worst(by_layer)}")
    return "\n".join(lines)


def errors(layers: Mapping[str, Layer]) -> str:
    """What bringing the merge to a rank has lost."""
    by_layer = {name: layer.error for name, layer in layers.items()}
    return f"error of the SVD: {overall(layers)['error']:.4f} of the change; worst: {_worst(by_layer)}"


def _worst(by_layer: Mapping[str, float]) -> str:
    names = sorted(by_layer, key=lambda name: -by_layer[name])[:WORST]
    return ", ".join([f"{by_layer[name]:.3f} in {name}" for name in names])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
