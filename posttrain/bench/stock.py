"""diffusers' own transformer on the same weights, for a comparison of speed.

It is used as diffusers' pipeline and training scripts use it: text is padded to 512 tokens and masked, and the text
fusion runs in each forward.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from diffusers import Krea2Pipeline
from torch import Tensor

from posttrain.model.k2 import K2

TOKENS = 512


class Stock:
    """A random batch of images of one size, drawn or trained under `role`."""

    def __init__(self, k2: K2, size: tuple[int, int], batch: int, text: int, role: str | None):
        self.k2, self.role = k2, role
        rows, columns = k2.grid(*size)
        # All samples have the same text: its values do not change how long a forward takes.
        features = k2.random_features(text)
        padded = features.new_zeros(batch, TOKENS, *features.shape[1:])
        padded[:, :text] = features
        mask = torch.arange(TOKENS, device=k2.device).expand(batch, -1) < text
        # stock computes masked tokens too; that is the cost to compare with
        self.x = torch.randn(batch, rows * columns, k2.latent_channels, device=k2.device)
        self.inputs: dict[str, Any] = {
            "encoder_hidden_states": padded,
            "timestep": torch.full((batch,), 0.5, device=k2.device),
            "position_ids": Krea2Pipeline.prepare_position_ids(TOKENS, rows, columns, k2.device),
            "encoder_attention_mask": mask,
            "return_dict": False,
        }

    def velocity(self) -> Tensor:
        """(B, N, C)"""
        low = self.k2.dtype != torch.float32 and self.role is not None  # fp32 adapters on a bf16 base need autocast
        with torch.autocast(self.x.device.type, dtype=self.k2.dtype) if low else contextlib.nullcontext():
            return self.k2.transformer(self.x.to(self.k2.dtype), **self.inputs)[0]

    @torch.no_grad()
    def forward(self) -> None:
        with self.k2.role(self.role):
            self.velocity()

    def step(self) -> None:
        """Forward and backward of the trained adapter, with gradient checkpointing."""
        net: Any = self.k2.transformer
        assert self.role is not None
        self.k2.train_role(self.role)
        net.enable_gradient_checkpointing()
        with self.k2.role(self.role):  # around backward too, because checkpointing runs forwards there
            self.velocity().float().square().mean().backward()
        net.disable_gradient_checkpointing()
        for parameter in net.parameters():
            parameter.grad = None
