"""Checks of single settings, and the error that names the field and the remedy."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from posttrain.errors import UserError

SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)
"""In the names of variables whose values no file may hold."""


class ConfigError(UserError):
    """A field of a recipe holds what it may not. `field` is its path, such as `optim.lr`."""

    def __init__(self, field: str, problem: str):
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem


def pixels(path: str, size: Sequence[int]) -> None:
    if len(size) != 2:
        raise ConfigError(path, f"is {list(size)}; write [height, width] in pixels")
    for side in size:
        if side < 16 or side % 16:
            nearest = max(16, round(side / 16) * 16)
            raise ConfigError(path, f"{side} pixels is not a multiple of 16; use {nearest}")


def at_least(path: str, value: float, least: float) -> None:
    if not (math.isfinite(value) and value >= least):
        raise ConfigError(path, f"is {value}; use {least} or more")


def share(path: str, value: float, most: float) -> None:
    if not 0 <= value <= most:
        raise ConfigError(path, f"is {value}; use 0 to {most:g}")


def positive(path: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(path, f"is {value}; use a number above 0")


def no_keys(path: str, env: Mapping[str, str], arguments: Sequence[str]) -> None:
    """Of a server: a run keeps its recipe, so keys come from the environment, which servers inherit."""
    for name, value in env.items():
        if SECRET.search(name) and value:
            raise ConfigError(f"{path}.env.{name}", "a run keeps its recipe: export the variable, servers inherit it")
    if any(word.partition("=")[0] == "--api-key" for word in arguments):
        raise ConfigError(f"{path}.extra_args", "a run keeps its recipe: export VLLM_API_KEY and leave out --api-key")
