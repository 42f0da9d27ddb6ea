"""Key names of the original checkpoint, which ComfyUI, SGLang and the official code read, and those of diffusers.

`to_original` and `from_original` are pure functions of a state dict and exact inverses. diffusers reads the original
names but does not write them; a test compares `from_original` with its converter.
"""

import re
from collections.abc import Mapping

from torch import Tensor

PREFIX = "model.diffusion_model."
"""Some tools put this before the transformer's keys. It is dropped on reading and never written."""

# (original, diffusers): whole keys, or prefixes that end in a dot.
_MODULES = [
    ("first.", "img_in."),
    ("tmlp.0.", "time_embed.linear_1."),
    ("tmlp.2.", "time_embed.linear_2."),
    ("tproj.1.", "time_mod_proj."),
    ("txtmlp.0.scale", "txt_in.norm.weight"),
    ("txtmlp.1.", "txt_in.linear_1."),
    ("txtmlp.3.", "txt_in.linear_2."),
    ("txtfusion.", "text_fusion."),
    ("blocks.", "transformer_blocks."),
    ("last.linear.", "final_layer.linear."),
    ("last.norm.scale", "final_layer.norm.weight"),
    ("last.modulation.lin", "final_layer.scale_shift_table"),
]
# The names inside a block, after its index, both in transformer_blocks and in text_fusion.
_IN_BLOCK = [
    ("attn.wq.", "attn.to_q."),
    ("attn.wk.", "attn.to_k."),
    ("attn.wv.", "attn.to_v."),
    ("attn.wo.", "attn.to_out.0."),
    ("attn.gate.", "attn.to_gate."),
    ("attn.qknorm.qnorm.scale", "attn.norm_q.weight"),
    ("attn.qknorm.knorm.scale", "attn.norm_k.weight"),
    ("mlp.", "ff."),
    ("prenorm.scale", "norm1.weight"),
    ("postnorm.scale", "norm2.weight"),
    ("mod.lin", "scale_shift_table"),
]
_BLOCK = re.compile(r"((?:transformer_blocks|text_fusion\.\w+_blocks|blocks|txtfusion\.\w+_blocks)\.\d+\.)(.+)")


def original_name(key: str) -> str:
    """The original name of a transformer parameter, or of a LoRA factor on it, from its name in diffusers."""
    return _rename(key, to_original=True)


def diffusers_name(key: str) -> str:
    return _rename(key.removeprefix(PREFIX), to_original=False)


def to_original(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A Krea2Transformer2DModel's state dict in the original format."""
    renamed: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        # The original stores a block's (6, C) table of shifts and scales as one vector.
        renamed[original_name(key)] = value.reshape(-1) if _is_block_table(key) else value
    return renamed


def from_original(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_original`. Unknown keys pass unchanged, so that the caller can name them in an error."""
    renamed: dict[str, Tensor] = {}
    for original, value in state_dict.items():
        key = diffusers_name(original)
        # A table of another size stays as it is too: the caller compares shapes.
        is_table = _is_block_table(key) and value.numel() % 6 == 0
        renamed[key] = value.reshape(6, -1) if is_table else value
    return renamed


def _is_block_table(key: str) -> bool:
    return key.startswith("transformer_blocks.") and key.endswith(".scale_shift_table")


def _rename(key: str, to_original: bool) -> str:
    def replace_start(text: str, table: list[tuple[str, str]]) -> str:
        for original, diffusers in table:
            old, new = (diffusers, original) if to_original else (original, diffusers)
            if text == old or (old.endswith(".") and text.startswith(old)):
                return new + text[len(old) :]
        return text

    if block := _BLOCK.fullmatch(key):
        return replace_start(block[1], _MODULES) + replace_start(block[2], _IN_BLOCK)
    return replace_start(key, _MODULES)
