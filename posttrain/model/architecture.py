"""The parts of Krea2Transformer2DModel by what they do, and the text that goes into it. What diffusers calls its parts
is known in posttrain/model alone.

Shapes: B samples, L text tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import Krea2Transformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F

from posttrain.model.adapters.targets import fuses_text, is_block_linear


def blocks(transformer: Krea2Transformer2DModel) -> list[nn.Module]:
    """Those that image and text tokens pass through, in order; most of the weights are theirs."""
    return list(transformer.transformer_blocks)


def block_linears(transformer: Krea2Transformer2DModel) -> list[nn.Linear]:
    return [module for module in transformer.transformer_blocks.modules() if isinstance(module, nn.Linear)]


def is_block_matrix(key: str) -> bool:
    """Whether the parameter of that name is the weight of a linear in a block: attention's or the feed-forward's."""
    return key.endswith(".weight") and is_block_linear(key.removesuffix(".weight"))


def text_parameters(transformer: Krea2Transformer2DModel) -> list[nn.Parameter]:
    """Those of TEXT."""
    return [parameter for key, parameter in transformer.named_parameters() if fuses_text(key)]


def text_weights(transformer: Krea2Transformer2DModel) -> dict[str, Tensor]:
    """The state of TEXT by its names in the whole transformer."""
    return {key: value for key, value in transformer.state_dict().items() if fuses_text(key)}


def text_width(transformer: Krea2Transformer2DModel) -> int:
    """Channels of a fused text token, which are the network's own."""
    return transformer.txt_in.linear_2.out_features


def fuse(transformer: Krea2Transformer2DModel, features: Tensor, mask: Tensor | None) -> Tensor:
    """Features (B, L, taps, text_dim) to fused tokens (B, L, C), under the adapters that are active. `mask` (B, L) is
    True for real tokens; None where all are."""
    # Attention broadcasts a mask to (B, heads, queries, keys); this one is of keys.
    attended = None if mask is None else mask[:, None, None, :]
    return transformer.txt_in(transformer.text_fusion(features, attended))


def fuse_each(
    transformer: Krea2Transformer2DModel, features: Sequence[Tensor], device: torch.device, dtype: torch.dtype,
    batch: int = 16,
) -> list[Tensor]:  # fmt: skip
    """`fuse` of prompts of any lengths (L_i, taps, text_dim), in their order; up to `batch` of one length together."""
    by_length: dict[int, list[int]] = {}
    for i, own in enumerate(features):
        by_length.setdefault(len(own), []).append(i)
    fused: dict[int, Tensor] = {}
    for members in by_length.values():
        for first in range(0, len(members), batch):
            chosen = members[first : first + batch]
            stack = torch.stack([features[i] for i in chosen])
            fused |= zip(chosen, fuse(transformer, stack.to(device, dtype), None))
    return [fused[i].clone() for i in range(len(features))]  # a view would be saved with its batch behind it


@dataclass(frozen=True)
class Encoding:
    """Prompts after the text encoder: real tokens only, [prompt | suffix]."""

    features: list[Tensor]
    """(L_i, taps, text_dim) a prompt."""
    cut: list[int]
    """How many tokens of each prompt did not fit into max_tokens."""


@dataclass(frozen=True)
class Text:
    """The text of a batch, as `K2.velocity` takes it. A batch of one serves any number of samples."""

    tokens: Tensor
    """Fused, (B, L, C). Where a role adapts the layers that fuse text: features (B, L, taps, text_dim), which each
    forward fuses under its own role."""
    mask: Tensor | None = None
    """(B, L) bool, True for real tokens; None where all prompts have the same length."""
    under: tuple[str, ...] | None = None
    """The adapters that fused it, where roles adapt those layers; None: any role may read it."""

    @staticmethod
    def of(prompts: Sequence[Tensor]) -> Text:
        """From what `K2.text_tokens` gives of each prompt. Padded to the longest, and masked, only if the lengths
        differ."""
        lengths = list(map(len, prompts))
        tokens = nn.utils.rnn.pad_sequence(list(prompts), batch_first=True)
        # Without a mask attention has faster kernels.
        if len(set(lengths)) == 1:
            return Text(tokens)
        ends = torch.tensor(lengths, device=tokens.device)[:, None]
        return Text(tokens, torch.arange(tokens.shape[1], device=tokens.device) < ends)

    @property
    def is_fused(self) -> bool:
        return self.tokens.ndim == 3

    def first(self, count: int) -> Text:
        """The first prompts of the batch."""
        return self.rows(slice(count))

    def rows(self, rows: Tensor | slice) -> Text:
        """These prompts of the batch."""
        return replace(self, tokens=self.tokens[rows], mask=None if self.mask is None else self.mask[rows])

    def repeat(self, times: int) -> Text:
        """Each prompt `times` times in a row, for groups of one prompt."""
        mask = None if self.mask is None else self.mask.repeat_interleave(times, 0)
        return replace(self, tokens=self.tokens.repeat_interleave(times, 0), mask=mask)

    def __len__(self) -> int:
        return len(self.tokens)


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
