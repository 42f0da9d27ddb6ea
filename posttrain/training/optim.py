"""AdamW, plain or with its moments in 8 bits (torchao's), and what its state is as plain tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from posttrain.config.sections import OptimConfig
from posttrain.errors import UserError

FLOOR = 1e-12
"""torchao's lower bound for the greatest moment of each block of 256."""
SCALE = 2.0**30
"""What gradients are multiplied by for moments in 8 bits, as K2's second moments are 1e-17, far below that floor. A
power of two rounds nothing, and AdamW's update does not depend on it."""
TENSORS, ELEMENTS = 32, 256
"""At most so many elements of about so many tensors make the sample of `median_root`."""


def make_optimizer(parameters: Sequence[Tensor], config: OptimConfig) -> torch.optim.Optimizer:
    """Raises UserError where the library is missing."""
    settings: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "weight_decay": config.weight_decay}
    if config.kind == "adamw":
        return torch.optim.AdamW(parameters, eps=config.eps, **settings)
    try:
        from torchao.optim import AdamW8bit as Stock  # type: ignore
    except ImportError as error:
        message = f"optim.kind: adamw8bit needs torchao ({error}): pip install 'posttrain[fp8]'"
        raise UserError(message) from error

    class AdamW8bit(Stock):
        """torchao's, for gradients of any scale."""

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
            if gradients:
                torch._foreach_mul_(gradients, SCALE)
            loss = super().step(closure)
            # A second moment far below the greatest of its block becomes 0 in 8 bits, beside a first moment that does
            # not: the update would be many times the rate. The least code above 0 bounds it.
            for state in self.state.values():
                if (inner := parts(state["exp_avg_sq"])) is not None:
                    inner["codes"].clamp_(min=1)
            return loss

    return AdamW8bit(parameters, eps=config.eps * SCALE, **settings)


def set_group(group: dict[str, Any], config: OptimConfig, rate: float) -> None:
    """Puts the recipe's settings, which a resumed run may have changed, and this update's rate into a group."""
    if isinstance(group["lr"], Tensor):  # torchao's: a tensor, so that another rate does not compile the step again
        group["lr"].fill_(rate)
        eps = config.eps * SCALE
    else:
        group["lr"], eps = rate, config.eps
    group |= {"betas": config.betas, "weight_decay": config.weight_decay, "eps": eps}


@torch.no_grad()
def median_root(optimizer: torch.optim.Optimizer) -> float | None:
    """Median of sqrt(v_hat), the root of the second moment without its bias, of the elements that have had a gradient.

    Over a sample of them; where they are sharded, of the parts that this process holds. None while there are none.
    """
    states = [state for state in optimizer.state.values() if state["exp_avg_sq"].numel()]
    beta = optimizer.param_groups[0]["betas"][1]
    found = []
    for state in states[:: len(states) // TENSORS | 1]:  # odd, as the two factors of an adapter take turns
        value = state["exp_avg_sq"]
        places = torch.arange(0, value.numel(), value.numel() // ELEMENTS | 1, device=value.device)
        found.append(_elements(value, places) / (1 - beta ** float(state["step"])))
    v = torch.cat(found).cpu() if found else torch.empty(0)
    v = v[v > 0]
    scale = SCALE if isinstance(optimizer.param_groups[0]["lr"], Tensor) else 1.0
    return float(v.sqrt().median()) / scale if len(v) else None


def _elements(value: Tensor, places: Tensor) -> Tensor:
    """Some elements of a moment, by their places in it."""
    if (inner := parts(value)) is None:
        return value.flatten()[places]
    scale = inner["scale"].where(inner["scale"] > FLOOR, 0.0)
    codes = inner["codes"].flatten()[places].int()
    return inner["qmap"][codes] * scale[places // (value.numel() // len(scale))]


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
