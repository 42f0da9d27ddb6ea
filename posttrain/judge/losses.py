"""Losses of the judges: pure functions of tensors that return (loss, metrics), all in fp32.

Legend: B pairs or images.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def bradley_terry(rho_w_B: Tensor, rho_l_B: Tensor, share_B: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """(B,) loss of pairs of scores: -s log sigma(d) - (1 - s) log sigma(-d) with d = rho_w - rho_l, and s the share
    of votes for the first. Only d would be determined, so 0.01 (rho_w + rho_l)^2 fixes the offset.
    """
    difference = rho_w_B.float() - rho_l_B.float()
    pair_B = F.binary_cross_entropy_with_logits(difference, share_B.to(difference), reduction="none")
    # Sums, as the caller divides by the size of the whole batch.
    with torch.no_grad():
        metrics = {"pair_loss": pair_B.sum(), "accuracy": ((difference > 0) == (share_B > 0.5)).float().sum()}
    return pair_B + 0.01 * (rho_w_B.float() + rho_l_B.float()).square(), metrics


def faulty(rho_B: Tensor, share_B: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """(B,) cross-entropy of the score rho = logit(yes) - logit(no) with the share of votes for yes."""
    loss_B = F.binary_cross_entropy_with_logits(rho_B.float(), share_B.float(), reduction="none")
    with torch.no_grad():
        metrics = {"accuracy": ((rho_B > 0) == (share_B > 0.5)).float().sum()}
    return loss_B, metrics
