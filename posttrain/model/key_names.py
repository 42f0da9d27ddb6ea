"""Key names: the original checkpoint's, which ComfyUI, SGLang and the official code read, and diffusers'.

Pure functions of a state dict and exact inverses of each other. diffusers reads the original names but does
not write them; a test holds `from_original` against its converter.
"""

import re
from collections.abc import Mapping

from torch import Tensor

PREFIX = "model.diffusion_model."
"""Some tools store the transformer's keys below this; it is dropped on reading and not written."""

# (original, diffusers): whole keys, or beginnings that end in a dot.
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
# What stands inside a block, after its index, both in transformer_blocks and in text_fusion.
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
    """diffusers' name of a transformer parameter, or of a LoRA factor on it, in the original naming."""
    return _rename(key, to_original=True)


def diffusers_name(key: str) -> str:
    return _rename(key.removeprefix(PREFIX), to_original=False)


def to_original(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A Krea2Transformer2DModel's state dict in the original format; a block's (6, C) table is flattened."""
    return {
        original_name(key): value.reshape(-1) if _is_block_table(key) else value for key, value in state_dict.items()
    }


def from_original(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_original`; unknown keys pass unchanged, for the caller to name."""
    renamed = {diffusers_name(key): value for key, value in state_dict.items()}
    return {
        key: value.reshape(6, -1) if _is_block_table(key) and value.numel() % 6 == 0 else value
        for key, value in renamed.items()
    }


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
