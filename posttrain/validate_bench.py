"""Ranges of the settings of `posttrain bench`."""

from __future__ import annotations

from posttrain.bench.config import DRAWING, BenchConfig
from posttrain.config.ranges import ConfigError, at_least, pixels, positive
from posttrain.tdm.config import MOST_STEPS

LEAST = {"batch": 2, "group": 2, "text": 8, "rank": 0, "stages": 1, "warmup": 2, "repeats": 1, "gpus": 1}


def validate_bench(config: BenchConfig) -> None:
    for name, least in LEAST.items():
        at_least(name, getattr(config, name), least)
    if not config.methods:
        raise ConfigError("methods", "is empty; name at least one")
    if config.rank == 0 and not set(config.methods) <= set(DRAWING):
        raise ConfigError("rank", "is 0, so there is nothing to train; use 1 or more, or methods [rollout]")
    if config.stages > 1 and config.rank == 0:
        raise ConfigError("stages", f"is {config.stages} and rank is 0; use a rank of 1 or more")
    if "text_encoder" in config.offload and not config.encode:
        raise ConfigError("offload", "names text_encoder, which is loaded and used only with encode; set encode: true")
    for i, size in enumerate(config.sizes or []):
        pixels(f"sizes[{i}]", size)
    if not 3 <= config.steps <= MOST_STEPS:
        raise ConfigError("steps", f"is {config.steps}; use 3 to {MOST_STEPS}")
    if not 1 <= config.window < config.steps:
        raise ConfigError("window", f"is {config.window}; use 1 to steps - 1 ({config.steps - 1})")
    if config.recompute is not None:
        at_least("recompute", config.recompute, 0)
    for name in ("gpu_gib", "gpu_tflops"):
        if (value := getattr(config, name)) is not None:
            positive(name, value)
