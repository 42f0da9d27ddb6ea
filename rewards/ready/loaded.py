"""What the published scorers share: checked settings, batches, and weights that are not in transformers' format.

Legend: B images of one batch with their prompts, H x W pixels of an image as a model wants them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer

from posttrain.errors import UserError
from posttrain.image_reader import to_rgb
from posttrain.loading import check_finite, check_json, check_keys, is_hub_id, local, quiet, reading
from rewards.base import Failure, Score

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SETTINGS = ("*.json", "*.txt", "*.model", "*.jinja")
"""Files of a repository that hold no weights: config.json, tokenizer and image processor."""
PROBE = "two red stars on a blue square"


class Scorer(ABC):
    """One frozen model in this process, asked for `batch` images at a time."""

    def __init__(self, path: str, batch: int, device: str | None, dtype: str):
        if batch < 1:
            raise UserError(f"batch: {batch}: use 1 or more")
        if dtype not in DTYPES:
            raise UserError(f"dtype: {dtype}: use {' or '.join(DTYPES)}")
        self.path, self.batch, self.dtype = path, batch, DTYPES[dtype]
        self.device = checked_device(device)

    @abstractmethod
    def scores(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """(B,) of RGB images and their prompts."""

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[Score]:
        results: list[Score] = []
        for first in range(0, len(images), self.batch):
            rows = slice(first, first + self.batch)
            with torch.inference_mode():
                batch = self.scores(list(map(to_rgb, images[rows])), prompts[rows])
            results += map(_finite, batch.float().tolist())
        return results

    def record(self) -> dict[str, Any]:
        return {"model": self.path}


def _finite(score: float) -> Score:
    return score if math.isfinite(score) else Failure(f"the model's score is {score}")


def checked_device(device: str | None) -> torch.device:
    """The device of that name, with the number of the process's own GPU; None: the GPU if there is one."""
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise UserError(f"device: {device}: use cpu, cuda or cuda:0") from None
    if chosen.type == "cuda":
        if not torch.cuda.is_available() or (chosen.index or 0) >= torch.cuda.device_count():
            raise UserError(f"device: {device}: there are {torch.cuda.device_count()} GPUs here; use cpu or another")
        if chosen.index is None:  # rewards run in threads, in which plain cuda would be the first GPU
            chosen = torch.device("cuda", torch.cuda.current_device())
    return chosen


def tokenizer_of(path: str) -> Any:
    """The tokenizer of a directory or hub id. Those of CLIP and BERT write in lower case, so that they do not give a
    text back, as load_tokenizer wants it; here it has to know the words of one."""
    folder = local(path, SETTINGS)
    check_json(folder)
    with quiet(), reading(path, "a tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
        # A vocabulary that does not fit gives unknown tokens, or one for each letter.
        tokens = tokenizer(PROBE, add_special_tokens=False).input_ids
        if not 0 < len(tokens) < len(PROBE) or tokenizer.unk_token_id in tokens[:-1]:
            raise UserError(f"{path}: its tokenizer does not know the words of {PROBE!r}: copy or download it again")
    return tokenizer


def image_processor(path: str, kind: Any, **sizes: Any) -> Any:
    with quiet(), reading(path, "an image processor"):
        return kind.from_pretrained(str(local(path, SETTINGS)), **sizes)


def read_state(path: str, name: str, inner: str | None = None) -> dict[str, Tensor]:
    """The tensors of one file: `path` itself, or the file `name` of a directory or of a hub id.

    `inner` is the entry of the file that holds them. A pickle that would run code is refused.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        file = (local(path, [name]) if is_hub_id(path) else file) / name
    if not file.is_file():
        raise UserError(f"path: {path}: no such file, and no {name} in it: correct it, or give a hub id as OWNER/NAME")
    with quiet(), reading(str(file), "a file of weights"):
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        state = state[inner] if inner is not None else state
        if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
            raise UserError(f"{file}: holds no state dict: give the file of the release")
        return state


def part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin so, named without it."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


REMEDY = "give the file of the release, and the settings of the same model"


def build(
    kind: Any, config: Any, state: dict[str, Tensor], where: str, device: torch.device, dtype: torch.dtype
) -> Any:
    """A model of transformers with these weights, frozen. Raises UserError for keys and shapes that are not its own."""
    check_finite(where, state)
    with quiet(), reading(where, f"a {kind.__name__}"):
        # Sizes that do not match are collected too, so that one message names all that is wrong.
        model, info = kind.from_pretrained(
            None, config=config, state_dict=state, output_loading_info=True, ignore_mismatched_sizes=True, dtype=dtype
        )
    misshapen = {entry[0] for entry in info["mismatched_keys"]}
    check_keys(
        where, REMEDY, missing=sorted(info["missing_keys"] - misshapen), unexpected=sorted(info["unexpected_keys"]),
        of_another_shape=sorted(misshapen),
    )  # fmt: skip
    return model.to(device).eval().requires_grad_(False)


def fill(head: torch.nn.Module, state: Mapping[str, Tensor], where: str, device: torch.device) -> torch.nn.Module:
    """A head in float32 with these weights, frozen; the same errors."""
    own = head.state_dict()
    check_finite(where, state)
    check_keys(
        where, REMEDY,
        missing=[key for key in own if key not in state],
        unexpected=[key for key in state if key not in own],
        of_another_shape=[key for key in own if key in state and state[key].shape != own[key].shape],
    )  # fmt: skip
    head.load_state_dict(dict(state))
    return head.float().to(device).eval().requires_grad_(False)


def score_head(*widths: int) -> torch.nn.Sequential:
    """Linear layers with the dropout of the aesthetic predictor between them, which gives the layers its numbers:
    0, 2, 4, 6, 7. There is no other nonlinearity."""
    layers: list[torch.nn.Module] = []
    for i, (before, after) in enumerate(zip(widths, widths[1:])):
        layers.append(torch.nn.Linear(before, after))
        if i < 3:
            layers.append(torch.nn.Dropout(0.2))
    return torch.nn.Sequential(*layers)


HIDDEN = (1024, 128, 64, 16, 1)
"""Widths after the first of the heads of AestheticScore and ImageReward."""
