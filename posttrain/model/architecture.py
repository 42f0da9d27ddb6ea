"""The parts of Krea2Transformer2DModel by what they do. What diffusers calls them is known in posttrain/model alone."""

from __future__ import annotations

import re
from typing import Any

import torch
from diffusers import Krea2Transformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F

TEXT = ("text_fusion", "txt_in")
"""What fuses a prompt's text. It sees no time and no image, so its output is cached and it is never trained."""

ATTENTION, FEED_FORWARD = r"attn\.(to_q|to_k|to_v|to_gate|to_out\.0)", r"ff\.(gate|up|down)"
BLOCK_MATRIX = re.compile(rf"transformer_blocks\.\d+\.({ATTENTION}|{FEED_FORWARD})\.weight")


def blocks(transformer: Krea2Transformer2DModel) -> list[nn.Module]:
    """Those that image and text tokens pass through, in order; most of the weights are theirs."""
    return list(transformer.transformer_blocks)


def block_linears(transformer: Krea2Transformer2DModel) -> list[nn.Linear]:
    return [module for module in transformer.transformer_blocks.modules() if isinstance(module, nn.Linear)]


def is_block_matrix(key: str) -> bool:
    """Whether the parameter of that name is the weight of a linear in a block: attention's or the feed-forward's."""
    return BLOCK_MATRIX.fullmatch(key) is not None


def fuses_text(key: str) -> bool:
    """Whether the parameter of that name belongs to TEXT."""
    return key.partition(".")[0] in TEXT


def text_modules(transformer: Krea2Transformer2DModel) -> list[nn.Module]:
    return [transformer.get_submodule(name) for name in TEXT]


def text_weights(transformer: Krea2Transformer2DModel) -> dict[str, Tensor]:
    """The state of TEXT by its names in the whole transformer."""
    return {key: value for key, value in transformer.state_dict().items() if fuses_text(key)}


def text_width(transformer: Krea2Transformer2DModel) -> int:
    """Channels of a fused text token, which are the network's own."""
    return transformer.txt_in.linear_2.out_features


def compile_text_fusion(transformer: Krea2Transformer2DModel) -> None:
    transformer.text_fusion.compile(dynamic=False)


def randomise_output(transformer: Any, std: float) -> None:
    """Diffusers begins with an output of zero, which teaches the blocks nothing in the first steps."""
    torch.nn.init.normal_(transformer.final_layer.linear.weight, std=std)


def pack(latents: Tensor, patch: int = 2) -> Tensor:
    """(B, c, rows*patch, columns*patch) to (B, rows*columns, c*patch*patch), channel order (c, ph, pw)."""
    return F.pixel_unshuffle(latents, patch).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, rows: int, columns: int, patch: int = 2) -> Tensor:
    """The inverse of `pack`."""
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (rows, columns)), patch)
