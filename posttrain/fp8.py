"""A frozen base in fp8, through torchao: the linears of the transformer's blocks, where 95 % of K2's weights are.

Numbers are e4m3 and sums fp32. Each output of a weight has a scale of its own, and each token of what goes in another,
which is found anew each time. Backward brings the weight back to bf16 and multiplies there, so that its only error is
the weight's rounding. Adapters, and all that is trained, stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from posttrain.k2 import K2
from posttrain.machine import check_fp8
from prompts.errors import UserError


class Frozen8(nn.Linear):
    """A linear whose weight is torchao's Float8Tensor; (..., in) to (..., out) in bf16. It is never trained."""

    def __init__(self, linear: nn.Linear, weight: Tensor):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, None
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        return _Product.apply(input.to(self.weight.dtype), self.weight)


class _Product(torch.autograd.Function):
    """torchao's product has no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return gradients[0] @ weight.dequantize(), None


def quantize(k2: K2, device: str | torch.device) -> None:
    """Puts the blocks' linears into fp8 on `device`, one after the other, so that never all are there in bf16.

    Raises UserError where the GPU or the library cannot. Adapters may be there already or come later.
    """
    quantized = _quantizer(torch.device(device))
    for block in k2.transformer.transformer_blocks:
        for name, module in list(block.named_modules()):
            if type(module) is nn.Linear and ".lora_" not in name:
                assert module.bias is None
                weight = quantized(module.weight.detach().to(device, torch.bfloat16))
                block.set_submodule(name, Frozen8(module, weight), strict=True)


def _quantizer(device: torch.device) -> Any:
    try:
        from torchao.float8.inference import Float8MMConfig  # type: ignore
        from torchao.quantization import Float8Tensor, PerRow  # type: ignore
        from torchao.quantization.quantize_.common import KernelPreference  # type: ignore
        from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs  # type: ignore
    except ImportError as error:
        raise UserError(f"model.quantize: fp8 needs torchao ({error}): pip install 'posttrain[fp8]'") from error
    if device.type == "cuda":
        check_fp8(device)
    inputs = QuantizeTensorToFloat8Kwargs(granularity=PerRow(), kernel_preference=KernelPreference.TORCH)

    def quantized(weight: Tensor) -> Tensor:
        return Float8Tensor.from_hp(
            weight, granularity=PerRow(), mm_config=Float8MMConfig(use_fast_accum=True), act_quant_kwargs=inputs,
            kernel_preference=KernelPreference.TORCH,
        )  # fmt: skip

    return quantized
