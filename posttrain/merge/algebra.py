"""Arithmetic of changes of weights: TIES, how far changes agree, and the low-rank part of a matrix.

Tensors and plain numbers in and out. Changes of one layer have one shape, (d_out, d_in) or any other, in fp32. Products
of factors, which never make a matrix of the layer's size, are in posttrain/model/adapters/low_rank.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.model.adapters.low_rank import Factors, Truncated, inner
from posttrain.model.roles import PART

EXACT = 1024
"""Least side of a matrix above which its SVD is randomised."""
OVERSAMPLING = 16
POWER_ITERATIONS = 2
"""Of the randomised SVD (Halko, Martinsson and Tropp, arXiv:0909.4061)."""
CAP = 512
"""Greatest rank that is looked for where an error is asked for."""
ROWS = 2048
"""Of a layer that are made at a time where only sums over its entries are wanted."""


# ---- TIES -----------------------------------------------------------------------------------------------------


def threshold(change: Tensor, density: float) -> float:
    """The absolute value that an entry needs to be among the greatest `density`, a share in (0, 1]."""
    count = max(1, round(density * change.numel()))
    if count >= change.numel():
        return 0.0
    # kthvalue counts from the least; torch.quantile refuses tensors of this size.
    return float(change.abs().flatten().kthvalue(change.numel() - count + 1).values)


def ties(changes: Sequence[Tensor], weights: Sequence[float], density: float, scale: float = 1.0) -> Tensor:
    """TIES (arXiv:2306.01708) of one layer: trim each change to its greatest entries, elect the sign of the weighted
    sum, and take the weighted mean of the entries that agree with it, times `scale`. Weights are positive, and only
    their ratios count."""
    least = [threshold(change, density) for change in changes]
    flat = [change.reshape(-1) for change in changes]
    merged = torch.empty_like(flat[0])
    # In parts, so that what is computed on the way takes no memory of the layer's size.
    for start in range(0, len(merged), PART):
        part = slice(start, start + PART)
        kept = []
        for change, value in zip(flat, least):
            kept.append(torch.where(change[part].abs() >= value, change[part], 0.0))
        merged[part] = scale * _agreed(kept, weights)
    return merged.view_as(changes[0])


def _agreed(changes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted mean of the entries that agree with the sign of the weighted sum; 0 where that has none."""
    total = torch.zeros_like(changes[0])
    for change, weight in zip(changes, weights, strict=True):
        total += weight * change
    elected = total.sign()
    summed, divisor = torch.zeros_like(total), torch.zeros_like(total)
    for change, weight in zip(changes, weights):
        # Entries that were trimmed have no sign, so they agree with nothing.
        agrees = (change.sign() == elected) & (change != 0)
        summed += weight * change * agrees
        divisor += weight * agrees
    return summed / torch.where(divisor > 0, divisor, 1.0)


# ---- how far changes agree --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Overlap:
    """Sums over the entries of one layer, or of several: they add up."""

    products: tuple[tuple[float, ...], ...]
    """<change i, change j>."""
    opposed: float = 0.0
    """Sum of the lesser of an entry's positive and negative parts, each summed over the weighted changes."""
    leading: float = 0.0
    """Sum of the greater."""

    def __add__(self, other: Overlap) -> Overlap:
        rows = []
        for own, others in zip(self.products, other.products, strict=True):
            rows.append(tuple(map(sum, zip(own, others))))
        return Overlap(tuple(rows), self.opposed + other.opposed, self.leading + other.leading)

    @property
    def norms(self) -> list[float]:
        return [math.sqrt(max(0.0, row[i])) for i, row in enumerate(self.products)]

    def cosine(self, i: int, j: int) -> float | None:
        """In [-1, 1]; None where one of the two is 0."""
        size = self.norms[i] * self.norms[j]
        return self.products[i][j] / size if size else None

    @property
    def conflict(self) -> float | None:
        """Sign conflict in [0, 1]: 0 where no two weighted changes oppose each other, 1 where they cancel; None where
        all are 0."""
        return self.opposed / self.leading if self.leading else None


def overlap(changes: Sequence[Tensor], weights: Sequence[float]) -> Overlap:
    """Of the changes of one layer."""
    count = len(changes)
    summed = Overlap(((0.0,) * count,) * count)
    flat = [change.reshape(-1) for change in changes]
    # In parts, so that what is computed on the way takes no memory of the layer's size.
    for start in range(0, len(flat[0]), PART):
        parts = [change[start : start + PART] for change in flat]
        products = []
        for first in parts:
            # Millions of small products: fp32 would lose the sum's last digits.
            row = [float((first * second).sum(dtype=torch.float64)) for second in parts]
            products.append(tuple(row))
        summed += Overlap(tuple(products), *_opposed(parts, weights))
    return summed


def overlap_of_factors(factors: Sequence[Factors | None], weights: Sequence[float]) -> Overlap:
    """Of low-rank changes of one layer, by their factors; None for one that leaves the layer as it is.

    Products take r x r numbers. The sign conflict takes the entries themselves, of ROWS rows at a time.
    """
    products = []
    for first in factors:
        row = [0.0 if first is None or second is None else inner(first, second) for second in factors]
        products.append(tuple(row))
    # A parent that leaves the layer as it is neither opposes nor leads.
    present, their_weights = present_in(factors, weights)
    opposed = leading = 0.0
    outputs = len(present[0][0])
    for start in range(0, outputs, ROWS):
        changes = [b[start : start + ROWS] @ a for b, a in present]
        less, more = _opposed(changes, their_weights)
        opposed, leading = opposed + less, leading + more
    return Overlap(tuple(products), opposed, leading)


def present_in(factors: Sequence[Factors | None], weights: Sequence[float]) -> tuple[list[Factors], list[float]]:
    """The changes that a layer has, with their weights."""
    present: list[Factors] = []
    their_weights: list[float] = []
    for pair, weight in zip(factors, weights, strict=True):
        if pair is not None:
            present.append(pair)
            their_weights.append(weight)
    return present, their_weights


def _opposed(changes: Sequence[Tensor], weights: Sequence[float]) -> tuple[float, float]:
    # A negative weight turns a change round, so signs are those of the weighted changes.
    positive, negative = torch.zeros_like(changes[0]), torch.zeros_like(changes[0])
    for change, weight in zip(changes, weights):
        positive += (weight * change).clamp_min(0)
        negative -= (weight * change).clamp_max(0)
    less, more = torch.minimum(positive, negative), torch.maximum(positive, negative)
    return float(less.sum(dtype=torch.float64)), float(more.sum(dtype=torch.float64))


def total(overlaps: Iterable[Overlap]) -> Overlap:
    """Over all layers."""
    first, *rest = overlaps
    return sum(rest, first)


# ---- a matrix as factors ----------------------------------------------------------------------------------------


def low_rank(change: Tensor, rank: int | None = None, error: float | None = None) -> Truncated:
    """The best factors of a matrix (d_out, d_in) in the Frobenius norm: of `rank`, or of the least rank whose relative
    error is at most `error`, up to CAP. A matrix whose shorter side is above EXACT has a randomised SVD."""
    shorter = min(change.shape)
    most = min(CAP if rank is None else rank, shorter)
    if shorter <= EXACT:
        u, sigma, vh = torch.linalg.svd(change, full_matrices=False)
        v = vh.mT
    else:
        # A randomised SVD draws from torch's generators: seeded, so that a merge is repeatable, and restored.
        devices = [change.device] if change.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(0)
            u, sigma, v = torch.svd_lowrank(change, min(most + OVERSAMPLING, shorter), POWER_ITERATIONS)
    norm = float(change.norm())
    if error is not None:
        most = least_rank(sigma.tolist(), norm, error, most)
    root = sigma[:most].sqrt()
    b, a = u[:, :most] * root, root[:, None] * v[:, :most].mT
    # Measured, not taken from the singular values: it holds what the randomised SVD has missed.
    return Truncated(b, a, float((change - b @ a).norm()), norm)


def least_rank(sigma: Sequence[float], norm: float, error: float, most: int) -> int:
    """The least rank, from 1 to `most`, that leaves at most `error` of a matrix of that norm, by its singular values
    from the greatest on."""
    # What is left after the first ranks is the squared norm less their squares: a randomised SVD knows no others.
    left = norm**2
    for rank, value in enumerate(sigma[:most], 1):
        left -= value**2
        if left <= (error * norm) ** 2:
            return rank
    return most
