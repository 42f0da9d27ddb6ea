"""Reference images in the network: others are drawn in their style.

One sequence, [text | noisy target | reference 1 | reference 2 | ...]. References are clean latents that go through the
target's own input layer, at time 0, with rotary positions (i, y, x) for reference i = 1, 2, ...; those of text and
target have i = 0. Text and target see everything. A reference sees itself alone, so it needs one pass for all steps,
prompts and guidance branches: `cache` keeps the keys and values that it has in each block. In training the references
go through the blocks beside the target, with gradient.

Legend: B samples, N_i tokens of reference i, M of all references, T = L + N of text and target, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from diffusers import Krea2Pipeline, Krea2Transformer2DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_krea2 import Krea2AttnProcessor
from torch import Tensor, nn
from torch.nn import functional as F

from posttrain.model import architecture, packed

Rope = tuple[Tensor, Tensor]
KeysValues = tuple[Tensor, Tensor]
"""(B, M, heads, head) each, after norm and rotary positions."""
MOST = 10
"""References of one image, as in K2's report."""
KAPPA = 2.0
"""A user's strength k multiplies the odds of a reference's tokens by k to this power."""


@dataclass(frozen=True)
class References:
    """The references of a batch, as `K2.velocity` takes them."""

    latents: tuple[Tensor, ...]
    """(B or 1, N_i, C) each, packed as the target's."""
    grids: tuple[tuple[int, int], ...]
    """(rows, columns) of tokens of each."""
    places: tuple[int, ...] = ()
    """The place i of each in the order that the user gave; () for 1, 2, ... It stays where others are left out."""
    strength: Tensor | None = None
    """(B or 1, R), >= 0: the odds of each token of reference i are multiplied by it. 0 masks it. None: 1 for all."""
    cached: tuple[KeysValues, ...] | None = None
    """Of each block; void when the adapter changes, or the place i of a reference. See `cache`."""

    def __post_init__(self) -> None:
        if not self.places:
            object.__setattr__(self, "places", tuple(range(1, len(self.latents) + 1)))
        if not 0 < len(self.latents) <= MOST or not len(self.grids) == len(self.latents) == len(self.places):
            raise ValueError(f"{len(self.latents)} references with {len(self.grids)} grids: 1 to {MOST} are taken")
        for latents, (rows, columns) in zip(self.latents, self.grids):
            if latents.shape[1] != rows * columns:
                raise ValueError(f"reference {tuple(latents.shape)}: not for {rows} x {columns} tokens")
        if self.strength is not None and (self.strength.shape[-1] != len(self.latents) or (self.strength < 0).any()):
            raise ValueError("strengths are one for each reference, and not below 0; see draw.py for negative ones")

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(latents.shape[1] for latents in self.latents)

    def at(self, strength: Tensor | None) -> References:
        """The same references with other strengths."""
        return replace(self, strength=strength)

    def bias(self, mask: Tensor | None, tokens: int, batch: int, dtype: torch.dtype) -> Tensor | None:
        """What is added to the logits of the keys [text | target | references], (B, 1, 1, T + M); None: nothing.

        `mask` (B, L + N) is True for real tokens of text and target; None: all `tokens` are.
        """
        if self.strength is None and mask is None:
            return None
        device = self.latents[0].device
        own = torch.zeros(batch, tokens, device=device)
        if mask is not None:
            own = own.masked_fill(~mask, -math.inf)
        strength = torch.ones(1, len(self.latents)) if self.strength is None else self.strength
        # exp(logit + log s) = s exp(logit): each token of a reference counts s times. log 0 = -inf masks it.
        added = strength.to(device, torch.float32).log().expand(batch, -1)
        per_token = added.repeat_interleave(torch.tensor(self.lengths, device=device), 1)
        return torch.cat([own, per_token], 1)[:, None, None, :].to(dtype)


def position_ids(index: int, rows: int, columns: int) -> Tensor:
    """(rows * columns, 3) rotary positions (index, y, x) of a reference, from 0 in its own grid."""
    ids = Krea2Pipeline.prepare_position_ids(0, rows, columns, torch.device("cpu")).float()
    ids[:, 0] = index
    return ids


def rotary(transformer: Krea2Transformer2DModel, shown: References, device: torch.device) -> list[Rope]:
    """The rotary table of each reference."""
    ids = [position_ids(place, *grid).to(device) for place, grid in zip(shown.places, shown.grids)]
    with torch.autocast(device.type, enabled=False):  # angles in full precision
        return list(map(transformer.rotary_emb, ids))


def clean_modulation(transformer: Krea2Transformer2DModel, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(1, 1, 6 C) at time 0."""
    embedded = transformer.time_embed(torch.zeros(1, device=device), dtype=dtype)
    return transformer.time_mod_proj(F.gelu(embedded, approximate="tanh"))


# ---- blocks -----------------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """Takes the place of a block's attention mask, which diffusers hands to the processor as it is."""

    bias: Tensor | None = None
    """Added to the logits of the keys, those of `others` last, (B, 1, 1, keys)."""
    others: KeysValues | None = None
    """Keys and values that the queries see beside their own."""
    own: list[KeysValues] = field(default_factory=list)
    """Receives the block's own keys and values."""
    real: tuple[Tensor, Tensor] | None = None
    """Which keys are real, as `packed.packed` gives them; then there are neither bias nor others."""


class ReferenceProcessor(Krea2AttnProcessor):
    """diffusers' attention of K2, and with a `Seen` for a mask, attention to further keys and values."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, attention_mask: Any = None, image_rotary_emb: Rope | None = None
    ) -> Tensor:
        if not isinstance(attention_mask, Seen):
            return super().__call__(attn, hidden_states, attention_mask, image_rotary_emb)
        query = attn.norm_q(attn.to_q(hidden_states).unflatten(-1, (attn.num_heads, attn.head_dim)))
        key = attn.norm_k(attn.to_k(hidden_states).unflatten(-1, (attn.num_kv_heads, attn.head_dim)))
        value = attn.to_v(hidden_states).unflatten(-1, (attn.num_kv_heads, attn.head_dim))
        rotate: Any = apply_rotary_emb  # whose annotations say that it may return pairs
        query, key = rotate(query, image_rotary_emb, sequence_dim=1), rotate(key, image_rotary_emb, sequence_dim=1)
        if attention_mask.real is not None:
            return self._out(attn, hidden_states, packed.attention(query, key, value, *attention_mask.real))
        attention_mask.own.append((key, value))
        if attention_mask.others is not None:
            keys, values = attention_mask.others
            key = torch.cat([key, keys.expand(len(key), -1, -1, -1)], 1)
            value = torch.cat([value, values.expand(len(value), -1, -1, -1)], 1)
        # As in diffusers' processor: the kernels take repeated heads with any mask.
        groups = attn.num_heads // attn.num_kv_heads
        key, value = key.repeat_interleave(groups, 2), value.repeat_interleave(groups, 2)
        attended = dispatch_attention_fn(
            query, key, value, attn_mask=attention_mask.bias, backend=self._attention_backend
        )
        return self._out(attn, hidden_states, attended)

    @staticmethod
    def _out(attn: Any, hidden: Tensor, attended: Tensor) -> Tensor:
        return attn.to_out[0](attended.flatten(2, 3) * torch.sigmoid(attn.to_gate(hidden)))


def install(transformer: Krea2Transformer2DModel) -> None:
    """Has the blocks attend to references and to packed keys. Without these they compute what they did."""
    blocks: list[Any] = architecture.blocks(transformer)
    for block in blocks:
        before = block.attn.processor
        if not isinstance(before, ReferenceProcessor):
            processor = ReferenceProcessor()
            processor._attention_backend = before._attention_backend
            block.attn.set_processor(processor)


OwnBlock = Callable[[nn.Module, Tensor, Tensor, Rope], tuple[Tensor, Tensor, Tensor]]
SeeingBlock = Callable[[nn.Module, Tensor, Tensor, Rope, Tensor | None, Tensor, Tensor], Tensor]


def own_block(block: nn.Module, hidden: Tensor, modulation: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
    """A block on a reference (B, N, C), which sees itself alone; and its keys and values."""
    seen = Seen()
    ended = block(hidden, modulation, rope, seen)
    return (ended, *seen.own[0])


def packed_block(
    block: nn.Module, hidden: Tensor, modulation: Tensor, rope: Rope, places: Tensor, ends: Tensor
) -> Tensor:
    """A block whose queries see the real keys alone; see packed.py."""
    return block(hidden, modulation, rope, Seen(real=(places, ends)))


def joint_block(
    block: nn.Module,
    hidden: Tensor,
    modulation: Tensor,
    rope: Rope,
    bias: Tensor | None,
    lengths: tuple[int, ...],
    own: OwnBlock,
    seeing: SeeingBlock,
) -> Tensor:
    """A block on (B, T + M, C): references see themselves alone, text and target see all.

    `lengths` are (T, N_1, N_2, ...), modulation is (B, 2, 6 C) at the target's time and at 0, bias as in
    `References.bias`. `own` and `seeing` are `own_block` and `cached_block`, or compiled: so any number of references
    of any size needs these two graphs.
    """
    at_time, clean = modulation[:, :1], modulation[:, 1:]
    main, *references = hidden.split(lengths, 1)
    cos, sin = rope[0].split(lengths), rope[1].split(lengths)
    ended, keys, values = [], [], []
    for i, reference in enumerate(references, start=1):
        out, key, value = own(block, reference, clean, (cos[i], sin[i]))
        ended.append(out)
        keys.append(key)
        values.append(value)
    main = seeing(block, main, at_time, (cos[0], sin[0]), bias, torch.cat(keys, 1), torch.cat(values, 1))
    return torch.cat([main, *ended], 1)


def cached_block(
    block: nn.Module, hidden: Tensor, modulation: Tensor, rope: Rope, bias: Tensor | None, key: Tensor, value: Tensor
) -> Tensor:
    """A block on text and target, (B, T, C), with the references' keys and values."""
    return block(hidden, modulation, rope, Seen(bias, (key, value)))


def keys_and_values(transformer: Krea2Transformer2DModel, references: References, dtype: torch.dtype) -> References:
    """The references with their keys and values in each block, under the adapters that are active now."""
    device = transformer.img_in.weight.device
    install(transformer)
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        clean = clean_modulation(transformer, dtype, device)
        streams = [transformer.img_in(latents.to(device, dtype)) for latents in references.latents]
        # One batch for all, so that keys can be joined along the tokens.
        batch = max(len(stream) for stream in streams)
        streams = [stream.expand(batch, -1, -1) for stream in streams]
        ropes = rotary(transformer, references, device)
        found: list[KeysValues] = []
        for block in architecture.blocks(transformer):
            seen = Seen()
            for i, stream in enumerate(streams):
                streams[i] = block(stream, clean, ropes[i], seen)
            # `seen` has collected those of all references, in their order.
            keys, values = zip(*seen.own)
            found.append((torch.cat(keys, 1), torch.cat(values, 1)))
    return replace(references, cached=tuple(found))
