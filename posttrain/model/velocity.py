"""The network as a module: from fused text, latents and time to a velocity. Shapes as in k2.py."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch
from diffusers import Krea2Pipeline, Krea2Transformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F

from posttrain.model.blocks import Blocks

if TYPE_CHECKING:
    from posttrain.model.sequence import SequenceParallel


class VelocityModel(nn.Module):
    """The transformer after the text fusion. Every forward enters here, so this is the module that is sharded."""

    def __init__(self, transformer: Krea2Transformer2DModel, blocks: Blocks) -> None:
        super().__init__()
        self.transformer = transformer
        self.blocks = blocks
        self.sequence: SequenceParallel | None = None
        """Divides tokens over processes; see sequence.py."""
        self._rope: dict[tuple[int, int, torch.device], tuple[Tensor, Tensor]] = {}

    def forward(self, x: Tensor, t: Tensor, tokens: Tensor, mask: Tensor | None, grid: tuple[int, int]) -> Tensor:
        """x (B, N, C) and tokens (B, L, C) in the network's dtype, t (B,) in fp32, mask (B, L) or None."""
        net, length = self.transformer, tokens.shape[1]
        low_precision = x.dtype != torch.float32
        # Trained weights are fp32: autocast computes in the base's dtype with them. Everything else has it already.
        with torch.autocast(x.device.type, dtype=x.dtype) if low_precision else contextlib.nullcontext():
            temb = net.time_embed(t, dtype=x.dtype)
            modulation = net.time_mod_proj(F.gelu(temb, approximate="tanh"))
            if mask is not None:
                mask = torch.cat([mask, mask.new_ones(x.shape[:2])], dim=1)[:, None, None, :]
            rope = self._rotary(length, *grid, x.device)
            hidden = torch.cat([tokens, net.img_in(x)], dim=1)
            total = hidden.shape[1]
            if self.sequence is not None:
                hidden, rope, mask = self.sequence.split(hidden, rope, mask)
            hidden = self.blocks(list(net.transformer_blocks), hidden, modulation, rope, mask)
            if self.sequence is None:
                return net.final_layer(hidden[:, length:], temb)
            return self.sequence.gather(net.final_layer(hidden, temb))[:, length:total]

    def _rotary(self, length: int, rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
        # All text tokens have position 0: a table for a long text serves every shorter one by slicing.
        key = (rows, columns, device)
        cached = self._rope.get(key)
        if cached is None or cached[0].shape[0] - rows * columns < length:
            with torch.inference_mode(False), torch.autocast(device.type, enabled=False):
                ids = Krea2Pipeline.prepare_position_ids(max(512, length), rows, columns, device)
                cached = self._rope[key] = self.transformer.rotary_emb(ids)
        start = cached[0].shape[0] - rows * columns - length
        return cached[0][start:], cached[1][start:]
