"""Reads LoRA files, of this project and of others. A key that fits no layer of the transformer is an error.

Accepted are diffusers' names (`transformer.`...) and the original ones (`diffusion_model.`..., `base_model.model.`...),
as they are or joined by underscores (`lora_unet_blocks_0_attn_wq`), with lora_A and lora_B or lora_down and lora_up.

How strongly a layer acts is read in this order: an `alpha` tensor beside the factors; the file's header, as diffusers
(`lora_adapter_metadata`) or kohya's trainers (`ss_network_alpha`) write it; PEFT's adapter_config.json beside the file.
Two that disagree are an error, since one of them is wrong and nothing says which. kohya's header has one number for all
layers, which says nothing of them beside alphas where their ranks are others. Where none says anything the scale is 1.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from posttrain.errors import UserError, counted
from posttrain.loading import check_file, check_finite, reading, some
from posttrain.model import key_names
from posttrain.model.k2 import K2
from posttrain.model.load import empty_transformer
from posttrain.model.roles import TARGETS

A, B = "lora_A.weight", "lora_B.weight"
PREFIXES = ("transformer.", "diffusion_model.", "base_model.model.", "model.diffusion_model.", "pipe.dit.",
            "_orig_mod.", "module.")  # fmt: skip
"""What stands before a layer's name: of pipelines, trainers and wrappers, also one inside the other."""
JOINED = ("lora_unet_", "lora_transformer_")
"""Prefixes of trainers that join the parts of a layer's name by underscores."""
_KEY = re.compile(r"(.+)\.(?:(lora_A|lora_down)(?:\.default)?\.weight|(lora_B|lora_up)(?:\.default)?\.weight|(alpha))")
_BLOCK = re.compile(r"transformer_blocks\.\d+\.(?:attn\.)?(.+)")
Scale = Callable[[str, int], float | None]
"""Of a layer's name and rank; None where nothing is said of it."""
AGREE = 0.01
"""Relative difference of two scales that is rounding: an alpha may be stored in bf16."""
KEEPS_BASE = (True, False, None, "gaussian", "orthogonal", "eva")
"""Values of init_lora_weights under which the base's weights stay as they are."""
OTHER_LAYERS = ("use_dora", "use_qalora", "layer_replication", "alora_invocation_tokens")
"""Settings of PEFT whose layers compute something else than W + scale B A."""


def linear_shapes(state_dict: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of each linear layer of a transformer by its name in diffusers, from its state dict."""
    shapes: dict[str, tuple[int, int]] = {}
    for key, value in state_dict.items():
        if key.endswith(".weight") and value.ndim == 2:
            shapes[key.removesuffix(".weight")] = (value.shape[0], value.shape[1])
    return shapes


def shapes_at(path: str) -> dict[str, tuple[int, int]]:
    """The same of a pipeline whose weights are not read."""
    with reading(f"{path}/transformer/config.json", "the transformer's settings"):
        return linear_shapes(empty_transformer(path).state_dict())


def read_lora(path: str | Path, shapes: Mapping[str, tuple[int, int]], where: str | Path = "") -> dict[str, Tensor]:
    """Factors by diffusers' names, such as `transformer_blocks.0.attn.to_q.lora_A.weight`, fp32, with the scale in B.

    `shapes` are those of the model; messages call the file `where`. Raises UserError, with the keys, if one of them
    fits no layer, has no partner, a wrong shape or type, or a number that is not finite; or for scales that disagree.
    """
    path, where = Path(path), where or path
    if not path.is_file():
        raise UserError(f"{where}: no such file; give a run, one of its checkpoints or a LoRA as .safetensors")
    check_file(path, where)
    tensors = load_file(path)
    check_finite(where, tensors)
    layers: dict[str, dict[str, Tensor]] = {}
    names: dict[str, str] = {}
    unbound = []
    joined = _joined(shapes)
    for key, value in tensors.items():
        match = _KEY.fullmatch(key)
        layer = _layer(match[1], joined) if match else ""
        if match is None or layer not in shapes:
            unbound.append(key)
            continue
        kind = "A" if match[2] else "B" if match[3] else "alpha"
        parts = layers.setdefault(layer, {})
        if kind in parts:
            raise UserError(f"{where}: {key} is there twice, under two names; give a file with one LoRA")
        names[layer], parts[kind] = match[1], value.float()
    if not layers:
        raise UserError(
            f"{where}: none of its {counted(len(tensors), 'key')} binds to a layer of this model ({some(unbound)}),"
            " so it would do nothing; give a LoRA for K2 in diffusers' or the original names"
        )
    if unbound:
        raise UserError(
            f"{where}: {len(unbound)} of its {counted(len(tensors), 'key')} would bind to no layer of this model"
            f" ({some(unbound)}), so a part of it would be lost; give a LoRA for this model, or leave those layers out"
            " when you train it"
        )
    if alone := [names[layer] for layer, parts in layers.items() if not {"A", "B"} <= parts.keys()]:
        raise UserError(f"{where}: a factor is missing for {some(alone)}; give a whole LoRA")
    ranks = {parts["A"].shape[0] for parts in layers.values() if parts["A"].ndim == 2}
    stated = stated_scales(path, where, ranks, all("alpha" in parts for parts in layers.values()))
    factors: dict[str, Tensor] = {}
    for layer, parts in layers.items():
        a, b, alpha = parts["A"], parts["B"], parts.get("alpha")
        rank = a.shape[0] if a.ndim == 2 else 0
        outputs, inputs = shapes[layer]
        if not rank or a.shape != (rank, inputs) or b.shape != (outputs, rank):
            raise UserError(
                f"{where}: {names[layer]}: factors of {list(a.shape)} and {list(b.shape)} do not fit a layer of"
                f" {[outputs, inputs]}; give a LoRA of this model"
            )
        if alpha is not None and alpha.numel() != 1:
            raise UserError(
                f"{where}: {names[layer]}.alpha has {counted(alpha.numel(), 'number')}; give a LoRA with one a layer"
            )
        name = _bare(names[layer])
        scale = scale_of(name, rank, None if alpha is None else float(alpha), stated, where)
        # The scale goes into B, so that factors of several files can be concatenated.
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
            f"{where}: adapts {some(outside)} outside the transformer blocks' linear layers, which roles do not"
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


def _bare(name: str) -> str:
    """A layer's name as the file has it, without prefixes."""
    before = ""
    while before != name:
        before = name
        for prefix in PREFIXES:
            name = name.removeprefix(prefix)
    return name


def _layer(name: str, joined: Mapping[str, str]) -> str:
    """The layer's name in diffusers, if it is one."""
    for prefix in JOINED:
        if name.startswith(prefix):
            return joined.get(name.removeprefix(prefix), "")
    return key_names.diffusers_name(f"{_bare(name)}.").removesuffix(".")


def _joined(shapes: Mapping[str, tuple[int, int]]) -> dict[str, str]:
    """Names in diffusers by those that join the parts of diffusers' or the original name."""
    names: dict[str, str] = {}
    for layer in shapes:
        original = key_names.original_name(f"{layer}.").removesuffix(".")
        for name in (layer, original):
            names[name.replace(".", "_")] = layer
    return names


# ---- how strongly a layer acts -------------------------------------------------------------------------------


def stated_scales(path: Path, where: str | Path, ranks: Set[int], alphas: bool) -> dict[str, Scale]:
    """What header and adapter_config.json say, by the place that says it. `ranks` are those of the layers, `alphas`
    whether each has an alpha tensor. Raises UserError if they cannot be read."""
    with safe_open(path, framework="np") as opened:
        header = opened.metadata() or {}
    scales: dict[str, Scale] = {}
    if "lora_adapter_metadata" in header:
        place = "lora_adapter_metadata in its header"
        settings = _mapping(header["lora_adapter_metadata"], where, place)
        start = "transformer."  # what a pipeline writes; a transformer alone writes none
        own = {key.removeprefix(start): value for key, value in settings.items() if key.startswith(start)}
        if own or "r" in settings:
            scales[place] = _of_peft(own or settings, where, place)
    if "ss_network_alpha" in header:
        scales["ss_network_alpha in its header"] = _of_kohya(header, where, ranks, alphas)
    config = path.parent / "adapter_config.json"
    # PEFT's own file name, or the only file that it can be about.
    if config.is_file() and (
        path.name == "adapter_model.safetensors" or len(list(path.parent.glob("*.safetensors"))) == 1
    ):
        text = config.read_text(encoding="utf-8", errors="replace")
        scales[config.name] = _of_peft(_mapping(text, where, str(config)), where, config.name)
    return scales


def scale_of(layer: str, rank: int, alpha: float | None, stated: Mapping[str, Scale], where: str | Path) -> float:
    """The scale of a layer, as the file names it, of that rank. Raises UserError if two places disagree."""
    found = {} if alpha is None else {"its alpha tensor": alpha / rank}
    for place, scale in stated.items():
        if (value := scale(layer, rank)) is not None:
            found[place] = value
    for place, value in found.items():
        if not math.isfinite(value):
            raise UserError(f"{where}: {layer}: {place} gives a scale of {value}; copy or download it again")
        first = next(iter(found))
        if not math.isclose(value, found[first], rel_tol=AGREE, abs_tol=1e-12):
            raise UserError(
                f"{where}: {layer}: {first} gives a scale (alpha / rank) of {found[first]:g}, and {place} of {value:g};"
                " remove the one that is wrong"
            )
    return next(iter(found.values()), 1.0)


def _mapping(text: str, where: str | Path, place: str) -> dict[str, Any]:
    try:
        held = json.loads(text)
    except ValueError as error:
        raise UserError(f"{where}: {place} is not JSON ({error}); copy or download it again") from error
    if not isinstance(held, dict):
        raise UserError(f"{where}: {place} is not an object of settings; copy or download it again")
    return held


def _of_peft(config: Mapping[str, Any], where: str | Path, place: str) -> Scale:
    """Of the settings of a peft.LoraConfig."""

    def refuse(key: str, why: str) -> UserError:
        return UserError(f"{where}: {place}: {key} is {json.dumps(config.get(key))}: {why}")

    if config.get("peft_type", "LORA") != "LORA":
        raise refuse("peft_type", "only LORA is read")
    for key in OTHER_LAYERS:
        if config.get(key):
            raise refuse(key, "such layers are not read; give a plain LoRA")
    if config.get("init_lora_weights") not in KEEPS_BASE:
        raise refuse("init_lora_weights", "it is for changed base weights; convert it to a plain LoRA")

    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key) or {}, dict):
            raise refuse(key, "it must map layers to numbers; copy or download it again")

    def number(key: str, patterns: str, layer: str, default: float) -> float:
        value = config.get(key, default)
        for pattern, chosen in (config.get(patterns) or {}).items():
            try:
                matches = re.fullmatch(rf"(.*\.)?({pattern})", layer)
            except re.error as error:
                raise refuse(patterns, f"{error}; copy or download it again") from error
            if matches:  # the first, as in PEFT
                value = chosen
                break
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise refuse(key, "it must be a number; copy or download it again")
        return value

    def scale(layer: str, rank: int) -> float:
        # PEFT's defaults are 8 for both.
        said, alpha = number("r", "rank_pattern", layer, 8), number("lora_alpha", "alpha_pattern", layer, 8)
        if said != rank:
            raise UserError(
                f"{where}: {layer} has rank {rank}, and {place} says {said:g}; they belong to different LoRAs"
            )
        return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)

    return scale


def _of_kohya(header: Mapping[str, str], where: str | Path, ranks: Set[int], alphas: bool) -> Scale:
    """Of kohya's header, whose values are texts; "None" and "Dynamic" say nothing."""
    place = "ss_network_alpha in its header"
    numbers: dict[str, float] = {}
    for key in ("ss_network_alpha", "ss_network_dim"):
        text = header.get(key, "None")
        if text in ("None", "Dynamic", ""):
            continue
        try:
            numbers[key] = float(text)
        except ValueError as error:
            raise UserError(f"{where}: {key} in its header is {text!r}, not a number; copy it again") from error

    # With ranks of their own, layers have alphas of their own too: the header's is then only the trainer's default.
    own = alphas and ranks != {numbers.get("ss_network_dim", min(ranks, default=0))}

    def scale(layer: str, rank: int) -> float | None:
        if own or "ss_network_alpha" not in numbers:
            return None
        if numbers.get("ss_network_dim", rank) != rank:
            raise UserError(
                f"{where}: {layer} has rank {rank}, and its header says {numbers['ss_network_dim']:g} beside {place};"
                " they belong to different LoRAs"
            )
        return numbers["ss_network_alpha"] / rank

    return scale
