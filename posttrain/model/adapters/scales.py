"""How strongly a layer of an adapter's file acts: its scale, alpha / rank.

It is read in this order: an `alpha` tensor beside the factors; the file's header, as diffusers
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

from safetensors import safe_open

from posttrain.errors import UserError

Scale = Callable[[str, int | None], float | None]
"""Of a layer's name and rank, None where its kind has none; None where nothing is said of it."""
AGREE = 0.01
"""Relative difference of two scales that is rounding: an alpha may be stored in bf16."""
KEEPS_BASE = (True, False, None, "gaussian", "orthogonal", "eva")
"""Values of init_lora_weights under which the base's weights stay as they are."""
OTHER_LAYERS = ("use_qalora", "layer_replication", "alora_invocation_tokens")
"""Settings of PEFT whose layers compute something else than W + scale B A."""
PEFT_TYPES = {"LORA": "LoRA", "LOKR": "LoKr", "LOHA": "LoHa"}
"""By PEFT's name, what kinds.py calls it."""


def stated_scales(
    path: Path, where: str | Path, ranks: Set[int], alphas: bool, found: Set[str] = frozenset({"LoRA"}),
    magnitudes: bool = False,
) -> dict[str, Scale]:  # fmt: skip
    """What header and adapter_config.json say, by the place that says it. `ranks` and `found` are those of the layers
    and their kinds, `alphas` whether each has an alpha tensor, `magnitudes` whether any has a magnitude. Raises
    UserError if they cannot be read."""
    peft: dict[str, Any] = {"found": found, "magnitudes": magnitudes}
    with safe_open(path, framework="np") as opened:  # the header alone
        header = opened.metadata() or {}
    scales: dict[str, Scale] = {}
    if "lora_adapter_metadata" in header:
        place = "lora_adapter_metadata in its header"
        settings = _mapping(header["lora_adapter_metadata"], where, place)
        start = "transformer."  # what a pipeline writes; a transformer alone writes none
        own = {key.removeprefix(start): value for key, value in settings.items() if key.startswith(start)}
        if own or "r" in settings:
            scales[place] = _of_peft(own or settings, where, place, **peft)
    if "ss_network_alpha" in header:
        scales["ss_network_alpha in its header"] = _of_kohya(header, where, ranks, alphas)
    config = path.parent / "adapter_config.json"
    # PEFT's own file name, or the only file that it can be about.
    if config.is_file() and (
        path.name == "adapter_model.safetensors" or len(list(path.parent.glob("*.safetensors"))) == 1
    ):
        text = config.read_text(encoding="utf-8", errors="replace")
        scales[config.name] = _of_peft(_mapping(text, where, str(config)), where, config.name, **peft)
    return scales


def scale_of(
    layer: str, rank: int | None, alpha: float | None, stated: Mapping[str, Scale], where: str | Path
) -> float:
    """The scale of a layer, as the file names it, of that rank; None: its kind has none, and so no alpha counts.
    Raises UserError if two places disagree."""
    found = {} if alpha is None or not rank else {"its alpha tensor": alpha / rank}
    # All places are asked, and not only the first that knows: disagreement has to be seen.
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


def _of_peft(config: Mapping[str, Any], where: str | Path, place: str, found: Set[str], magnitudes: bool) -> Scale:
    """Of the settings of a peft.LoraConfig, LoKrConfig or LoHaConfig."""

    def refuse(key: str, why: str) -> UserError:
        return UserError(f"{where}: {place}: {key} is {json.dumps(config.get(key))}: {why}")

    type_of = config.get("peft_type", "LORA")
    if {PEFT_TYPES.get(type_of)} != found:
        raise refuse("peft_type", f"the file holds {' and '.join(sorted(found))}; give the settings that belong to it")
    if config.get("use_dora") and not magnitudes:
        raise refuse("use_dora", "no layer of the file has a magnitude; give the whole file")
    alpha_key = "lora_alpha" if type_of == "LORA" else "alpha"
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
                # PEFT's own form: a pattern stands for the end of a name, from a dot on.
                matches = re.fullmatch(rf"(.*\.)?({pattern})", layer)
            except re.error as error:
                raise refuse(patterns, f"{error}; copy or download it again") from error
            if matches:  # the first, as in PEFT
                value = chosen
                break
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise refuse(key, "it must be a number; copy or download it again")
        return value

    def scale(layer: str, rank: int | None) -> float:
        # PEFT's defaults are 8 for both.
        said, alpha = number("r", "rank_pattern", layer, 8), number(alpha_key, "alpha_pattern", layer, 8)
        if rank is not None and said != rank:
            raise UserError(
                f"{where}: {layer} has rank {rank}, and {place} says {said:g}; they belong to different LoRAs"
            )
        return alpha / (math.sqrt(said) if config.get("use_rslora") else said)

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

    def scale(layer: str, rank: int | None) -> float | None:
        if own or rank is None or "ss_network_alpha" not in numbers:
            return None
        if numbers.get("ss_network_dim", rank) != rank:
            raise UserError(
                f"{where}: {layer} has rank {rank}, and its header says {numbers['ss_network_dim']:g} beside {place};"
                " they belong to different LoRAs"
            )
        return numbers["ss_network_alpha"] / rank

    return scale
