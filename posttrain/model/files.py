"""The files of a K2 checkpoint on disk: whether they are complete, and how large they are. Never imports torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from posttrain.errors import UserError
from posttrain.loading import check_file, check_source, is_hub_id, weight_files

PARTS = ("transformer", "text_encoder", "vae")
TYPES = {"float32": "F32", "bfloat16": "BF16"}
"""How safetensors names the values of `model.dtype`."""


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


def check_directory(path: str, transformer_file: str | Path | None = None) -> None:
    """Raises UserError unless `path` is a local K2 pipeline with complete files of plain numbers, or a hub id that the
    hub knows. The file of the transformer, if one is named, must be complete too."""
    if transformer_file is not None:
        _check_single(Path(transformer_file))
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


def _check_single(file: Path) -> None:
    if not file.is_file():
        raise UserError(f"{file}: no such file; give the transformer as one .safetensors file")
    if file.suffix != ".safetensors":
        raise UserError(f"{file}: only .safetensors files are read; convert it first")
    check_file(file)
