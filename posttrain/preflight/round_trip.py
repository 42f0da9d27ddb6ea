"""The round trip of an export: does the stock pipeline, with the exported policy, draw what the policy draws?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain.config.sections import ModelConfig
from posttrain.export.export import write
from posttrain.model.blocks import set_attention
from posttrain.model.fp8 import exact
from posttrain.model.k2 import K2
from posttrain.model.load import load_pipeline
from posttrain.training import checkpoint
from posttrain.training.checkpoint import Checkpoint
from posttrain.training.policy import POLICY, described, earlier_of, policy_state, saved_tensors

STEPS = 2
EFFECT = 0.2
"""Least relative change of the latents that the exported policy makes, so that rounding is small beside it."""


def round_trip(
    k2: K2, model: ModelConfig, begun: Mapping[str, Tensor], prompt: str, noise: Tensor, size: tuple[int, int],
    max_tokens: int, folder: Path,
) -> tuple[float, float]:  # fmt: skip
    """How far training moves the latents of an image, relative to them, and the error of the stock pipeline relative to
    that distance.

    `begun` is the policy before the update. One update may change less than rounding does in bf16, so the policy is
    moved further in the same direction. If the base in memory equals its files, the stock pipeline reuses it without
    the roles, which are removed: reading 34 GB again would take longer than everything else. Otherwise the transformer
    is moved to the CPU, to make room for the stock one.
    """
    text, (height, width), device = k2.text([prompt], max_tokens), size, k2.device

    def draw() -> Tensor:
        with k2.role(POLICY), exact(k2):
            return k2.sample(text, noise, STEPS, height, width)

    base, policy = _amplified(k2, begun, draw)
    lora = described(k2)
    state = {"model": asdict(model), "lora": lora, "origin": k2.origin}
    saved = checkpoint.load(checkpoint.save(folder / "checkpoints", 1, saved_tensors(k2), state, keep=1))

    def stock(pipe: Any) -> Tensor:
        pipe.set_progress_bar_config(disable=True)
        return pipe(
            prompt, height=height, width=width, num_inference_steps=STEPS, guidance_scale=0.0,
            latents=noise.to(device), output_type="latent", max_sequence_length=max_tokens,
        ).images.float()  # fmt: skip

    # Full weights of any stage change the base, so that the model in memory is not that of the files any more.
    earlier = earlier_of(saved)
    adapters = all(one.state["lora"] for one in (*earlier, saved))
    in_memory = adapters and not (model.quantize or model.offload)
    if in_memory:
        k2.drop_roles()
        if model.attention != "native":  # the stock pipeline's own
            set_attention(k2.transformer, "native")
    else:
        k2.transformer.cpu()

    def read(path: str | Path, file: str | None) -> Any:
        if in_memory:
            return k2.pipe
        format = model.transformer_format if file is not None else None
        return load_pipeline(path, file, getattr(torch, model.dtype), device, format)

    def exported_by(one: Checkpoint, name: str) -> Tensor:
        """What the stock pipeline draws with an export of it."""
        if not adapters:
            write(one, folder / name, "diffusers", allow_rounding=True)
            return stock(read(folder / name, None))
        write(one, folder / f"{name}.safetensors", "lora")
        pipe = read(model.path, model.transformer_file)
        pipe.load_lora_weights(folder / f"{name}.safetensors")
        latents = stock(pipe)
        pipe.unload_lora_weights()
        return latents

    off = exported_by(earlier[-1], "before") if earlier else stock(read(model.path, model.transformer_file))
    # Differences: in bf16 the stock pipeline rounds times and latents too, with the export and without.
    own, exported = policy - base, exported_by(saved, "exported") - off
    return float(own.norm() / base.norm()), float((exported - own).norm() / own.norm())


def _amplified(k2: K2, begun: Mapping[str, Tensor], draw: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """The latents of the policy at its start, and of the policy moved until it changes them by EFFECT."""
    now = policy_state(k2)

    def draw_at(times: float) -> Tensor:
        """With the policy `times` as far from its start as the update moved it."""
        k2.load_role_state_dict(POLICY, {key: torch.lerp(begun[key], now[key], times) for key in now})
        return draw()

    base, times = draw_at(0.0), 1.0
    drawn = draw_at(times)
    # 2**40 ends the search where the policy has no effect at all.
    while (drawn - base).norm() < EFFECT * base.norm() and times < 2**40:
        times *= 2
        drawn = draw_at(times)
    return base, drawn
