"""AdamW, plain or with its moments in 8 bits (torchao's), and the state of any optimiser as plain tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from posttrain.config.sections import OptimConfig
from posttrain.errors import UserError, counted

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
            gradients: list[Tensor] = []
            for group in self.param_groups:
                gradients += [p.grad for p in group["params"] if p.grad is not None]
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
    group["weight_decay"] = config.weight_decay
    if "betas" in group:  # Muon's matrices have none
        group |= {"betas": config.betas, "eps": eps}


@torch.no_grad()
def median_root(optimizer: torch.optim.Optimizer) -> float | None:
    """Median of sqrt(v_hat), the root of the second moment without its bias, of the elements that have had a gradient.

    Over a sample of them; where they are sharded, of the parts that this process holds. None while there are none.
    """
    states = [state for state in optimizer.state.values() if "exp_avg_sq" in state and state["exp_avg_sq"].numel()]
    beta = optimizer.param_groups[-1]["betas"][1]  # of Muon, which has no second moment, the group that is AdamW's
    found = []
    for state in states[:: len(states) // TENSORS | 1]:  # odd, as the two factors of an adapter take turns
        value = state["exp_avg_sq"]
        places = torch.arange(0, value.numel(), value.numel() // ELEMENTS | 1, device=value.device)
        found.append(_elements(value, places) / (1 - beta ** float(state["step"])))
    v = torch.cat(found).cpu() if found else torch.empty(0)
    v = v[v > 0]  # an element without any gradient so far has 0
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


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimiser's state as tensors (`<parameter index>.<name>`, of an 8-bit moment `....<part>`) and the rest as
    JSON."""
    full = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    state: dict[str, Any] = {"kind": type(optimizer).__name__, "groups": []}
    for index, values in full["state"].items():
        for name, value in values.items():
            inner = parts(value)
            if inner is None:
                tensors[f"{index}.{name}"] = value
                continue
            for part, tensor in inner.items():
                tensors[f"{index}.{name}.{part}"] = tensor
    for i, group in enumerate(full["param_groups"]):
        plain = {}
        for name, value in group.items():
            if isinstance(value, Tensor):  # such as the rate of a capturable optimiser
                tensors[f"group{i}.{name}"] = value
            else:
                plain[name] = value
        state["groups"].append(plain)
    return tensors, state


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Put back what `flatten_optimizer` gave, bit for bit.

    Raises UserError if the parameters differ in number or shape, as after a change of model or LoRA rank, or the kind
    of the optimiser does.
    """
    own, kind = type(optimizer).__name__, state.get("kind", "AdamW")
    if own != kind:
        raise UserError(
            f"optim.kind: the checkpoint's is {kind} and the recipe's {own}; restore it, or start another run"
        )
    parameters: list[torch.Tensor] = []
    for group in optimizer.param_groups:
        parameters += group["params"]
    saved = sum(len(group["params"]) for group in state["groups"])
    if saved != len(parameters):
        raise UserError(
            f"the checkpoint has {counted(saved, 'trained tensor')} and the model {len(parameters)}: the recipe"
            " has changed; restore model and lora, or start another run"
        )
    groups = [{**group} for group in state["groups"]]
    values: dict[int, dict[str, Tensor]] = {}
    eight: dict[tuple[int, str], dict[str, Tensor]] = {}
    for key, value in tensors.items():
        owner, _, name = key.partition(".")
        if owner.startswith("group"):
            groups[int(owner.removeprefix("group"))][name] = value
            continue
        name, _, part = name.partition(".")
        if part:  # of an 8-bit moment, of which the codes have the parameter's shape
            eight.setdefault((int(owner), name), {})[part] = value.clone()
            if part != "codes":
                continue
        shape = parameters[int(owner)].shape
        if value.ndim and value.shape != shape:
            raise UserError(
                f"the checkpoint's tensor {key} has shape {list(value.shape)} and the model's {list(shape)}:"
                " the recipe has changed; restore model and lora, or start another run"
            )
        values.setdefault(int(owner), {})[name] = value.clone()
    for (owner, name), inner in eight.items():
        values[owner][name] = moment(inner)
    for group in groups:  # JSON has made lists of tuples
        if "betas" in group:
            group["betas"] = tuple(group["betas"])
    optimizer.load_state_dict({"state": values, "param_groups": groups})
