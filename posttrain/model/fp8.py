"""The linears of the transformer's blocks, where 95 % of K2's weights are, in fp8 through torchao.

A frozen base (`quantize`): weights and inputs are e4m3, sums are fp32. A weight has one scale for each output; an input
has one for each token, computed in every forward. Backward converts the weight to bf16 and multiplies there, so the
weight's rounding is its only error. Adapters, and everything that is trained, keep their types.

Training of all weights (`train_in_float8`): weights stay fp32, and each product, forward and backward, rounds its two
factors to fp8 with new scales, one for a whole factor (tensorwise; gradients are e5m2) or one for each row (rowwise;
e4m3, scales are powers of two). All networks of a run compute alike, so a policy begins exactly as its reference.
Evaluations are exact: what is exported is what they drew.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from posttrain.errors import UserError
from posttrain.log import log
from posttrain.model import architecture
from posttrain.model.blocks import Blocks
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


# training of all weights


def train_in_float8(k2: K2) -> None:
    """Has the linears of the blocks multiply in fp8, in all networks, if `k2.blocks.float8` says how. To be called when
    all roles are there, and before they are sharded.

    On a CPU products are emulated: as slow as exact ones and more, with fp8's numbers.
    """
    recipe = k2.blocks.float8
    if recipe is None:
        return
    config_class, convert, kind = _training()
    cuda = k2.device.type == "cuda"
    if cuda:
        check_fp8(k2.device, "model.float8")
    # The kernels sum over multiples of 16, and a weight's gradient is a sum over tokens, of which there is any number.
    config = dataclasses.replace(config_class.from_recipe_name(recipe), pad_inner_dim=True, emulate=not cuda)
    count, networks = 0, [net for net in (k2.velocity_model, k2.reference, *k2.copies.values()) if net is not None]
    for network in networks:
        convert(network, module_filter_fn=_is_block_linear, config=config)
        for module in network.modules():
            module: Any
            # torchao's own linear is made in place of a plain one; this adds what it lacks.
            if type(module) is kind.__base__:
                module.__class__ = kind
                module.blocks = k2.blocks
                count += 1
    each = count // len(networks)
    log.info(f"model.float8: {recipe}, in {each} linears of the blocks of each network; evaluations compute exactly")


@contextlib.contextmanager
def exact(k2: K2) -> Iterator[None]:
    """Inside the block nothing that `train_in_float8` has changed computes in fp8."""
    before, k2.blocks.exact = k2.blocks.exact, True
    try:
        yield
    finally:
        k2.blocks.exact = before


def check_training(device: str | torch.device) -> None:
    """Raises UserError if the GPU or torchao does not support training in fp8."""
    _training()
    if torch.device(device).type == "cuda":
        check_fp8(torch.device(device), "model.float8")


def _is_block_linear(module: Any, name: str) -> bool:
    # The names of a network begin with `transformer.`; fp8 products take multiples of 16.
    fits = module.in_features % 16 == 0 and module.out_features % 16 == 0
    return fits and architecture.is_block_matrix(f"{name.removeprefix('transformer.')}.weight")


@functools.cache
def _training() -> tuple[Any, Any, Any]:
    """torchao's class of settings, its conversion of linears, and our class of linears."""
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training  # type: ignore
        from torchao.float8.float8_linear import Float8Linear as Stock  # type: ignore
        from torchao.float8.float8_linear import matmul_with_hp_or_float8_args  # type: ignore
    except ImportError as error:
        raise UserError(f"model.float8: fp8 needs torchao ({error}): pip install 'posttrain[fp8]'") from error

    class Float8TrainedLinear(Stock):
        """torchao's, which can be told to compute exactly."""

        blocks: Blocks

        def forward(self, input: Tensor) -> Tensor:
            if self.blocks.exact:
                return F.linear(input, self.weight)
            if torch.is_autocast_enabled(input.device.type):  # torchao asks this of GPUs alone
                input = input.to(torch.get_autocast_dtype(input.device.type))
            # As FSDP2 gathers it: of an fp32 weight fp8 would be another, and one GPU would not equal several.
            weight = self.weight.to(input.dtype)
            return matmul_with_hp_or_float8_args.apply(input, weight.t(), self.linear_mm_config, self.config)

    return Float8LinearConfig, convert_to_float8_training, Float8TrainedLinear
