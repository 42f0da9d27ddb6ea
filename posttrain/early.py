"""What can be refused at once: the command line calls `check` before it imports a command's code or reads weights.

Cheapest first: the output, files that are named, rewards, servers; then, with torch, checkpoints, the GPU and memory.
What these functions refuse, the commands refuse too when they are called from Python, only later.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.errors import UserError
from posttrain.model import files
from posttrain.pairs import planning
from posttrain.runs.guard import check_new, check_run
from prompts.records import read_prompts
from rewards.base import RewardSpec
from rewards.load import check_addresses, check_rewards
from rewards.serve import missing

CHECK = "export --check"
RUNS = ("stpo", "grpo", "tdm", "pairs", "judge", "expander sft", "expander gdpo")
"""Commands whose output is a run directory, which they can resume."""
FROM_RAW = ("stpo", "grpo", "tdm", "pairs")
"""Commands that begin with Raw, unless they are told otherwise."""
ON_GPU = (*RUNS, "sample", "bench", "expand", CHECK)
PROMPTS = {
    "grpo": ["prompts.train", "prompts.heldout"], "tdm": ["prompts.train", "prompts.heldout"], "stpo": ["heldout"],
    "expander gdpo": ["prompts.train", "prompts.heldout"], "pairs": ["prompts"], "sample": ["prompts"],
    CHECK: ["prompts"],
}  # fmt: skip
"""Settings that name a file of prompts."""
DATA = {"stpo": "pairs.train", "judge": "data", "expander sft": "data"}
"""The setting that names a set of pairs, records or captions."""
METHODS = {
    "GRPOConfig": "grpo", "STPOConfig": "stpo", "TDMConfig": "tdm", "PairsConfig": "pairs",
    "ExpanderGDPOConfig": "expander gdpo",
}  # fmt: skip
"""Whose recipe it is that `posttrain preflight` was given, by its class."""
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


def check(command: str, config: Any, resume: bool) -> None:
    """Raises UserError for the first thing that is wrong. `command` is the name that the user gave."""
    try:
        _check(command, config, resume)
    except OSError as error:  # a path that is too long, a directory that may not be read
        raise UserError(f"{error.filename or 'a path'}: {error.strerror}; correct the path") from error


def _check(command: str, config: Any, resume: bool) -> None:
    launched = "TORCHELASTIC_RESTART_COUNT" in os.environ or os.environ.get("WORLD_SIZE", "1") != "1"
    if command in RUNS and not launched:  # what a launcher begins, it may restart: `training.resuming`
        check_run(config, resume)
    if command == "export":
        check_new(Path(config.output), card=config.format != "diffusers")
    if command in ("sample", CHECK) and config.output is not None:
        check_new(Path(config.output))
    if command in RUNS and os.environ.get("RANK", "0") == "0":  # whose machine starts them
        _check_servers(config)
    method = METHODS[type(config).__name__] if command == "preflight" else command
    _check_files(method, config)
    _check_rewards(config)
    bases = list(_bases(method, config))
    for base in bases:
        files.check_directory(base.path, base.transformer_file)
    if method in FROM_RAW and not config.model.allow_distilled and files.is_distilled(config.model.path):
        raise UserError(f"{config.model.path}: model_index.json: is_distilled is true: {DISTILLED_REMEDY}")
    _check_checkpoints(method, config)
    if method in ON_GPU:
        from posttrain.model import machine  # torch comes with it

        machine.check(bases, dict(_types(config)))


# ---- inputs ---------------------------------------------------------------------------------------------------


def _check_files(method: str, config: Any) -> None:
    """Prompt files and data that are not there. What they hold is checked when they are read."""
    for field in PROMPTS.get(method, []):
        source = _at(config, field)
        if source is not None and not source.startswith("hf:") and not Path(source).is_file():
            read_prompts(source)  # which says what is wrong
    if method in DATA:
        source = _at(config, DATA[method])
        if not source.startswith("hf:") and not Path(source).exists():
            raise UserError(f"{DATA[method]}: {source}: no such file or directory; correct the path")


def _check_rewards(config: Any) -> None:
    """Rewards, safety checks and language models: imports, arguments, names of servers. Nothing is made or asked."""
    servers = [server.name for server in getattr(config, "servers", [])]
    check_rewards(getattr(config, "rewards", []), servers)
    check_rewards([RewardSpec(f"safety {spec.name}", spec.function) for spec in getattr(config, "safety", [])], servers)
    for name in ("writer", "checker"):
        if (writer := getattr(config, name, None)) is not None:
            check_addresses({"base_urls": writer.base_urls}, servers, name)


def _check_servers(config: Any) -> None:
    """Servers that this machine would start and has not what they need."""
    for spec in getattr(config, "servers", []):
        if not spec.urls and (texts := missing(spec)):
            raise UserError(texts[0])


def _check_checkpoints(method: str, config: Any) -> None:
    """Runs and checkpoints to go on from, draw with or export, of which none is whole."""
    named = dict(_named_checkpoints(method, config))
    if not named:
        return
    from posttrain.training import checkpoint  # torch comes with it

    for field, path in named.items():
        try:
            checkpoint.find(path)
        except UserError as error:
            raise UserError(f"{field}: {error}") from error


def _named_checkpoints(method: str, config: Any) -> Iterator[tuple[str, str]]:
    """Setting and path of each."""
    if method in FROM_RAW and config.model.start is not None:
        yield "model.start", config.model.start
    if method == "pairs":
        draws = [planning.resolved(config, draw) for source in config.sources for draw in planning.draws(source)]
        for name in dict.fromkeys([config.policy or "", *(draw.checkpoint for draw in draws)]):
            if name:
                yield "policy" if name == config.policy else "checkpoint", name
    if method == "sample" and config.adapter is not None:
        yield "adapter", config.adapter
    if method == "export":
        yield "source", config.source
    if method == CHECK and not config.check.endswith(".safetensors"):
        yield "check", config.check


# ---- models ---------------------------------------------------------------------------------------------------


def _bases(method: str, config: Any) -> Iterator[Base]:
    """Each K2 that is loaded onto the device from a path that the recipe names."""
    if method in (*FROM_RAW, "sample") or (method == CHECK and config.model is not None):
        m = config.model
        yield Base("model", m.path, m.dtype, m.transformer_file, m.quantize, tuple(m.offload))
    if method == "expander gdpo" and not config.renderer.urls:
        yield Base("renderer", config.renderer.path, config.renderer.dtype)


def _types(config: Any) -> Iterator[tuple[str, str]]:
    """Setting and value of each type that a model runs in."""
    for section in ("model", "renderer"):
        if (held := getattr(getattr(config, section, None), "dtype", None)) is not None:
            yield f"{section}.dtype", held
    if (held := getattr(config, "dtype", None)) is not None:
        yield "dtype", held


def _at(config: Any, field: str) -> Any:
    """The value of a setting by its path."""
    for part in field.split("."):
        config = getattr(config, part)
    return config
