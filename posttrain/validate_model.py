"""Ranges of `model`, and what fits together with it; see validate.py."""

from __future__ import annotations

from posttrain.config.ranges import ConfigError, at_least, positive
from posttrain.config.sections import LoraConfig, ModelConfig


def validate_model(model: ModelConfig, all_weights: bool = False) -> None:
    """`all_weights`: they are trained, and there is no adapter."""
    if model.recompute is not None:
        at_least("model.recompute", model.recompute, 0)
    if model.quantize is None:
        return
    if all_weights:
        raise ConfigError(
            "model.quantize", "fp8 holds weights that stay as they are, and lora is null; use one of the two"
        )
    if model.dtype != "bfloat16":
        raise ConfigError("model.quantize", f"fp8 multiplies in bfloat16, and model.dtype is {model.dtype}; change it")


def validate_lora(lora: LoraConfig) -> None:
    at_least("lora.rank", lora.rank, 1)
    positive("lora.alpha", lora.alpha)
    if lora.targets == []:
        raise ConfigError("lora.targets", "is empty, so nothing would be trained; name layers or use null")


def refuse_quantize(model: ModelConfig, why: str) -> None:
    if model.quantize is not None:
        raise ConfigError("model.quantize", f"{why}; leave it out")
