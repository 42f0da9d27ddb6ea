"""A frozen base in fp8, through torchao: the linears of the transformer's blocks, where 95 % of K2's weights are.

Weights and inputs are e4m3, sums are fp32. A weight has one scale for each output; an input has one for each token,
computed in every forward. Backward converts the weight to bf16 and multiplies there, so the weight's rounding is its
only error. Adapters, and everything that is trained, keep their types.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from posttrain.errors import UserError
from posttrain.model import architecture
from posttrain.model.k2 import K2
from posttrain.model.linears import Float8Linear, LoraLinear
from posttrain.model.machine import check_fp8


def quantize(k2: K2, device: str | torch.device) -> None:
    """Puts the linears of the blocks into fp8 on `device`, one at a time: the GPU never holds all of them in bf16.

    Raises UserError if the GPU or torchao does not support it. Adapters may exist already or be added later.
    """
    quantized = _quantizer(torch.device(device))
    for block in architecture.blocks(k2.transformer):
        for name, module in list(block.named_modules()):
            if not isinstance(module, nn.Linear) or isinstance(module, Float8Linear):
                continue
            assert module.bias is None
            weight = quantized(module.weight.detach().to(device, torch.bfloat16))
            if isinstance(module, LoraLinear):
                # Its adapters stay: only the frozen weight beside them changes its type.
                module.weight = nn.Parameter(weight, requires_grad=False)
                module.is_float8 = True
            else:
                block.set_submodule(name, Float8Linear(module, weight), strict=True)


def check(device: str | torch.device, field: str) -> None:
    """Raises UserError, which begins with `field`, if the GPU or torchao does not support fp8."""
    _quantizer(torch.device(device), field)


def add_copies(k2: K2, device: str | torch.device) -> None:
    """Keeps, beside the weight of each adapted linear of the blocks, the same weight in fp8: half as much memory again.
    They are used inside `k2.role(name, fp8=True)`.

    Raises UserError as `quantize` does.
    """
    quantized = _quantizer(torch.device(device), "rollout.quantize")
    for block in architecture.blocks(k2.transformer):
        for layer in block.modules():
            if isinstance(layer, LoraLinear) and not layer.is_float8:
                layer.copy = quantized(layer.weight.detach().to(torch.bfloat16))


def _quantizer(device: torch.device, field: str = "model.quantize") -> Any:
    try:
        from torchao.float8.inference import Float8MMConfig  # type: ignore
        from torchao.quantization import Float8Tensor, PerRow  # type: ignore
        from torchao.quantization.quantize_.common import KernelPreference  # type: ignore
        from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs  # type: ignore
    except ImportError as error:
        raise UserError(f"{field}: fp8 needs torchao ({error}): pip install 'posttrain[fp8]'") from error
    if device.type == "cuda":
        check_fp8(device, field)
    # torch's own kernel: torchao's default picks one by what else is installed, and results would differ by machine.
    inputs = QuantizeTensorToFloat8Kwargs(granularity=PerRow(), kernel_preference=KernelPreference.TORCH)

    def quantized(weight: Tensor) -> Tensor:
        return Float8Tensor.from_hp(
            weight, granularity=PerRow(), mm_config=Float8MMConfig(use_fast_accum=True), act_quant_kwargs=inputs,
            kernel_preference=KernelPreference.TORCH,
        )  # fmt: skip

    return quantized
