"""Resolves a pipeline's stages: settings, outputs wired to inputs, and all checks that need no weights.

torch is not imported, so that a dry run takes seconds. Each path must exist or be made by an earlier stage; prompt
files are read; rewards are imported but not built.
"""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain import commands
from posttrain.commands import COMMANDS, HUB
from posttrain.config.fields import hints, settings_at, suggestion, value_at
from posttrain.config.load import load_config
from posttrain.config.recipe import read_recipe
from posttrain.errors import UserError, counted
from posttrain.export.config import ExportConfig
from posttrain.loading import is_hub_id
from posttrain.pipeline.config import PipelineConfig, StageConfig
from prompts.records import read_prompts
from rewards.base import RewardSpec
from rewards.load import check_addresses, check_rewards
from rewards.serve import check_urls

TRAINING = tuple(name for name, command in COMMANDS.items() if command.makes == "checkpoint" and command.resumable)
"""A merge makes a checkpoint too, and trains nothing."""
GROUPS = ("grpo", "nft")
"""Commands whose recipes have groups of images and a pool of prompts (config/groups.py)."""
REFERENCE = re.compile(r"\$\{([^}]*)\}")


@dataclass
class Stage:
    """A stage with resolved and checked settings."""

    name: str
    command: str
    config: Any
    """The settings dataclass of the command."""
    arguments: list[str]
    """Command-line arguments after the command's name."""
    output: Path
    reads: dict[str, str]
    """Field -> name of the stage that makes its value."""

    @property
    def settings(self) -> dict[str, Any]:
        """The settings as plain JSON values, to compare with stages.json."""
        return json.loads(json.dumps(dataclasses.asdict(self.config)))


def resolve(config: PipelineConfig) -> list[Stage]:
    """Raises UserError for the first faulty stage; the message begins with the stage's name."""
    stages: list[Stage] = []
    for stage in config.stages:
        try:
            stages.append(_resolve(stage, stages, Path(config.output), config.seed))
        except UserError as error:
            # a stage's `set` reaches the parser as command-line options
            message = str(error).replace("command line: ", "set: ")
            raise UserError(f"stage {stage.name}: {message}") from error
    return stages


def _resolve(stage: StageConfig, earlier: list[Stage], folder: Path, seed: int | None) -> Stage:
    command = commands.get(stage.command)
    if command is None or not command.makes:
        known = [name for name, other in commands.every().items() if other.makes]
        raise UserError(f"command: '{stage.command}' cannot be a stage{suggestion(stage.command, known)}")
    if "output" in stage.set:
        raise UserError(f"set.output: the pipeline sets it ({folder / stage.name}); leave it out")
    # Only earlier stages: what a later one makes is not there yet.
    outputs = {one.name: str(one.output) for one in earlier}
    settings = dict(stage.set)
    if seed is not None and "seed" in hints(command.settings()):
        settings = {"seed": seed} | settings  # a stage's own seed wins over the pipeline's
    settings = _substitute(settings, "set", outputs)
    output = folder / stage.name
    if stage.command == "export":
        merged: dict[str, Any] = {}
        for path in stage.recipes:
            merged |= read_recipe(path)
        # every format but diffusers is one file
        if (merged | settings).get("format", "diffusers") != "diffusers":
            output = output.with_suffix(".safetensors")
    arguments = []
    for path in stage.recipes:
        arguments += ["--config", path]
    arguments.append(f"--output={output}")
    for key, value in settings.items():
        text = value if isinstance(value, str) else json.dumps(value)
        arguments.append(f"--{key}={text}")
    config, _ = load_config(stage.command, arguments)
    resolved = Stage(stage.name, stage.command, config, arguments, output, {})
    _check_inputs(resolved, earlier)
    return resolved


def _substitute(value: Any, where: str, outputs: dict[str, str]) -> Any:
    """`value` with each ${NAME} replaced by the output of that earlier stage, at any depth."""
    if isinstance(value, dict):
        return {key: _substitute(item, f"{where}.{key}", outputs) for key, item in value.items()}
    if isinstance(value, list):
        return [_substitute(item, where, outputs) for item in value]
    if not isinstance(value, str):
        return value
    for name in REFERENCE.findall(value):
        if name not in outputs:
            known = ", ".join(outputs) or "none"
            raise UserError(f"{where}: ${{{name}}}: no earlier stage has that name; earlier stages: {known}")
    return REFERENCE.sub(lambda match: outputs[match[1]], value)


# ---- what a stage reads ---------------------------------------------------------------------------------------


def _check_inputs(stage: Stage, earlier: list[Stage]) -> None:
    """Raises UserError for a missing input that no earlier stage makes. Fills `stage.reads`."""
    config, command = stage.config, stage.command
    row = commands.get(command)
    assert row is not None
    if row.model:
        _check_model("model.path", config.model.path, config.model.transformer_file)
    if command == "expander gdpo" and Path(config.renderer.path) not in [one.output for one in earlier]:
        _check_model("renderer.path", config.renderer.path, None)
    servers = [server.name for server in getattr(config, "servers", [])]
    check_rewards(getattr(config, "rewards", []), servers)
    if command == "expander gdpo":
        safety = [RewardSpec(f"safety {check.name}", check.function) for check in config.safety]
        check_rewards(safety, servers)
        check_urls(config.renderer.urls, "renderer.urls")
    for name in ("writer", "checker"):
        if (writer := getattr(config, name, None)) is not None:
            check_addresses({"base_urls": writer.base_urls}, servers, name)
    for pattern, kind in row.reads.items():
        for field in settings_at(config, pattern):
            paths = commands.paths(value_at(config, field))
            for i, path in enumerate(paths):
                _check_input(stage, field if len(paths) == 1 else f"{field}[{i}]", kind, path, earlier)
    for field in row.prompts:
        source = value_at(config, field)
        if source is not None and not source.startswith("hf:"):
            _check_enough(command, config, field, len(read_prompts(source, references=True)))


def _check_input(stage: Stage, field: str, kind: str, value: str, earlier: list[Stage]) -> None:
    # what lies on the hub cannot be checked without a network
    if value.startswith("hf:") or (kind in HUB and is_hub_id(value)):
        return
    # A path inside an output counts too, such as a checkpoint of a run.
    maker = next((one for one in earlier if Path(value).is_relative_to(one.output)), None)
    if maker is None:
        if not Path(value).exists():
            raise UserError(
                f"{field}: {value} does not exist, and no earlier stage makes it; write ${{STAGE}} to use a stage's"
                " output"
            )
        return
    makers = [name for name, command in commands.every().items() if command.makes == kind]
    if maker.command not in makers:
        kinds = f"the output of {' or '.join(makers)}" if makers else f"a {kind}"
        raise UserError(f"{field}: {value} is the output of stage {maker.name} ({maker.command}); give {kinds}")
    if field == "model.start" and maker.command == "tdm" and not stage.config.model.allow_distilled:
        raise UserError(
            f"model.start: stage {maker.name} makes a distilled model; distil last, or set model.allow_distilled: true"
        )
    stage.reads[field] = maker.name
    if stage.command == "export" and maker.command in TRAINING:
        _check_rounding(stage.config, maker)


def _check_rounding(config: ExportConfig, maker: Stage) -> None:
    """Raises UserError for an export that might be refused after all training is done.

    A merge into bfloat16 rounds the trained change. How much is lost is known only then.
    """
    merges = not config.format.startswith("lora") and config.dtype is None and not config.allow_rounding
    if merges and maker.config.model.dtype == "bfloat16":
        exact = "dtype: float32" if maker.config.lora is None else "dtype: float32, or format: lora,"
        raise UserError(
            f"format: {config.format} merges what {maker.name} trains into bfloat16. This may round too much of it"
            f" away, and the export would then be refused; set {exact} or allow_rounding: true"
        )


def _check_enough(command: str, config: Any, field: str, prompts: int) -> None:
    least = 0
    # tdm and the adaptive pool draw without replacement within a step
    if field == "prompts.train" and command == "tdm":
        least = config.batch
    if field == "prompts.train" and command in GROUPS and config.pool.kind == "adaptive":
        least = config.groups.prompts_per_step + bool(getattr(config.groups, "refill", 0))
    if prompts < least:
        raise UserError(f"{field}: has {counted(prompts, 'prompt')}, but a step takes {least} different ones; add more")


def _check_model(field: str, path: str, transformer_file: str | None) -> None:
    if not is_hub_id(path) and not (Path(path) / "model_index.json").is_file():
        raise UserError(f"{field}: {path} has no model_index.json; give a K2 pipeline directory or a hub id")
    if transformer_file is not None and not Path(transformer_file).is_file():
        raise UserError(f"model.transformer_file: {transformer_file}: no such file")
