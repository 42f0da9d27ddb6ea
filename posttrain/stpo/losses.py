"""STPO and Diffusion-DPO: pure functions of one batch of pairs. No config, no printing, no collectives; all in fp32.

A pair shares its time and its noise, also between policy and reference. Norms are means over a sample's elements, so
that beta does not depend on the resolution. With u the target velocity and e = v - u:

    a = |e|^2 of the chosen image, a0 the reference's; Dw = a - a0; b, b0, Dl the same of the rejected one
    z = beta/2 (phi(Dl) - Dw)                                       the margin that the policy sees, in nats
    L = -p log s(z) - (1 - p) log s(-z) + beta/2 [ k (dw + dl) + h max(0, mean Dw) ],  s the logistic function

with p the share of votes for the chosen one (`label`), dw and dl the squared distances of policy and reference, and
phi the identity, or bounded so that the rejected image supplies `bound` nats at most. Diffusion-DPO
(arXiv:2311.12908) is this with k = h = 0. Nothing in it keeps the chosen image's error from rising as long as the
other's rises faster; STPO's guard, as that of Diffusion-SDPO (arXiv:2511.03317), scales the gradient through the
rejected image by l in [0, 1] and leaves the value as it is.

Legend: B pairs, N image tokens, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

SHARES = (0.05, 0.95)
"""Shares of votes are clipped to this, so that the margin they ask for is finite: logit .95 = 2.94 nats."""
SATURATED = 0.05
RISE = 1e-4
"""Share of its error by which the chosen images' must rise before the hinge acts. At the start policy and reference are
the same up to rounding, whose sign would otherwise decide whether the first step has a hinge."""


def label(share: float, human: bool) -> float:
    """What a pair's loss takes for p: the share of votes, clipped to SHARES; but 1 where nobody voted, since the
    difference was made and is certain."""
    return share if share == 1 and not human else min(max(share, SHARES[0]), SHARES[1])


def error_change(v: Tensor, reference: Tensor, target: Tensor) -> Tensor:
    """(B,) |v - u|^2 - |v_ref - u|^2 of (B, N, C), as <v - v_ref, v + v_ref - 2u>: nothing cancels, 0 at v = v_ref."""
    v, reference, target = v.float(), reference.float(), target.float()
    return ((v - reference) * (v + reference - 2 * target)).flatten(1).mean(1)


def has_risen(change: float, error: float) -> bool:
    """Whether the hinge acts, given the chosen images' mean Dw and mean a0."""
    return change > RISE * error


def preference_terms(
    v_w: Tensor,
    v_l: Tensor,
    reference_w: Tensor,
    reference_l: Tensor,
    target_w: Tensor,
    target_l: Tensor,
    label_B: Tensor,
    *,
    beta: float,
    guard: float | None,
    bound: float | None,
    anchor: float,
    hinge: float,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The terms of the gradient (winner, loser, and those of anchor and hinge that are above 0) and what the pairs look
    like, both (B,) each.

    The gradient of the mean of all terms is that of L; their values mean nothing. The caller leaves out the hinge
    unless the mean Dw of the whole batch `has_risen`. `guard` is the share of the unopposed decrease of the chosen
    image's error that a step keeps, in [0, 1], with the gradients at the output in the place of the parameters';
    None lets the rejected image's gradient be. Labels are p, from `label`.

    Metrics carry no gradient: `loss` is L without the hinge, `winner` Dw, `winner_error` a0 and so on; `sigma` is
    s(-z), `guard` is l.
    """
    dw, dl = error_change(v_w, reference_w, target_w), error_change(v_l, reference_l, target_l)
    drift_w = (v_w.float() - reference_w.float()).square().flatten(1).mean(1)
    drift_l = (v_l.float() - reference_l.float()).square().flatten(1).mean(1)
    phi = dl if bound is None else bounded(dl, 2 * bound / beta)  # bound is in nats, and z = beta/2 (phi - dw)
    label_B = label_B.float()
    # The loss's derivative by z is computed here and multiplied with the errors below, in place of a loss that autograd
    # differentiates: so each term has a gradient of its own, which the guard scales and the metrics measure.
    with torch.no_grad():
        z = beta / 2 * (phi - dw)
        pull = (-z).sigmoid() - (1 - label_B)  # -dL/dz; below 0 where z is more than the votes ask for
        e_w, e_l = (v_w.float() - target_w.float()).flatten(1), (v_l.float() - target_l.float()).flatten(1)
        # Up to a factor e is the gradient of a at the network's output, so their inner products are the gradients'.
        inner, norm_w, norm_l = (e_w * e_l).mean(1), e_w.square().mean(1), e_l.square().mean(1)
        kept = torch.ones_like(z)
        if guard is not None:
            # A pull that goes back raises the chosen image's error, and least so with the whole of the other's.
            kept = torch.where((inner > 0) & (pull >= 0), ((1 - guard) * norm_w / inner).clamp(0, 1), kept)
        metrics = {
            # The hinge is of the mean over the batch, so the caller adds it.
            "loss": F.binary_cross_entropy_with_logits(z, label_B, reduction="none")
            + beta / 2 * anchor * (drift_w + drift_l),
            "winner": dw,
            "loser": dl,
            "winner_error": norm_w - dw,
            "loser_error": norm_l - dl,
            "margin": dl - dw,
            "accuracy": (1 + (dl - dw).sign()) / 2,
            "z": z,
            "sigma": (-z).sigmoid(),
            "saturated": ((-z).sigmoid() < SATURATED).float(),
            "guard": kept,
            "guarded": (kept < 1).float(),
            "cosine": inner / (norm_w * norm_l).sqrt().clamp_min(1e-12),
            "drift_winner": drift_w,
            "drift_loser": drift_l,
        }
    # phi, not dl: its slope is the part of the bound that the gradient has.
    terms = {"winner": beta / 2 * pull * dw, "loser": -beta / 2 * pull * kept * phi}
    if anchor > 0:
        terms["anchor"] = beta / 2 * anchor * (drift_w + drift_l)
    if hinge > 0:
        terms["hinge"] = beta / 2 * hinge * dw
    return terms, {name: value.detach() for name, value in metrics.items()}


def bounded(change: Tensor, limit: float) -> Tensor:
    """limit (1 - exp(-x / limit)) above 0, x below: smooth, never above limit (BDPO, arXiv:2506.12725)."""
    return torch.where(change > 0, -limit * torch.expm1(-change.clamp_min(0) / limit), change)


def exact_guard(winner_n: float, loser_n: float, guard: float) -> float:
    """How much of the rejected images' gradient a batch may take, in [0, 1], so that a step of gradient descent keeps
    the share `guard` of the decrease of the chosen images' errors that it would have without it.

    `winner_n` and `loser_n` are the inner products of the two gradients, as ascents of the two errors, with the
    gradient n of the sum of the chosen images' errors, unweighted: weighted by the loss it would leave pairs
    unprotected that are already learnt. Where `winner_n` is below 0, no share can keep their errors from rising.
    """
    if loser_n <= 0:  # the rejected images' gradient helps the chosen ones too
        return 1.0
    return min(1.0, (1 - guard) * max(0.0, winner_n) / loser_n)


def inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Inner product of two lists of tensors, summed in fp64."""
    return sum(_inner(x, y) for x, y in zip(a, b, strict=True))


def _inner(x: Tensor, y: Tensor) -> float:
    # Millions of small products: fp32 would lose the sum's last digits.
    if x.is_cuda:
        return float((x.double() * y.double()).sum())
    # On the CPU, since Apple's GPUs have no fp64.
    first, second = (part.detach().float().cpu().numpy().astype(np.float64) for part in (x, y))
    return float(np.vdot(first, second))


def norm(a: Sequence[Tensor]) -> float:
    return math.sqrt(inner(a, a))
