"""Whole models on disk: read one tensor at a time, and written one tensor at a time, so that none is ever in memory.

A tensor is mapped to its file only while it is used. What a merge holds at once is then a few copies in fp32 of the
largest tensor: of K2 403 MB each.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from posttrain.errors import UserError
from posttrain.loading import PIPELINE, check_file, local, reading, weight_files
from posttrain.model import files, key_names
from posttrain.model.k2 import K2
from posttrain.model.load import check_names, empty_transformer
from posttrain.runs.files import sync

TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""By their names in safetensors' files."""
PART = "transformer"
SINGLE = "diffusion_pytorch_model.safetensors"
INDEX = f"{SINGLE}.index.json"


@dataclass(frozen=True)
class Place:
    """Where a tensor lies, and what it is."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class Weights(Mapping[str, Tensor]):
    """The tensors of safetensors files by diffusers' names, each read when it is asked for.

    The files may have the original names. Raises UserError, beginning with `where`, for one that is not whole.
    """

    def __init__(self, paths: Sequence[Path], where: str):
        self.where, self.files = where, list(paths)
        self.places: dict[str, Place] = {}
        for file in self.files:
            check_file(file)
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118
                    part = opened.get_slice(key)
                    # Only single numbers may be of another type; see check_file.
                    shape, dtype = tuple(part.get_shape()), TYPES.get(part.get_dtype(), torch.float32)
                    # Reshapes a block's table of shifts and scales, which the original stores as a vector.
                    ((name, renamed),) = key_names.from_original({key: torch.empty(shape, device="meta")}).items()
                    self.places[name] = Place(file, key, tuple(renamed.shape), dtype)

    def __getitem__(self, name: str) -> Tensor:
        place = self.places[name]
        # The file is opened for this tensor alone: when that is freed, no page of the file counts as ours.
        with safe_open(place.file, framework="pt") as opened:
            value = opened.get_tensor(place.key)
        if not bool(value.isfinite().all()):
            raise UserError(f"{self.where}: {name} holds numbers that are not finite; copy or download it again")
        return value.reshape(place.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def empty(self) -> dict[str, Tensor]:
        """Names and shapes without values."""
        return {name: torch.empty(place.shape, device="meta") for name, place in self.places.items()}


# ---- models ---------------------------------------------------------------------------------------------------


def expected(path: str) -> dict[str, Tensor]:
    """The state dict of a pipeline's transformer, on the meta device."""
    with reading(f"{path}/{PART}/config.json", "the transformer's settings"):
        return empty_transformer(path).state_dict()


def of_pipeline(path: str, like: Mapping[str, Tensor], transformer_file: str | None = None) -> Weights:
    """The transformer of a Krea2Pipeline directory or hub id. Raises UserError if it is not one, is not whole, or has
    other tensors than `like`."""
    folder = local(path, PIPELINE)
    files.check_directory(str(folder), transformer_file)
    if transformer_file is not None:
        return of_file(transformer_file, like)
    weights = Weights(weight_files(folder / PART, f"{path}/{PART}"), path)
    check_names(path, like, weights.empty(), "give a model of the base's architecture")
    return weights


def of_file(path: str, like: Mapping[str, Tensor]) -> Weights:
    """A transformer as one file. For errors see `of_pipeline`."""
    weights = Weights([Path(path)], path)
    check_names(path, like, weights.empty(), "give a model of the base's architecture")
    return weights


def is_pipeline(path: str) -> bool:
    """Whether a path is a pipeline's directory here."""
    return (Path(path) / "model_index.json").is_file()


def is_transformer(file: str, like: Mapping[str, Tensor]) -> bool:
    """Whether a safetensors file holds weights of a transformer, and not a LoRA's factors."""
    with safe_open(file, framework="np") as opened:
        return any(key_names.diffusers_name(key) in like for key in opened.keys())  # noqa: SIM118


def load(path: str, transformer_file: str | None, dtype: str, device: str | torch.device) -> K2:
    return K2.load(path, transformer_file, getattr(torch, dtype), device)


# ---- writing --------------------------------------------------------------------------------------------------


class Writer:
    """A safetensors file, written tensor by tensor in the order of its header.

    The format: 8 bytes with the header's length, the header as JSON, then the data
    (https://huggingface.co/docs/safetensors).
    """

    def __init__(self, path: Path, entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]):
        names = {dtype: name for name, dtype in TYPES.items()}
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, (dtype, shape) in entries.items():
            # Offsets count from the end of the header.
            start, end = end, end + torch.empty(shape, dtype=dtype, device="meta").nbytes
            header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        # The data begins at a multiple of 8 bytes.
        text += b" " * (-len(text) % 8)
        self.path, self._left = path, dict(entries)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def add(self, name: str, value: Tensor) -> None:
        """The next tensor, of the type and shape that the header says."""
        expected = next(iter(self._left))
        dtype, shape = self._left.pop(expected)
        if name != expected or value.dtype != dtype or tuple(value.shape) != shape:
            raise ValueError(f"{name} {value.dtype} {tuple(value.shape)}: {expected} {dtype} {shape} comes next")
        flat = value.detach().cpu().contiguous().reshape(-1)
        # Bytes, since numpy has no bfloat16.
        self._file.write(flat.view(torch.uint8).numpy().data)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()
        if kind is None:
            if self._left:
                raise ValueError(f"{self.path}: {len(self._left)} tensors were not written, such as {min(self._left)}")
            sync(self.path)


def copy_parts(path: str, folder: Path) -> None:
    """All of a pipeline but the weights of its transformer, into `folder`. What else lies beside it stays there."""
    source = local(path, PIPELINE)
    index = json.loads((source / "model_index.json").read_text())
    shutil.copy(source / "model_index.json", folder)
    for name, value in index.items():
        if isinstance(value, list) and (source / name).is_dir():
            # The star at the end also leaves out the index of the weights, which names files that are not copied.
            ignored = shutil.ignore_patterns("*.safetensors*", "*.bin") if name == PART else None
            shutil.copytree(source / name, folder / name, ignore=ignored)


def write_index(folder: Path, shards: Mapping[str, Sequence[str]], size: int) -> None:
    """The index of a transformer in several files: `shards` are the names in each, `size` is in bytes."""
    weight_map = {}
    for file, names in shards.items():
        weight_map |= dict.fromkeys(names, file)
    text = json.dumps({"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}, indent=2)
    (folder / INDEX).write_text(text + "\n")
