"""Ranges of the prompt expander's settings; see validate.py."""

from __future__ import annotations

from posttrain.config.ranges import ConfigError, at_least, positive, share
from posttrain.expander.config import ExpandConfig, ExpanderDataConfig, ExpanderSFTConfig, WriterConfig, is_function
from posttrain.validate_model import validate_lora


def validate_expander_data(config: ExpanderDataConfig) -> None:
    for name in ("output", "captions", "column"):
        _named(name, getattr(config, name))
    if is_function(config.captions) and config.count is None:
        raise ConfigError("count", "is null, and a function draws captions without end; say how many")
    if not is_function(config.captions):
        if config.writer is None:
            raise ConfigError("writer", "is null: name the model that writes the short prompts, and its server")
        for name in ("lengths", "registers"):
            if not getattr(config, name):
                raise ConfigError(name, "is empty; name at least one")
        if config.per_caption > len(config.lengths) * len(config.registers):
            raise ConfigError("per_caption", f"is {config.per_caption}, more than there are lengths times registers")
    for name, writer in (("writer", config.writer), ("checker", config.checker)):
        if writer is not None:
            _writer(name, writer)
    if config.count is not None:
        at_least("count", config.count, 2)
    at_least("per_caption", config.per_caption, 1)
    for name in ("long_share", "max_failures"):
        share(name, getattr(config, name), 1)
    for name in ("threshold", "heldout"):
        _between(name, getattr(config, name))
    at_least("seed", config.seed, 0)


def validate_expander_sft(config: ExpanderSFTConfig) -> None:
    for name in ("output", "model", "data"):
        _named(name, getattr(config, name))
    _between("heldout", config.heldout)
    share("max_dropped", config.max_dropped, 1)
    for name in ("measured", "max_length", "steps", "batch", "micro_batch"):
        at_least(name, getattr(config, name), 1)
    if config.batch % config.micro_batch:
        raise ConfigError("micro_batch", f"is {config.micro_batch}; use a divisor of batch ({config.batch})")
    at_least("eval_every", config.eval_every, 0)
    at_least("seed", config.seed, 0)
    if config.lora is not None:
        validate_lora(config.lora)
    if config.optim.passes != 1:
        raise ConfigError("optim.passes", f"is {config.optim.passes}; each update draws its own pairs; use 1")
    if config.optim.kind != "adamw":
        raise ConfigError("optim.kind", f"is {config.optim.kind}, and this command has adamw only; leave it out")
    for name in ("ema", "cooldown_steps"):
        if getattr(config.optim, name):
            raise ConfigError(f"optim.{name}", "is not for this command, whose rate falls along a cosine; leave it 0")
    at_least("checkpoint.every", config.checkpoint.every, 0)
    at_least("checkpoint.keep", config.checkpoint.keep, 1)


def validate_expand(config: ExpandConfig) -> None:
    for name in ("prompt", "model"):
        _named(name, getattr(config, name))
    for name in ("n", "max_tokens"):
        at_least(name, getattr(config, name), 1)
    positive("temperature", config.temperature)
    at_least("seed", config.seed, 0)


def _writer(path: str, writer: WriterConfig) -> None:
    _named(f"{path}.model", writer.model)
    if not writer.base_urls:
        raise ConfigError(f"{path}.base_urls", "is empty; give a URL or server://NAME")
    at_least(f"{path}.concurrency", writer.concurrency, 1)
    positive(f"{path}.timeout", writer.timeout)


def _named(path: str, value: str) -> None:
    if not value.strip():
        raise ConfigError(path, "is empty; name one")


def _between(path: str, value: float) -> None:
    if not 0 < value < 1:
        raise ConfigError(path, f"is {value}; use a number between 0 and 1")
