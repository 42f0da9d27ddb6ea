"""Linears with LoRA adapters, and linears with a frozen weight in fp8.

    y = W x + B A x (+ b)      A (r, in) and B (out, r): all active adapters concatenated, fp32, with their scales in B

The sum of the products is rounded once. If W x were rounded to bf16 first, changes of less than half a unit in the last
place would be lost: 88 % of the change by an adapter with |BA| = 0.0002 |W|. A bias, which only layers outside the
blocks have, is added last, with and without adapters, so that an adapter without effect changes not a bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FP8 = "fp8"
"""Beside the adapters in a list of active ones: linears multiply by their copies in fp8, where they have them."""


class Float8Linear(nn.Linear):
    """A frozen linear whose weight is torchao's Float8Tensor; (..., in) to (..., out) in bf16."""

    def __init__(self, linear: nn.Linear, weight: Tensor):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, None
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        return Float8Matmul.apply(input.to(self.weight.dtype), self.weight)


class Float8Matmul(torch.autograd.Function):
    """torchao's product with a gradient, which its own has not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        # The weight is frozen, so the input is not needed in backward and takes no memory.
        ctx.save_for_backward(weight)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return gradients[0] @ weight.dequantize(), None


class LoraLinear(nn.Linear):
    """A linear with adapters by name. It takes over the weight of a plain linear or of a Float8Linear, and its bias."""

    def __init__(self, linear: nn.Linear, active: list[str]):
        """`active` names the adapters to add. All linears of a model share this list, which changes in place."""
        nn.Module.__init__(self)  # nn.Linear's own would allocate a weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.active = active
        self.is_float8 = isinstance(linear, Float8Linear)
        """Whether the weight is in fp8. Its product is rounded to bf16 before adapters are added."""
        self.scales: dict[str, float] = {}
        """By name of the adapters that this linear has."""
        self.copy: Tensor | None
        """The weight once more in fp8, used where FP8 is active; see fp8.add_copies. It is in no checkpoint."""
        self.register_buffer("copy", None, persistent=False)

    def add(self, name: str, a: Tensor, b: Tensor, scale: float) -> None:
        """Adds factors (r, in) and (out, r) as frozen fp32 parameters beside the weight."""
        for factor, value in (("A", a), ("B", b)):
            # fp32 on any base: an update of 1e-5 would be rounded away in bf16.
            weight = value.detach().to(self.weight.device, torch.float32)
            self.register_parameter(f"lora_{factor}_{name}", nn.Parameter(weight, requires_grad=False))
        self.scales[name] = scale

    def remove(self, name: str) -> None:
        delattr(self, f"lora_A_{name}")
        delattr(self, f"lora_B_{name}")
        del self.scales[name]

    def factor(self, factor: str, name: str) -> nn.Parameter:
        """`A` or `B` of an adapter."""
        return getattr(self, f"lora_{factor}_{name}")

    def factors(self, names: list[str]) -> tuple[Tensor, Tensor] | None:
        """A (r, in) and B (out, r) of these adapters, concatenated, with their scales in B; None if it has none."""
        own = [name for name in names if name in self.scales]
        if not own:
            return None
        a: list[Tensor] = [self.factor("A", name) for name in own]
        b = [self.factor("B", name) * self.scales[name] for name in own]
        return (a[0], b[0]) if len(own) == 1 else (torch.cat(a), torch.cat(b, dim=1))

    def forward(self, input: Tensor) -> Tensor:
        output = self._without_bias(input.to(self.weight.dtype))
        return output if self.bias is None else output + self.bias

    def _without_bias(self, input: Tensor) -> Tensor:
        factors = self.factors(self.active)
        if factors is None:
            return self._base(input)
        a, b = (factor.to(input.dtype) for factor in factors)
        # Through the rank: B A would be a matrix of the layer's size.
        added = F.linear(F.linear(input, a), b)
        if self._float8() is not None:
            return self._base(input) + added
        # addmm adds before it rounds; it takes matrices only, so the leading dimensions are flattened.
        return torch.addmm(added.flatten(0, -2), input.flatten(0, -2), self.weight.t()).view(added.shape)

    def _base(self, input: Tensor) -> Tensor:
        weight = self._float8()
        return F.linear(input, self.weight) if weight is None else Float8Matmul.apply(input, weight)

    def _float8(self) -> Tensor | None:
        """The weight to multiply by, if that is one in fp8."""
        if self.is_float8:
            return self.weight
        return self.copy if FP8 in self.active else None

    def plain(self) -> nn.Linear:
        """The linear without adapters, with the same weight."""
        if self.is_float8:
            return Float8Linear(self, self.weight.data)
        # On the meta device, so that no second weight is allocated for a moment.
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight, linear.bias = self.weight, self.bias
        return linear
