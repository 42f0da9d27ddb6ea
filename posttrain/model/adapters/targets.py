"""Names of the layers that an adapter reaches: `lora.targets` of a recipe. Never imports torch.

A target is a linear of the blocks, for all of them (`to_q`), a part before or behind the blocks with all its linears
(`txt_in`) or one of these (`txt_in.linear_1`), or a word for many: `blocks`, `all`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Literal

TARGETS = ("to_q", "to_k", "to_v", "to_gate", "to_out.0", "ff.gate", "ff.up", "ff.down")
"""The linears of a transformer block, which a role adapts by default: all of them."""
TEXT = ("text_fusion", "txt_in")
"""What fuses a prompt's text. It sees no time and no image, so its output is cached where no role adapts it."""
OUTSIDE = ("img_in", "time_embed", "time_mod_proj", "final_layer", *TEXT)
"""The parts that have linears outside the blocks."""
BLOCKS, ALL = "blocks", "all"
"""Words for TARGETS, and for every linear of the network."""
BEFORE_KEYS = ("transformer_blocks.", "img_in", "time_embed", "time_mod_proj")
"""What references pass on the way to their keys and values."""
Lanes = Literal["all", "references"]
"""Which rows an adapter acts on: all of them, or those of references alone (model/references.py)."""
ON_REFERENCES = (
    "lanes: this adapter acts on the rows of references alone, so it is no change of the model that a file of others or"
    " another stage could have; draw it with posttrain sample"
)
_IN_BLOCK = re.compile(r"transformer_blocks\.\d+\.(?:attn\.)?(.+)")


def fuses_text(name: str) -> bool:
    """Whether the layer or parameter of that name belongs to TEXT."""
    return name.partition(".")[0] in TEXT


def is_known(target: str) -> bool:
    """Whether it can be a target by its name; whether a model has the layer is known to the model."""
    return target in (*TARGETS, BLOCKS, ALL) or target.partition(".")[0] in OUTSIDE


def choices() -> str:
    return ", ".join((BLOCKS, ALL, *TARGETS, *OUTSIDE))


def target_of(layer: str) -> str:
    """The narrowest target that names a layer of the network: `to_q` of a block's, else the layer itself."""
    # Blocks of the text fusion, whose names also hold "blocks", have no targets of their own.
    match = _IN_BLOCK.fullmatch(layer)
    return layer if match is None else match[1]


def is_block_linear(layer: str) -> bool:
    """Whether it is a linear of a block: attention's or the feed-forward's."""
    own = target_of(layer)
    return own in TARGETS and own != layer


def reaches(targets: Iterable[str], layer: str) -> bool:
    """Whether one of the targets names this layer of the network."""
    own = target_of(layer)
    in_block = own != layer
    # A part outside the blocks reaches all its linears; within them targets are exact, so that `ff` is none.
    for target in targets:
        if target in (ALL, own) or (in_block and target == BLOCKS) or (not in_block and own.startswith(f"{target}.")):
            return True
    return False


def is_before_keys(layer: str, blocks: int) -> bool:
    """Whether the keys and values of references depend on it. Nobody looks behind those of the last of the blocks."""
    is_last = layer.startswith(f"transformer_blocks.{blocks - 1}.")
    return layer.startswith(BEFORE_KEYS) and (not is_last or layer.endswith((".to_k", ".to_v")))


def text_targets(targets: Sequence[str]) -> list[str]:
    """Those that reach layers which fuse the text."""
    return [target for target in targets if target == ALL or fuses_text(target)]
