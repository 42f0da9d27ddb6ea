"""Adapters that are no LoRA, as the change of a weight that their trainer means: DoRA, LoKr, LoHa, whole differences.

    LoRA    D = s B A                        s = alpha / rank
    LoKr    D = s kron(w1, w2)               w1 or w2 may be a product of two factors of rank r: s = alpha / r, else 1
    LoHa    D = s (w1a w1b) * (w2a w2b)      elementwise
    full    D itself
    DoRA    W' = m (W + D) / |W + D|         of each output (m of shape (out,) or (out, 1)) or of each input ((1, in))

Without m, W' = W + D. In general none of these is W plus a product of low rank: DoRA scales the rows of W itself, and a
Kronecker product has the product of the ranks of its factors. So they are merged into weights, in fp32, and rounded
once.

Sources: LyCORIS 4.1 (lycoris/modules), PEFT 0.21 (tuners: lora/dora.py, lokr, loha), musubi-tuner (networks).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

PARTS = {
    "LoRA": ("A", "B"),
    "LoKr": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
    "LoHa": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    "full": ("diff",),
}
"""By kind: the tensors that a layer may have of it, besides alpha, a magnitude and the change of a bias."""
MAGNITUDE, BIAS, ALPHA = "magnitude", "diff_b", "alpha"


class Misshapen(ValueError):
    """The parts of a layer do not make a change of its weight."""


@dataclass(frozen=True)
class Change:
    """What a layer's tensors make of its weight (out, in); fp32 throughout."""

    kind: str
    """As its trainer calls it: DoRA, LoKr, LoHa, full, or a combination."""
    parts: Mapping[str, Tensor]
    scale: float = 1.0

    def of(self, weight: Tensor) -> Tensor:
        """The weight with the change."""
        changed = weight.float()
        if self.parts.keys() - {MAGNITUDE, BIAS}:
            changed = changed + difference(self.parts, self.scale).to(weight.device)
        if (magnitude := self.parts.get(MAGNITUDE)) is None:
            return changed
        # A magnitude for each input is of norms over the outputs, and the other way round.
        over = 0 if magnitude.shape[0] == 1 and magnitude.ndim == 2 else 1
        norm = torch.linalg.vector_norm(changed, dim=over, keepdim=True)
        # LyCORIS adds this much too; it keeps an output without weights at 0.
        norm = norm + torch.finfo(norm.dtype).eps
        return changed * (magnitude.to(weight.device).reshape(norm.shape) / norm)


def kind_of(parts: Mapping[str, Tensor]) -> str | None:
    """Which of PARTS a layer's tensors are; None for none, or a mixture."""
    found = [kind for kind, names in PARTS.items() if not parts.keys().isdisjoint(names)]
    return found[0] if len(found) == 1 else None


def missing(kind: str, parts: Mapping[str, Tensor]) -> list[str]:
    """The tensors of its kind that a layer lacks."""
    if kind != "LoKr":
        return [name for name in PARTS[kind] if name not in parts]
    lacking: list[str] = []
    for whole in ("lokr_w1", "lokr_w2"):
        factors = [f"{whole}_a", f"{whole}_b"]
        if whole not in parts:
            lacking += [name for name in factors if name not in parts]
    return lacking


def rank_of(kind: str, parts: Mapping[str, Tensor]) -> int | None:
    """The rank that alpha is divided by; None where the kind has none, so that its scale is 1."""
    names = {"LoRA": ("A",), "LoKr": ("lokr_w2_b", "lokr_w1_b"), "LoHa": ("hada_w1_b",), "full": ()}[kind]
    for name in names:
        if name in parts:
            return parts[name].shape[0] if parts[name].ndim == 2 else 0
    return None


def difference(parts: Mapping[str, Tensor], scale: float) -> Tensor:
    """D of the module's docstring, (out, in). Raises Misshapen where its tensors do not fit each other."""
    kind = kind_of(parts)
    assert kind is not None
    try:
        return scale * _DIFFERENCES[kind](parts)
    except RuntimeError as error:  # torch's, of shapes
        raise Misshapen(str(error).splitlines()[0]) from error


def shape_of(parts: Mapping[str, Tensor]) -> tuple[int, ...]:
    """The shape of the difference, without computing it; () where its tensors do not fit each other."""
    # On the meta device shapes are worked out by the same products, and nothing is multiplied.
    on_meta = {name: torch.empty_like(part, device="meta") for name, part in parts.items()}
    try:
        return tuple(difference(on_meta, 1.0).shape)
    except Misshapen:
        return ()


def _lora(parts: Mapping[str, Tensor]) -> Tensor:
    return parts["B"] @ parts["A"]


def _lokr(parts: Mapping[str, Tensor]) -> Tensor:
    # Each side of the Kronecker product may be whole or factored, whatever the other is.
    whole: list[Tensor] = []
    for name in ("lokr_w1", "lokr_w2"):
        whole.append(parts[name] if name in parts else parts[f"{name}_a"] @ parts[f"{name}_b"])
    return torch.kron(*whole)


def _loha(parts: Mapping[str, Tensor]) -> Tensor:
    return (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"])


def _full(parts: Mapping[str, Tensor]) -> Tensor:
    return parts["diff"]


_DIFFERENCES: dict[str, Callable[[Mapping[str, Tensor]], Tensor]] = {
    "LoRA": _lora, "LoKr": _lokr, "LoHa": _loha, "full": _full,
}  # fmt: skip
