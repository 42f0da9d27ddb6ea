"""AdamW, plain or with its moments in 8 bits (torchao's), and what its state is as plain tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from posttrain.config import OptimConfig
from prompts.errors import UserError


def make_optimizer(parameters: Sequence[Tensor], config: OptimConfig) -> torch.optim.Optimizer:
    """Raises UserError where the library is missing."""
    settings: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "weight_decay": config.weight_decay}
    if config.kind == "adamw":
        return torch.optim.AdamW(parameters, **settings)
    try:
        from torchao.optim import AdamW8bit  # type: ignore
    except ImportError as error:
        message = f"optim.kind: adamw8bit needs torchao ({error}): pip install 'posttrain[fp8]'"
        raise UserError(message) from error
    return AdamW8bit(parameters, **settings)


def set_rate(group: dict[str, Any], rate: float) -> None:
    """torchao keeps a rate as a tensor, so that another one does not have the step compiled again."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def parts(value: Tensor) -> dict[str, Tensor] | None:
    """The plain tensors that a moment in 8 bits is made of; None of any other tensor."""
    if not is_traceable_wrapper_subclass(value):
        return None
    return {name: getattr(value, name) for name in value.__tensor_flatten__()[0]}


def moment(parts: Mapping[str, Tensor]) -> Tensor:
    """The inverse of `parts`. Values of the second moment, which has no sign, are never below 0."""
    from torchao.optim.subclass_8bit import OptimState8bit  # type: ignore

    qmap = parts["qmap"]
    return OptimState8bit(parts["codes"], parts["scale"], qmap, bool(qmap.min() < 0), torch.float32)
