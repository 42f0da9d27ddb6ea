"""What fits into a GPU, estimated: pictures in a forward and options, by method and size, from the sizes of K2's parts.

Of P weights in the blocks, O others of the transformer, E of the text encoder and V of the VAE, and A in an adapter,

    always      2 O + 2 P (fp8: P) + 2 (E + V) (offloaded: 0); of each adapter 4 A, and 8 A (8 bits: 2 A) of moments;
                4 A for the policy's average, and of each earlier stage that it stands on
    training    T (k a + (B - k) 2 d + 2 a) + 4 A of gradients
    decoding    2^20 pixels or one picture, at 3.3 kB each, and 2 V if offloaded
    encoding    2 E if offloaded

of T tokens in a forward, B blocks d wide, k of which keep their activations of `a` bytes a token. What is always there
and the largest of the others must leave a tenth of the GPU free, as in blocks.py. tdm has two adapters.
"""

from __future__ import annotations

import json
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
"""GiB of memory, about: RTX 4090, L40S, H100 and H200 have a little less or more."""
BLOCK_BYTES = 150e3
"""What a compiled block of K2 keeps for backward, for a token with adapters of rank 64: measured."""
UNCOMPILED = 2.4
"""Times as much an uncompiled one keeps."""
DECODE_BYTES = 3.3e3
"""What K2's VAE holds at most for a pixel that it decodes in bf16, counted, without what convolutions take aside."""
OPTIONS: tuple[tuple[str, ...], ...] = (
    (), ("offload",), ("offload", "adamw8bit"), ("offload", "fp8"), ("offload", "adamw8bit", "fp8"),
)  # fmt: skip
"""From those that cost nothing to those that change most."""
MICRO_BATCHES = (8, 4, 2, 1)


@dataclass(frozen=True)
class Parts:
    """Numbers of weights, and the shape of the transformer."""

    blocks: int
    block_weights: int
    other_weights: int
    text_encoder: int
    vae: int
    width: int
    adapter: int
    """Weights of an adapter of rank 1 on all linears."""


@dataclass(frozen=True)
class Fit:
    """How a training step fits."""

    options: tuple[str, ...]
    micro_batch: int
    recomputed: int
    gib: float

    def __str__(self) -> str:
        named = " + ".join(self.options) or "no option"
        return f"{self.micro_batch}; {self.recomputed} again; {named}; {self.gib:.0f} GiB"


@cache
def parts_of(scale: str) -> Parts:
    """Of `load.sizes_of`; nothing is allocated."""
    transformer_config, text_config, vae_config, _ = sizes_of(scale)
    with torch.device("meta"):
        net = Krea2Transformer2DModel(**transformer_config)
        encoder, vae = Qwen3VLModel(Qwen3VLConfig(**text_config)), AutoencoderKLQwenImage(**vae_config)
    return _counted(net, encoder, vae)


@cache
def parts_in(path: str) -> Parts:
    """Of a pipeline directory by its configurations; nothing is allocated, and no weights are read."""
    text, transformer, vae = (Path(path) / part for part in ("text_encoder", "transformer", "vae"))
    with torch.device("meta"):
        encoder = AutoModel.from_config(AutoConfig.from_pretrained(text))
        net = Krea2Transformer2DModel(**_arguments(transformer))
        return _counted(net, encoder, AutoencoderKLQwenImage(**_arguments(vae)))


def _arguments(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text())
    return {name: value for name, value in config.items() if not name.startswith("_")}


def _counted(net: Krea2Transformer2DModel, encoder: torch.nn.Module, vae: torch.nn.Module) -> Parts:
    blocks = architecture.blocks(net)
    inner = sum(p.numel() for block in blocks for p in block.parameters())
    linears = architecture.block_linears(net)
    return Parts(
        len(blocks), inner, sum(p.numel() for p in net.parameters()) - inner,
        sum(p.numel() for p in encoder.parameters()), sum(p.numel() for p in vae.parameters()),
        net.config["num_attention_heads"] * net.config["attention_head_dim"],
        sum(m.in_features + m.out_features for m in linears),
    )  # fmt: skip


def need(
    parts: Parts, options: Sequence[str], adapters: int, rank: int, tokens: int, pixels: int, recomputed: int,
    block_bytes: float = BLOCK_BYTES, stack: int = 0,
) -> float:  # fmt: skip
    """GiB, by the formulas above; `tokens` of all samples of a forward, `pixels` of one picture, `stack` the ranks of
    all earlier stages."""
    weights = 2 * parts.other_weights + (1 if "fp8" in options else 2) * parts.block_weights
    aside = 2 * (parts.text_encoder + parts.vae)
    used = weights + (0 if "offload" in options else aside)
    moments = 2 if "adamw8bit" in options else 8
    used += ((adapters * (4 + moments) + 4) * rank + 4 * stack) * parts.adapter
    kept = parts.blocks - recomputed
    training = tokens * ((kept + 2) * block_bytes + recomputed * 2 * parts.width) + 4 * rank * parts.adapter
    decoding = max(DECODED, pixels) * DECODE_BYTES + (2 * parts.vae if "offload" in options else 0)
    encoding = 2 * parts.text_encoder if "offload" in options else 0
    return (used + max(training, decoding, encoding)) / GIB


def fit(
    parts: Parts, gpu_gib: float, adapters: int, rank: int, size: Sequence[int], text: int, multiple: int = 16,
    block_bytes: float = BLOCK_BYTES,
) -> Fit | None:  # fmt: skip
    """The first of OPTIONS that fits, with the largest micro-batch, and as few blocks computed again as do; or None."""
    height, width = size
    each = (height // multiple) * (width // multiple) + text
    for options in OPTIONS:
        for micro_batch in MICRO_BATCHES:
            for recomputed in range(parts.blocks + 1):
                gib = need(parts, options, adapters, rank, micro_batch * each, height * width, recomputed, block_bytes)
                if gib <= (1 - RESERVE) * gpu_gib:
                    return Fit(options, micro_batch, recomputed, gib)
    return None


def tiers(
    parts: Parts, methods: Sequence[str], sizes: Sequence[Sequence[int]], rank: int, text: int,
    block_bytes: float = BLOCK_BYTES,
) -> str:  # fmt: skip
    """A table of what fits into GPUS, as markdown. All of it is estimated."""
    lines = [
        f"| estimated, rank {rank} | " + " | ".join(f"{gpu} GB" for gpu in GPUS) + " |",
        "|---" * (len(GPUS) + 1) + "|",
    ]
    for method in methods:
        for size in sizes:
            found = [fit(parts, gpu, 2 if method == "tdm" else 1, rank, size, text, block_bytes=block_bytes)
                     for gpu in GPUS]  # fmt: skip
            cells = [str(one) if one else "does not fit" for one in found]
            lines.append(f"| {method}, {size[0]} x {size[1]} | {' | '.join(cells)} |")
    return "\n".join(lines)
