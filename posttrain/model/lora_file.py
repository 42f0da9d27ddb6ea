"""Reads LoRA files, of this project and of others. A key that fits no layer of the transformer is an error.

Accepted are diffusers' names (`transformer.`...) and the original ones (`diffusion_model.`..., `base_model.model.`...),
with lora_A and lora_B or lora_down and lora_up, and optionally an `alpha` for each layer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from posttrain.errors import UserError
from posttrain.model import key_names
from posttrain.model.k2 import K2
from posttrain.model.roles import TARGETS

A, B = "lora_A.weight", "lora_B.weight"
PREFIXES = ("transformer.", "diffusion_model.", "base_model.model.", "model.diffusion_model.")
_KEY = re.compile(r"(.+)\.(?:(lora_A|lora_down)(?:\.default)?\.weight|(lora_B|lora_up)(?:\.default)?\.weight|(alpha))")
_BLOCK = re.compile(r"transformer_blocks\.\d+\.(?:attn\.)?(.+)")


def linear_shapes(state_dict: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of each linear layer of a transformer by its name in diffusers, from its state dict."""
    shapes: dict[str, tuple[int, int]] = {}
    for key, value in state_dict.items():
        if key.endswith(".weight") and value.ndim == 2:
            shapes[key.removesuffix(".weight")] = (value.shape[0], value.shape[1])
    return shapes


def read_lora(path: str | Path, shapes: Mapping[str, tuple[int, int]], where: str | Path = "") -> dict[str, Tensor]:
    """Factors by diffusers' names, such as `transformer_blocks.0.attn.to_q.lora_A.weight`, fp32, alpha / rank in B.

    `shapes` are those of the model; messages call the file `where`. Raises UserError, with the keys, if one of them
    fits no layer, has no partner or a wrong shape.
    """
    path, where = Path(path), where or path
    if not path.is_file():
        raise UserError(f"{where}: no such file; give a run, one of its checkpoints or a LoRA as .safetensors")
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{where}: not a whole safetensors file ({error}); copy or download it again") from error
    layers: dict[str, dict[str, Tensor]] = {}
    names: dict[str, str] = {}
    unbound = []
    for key, value in tensors.items():
        match = _KEY.fullmatch(key)
        layer = _layer(match[1]) if match else ""
        if match is None or layer not in shapes:
            unbound.append(key)
            continue
        names[layer] = match[1]
        kind = "A" if match[2] else "B" if match[3] else "alpha"
        layers.setdefault(layer, {})[kind] = value.float()
    if not layers:
        raise UserError(
            f"{where}: none of its {len(tensors)} keys binds to a layer of this model ({_some(unbound)}), so it would"
            " do nothing; give a LoRA for K2 in diffusers' or the original names"
        )
    if unbound:
        raise UserError(
            f"{where}: {len(unbound)} of its {len(tensors)} keys bind to no layer of this model ({_some(unbound)}), so"
            " a part of it would be lost; give a LoRA for this model, or leave those layers out when you train it"
        )
    if alone := [names[layer] for layer, parts in layers.items() if not {"A", "B"} <= parts.keys()]:
        raise UserError(f"{where}: a factor is missing for {_some(alone)}; give a whole LoRA")
    factors: dict[str, Tensor] = {}
    for layer, parts in layers.items():
        a, b, rank = parts["A"], parts["B"], len(parts["A"])
        outputs, inputs = shapes[layer]
        if a.shape != (rank, inputs) or b.shape != (outputs, rank):
            raise UserError(
                f"{where}: {names[layer]}: factors of {list(a.shape)} and {list(b.shape)} do not fit a layer of"
                f" {[outputs, inputs]}; give a LoRA of this model"
            )
        # Without an alpha the scale is 1. It goes into B, so that factors of several files can be concatenated.
        scale = float(parts.get("alpha", rank)) / rank
        factors |= {f"{layer}.{A}": a, f"{layer}.{B}": b * scale}
    return factors


def add_lora(k2: K2, name: str, factors: Mapping[str, Tensor], where: str | Path) -> None:
    """Adds a role with the factors of `read_lora`. Factors of different ranks are padded with zeros to the largest.

    Raises UserError for a LoRA on layers outside the blocks, which roles cannot adapt, or one that has no effect.
    """
    linears: dict[str, str | None] = {}
    for key in factors:
        layer = key.rpartition(".lora_")[0]
        match = _BLOCK.fullmatch(layer)
        linears[layer] = match[1] if match else None
    if outside := [layer for layer, linear in linears.items() if linear not in TARGETS]:
        raise UserError(
            f"{where}: adapts {_some(outside)} outside the transformer blocks' linear layers, which roles do not"
            " reach; give a LoRA of the blocks"
        )
    # B is 0 in an adapter that was never trained, and a run from it would only seem to have an earlier stage.
    if not any(value.any() for key, value in factors.items() if key.endswith(B)):
        raise UserError(f"{where}: every B factor is 0, so it does nothing; give a trained LoRA")
    rank = max(len(value) for key, value in factors.items() if key.endswith(A))
    # alpha = rank is a scale of 1: the files' scales are in B already.
    k2.add_role(name, rank, float(rank), [target for target in TARGETS if target in linears.values()])
    state = {}
    for key, own in k2.role_named_parameters(name).items():
        # Some LoRAs leave out a target in some blocks: its factors there are 0.
        state[key] = torch.zeros_like(own)
        if (value := factors.get(key)) is not None:
            state[key][: value.shape[0], : value.shape[1]] = value
    k2.load_role_state_dict(name, state)


def _layer(name: str) -> str:
    """The layer's name in diffusers. A name may have several prefixes, one inside the other."""
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return key_names.diffusers_name(f"{name}.").removesuffix(".")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
