"""What can be refused at once: the command line calls `check` before it imports a command's code or reads weights.

Cheapest first: the output, files that are named, rewards, servers; then, with torch, checkpoints, the GPU and memory.
What is looked at stands in the command's row (commands.py). What these functions refuse, the commands refuse too when
they are called from Python, only later.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from posttrain import commands
from posttrain.commands import Command
from posttrain.config.fields import settings_at, value_at
from posttrain.distributed import launch
from posttrain.errors import UserError
from posttrain.loading import check_file, check_source
from posttrain.model import files
from posttrain.model.files import Base
from posttrain.runs.guard import check_new, check_run
from prompts.records import read_prompts
from rewards.base import RewardSpec
from rewards.load import check_addresses, check_rewards
from rewards.serve import missing

ADAPTER = ".safetensors"
"""How the name of an adapter's file ends; runs and checkpoints are directories."""


def check(name: str, config: Any, resume: bool) -> None:
    """Raises UserError for the first thing that is wrong. `name` is the command that the user gave."""
    command = commands.get(name)
    assert command is not None
    if command.output == "run":
        launch.check()
    try:
        _check_output(command, config, resume)
        if command.recipes_of:  # preflight: whose recipe it is
            _, command = commands.of(config)
        _check_inputs(command, config)
    except OSError as error:  # a path that is too long, a directory that may not be read
        raise UserError(f"{error.filename or 'a path'}: {error.strerror}; correct the path") from error


def _check_output(command: Command, config: Any, resume: bool) -> None:
    launched = "TORCHELASTIC_RESTART_COUNT" in os.environ or os.environ.get("WORLD_SIZE", "1") != "1"
    if command.output == "run" and not launched:  # a launcher may restart what it begins: `training.resuming`
        check_run(config, resume)
    # `report` and the like replace what they wrote before.
    if command.output == "new" and config.output is not None:
        # A single file has its model card beside it.
        check_new(Path(config.output), card=getattr(config, "format", "diffusers") != "diffusers")
    if command.output == "run" and os.environ.get("RANK", "0") == "0":  # the machine that starts the servers
        _check_servers(config)


def _check_inputs(command: Command, config: Any) -> None:
    _check_files(command, config)
    _check_rewards(config)
    bases = list(_bases(command, config))
    for base in bases:
        files.check_directory(base.path, base.transformer_file, base.transformer_format)
    if command.model == "raw" and not config.model.allow_distilled and files.is_distilled(config.model.path):
        raise UserError(f"{config.model.path}: model_index.json: is_distilled is true: {files.DISTILLED_REMEDY}")
    for setting, kind in command.reads.items():
        if kind in commands.HUB:
            check_source(value_at(config, setting))
    _check_checkpoints(command, config)
    if command.gpu:
        from posttrain.model import machine  # torch comes with it

        machine.check(bases, dict(_types(config)))


def _check_files(command: Command, config: Any) -> None:
    """Prompt files and data that are not there. What they hold is checked when they are read."""
    for setting in command.prompts:
        source = value_at(config, setting)
        if source is not None and not source.startswith("hf:") and not Path(source).is_file():
            read_prompts(source)  # which says what is wrong
    for setting, kind in command.reads.items():
        # Checkpoints come later, as they need torch, and so does what may be on the hub, which is asked.
        if kind == "checkpoint" or kind in commands.HUB:
            continue
        source = value_at(config, setting)
        if not source.startswith("hf:") and not Path(source).exists():
            raise UserError(f"{setting}: {source}: no such file or directory; correct the path")


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


def _check_checkpoints(command: Command, config: Any) -> None:
    """Runs and checkpoints to go on from, draw with or export, of which none is complete."""
    named = []
    for setting, path in _named_checkpoints(command, config):
        if path.endswith(ADAPTER):
            _check_adapter(setting, path)
        else:
            named.append((setting, path))
    if not named:
        return
    from posttrain.training import checkpoint  # torch comes with it

    for setting, path in named:
        try:
            checkpoint.find(path)
        except UserError as error:
            raise UserError(f"{setting}: {error}") from error


def _check_adapter(setting: str, path: str) -> None:
    """An adapter of any tool. What it holds is checked against the model when that is read."""
    if not Path(path).is_file():
        raise UserError(f"{setting}: {path}: no such file; give a LoRA file, a run or one of its checkpoints")
    check_file(Path(path), f"{setting}: {path}")


def _named_checkpoints(command: Command, config: Any) -> Iterator[tuple[str, str]]:
    """Setting and path of each."""
    for pattern, kind in command.reads.items():
        for setting in settings_at(config, pattern) if kind == "checkpoint" else ():
            for path in commands.paths(value_at(config, setting)):
                # A whole model is not a checkpoint of a run.
                if path and not (Path(path) / "model_index.json").is_file():
                    yield setting, path
    for source in getattr(config, "sources", []):  # of pairs: each may draw with checkpoints of its own
        for draw in source.draws():
            if draw.checkpoint not in ("policy", "base"):
                yield "checkpoint", draw.checkpoint


def _bases(command: Command, config: Any) -> Iterator[Base]:
    """Each K2 that is loaded onto the device from a path that the recipe names."""
    if command.model and config.model is not None:
        m = config.model
        yield Base("model", m.path, m.dtype, m.transformer_file, m.transformer_format, m.quantize, tuple(m.offload))
    renderer = getattr(config, "renderer", None)
    if renderer is not None and not renderer.urls:
        yield Base("renderer", renderer.path, renderer.dtype)


def _types(config: Any) -> Iterator[tuple[str, str]]:
    """Setting and value of each type that a model runs in."""
    for section in ("model", "renderer"):
        dtype = getattr(getattr(config, section, None), "dtype", None)
        if dtype is not None:
            yield f"{section}.dtype", dtype
    if getattr(config, "dtype", None) is not None:
        yield "dtype", config.dtype
