"""The ranges of the recipe of `posttrain run`."""

from __future__ import annotations

import re

from posttrain.config.ranges import ConfigError, at_least, positive
from posttrain.pipeline.config import PipelineConfig


def validate_pipeline(config: PipelineConfig) -> None:
    if not config.output.strip():
        raise ConfigError("output", "is empty; name a directory for the pipeline")
    if not config.stages:
        raise ConfigError("stages", "is empty; name at least one stage")
    if config.gpu_gib is not None:
        positive("gpu_gib", config.gpu_gib)
    if config.seed is not None:
        at_least("seed", config.seed, 0)
    names = [stage.name for stage in config.stages]
    for i, name in enumerate(names):
        if not re.fullmatch(r"[A-Za-z0-9_][\w-]*", name):
            raise ConfigError(f"stages[{i}].name", f"is '{name}'; it names a directory: use letters, digits, _ and -")
        if name in names[:i]:
            raise ConfigError(f"stages[{i}].name", f"'{name}' is used twice; give each its own name")
