"""The files of a K2 checkpoint on disk: whether they are complete, and how large they are. Never imports torch."""

from __future__ import annotations

import json
import math
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from posttrain.errors import UserError
from posttrain.loading import check_file, check_source, is_hub_id, weight_files

PARTS = ("transformer", "text_encoder", "vae")
TYPES = {"float32": "F32", "bfloat16": "BF16"}
"""How safetensors names the values of `model.dtype`."""
FLOAT8 = ("F8_E4M3", "F8_E5M2")
SCALES = (".weight_scale", ".scale_weight")
"""What stands in the place of .weight in the name of a weight's scale."""
UNUSED = (".input_scale", ".scale_input", ".comfy_quant", "scaled_fp8")
"""Ends of names in scaled files that change no weight: scales of a kernel's inputs, and marks of the format."""

DISTILLED_REMEDY = (
    "train the Raw checkpoint and distil it afterwards, or set model.allow_distilled: true if this is what you want"
)


@dataclass(frozen=True)
class Base:
    """A K2 that a command loads."""

    field: str
    """Section of the recipe that names it."""
    path: str
    dtype: str
    transformer_file: str | None = None
    transformer_format: str | None = None
    quantize: str | None = None
    offload: tuple[str, ...] = ()


@dataclass(frozen=True)
class Weight:
    """A tensor in a file."""

    part: str
    """One of PARTS."""
    name: str
    shape: tuple[int, ...]
    type: str
    """As safetensors names it, such as BF16."""

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def is_float8(self) -> bool:
        return self.type in FLOAT8 and not self.name.endswith(UNUSED)


def check_directory(
    path: str, transformer_file: str | Path | None = None, transformer_format: str | None = None
) -> None:
    """Raises UserError unless `path` is a local K2 pipeline with complete files of plain numbers, or a hub id that the
    hub knows. The file of the transformer, if one is named, must be complete too, and in the format that is named."""
    if transformer_file is not None:
        _check_single(Path(transformer_file), transformer_format)
    if is_hub_id(path):
        check_source(path)
        return
    index = Path(path) / "model_index.json"
    if not index.is_file():
        what = "has no model_index.json" if Path(path).is_dir() else "no such directory"
        raise UserError(f"{path}: {what}; give a K2 pipeline directory in diffusers' layout, or a hub id")
    try:
        name = json.loads(index.read_text())["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index}: not a pipeline index ({error!r}); copy or download it again") from error
    if name != "Krea2Pipeline":
        raise UserError(f"{index}: holds a {name}, not a Krea2Pipeline; give a K2 checkpoint")
    for part in PARTS:
        if part == "transformer" and transformer_file is not None:
            continue
        for file in weight_files(Path(path) / part, f"{path}/{part}"):
            check_file(file)


def is_distilled(path: str) -> bool:
    """Whether a local pipeline says that it is distilled. False for a hub id, which is not asked."""
    index = Path(path) / "model_index.json"
    # A hub's answer would take a download; it is checked once the model is loaded.
    return index.is_file() and bool(json.loads(index.read_text()).get("is_distilled"))


def weights(path: str, transformer_file: str | None = None) -> list[Weight]:
    """Every tensor of a pipeline directory that `check_directory` has passed, read from the headers of the files. Empty
    for a hub id."""
    if not Path(path).is_dir():
        return []
    tensors = []
    for part in PARTS:  # in shards or in one file
        files = sorted((Path(path) / part).glob("*.safetensors"))
        if part == "transformer" and transformer_file is not None:
            files = [Path(transformer_file)]
        for file in files:
            tensors += _tensors(file, part)
    return tensors


def _tensors(file: Path, part: str) -> Iterator[Weight]:
    # The format: 8 bytes with the header's length, then the header as JSON, then the data, which is not read.
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    for name, facts in header.items():
        if name != "__metadata__":
            yield Weight(part, name, tuple(facts["shape"]), facts["dtype"])


def scale_of(weight: str, keys: Container[str]) -> str | None:
    """The key of a weight's scale in a scaled file; None if it has none."""
    names = [weight.removesuffix(".weight") + end for end in SCALES]
    return next((name for name in names if name in keys), None)


def _check_single(file: Path, format: str | None) -> None:
    if not file.is_file():
        raise UserError(f"{file}: no such file; give the transformer as one .safetensors file")
    if file.suffix != ".safetensors":
        raise UserError(f"{file}: only .safetensors files are read; convert it first")
    # First with the types of scaled files, whose remedy is another than that of other quantised files.
    check_file(file, also=(*FLOAT8, "U8"))
    weights = {weight.name: weight for weight in _tensors(file, "transformer")}
    quantised = [weight for weight in weights.values() if weight.is_float8]
    if format is None:
        if any(scale_of(weight.name, weights) for weight in quantised):
            raise UserError(
                f"{file}: its weights have 8 bits and scales; to read them set model.transformer_format: fp8_scaled"
            )
        check_file(file)  # once more: without a format no 8-bit numbers
    else:
        _check_scaled(file, weights, quantised)


def _check_scaled(file: Path, weights: Mapping[str, Weight], quantised: Sequence[Weight]) -> None:
    """Raises UserError unless each of the weights in 8 bits has its scale, and no other format is among them."""
    if not quantised:
        raise UserError(f"{file}: none of its weights has 8 bits; leave model.transformer_format out")
    for weight in weights.values():
        if weight.type == "U8" and not weight.name.endswith(UNUSED):
            raise UserError(f"{file}: {weight.name} is stored as U8 (8 bits), which is not fp8_scaled; give bfloat16")
    for weight in quantised:
        scale = weights.get(scale_of(weight.name, weights) or "")
        # One for the whole weight, or one for each output. Others are for blocks of it, whose order nothing states.
        shapes = ((), (1,), (1, 1), weight.shape[:1], (*weight.shape[:1], 1))
        if scale is None or scale.type not in TYPES.values() or scale.shape not in shapes:
            what = "no scale beside it" if scale is None else f"a scale of {scale.type} {list(scale.shape)}"
            raise UserError(
                f"{file}: {weight.name} has {what}, and fp8_scaled needs one float32 or bfloat16 for each weight or for"
                " each of its outputs; give such a file, or bfloat16"
            )
