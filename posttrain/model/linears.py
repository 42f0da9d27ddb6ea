"""The linears of a transformer's blocks that are not plain ones: with adapters, and with a weight in 8 bits.

    y = W x + B A x        A (r, in) and B (out, r) of all active adapters side by side, fp32, with their scales in B

The sum is rounded once. A base in bf16 that multiplied first would round W x, and a change of less than half a last
place of that would be lost in nearly every element: of an adapter with |BA| = 0.0002 |W|, 88 %.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Frozen8(nn.Linear):
    """A linear whose weight is torchao's Float8Tensor; (..., in) to (..., out) in bf16. It is never trained."""

    def __init__(self, linear: nn.Linear, weight: Tensor):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, None
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        return Product8.apply(input.to(self.weight.dtype), self.weight)


class Product8(torch.autograd.Function):
    """torchao's product has no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return gradients[0] @ weight.dequantize(), None


class Adapted(nn.Linear):
    """A linear with adapters by name; it takes over the weight of a plain one, or of one in 8 bits."""

    def __init__(self, linear: nn.Linear, active: list[str]):
        """`active` names the adapters to add; it is shared by all linears of a model and changes in place."""
        nn.Module.__init__(self)
        assert linear.bias is None
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, None
        self.weight = linear.weight
        self.active = active
        self.eight = isinstance(linear, Frozen8)
        """Whether the weight is in 8 bits; its product is rounded to bf16 before adapters are added."""
        self.scales: dict[str, float] = {}
        """By adapter that this linear has."""

    def add(self, name: str, a: Tensor, b: Tensor, scale: float) -> None:
        """Factors (r, in) and (out, r), which become frozen fp32 parameters beside the weight."""
        for factor, value in (("A", a), ("B", b)):
            held = value.detach().to(self.weight.device, torch.float32)
            self.register_parameter(f"lora_{factor}_{name}", nn.Parameter(held, requires_grad=False))
        self.scales[name] = scale

    def remove(self, name: str) -> None:
        delattr(self, f"lora_A_{name}")
        delattr(self, f"lora_B_{name}")
        del self.scales[name]

    def factor(self, factor: str, name: str) -> nn.Parameter:
        """`A` or `B` of an adapter."""
        return getattr(self, f"lora_{factor}_{name}")

    def factors(self, names: list[str]) -> tuple[Tensor, Tensor] | None:
        """A (r, in) and B (out, r) of these adapters side by side, with their scales in B; None if it has none."""
        own = [name for name in names if name in self.scales]
        if not own:
            return None
        a: list[Tensor] = [self.factor("A", name) for name in own]
        b = [self.factor("B", name) * self.scales[name] for name in own]
        return (a[0], b[0]) if len(own) == 1 else (torch.cat(a), torch.cat(b, dim=1))

    def forward(self, input: Tensor) -> Tensor:
        input = input.to(self.weight.dtype)
        factors = self.factors(self.active)
        if factors is None:
            return self._base(input)
        a, b = (factor.to(input.dtype) for factor in factors)
        added = F.linear(F.linear(input, a), b)
        if self.eight:
            return self._base(input) + added
        return torch.addmm(added.flatten(0, -2), input.flatten(0, -2), self.weight.t()).view(added.shape)

    def _base(self, input: Tensor) -> Tensor:
        return Product8.apply(input, self.weight) if self.eight else F.linear(input, self.weight)

    def plain(self) -> nn.Linear:
        """The linear that it was, with the same weight."""
        if self.eight:
            return Frozen8(self, self.weight.data)
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = self.weight
        return linear
