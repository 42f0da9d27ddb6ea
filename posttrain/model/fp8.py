"""A frozen base in fp8, through torchao: the linears of the transformer's blocks, where 95 % of K2's weights are.

Numbers are e4m3 and sums fp32. Each output of a weight has a scale of its own, and each token of what goes in another,
which is found anew each time. Backward brings the weight back to bf16 and multiplies there, so that its only error is
the weight's rounding. Adapters, and all that is trained, stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from posttrain.errors import UserError
from posttrain.model.k2 import K2
from posttrain.model.linears import Adapted, Frozen8
from posttrain.model.machine import check_fp8


def quantize(k2: K2, device: str | torch.device) -> None:
    """Puts the blocks' linears into fp8 on `device`, one after the other, so that never all are there in bf16.

    Raises UserError where the GPU or the library cannot. Adapters may be there already or come later.
    """
    quantized = _quantizer(torch.device(device))
    for block in k2.transformer.transformer_blocks:
        for name, module in list(block.named_modules()):
            if not isinstance(module, nn.Linear) or isinstance(module, Frozen8):
                continue
            assert module.bias is None
            weight = quantized(module.weight.detach().to(device, torch.bfloat16))
            if isinstance(module, Adapted):
                module.weight, module.eight = nn.Parameter(weight, requires_grad=False), True
            else:
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
