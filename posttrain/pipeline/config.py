"""The recipe of `posttrain run` as data; see config.py. Never imports torch."""

from __future__ import annotations

from dataclasses import dataclass, field

# Not Any: jsonargparse would make the classes that settings name.
Setting = bool | int | float | str | list | dict | None


@dataclass
class StageConfig:
    """One command of a pipeline."""

    name: str
    """Name of the stage, and of its directory in the pipeline's output: letters, digits, _ and -."""
    command: str
    """What it runs: pairs, stpo, grpo, tdm, export, expander data, expander sft or expander gdpo."""
    recipes: list[str] = field(default_factory=list)
    """Its recipes, as after --config; of several, later ones win."""
    set: dict[str, Setting] = field(default_factory=dict)
    """Settings that win over the recipes', by their path, such as optim.lr. ${NAME} in a text is the output of the
    stage NAME, which must come before. Its own output is not set here: it is in the pipeline's."""


@dataclass
class PipelineConfig:
    """Carry out stages in their order, each in a process of its own, and report on them as one."""

    output: str
    """Directory of the pipeline, created: a directory for each stage, stages.json and index.html. One that holds a
    pipeline already needs --resume."""
    stages: list[StageConfig]
    """What to do, first to last."""
    launch: list[str] = field(default_factory=list)
    """Words that start a command of posttrain, such as [torchrun, --nproc-per-node, "8", -m, posttrain.cli], for all
    stages but export and expander data; none: this Python, one process."""
    gpu_gib: float | None = None
    """Memory in GiB of each GPU, > 0, for the dry run, which estimates what each stage needs of it; null: none is."""
    seed: int | None = None
    """Seed of every stage that has one, unless its `set` names another, >= 0; null: as their recipes say."""
