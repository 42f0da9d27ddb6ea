"""Estimates what fits into a GPU: images in a forward and options, by method and size, from the sizes of K2's parts.

Bytes, with P weights in the blocks, O other weights of the transformer, E of the text encoder, V of the VAE and A of an
adapter:

    always      2 O + 2 P (fp8: P) + 2 (E + V) (offloaded: 0); for each adapter 4 A, and 8 A (8 bits: 2 A) for moments;
                4 A for the policy's average, and for the adapter of each earlier stage
    training    T (k a + (B - k) 2 d + 2 a) + 4 A for gradients
    decoding    2^20 pixels or one image, at 3.3 kB each, and 2 V if offloaded
    encoding    2 E if offloaded

Here a forward has T tokens, and k of the B blocks of width d keep their activations, `a` bytes a token. The first line
and the largest of the others must leave a tenth of the GPU free, as in model/blocks.py. tdm has two adapters.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, Krea2Transformer2DModel
from transformers import AutoConfig, AutoModel, Qwen3VLConfig, Qwen3VLModel

from posttrain.model import architecture
from posttrain.model.blocks import RESERVE
from posttrain.model.k2 import DECODED
from posttrain.model.load import sizes_of

GIB = 2**30
GPUS = (24, 48, 80, 141)
"""Approximate GiB of memory of an RTX 4090, L40S, H100 and H200."""
BLOCK_BYTES = 150e3
"""Bytes a token that a compiled block of K2 keeps for backward, measured with adapters of rank 64."""
UNCOMPILED = 2.4
"""An uncompiled block keeps this many times as much."""
DECODE_BYTES = 3.3e3
"""Peak bytes a pixel of K2's VAE when it decodes in bf16; counted, without the workspace of convolutions."""
OPTIONS: tuple[tuple[str, ...], ...] = (
    (), ("offload",), ("offload", "adamw8bit"), ("offload", "fp8"), ("offload", "adamw8bit", "fp8"),
)  # fmt: skip
"""In order of cost: first those that change no result, last those that change most."""
MICRO_BATCHES = (8, 4, 2, 1)
MULTIPLE = 16
"""Pixels along one side of an image token of K2."""


@dataclass(frozen=True)
class Parts:
    """Numbers of weights of K2's parts, and the shape of its transformer."""

    blocks: int
    block_weights: int
    other_weights: int
    text_encoder: int
    vae: int
    width: int
    adapter: int
    """Weights of a rank-1 adapter on all linears."""


@dataclass(frozen=True)
class Fit:
    """Settings with which a training step fits."""

    options: tuple[str, ...]
    micro_batch: int
    recomputed: int
    gib: float

    def __str__(self) -> str:
        named = " + ".join(self.options) or "no option"
        return f"{self.micro_batch}; {self.recomputed} again; {named}; {self.gib:.0f} GiB"


@cache
def parts_of(scale: str) -> Parts:
    """The parts of a scale of `load.sizes_of`; nothing is allocated."""
    transformer_config, text_config, vae_config, _ = sizes_of(scale)
    with torch.device("meta"):
        net = Krea2Transformer2DModel(**transformer_config)
        encoder, vae = Qwen3VLModel(Qwen3VLConfig(**text_config)), AutoencoderKLQwenImage(**vae_config)
    return _counted(net, encoder, vae)


@cache
def parts_in(path: str) -> Parts:
    """The parts of a pipeline directory, from its config files; no weights are read or allocated."""
    root = Path(path)
    with torch.device("meta"):
        encoder = AutoModel.from_config(AutoConfig.from_pretrained(root / "text_encoder"))
        net = Krea2Transformer2DModel(**_arguments(root / "transformer"))
        return _counted(net, encoder, AutoencoderKLQwenImage(**_arguments(root / "vae")))


def _arguments(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text())
    # diffusers' own entries begin with an underscore
    return {name: value for name, value in config.items() if not name.startswith("_")}


def _counted(net: Krea2Transformer2DModel, encoder: torch.nn.Module, vae: torch.nn.Module) -> Parts:
    blocks = architecture.blocks(net)
    in_blocks = sum(_weights(block) for block in blocks)
    linears = architecture.block_linears(net)
    return Parts(
        blocks=len(blocks),
        block_weights=in_blocks,
        other_weights=_weights(net) - in_blocks,
        text_encoder=_weights(encoder),
        vae=_weights(vae),
        width=net.config["num_attention_heads"] * net.config["attention_head_dim"],
        # A is (1, in), B is (out, 1).
        adapter=sum(linear.in_features + linear.out_features for linear in linears),
    )


def _weights(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def need(
    parts: Parts, options: Sequence[str], adapters: int, rank: int, tokens: int, pixels: int, recomputed: int,
    block_bytes: float = BLOCK_BYTES, stack: int = 0,
) -> float:  # fmt: skip
    """GiB, by the formulas at the top: `tokens` of all samples of a forward, `pixels` of one image, `stack` the sum of
    the ranks of all earlier stages."""
    weights = 2 * parts.other_weights + (1 if "fp8" in options else 2) * parts.block_weights
    weights += parts.block_weights if "fp8 rollouts" in options else 0
    aside = 2 * (parts.text_encoder + parts.vae)
    used = weights + (0 if "offload" in options else aside)
    # Adapters are fp32, with two moments of four bytes or one byte each; the policy's average is one more copy.
    moments = 2 if "adamw8bit" in options else 8
    used += ((adapters * (4 + moments) + 4) * rank + 4 * stack) * parts.adapter
    kept = parts.blocks - recomputed
    # 2 more: the block that backward is in has its activations and their gradients
    training = tokens * ((kept + 2) * block_bytes + recomputed * 2 * parts.width) + 4 * rank * parts.adapter
    # Offloaded parts come to the GPU one at a time, while nothing is trained.
    decoding = max(DECODED, pixels) * DECODE_BYTES + (2 * parts.vae if "offload" in options else 0)
    encoding = 2 * parts.text_encoder if "offload" in options else 0
    return (used + max(training, decoding, encoding)) / GIB


def options_of(config: Any) -> list[str]:
    """Which of OPTIONS' parts a recipe has set, and "fp8 rollouts"."""
    options = []
    model, optim = getattr(config, "renderer", None) or config.model, getattr(config, "optim", None)
    if "text_encoder" in getattr(model, "offload", []):
        options.append("offload")
    if getattr(model, "quantize", None):
        options.append("fp8")
    if getattr(getattr(config, "rollout", None), "quantize", None):
        options.append("fp8 rollouts")
    if getattr(optim, "kind", "adamw") == "adamw8bit":
        options.append("adamw8bit")
    return options


def training_need(
    parts: Parts, recipe: Any, size: Sequence[int], text: int, room: float, stack: int = 0,
    block_bytes: float = BLOCK_BYTES,
) -> tuple[float, int]:  # fmt: skip
    """(GiB, blocks that must recompute their activations to need no more than `room` GiB) of a recipe that trains an
    adapter, with images of (height, width) pixels. With `model.recompute` set, as many as it says."""
    tokens = recipe.images_at_once() * ((size[0] // MULTIPLE) * (size[1] // MULTIPLE) + text)
    tokens = math.ceil(tokens / recipe.model.sequence_parallel)  # each GPU has a part of every sequence
    stack += recipe.copies() * recipe.lora.rank  # a copy takes as much as an earlier stage's adapter
    if recipe.model.compile is False:
        block_bytes *= UNCOMPILED
    gib, fixed = 0.0, recipe.model.recompute
    candidates = range(parts.blocks + 1) if fixed is None else [min(fixed, parts.blocks)]
    for recomputed in candidates:
        gib = need(
            parts, options_of(recipe), recipe.adapters, recipe.lora.rank, tokens, size[0] * size[1], recomputed,
            block_bytes, stack,
        )  # fmt: skip
        if gib <= room:
            return gib, recomputed
    return gib, candidates[-1]


def fit(
    parts: Parts, gpu_gib: float, adapters: int, rank: int, size: Sequence[int], text: int,
    block_bytes: float = BLOCK_BYTES,
) -> Fit | None:  # fmt: skip
    """The first of OPTIONS that fits, with the largest micro-batch and the fewest recomputed blocks; or None."""
    height, width = size
    tokens = (height // MULTIPLE) * (width // MULTIPLE) + text
    for options in OPTIONS:
        for micro_batch in MICRO_BATCHES:
            for recomputed in range(parts.blocks + 1):
                gib = need(
                    parts, options, adapters, rank, micro_batch * tokens, height * width, recomputed, block_bytes
                )
                if gib <= (1 - RESERVE) * gpu_gib:
                    return Fit(options, micro_batch, recomputed, gib)
    return None


def tiers(
    parts: Parts, methods: Sequence[str], sizes: Sequence[Sequence[int]], rank: int, text: int,
    block_bytes: float = BLOCK_BYTES,
) -> str:  # fmt: skip
    """An estimated Markdown table of what fits into GPUS."""
    head = f"| estimated, rank {rank} |"
    for gpu in GPUS:
        head += f" {gpu} GB |"
    lines = [head, "|---" * (len(GPUS) + 1) + "|"]
    for method in methods:
        adapters = 2 if method == "tdm" else 1  # the student's and the fake score's
        for size in sizes:
            line = f"| {method}, {size[0]} x {size[1]} |"
            for gpu in GPUS:
                found = fit(parts, gpu, adapters, rank, size, text, block_bytes=block_bytes)
                line += f" {found or 'does not fit'} |"
            lines.append(line)
    return "\n".join(lines)
