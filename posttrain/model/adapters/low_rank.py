"""Arithmetic of low-rank updates by their factors. A matrix of a layer's own size, d_out x d_in, is never made.

An update is `B @ A` of B (d_out, r) and A (r, d_in), with all scales in B. Everything is computed in the type of the
factors. Sums are exact by concatenation of the factors; `truncate` brings them back to a rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor]
"""B (d_out, r) and A (r, d_in)."""


@dataclass(frozen=True)
class Truncated:
    """The best update of a given rank in the Frobenius norm, and what it leaves out."""

    b: Tensor
    """(d_out, r)"""
    a: Tensor
    """(r, d_in); it and b have equal singular values, the roots of the update's."""
    residual: float
    """Frobenius norm of what was left out."""
    norm: float
    """Frobenius norm of the whole update."""

    @property
    def error(self) -> float:
        """residual / norm, in [0, 1]; 0 for an update of zeros."""
        return self.residual / self.norm if self.norm else 0.0


def concatenate(factors: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """The factors, of the sum of all ranks, of the weighted sum of these updates, which may have different ranks."""
    if not factors or len(factors) != len(weights):
        raise ValueError(f"{len(factors)} updates and {len(weights)} weights: give one weight for each")
    # [w1 B1, w2 B2] [A1; A2] = w1 B1 A1 + w2 B2 A2.
    b = [weight * b for (b, _), weight in zip(factors, weights)]
    a = [a for _, a in factors]
    return torch.cat(b, dim=1), torch.cat(a)


def truncate(b: Tensor, a: Tensor, rank: int) -> Truncated:
    """`b @ a` (d_out, R) (R, d_in) brought to `rank`, or to its own if that is smaller.

    QR of B and of A transposed, then an SVD of R_B R_A^T, which is R x R at most.
    """
    # B A = Q_B (R_B R_A^T) Q_A^T. The Q's columns are orthonormal, so the product has the singular values of the small
    # matrix in the middle.
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.mT)
    u, sigma, vh = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    root = sigma[:rank].sqrt()
    kept_b = q_b @ (u[:, :rank] * root)
    kept_a = (root[:, None] * vh[:rank]) @ q_a.mT
    return Truncated(kept_b, kept_a, float(sigma[rank:].norm()), float(sigma.norm()))


def error_of(layers: Iterable[Truncated]) -> float:
    """The relative error over several layers together, sqrt(sum residual^2 / sum norm^2), in [0, 1]."""
    residual = norm = 0.0
    for layer in layers:
        residual += layer.residual**2
        norm += layer.norm**2
    return math.sqrt(residual / norm) if norm else 0.0


def inner(first: Factors, second: Factors) -> float:
    """The Frobenius inner product <B1 A1, B2 A2>, as the sum of (B1^T B2) * (A1 A2^T), which is r1 x r2."""
    # tr((B1 A1)^T B2 A2) = tr(A1^T (B1^T B2) A2) = sum of (B1^T B2) * (A1 A2^T), by the trace's cyclic order.
    (b1, a1), (b2, a2) = first, second
    return float(((b1.mT @ b2) * (a1 @ a2.mT)).sum())
