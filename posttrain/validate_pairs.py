"""Ranges of the settings of pairs, what is learnt from them, and annotation; see validate.py."""

from __future__ import annotations

import ipaddress
import math

from posttrain.config.ranges import ConfigError, at_least, pixels, positive, share
from posttrain.pairs import planning
from posttrain.pairs.config import AnnotateConfig, AnnotationsConfig, DrawConfig, PairsConfig, PairSource
from posttrain.stpo.config import PairSetConfig, PreferenceLossConfig
from posttrain.validate_model import refuse_quantize


def validate_pairs(config: PairsConfig) -> None:
    for name in ("output", "prompts"):
        if not getattr(config, name).strip():
            raise ConfigError(name, "is empty; name one")
    refuse_quantize(config.model, "pairs show what the exact weights draw")
    if not config.sources:
        raise ConfigError("sources", "is empty; name at least one")
    ranks = [r for r in config.rewards if r.gate == "none" and not r.heldout_only and r.weight > 0]
    for i, reward in enumerate(config.rewards):
        if reward.group:
            raise ConfigError(f"rewards[{i}].group", f"'{reward.name}' sees whole groups, and pairs are none; drop it")
    seen: set[str] = set()
    for i, source in enumerate(config.sources):
        if not source.name.strip() or source.name in seen:
            raise ConfigError(f"sources[{i}].name", f"is '{source.name}'; give each source a name of its own")
        seen.add(source.name)
        _validate_source(f"sources[{i}]", source, config)
        if source.judged is not None and not ranks:
            raise ConfigError("rewards", f"hold none that ranks for source {source.name}: no gate, not heldout_only")
    for name, least in {"pairs": 1, "min_margin": 0, "tolerance": 0, "tries": 1, "steps": 1, "max_tokens": 1,
                        "seed": 0, "block": 1, "micro_batch": 1, "shard": 1}.items():  # fmt: skip
        at_least(name, getattr(config, name), least)
    for name in ("on_policy_share", "min_distance"):
        if not 0 <= getattr(config, name) <= 1:
            raise ConfigError(name, f"is {getattr(config, name)}; use 0 to 1")
    if config.on_policy_share and not any(planning.on_policy(config, source) for source in config.sources):
        raise ConfigError(
            "on_policy_share",
            f"is {config.on_policy_share:g}, and no source draws as the policy does (checkpoint: policy, all else left"
            " out); add one or use 0",
        )
    if not config.sizes:
        raise ConfigError("sizes", "is empty; write one [height, width], such as [[512, 512]]")
    for i, size in enumerate(config.sizes):
        pixels(f"sizes[{i}]", size)


def _validate_source(path: str, source: PairSource, config: PairsConfig) -> None:
    positive(f"{path}.share", source.share)
    if (source.delta is None) == (source.judged is None):
        raise ConfigError(path, f"'{source.name}' needs either delta or judged")
    if source.judged is not None:
        _validate_draw(f"{path}.judged.draw", source.judged.draw)
        if source.judged.group_size < 2:
            raise ConfigError(
                f"{path}.judged.group_size",
                f"is {source.judged.group_size}, but the best is paired with the worst; use 2 or more",
            )
    if source.delta is not None:
        stronger, weaker = source.delta.stronger, source.delta.weaker
        _validate_draw(f"{path}.delta.stronger", stronger)
        _validate_draw(f"{path}.delta.weaker", weaker)
        if planning.resolved(config, stronger) == planning.resolved(config, weaker):
            raise ConfigError(f"{path}.delta", "stronger and weaker draw alike; change one of them")


def _validate_draw(path: str, draw: DrawConfig) -> None:
    if not draw.checkpoint.strip():
        raise ConfigError(f"{path}.checkpoint", "is empty; use policy, base or a run directory")
    at_least(f"{path}.guidance", draw.guidance, 0)
    if draw.steps is not None:
        at_least(f"{path}.steps", draw.steps, 1)
    for name in ("drop", "noise"):
        if not 0 <= getattr(draw, name) < 1:
            raise ConfigError(f"{path}.{name}", f"is {getattr(draw, name)}; use at least 0 and below 1")


def validate_pair_set(pairs: PairSetConfig) -> None:
    for name in ("train", "cache"):
        if not getattr(pairs, name).strip():
            raise ConfigError(f"pairs.{name}", "is empty; name one")
    for name in ("max_bad", "drop_prompt"):
        if not 0 <= getattr(pairs, name) < 1:
            raise ConfigError(f"pairs.{name}", f"is {getattr(pairs, name)}; use at least 0 and below 1")
    if not 0 < pairs.heldout < 1:
        raise ConfigError("pairs.heldout", f"is {pairs.heldout}; use a number between 0 and 1")
    at_least("pairs.max_tokens", pairs.max_tokens, 1)
    at_least("pairs.measured", pairs.measured, 4)
    if pairs.size is not None:
        pixels("pairs.size", pairs.size)


def validate_preference_loss(loss: PreferenceLossConfig) -> None:
    positive("loss.beta", loss.beta)
    if not 0 <= loss.guard_share <= 1:
        raise ConfigError("loss.guard_share", f"is {loss.guard_share}; use 0 to 1")
    if loss.bound is not None:
        positive("loss.bound", loss.bound)
    at_least("loss.anchor", loss.anchor, 0)
    at_least("loss.hinge", loss.hinge, 0)
    positive("loss.time_std", loss.time_std)
    if not math.isfinite(loss.time_mean):
        raise ConfigError("loss.time_mean", f"is {loss.time_mean}; use a number")
    at_least("loss.terms_every", loss.terms_every, 0)


def validate_annotate(config: AnnotateConfig) -> None:
    needed, other = ("pairs", "images") if config.mode == "preference" else ("images", "pairs")
    if getattr(config, needed) is None:
        raise ConfigError(needed, f"missing; mode {config.mode} asks about {needed}")
    if getattr(config, other) is not None:
        raise ConfigError(other, f"is not read in mode {config.mode}; leave it out or change mode")
    if not is_loopback(config.host) and config.password_env is None:
        raise ConfigError("host", f"{config.host} is reached from beyond this machine; set password_env as well")
    if not 0 <= config.port <= 65535:
        raise ConfigError("port", f"is {config.port}; use 1 to 65535, or 0 for any free one")
    share("repeats", config.repeats, 0.5)
    share("max_bad", config.max_bad, 1)
    at_least("seed", config.seed, 0)


def validate_annotations(config: AnnotationsConfig) -> None:
    if (config.pairs is None) == (config.images is None):
        raise ConfigError("pairs", "give either pairs or images: what the store is about")
    share("max_bad", config.max_bad, 1)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches that address. A name other than localhost may mean any machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
