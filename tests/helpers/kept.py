"""Pipelines that no test writes to: read and checked once a process. Later loads give copies of what was read."""

import copy
from pathlib import Path
from typing import Any

import torch

import posttrain.model.k2
from posttrain.model import sampler
from posttrain.model.k2 import K2
from posttrain.model.load import load_pipeline
from posttrain.resources import NANO

FOLDERS = {NANO.resolve()}
"""Everything else is read each time."""
PIPELINES: dict[tuple, Any] = {}


def load(path, transformer_file, dtype, device, transformer_format=None) -> Any:
    arguments = (str(path), transformer_file, dtype, str(device), transformer_format)
    if Path(path).resolve() not in FOLDERS or transformer_file is not None:
        return load_pipeline(*arguments)
    if arguments in PIPELINES:
        return copy.deepcopy(PIPELINES[arguments])
    pipeline = load_pipeline(*arguments)
    PIPELINES[arguments] = copy.deepcopy(pipeline)
    return pipeline


def keep(folder: str | Path) -> None:
    FOLDERS.add(Path(folder).resolve())
    posttrain.model.k2.load_pipeline = load


@torch.no_grad()
def warm(folder: str | Path) -> None:
    """Also draws an image: what torch prepares for a first one is there in processes that are forked afterwards."""
    keep(folder)
    k2 = K2.load(folder)
    k2.decode(k2.sample(k2.text(["a red circle"]), sampler.noise([0], (16, 64)), 2, 32, 32), 32, 32)
