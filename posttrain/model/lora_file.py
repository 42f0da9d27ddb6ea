"""Reads adapters' files, of this project and of others. A key that fits no layer of the transformer is an error.

Accepted are diffusers' names (`transformer.`...) and the original ones (`diffusion_model.`..., `base_model.model.`...),
as they are or joined by underscores (`lora_unet_blocks_0_attn_wq`, `lycoris_`...), with lora_A and lora_B or lora_down
and lora_up. DoRA, LoKr, LoHa and whole differences are read too, as changes of weights (adapters/kinds.py).

How strongly a layer acts is read by adapters/scales.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from posttrain.errors import UserError, counted
from posttrain.loading import check_file, check_finite, reading, some
from posttrain.model import key_names
from posttrain.model.adapters import kinds
from posttrain.model.adapters.kinds import ALPHA, BIAS, MAGNITUDE, Change
from posttrain.model.adapters.scales import scale_of, stated_scales
from posttrain.model.adapters.targets import target_of
from posttrain.model.k2 import K2
from posttrain.model.load import empty_transformer
from posttrain.model.roles import Kept, Role

A, B = "lora_A.weight", "lora_B.weight"
SUFFIX = ".safetensors"
"""Of an adapter that is a file, of this project or of another, and no run or checkpoint."""
PREFIXES = ("transformer.", "diffusion_model.", "base_model.model.", "model.diffusion_model.", "pipe.dit.",
            "_orig_mod.", "module.")  # fmt: skip
"""What stands before a layer's name: of pipelines, trainers and wrappers, also one inside the other."""
JOINED = ("lora_unet_", "lora_transformer_", "lycoris_")
"""Prefixes of trainers that join the parts of a layer's name by underscores."""
_KEY = re.compile(
    r"(.+)\.(?:(?P<A>lora_A|lora_down)(?:\.default)?\.weight|(?P<B>lora_B|lora_up)(?:\.default)?\.weight|(?P<alpha>alpha)"
    r"|(?P<magnitude>lora_magnitude_vector|magnitude|dora_scale)(?:\.default)?(?:\.weight)?|(?P<diff_b>diff_b)"
    r"|(?P<part>lokr_w[12](?:_[ab])?|hada_w[12]_[ab]|diff)(?:\.default)?(?:\.weight)?)"
)
MUSUBI = "lokr_factor"
"""A key of a whole file by musubi-tuner's own LoKr, which divides alpha by the larger side of a w2 without factors."""


@dataclass(frozen=True)
class Adapter:
    """What a file means."""

    factors: dict[str, Tensor] = field(default_factory=dict)
    """Of its LoRA layers: by diffusers' names, such as `transformer_blocks.0.attn.to_q.lora_A.weight`, fp32, with the
    scale in B."""
    changes: dict[str, Change] = field(default_factory=dict)
    """Of all other layers, by their names in diffusers."""

    def others(self) -> str:
        """What the layers are that are no LoRA, for messages: `DoRA`, or `LoKr and whole differences`."""
        return " and ".join(sorted({change.kind for change in self.changes.values()}))


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
    """The factors of a file that holds nothing but a LoRA; see `read_adapter`. Raises UserError for any other."""
    adapter = read_adapter(path, shapes, where)
    if adapter.changes:
        raise UserError(
            f"{where or path}: holds {adapter.others()} ({some(list(adapter.changes))}), which is not a LoRA and can"
            " only be merged into the weights: by model.start, posttrain sample --adapter or posttrain export --source"
        )
    return adapter.factors


def read_adapter(path: str | Path, shapes: Mapping[str, tuple[int, int]], where: str | Path = "") -> Adapter:
    """What a file means for a model whose linears have these shapes; messages call the file `where`.

    Raises UserError, with the keys, if one of them fits no layer, has no partner, a wrong shape or type, or a number
    that is not finite; or for scales that disagree.
    """
    path, where = Path(path), where or path
    if not path.is_file():
        raise UserError(f"{where}: no such file; give a run, one of its checkpoints or a LoRA as .safetensors")
    check_file(path, where)
    tensors = load_file(path)
    check_finite(where, tensors)
    is_musubi = tensors.pop(MUSUBI, None) is not None
    layers, names = _layers(tensors, shapes, where)
    found: dict[str, str] = {}
    ranks: dict[str, int | None] = {}
    has_alphas, has_magnitude = True, False
    for layer, parts in layers.items():
        found[layer] = _kind(names[layer], parts, where)
        ranks[layer] = kinds.rank_of(found[layer], parts)
        if is_musubi and found[layer] == "LoKr" and ranks[layer] is None:
            ranks[layer] = max(parts["lokr_w2"].shape)
        has_alphas = has_alphas and ALPHA in parts
        has_magnitude = has_magnitude or MAGNITUDE in parts
    of_layers = {rank for rank in ranks.values() if rank is not None}
    stated = stated_scales(path, where, of_layers, has_alphas, set(found.values()), has_magnitude)
    adapter = Adapter()
    for layer, parts in layers.items():
        rank, name = ranks[layer], names[layer]
        alpha = parts.pop(ALPHA, None)
        _check_shapes(name, parts, found[layer], rank, shapes[layer], where)
        if alpha is not None and alpha.numel() != 1:
            raise UserError(f"{where}: {name}.alpha has {alpha.numel()} numbers; give a LoRA with one a layer")
        if alpha is not None and found[layer] == "full":
            raise UserError(f"{where}: {name}: has an alpha beside a whole difference, which has no rank; remove it")
        # Where a kind has no rank, trainers write an alpha and do not use it.
        scale = scale_of(_bare(name), rank, None if alpha is None or rank is None else float(alpha), stated, where)
        if bias := {key: parts.pop(key) for key in (BIAS,) if key in parts}:
            adapter.changes[f"{layer}.{BIAS}"] = Change("a bias", bias)
        if found[layer] == "LoRA" and MAGNITUDE not in parts:
            # The scale goes into B, so that factors of several files can be concatenated.
            adapter.factors.update({f"{layer}.{A}": parts["A"], f"{layer}.{B}": parts["B"] * scale})
        elif parts:
            adapter.changes[layer] = Change(_called(found[layer], parts), parts, scale)
    return adapter


def _layers(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]], where: str | Path
) -> tuple[dict[str, dict[str, Tensor]], dict[str, str]]:
    """By layer its tensors, fp32, by what they are; and its name in the file."""
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
        is_part = match.lastgroup == "part"
        kind = match["part"] if is_part else str(match.lastgroup)
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
    return layers, names


def _kind(name: str, parts: Mapping[str, Tensor], where: str | Path) -> str:
    """Raises UserError where a layer's tensors are of no kind or of several, or not all that its kind has."""
    kind = kinds.kind_of(parts)
    if kind is None and parts.keys() == {BIAS}:
        return "full"
    several = sum(not parts.keys().isdisjoint(own) for own in kinds.PARTS.values()) > 1
    if several:
        raise UserError(f"{where}: {name} is adapted in two ways ({', '.join(parts)}); give a file with one of them")
    lacking = ["lora_A and lora_B"] if kind is None else kinds.missing(kind, parts)
    if lacking:
        lacking = [{"A": "lora_A", "B": "lora_B"}.get(part, part) for part in lacking]
        raise UserError(f"{where}: a factor is missing for {name} ({', '.join(lacking)}); give a whole LoRA")
    assert kind is not None
    return kind


def _check_shapes(
    name: str, parts: Mapping[str, Tensor], kind: str, rank: int | None, shape: tuple[int, int], where: str | Path
) -> None:
    outputs, inputs = shape
    if kind == "LoRA":
        a, b = parts["A"], parts["B"]
        if not rank or a.shape != (rank, inputs) or b.shape != (outputs, rank):
            raise UserError(
                f"{where}: {name}: factors of {list(a.shape)} and {list(b.shape)} do not fit a layer of"
                f" {[outputs, inputs]}; give a LoRA of this model"
            )
    elif parts.keys() - {MAGNITUDE, BIAS} and (rank == 0 or kinds.shape_of(parts) != (outputs, inputs)):
        sizes = ", ".join(f"{part} {list(value.shape)}" for part, value in parts.items())
        raise UserError(
            f"{where}: {name}: {sizes} do not make a change of a layer of {[outputs, inputs]}; give a file of this"
            " model"
        )
    # A magnitude for each output, or with LyCORIS' wd_on_output off for each input.
    expected = {MAGNITUDE: ((outputs,), (outputs, 1), (1, inputs)), BIAS: ((outputs,),)}
    for part, allowed in expected.items():
        if part in parts and tuple(parts[part].shape) not in allowed:
            raise UserError(
                f"{where}: {name}: its {part} of {list(parts[part].shape)} does not fit a layer of {[outputs, inputs]};"
                " give a file of this model"
            )


def _called(kind: str, parts: Mapping[str, Tensor]) -> str:
    """What trainers call it: with a magnitude LoRA is DoRA."""
    if MAGNITUDE not in parts:
        return "whole differences" if kind == "full" else kind
    return "DoRA" if kind == "LoRA" else f"DoRA on {kind}"


def add_adapter(k2: K2, name: str, adapter: Adapter, where: str | Path, *grids: torch.dtype) -> dict[str, list[Kept]]:
    """Merges what is not a LoRA into the base's weights, in fp32 with one rounding to their type, and adds the LoRA, if
    there is one, as a role.

    Returns, by weight that was merged, how much of the change rounding to each type of `grids` keeps. Raises UserError
    for an adapter that has no effect, or that changes a bias which is not there.
    """
    for layer in adapter.changes:
        if layer.endswith(BIAS) and _weight(k2, layer) is None:
            raise UserError(f"{where}: changes the bias of {layer.removesuffix(f'.{BIAS}')}, which has none")
    if adapter.factors:
        add_lora(k2, name, adapter.factors, where)
    kept: dict[str, list[Kept]] = {}
    moved = bool(adapter.factors)  # add_lora has refused one without effect
    for layer, change in adapter.changes.items():
        weight = _weight(k2, layer)
        assert weight is not None
        with torch.no_grad():
            merged = change.of(weight) if not layer.endswith(BIAS) else weight.float() + change.parts[BIAS].to(weight)
            moved = moved or not torch.equal(merged, weight.float())
            kept[layer] = [Kept.of(weight, merged - weight.float(), merged, grid) for grid in grids]
            weight.data = merged.to(weight.dtype)
    if not moved:
        raise UserError(f"{where}: changes no weight, so it does nothing; give a trained adapter")
    return kept


def _weight(k2: K2, layer: str) -> torch.nn.Parameter | None:
    """What a change of that name changes: the layer's weight, or its bias."""
    linear: Any = k2.transformer.get_submodule(layer.removesuffix(f".{BIAS}"))
    return linear.bias if layer.endswith(f".{BIAS}") else linear.weight


def add_lora(k2: K2, name: str, factors: Mapping[str, Tensor], where: str | Path) -> None:
    """Adds a role with the factors of `read_lora`. Factors of different ranks are padded with zeros to the largest.

    For errors see `role_for`.
    """
    role = role_for(factors, where)
    k2.add_role(name, role.rank, role.alpha, role.targets)
    k2.load_role_state_dict(name, padded(factors, k2.role_named_parameters(name)))


def role_for(factors: Mapping[str, Tensor], where: str | Path) -> Role:
    """The settings of a role that holds the factors of `read_lora`; its scale is 1, as the files' scales are in B.

    Raises UserError for a LoRA that has no effect.
    """
    # B is 0 in an adapter that was never trained, and a run from it would only seem to have an earlier stage.
    if not any(value.any() for key, value in factors.items() if key.endswith(B)):
        raise UserError(f"{where}: every B factor is 0, so it does nothing; give a trained LoRA")
    rank = max(len(value) for key, value in factors.items() if key.endswith(A))
    layers = dict.fromkeys(map(layer_of, factors))
    return Role(rank, float(rank), tuple(dict.fromkeys(map(target_of, layers))))


def padded(factors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The factors in the names and shapes of a role's parameters `own`, which may lie on the meta device."""
    state = {}
    for key, parameter in own.items():
        # Some LoRAs leave out a target in some blocks, or have smaller ranks there: the rest is 0.
        state[key] = torch.zeros(parameter.shape)
        if (value := factors.get(key)) is not None:
            # Ranks are rows of A and columns of B, so a smaller one fills the upper or the left part.
            state[key][: value.shape[0], : value.shape[1]] = value
    return state


def layer_of(key: str) -> str:
    """The layer of a factor of that name."""
    return key.rpartition(".lora_")[0]


def begin_role(k2: K2, name: str, factors: Mapping[str, Tensor]) -> None:
    """Puts factors, with scales in B, into a role that has no effect yet. Ranks beyond theirs stay as they are drawn,
    without effect.

    Raises UserError if the role does not hold them all.
    """
    role, state = k2.roles[name], k2.role_state_dict(name)
    assert role is not None
    if lacking := [key for key in factors if key not in state and key.endswith(B)]:
        layers = [layer_of(key) for key in lacking]
        targets = ", ".join(dict.fromkeys(map(target_of, layers)))
        raise UserError(f"lora.targets: model.start adapts {some(layers)} too; name also {targets}")
    if (rank := max(len(value) for key, value in factors.items() if key.endswith(A))) > role.rank:
        raise UserError(f"lora.rank: is {role.rank}, and model.start has rank {rank}; use at least that")
    for key, value in factors.items():
        # The role's own scale, alpha / rank, is applied on top.
        state[key][: value.shape[0], : value.shape[1]] = value * role.rank / role.alpha if key.endswith(B) else value
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
