"""A pipeline's stages as they will run: settings resolved, outputs wired to inputs, and all of it checked beforehand.

No weights are read and torch is not imported: paths must be there or be made by an earlier stage, prompt files are
read, and rewards are imported and not made.
"""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain import cli
from posttrain.config.recipe import read_recipe, suggestion
from posttrain.config.sections import ExportConfig
from posttrain.errors import UserError
from posttrain.pipeline.config import PipelineConfig, StageConfig
from prompts.records import read_prompts
from rewards.base import RewardSpec
from rewards.load import check_addresses, check_rewards
from rewards.urls import check_urls

TRAINING = ("stpo", "grpo", "tdm")
EXPANDER = ("expander data", "expander sft", "expander gdpo")
COMMANDS = ("pairs", *TRAINING, "export", *EXPANDER)
TAKES = {
    "model.start": TRAINING,
    "policy": TRAINING,
    "source": TRAINING,
    "pairs.train": ("pairs",),
    "data": ("expander data",),
    "model": (),
    "model.path": ("expander sft",),
    "renderer.path": ("export",),
}
"""Settings that hold what another stage made, and the commands that make such a thing."""
INPUTS = {
    "pairs": ["model.start", "policy"],
    "stpo": ["model.start", "pairs.train"],
    "grpo": ["model.start"],
    "tdm": ["model.start"],
    "export": ["source"],
    "expander data": [],
    "expander sft": ["data", "model"],
    "expander gdpo": ["model.path", "renderer.path"],
}
HUB = ("model", "model.path", "renderer.path")
"""Inputs that may be a hub id."""
PROMPTS = {"pairs": ["prompts"], "stpo": ["heldout"], "export": [], "expander data": [], "expander sft": []}
"""Prompt files of the commands that have others than most."""
REFERENCE = re.compile(r"\$\{([^}]*)\}")


@dataclass
class Stage:
    """A stage with its settings checked."""

    name: str
    command: str
    config: Any
    """The dataclass of the command's settings."""
    arguments: list[str]
    """Behind the command's name."""
    output: Path
    reads: dict[str, str]
    """Setting -> the stage that makes what it names."""

    @property
    def settings(self) -> dict[str, Any]:
        """As JSON holds them."""
        return json.loads(json.dumps(dataclasses.asdict(self.config)))


def resolve(config: PipelineConfig) -> list[Stage]:
    """Raises UserError for the first stage in which something is wrong; its name stands before the message."""
    stages: list[Stage] = []
    for stage in config.stages:
        try:
            stages.append(_resolve(stage, stages, Path(config.output), config.seed))
        except UserError as error:
            raise UserError(f"stage {stage.name}: {str(error).replace('command line: ', 'set: ')}") from error
    return stages


def _resolve(stage: StageConfig, earlier: list[Stage], folder: Path, seed: int | None) -> Stage:
    known = [name for name in COMMANDS if name in cli.COMMANDS]
    if stage.command not in known:
        raise UserError(f"command: '{stage.command}' cannot be a stage{suggestion(stage.command, known)}")
    if "output" in stage.set:
        raise UserError(f"set.output: is the pipeline's business ({folder / stage.name}); leave it out")
    outputs = {one.name: str(one.output) for one in earlier}
    fields = {field.name for field in dataclasses.fields(cli.COMMANDS[stage.command].config)}
    given = ({"seed": seed} if seed is not None and "seed" in fields else {}) | stage.set
    settings = {key: _filled(value, f"set.{key}", outputs) for key, value in given.items()}
    output = folder / stage.name
    if stage.command == "export":
        merged = {k: v for path in stage.recipes for k, v in read_recipe(path).items()} | settings
        if merged.get("format", "diffusers") != "diffusers":
            output = output.with_suffix(".safetensors")
    arguments = [word for path in stage.recipes for word in ("--config", path)]
    arguments += [f"--output={output}", *(f"--{key}={_as_text(value)}" for key, value in settings.items())]
    config, _ = cli.load_config(stage.command, arguments)
    made = Stage(stage.name, stage.command, config, arguments, output, {})
    _check_inputs(made, earlier)
    return made


def _filled(value: Any, where: str, outputs: dict[str, str]) -> Any:
    """With the outputs of earlier stages in the place of ${NAME}."""
    if isinstance(value, dict):
        return {key: _filled(item, f"{where}.{key}", outputs) for key, item in value.items()}
    if isinstance(value, list):
        return [_filled(item, where, outputs) for item in value]
    if not isinstance(value, str):
        return value
    for name in REFERENCE.findall(value):
        if name not in outputs:
            known = ", ".join(outputs) or "none"
            raise UserError(f"{where}: ${{{name}}}: no stage of that name comes before; those that do: {known}")
    return REFERENCE.sub(lambda match: outputs[match[1]], value)


def _as_text(value: Any) -> str:
    """A setting as an option's value."""
    return value if isinstance(value, str) else json.dumps(value)


# ---- what a stage reads ---------------------------------------------------------------------------------------


def _check_inputs(stage: Stage, earlier: list[Stage]) -> None:
    """Raises UserError for an input that is not there and that no earlier stage makes; notes who makes what."""
    config, command = stage.config, stage.command
    if command in ("pairs", *TRAINING):
        _check_model("model.path", config.model.path, config.model.transformer_file)
    if command == "expander gdpo" and not any(Path(config.renderer.path) == one.output for one in earlier):
        _check_model("renderer.path", config.renderer.path, None)
    servers = [server.name for server in getattr(config, "servers", [])]
    if command in ("pairs", *TRAINING, "expander gdpo"):
        check_rewards(config.rewards, servers)
    if command == "expander gdpo":
        check_rewards([RewardSpec(f"safety {check.name}", check.function) for check in config.safety], servers)
        check_urls(config.renderer.urls, "renderer.urls")
    for name in ("writer", "checker"):
        if (writer := getattr(config, name, None)) is not None:
            check_addresses({"base_urls": writer.base_urls}, servers, name)
    inputs = {field: _at(config, field) for field in INPUTS[command]}
    for field, value in inputs.items():
        if value is None or value.startswith("hf:") or (field in HUB and _on_hub(value)):
            continue
        maker = next((one for one in earlier if Path(value).is_relative_to(one.output)), None)
        if maker is None:
            if not Path(value).exists():
                raise UserError(
                    f"{field}: {value} is not there, and no stage before makes it; write ${{STAGE}} for one"
                )
            continue
        if maker.command not in TAKES[field]:
            kinds = f"one of {' or '.join(TAKES[field])}" if TAKES[field] else "a chat model"
            raise UserError(f"{field}: {value} is what stage {maker.name} makes ({maker.command}); give {kinds}")
        if field == "model.start" and maker.command == "tdm" and not config.model.allow_distilled:
            raise UserError(f"model.start: stage {maker.name} makes a distilled model; distil last, or set"
                            " model.allow_distilled: true")  # fmt: skip
        stage.reads[field] = maker.name
        if command == "export":
            _check_rounding(config, maker)
    for field in PROMPTS.get(command, ["prompts.train", "prompts.heldout"]):
        source = _at(config, field)
        if not source.startswith("hf:"):
            _check_enough(command, config, field, len(read_prompts(source)))


def _check_rounding(config: ExportConfig, maker: Stage) -> None:
    """Raises UserError for an export that may be refused when all has been trained: what is merged into bfloat16 is
    rounded, by how much is only known then."""
    merges = not config.format.startswith("lora") and config.dtype is None and not config.allow_rounding
    if merges and maker.config.model.dtype == "bfloat16":
        exact = "dtype: float32" if maker.config.lora is None else "dtype: float32, or format: lora,"
        raise UserError(
            f"format: {config.format} merges what {maker.name} trains into bfloat16, which may lose too much of it, and"
            f" is refused then; set {exact} or allow_rounding: true"
        )


def _check_enough(command: str, config: Any, field: str, prompts: int) -> None:
    """A step takes different prompts where it distils and where a pool chooses them."""
    least = 0
    if field == "prompts.train" and command == "tdm":
        least = config.batch
    if field == "prompts.train" and command == "grpo" and config.pool.kind == "adaptive":
        least = config.groups.prompts_per_step
    if prompts < least:
        raise UserError(f"{field}: holds {prompts} prompts, and a step takes {least} different ones; add some")


def _at(config: Any, field: str) -> Any:
    """The value of a field by its path."""
    for part in field.split("."):
        config = getattr(config, part)
    return config


def _on_hub(path: str) -> bool:
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) is not None and not Path(path).parent.exists()


def _check_model(field: str, path: str, transformer_file: str | None) -> None:
    if not _on_hub(path) and not (Path(path) / "model_index.json").is_file():
        raise UserError(f"{field}: {path} has no model_index.json; give a K2 pipeline directory, or a hub id")
    if transformer_file is not None and not Path(transformer_file).is_file():
        raise UserError(f"model.transformer_file: {transformer_file}: no such file")
