"""The recipe of `posttrain run` as data. Never imports torch."""

from __future__ import annotations

import re
from dataclasses import field
from typing import Annotated, Any

from pydantic import model_validator

from posttrain.config.types import AtLeast0, Filled, Positive, refusal, settings


@settings
class StageConfig:
    """One command of a pipeline."""

    name: str
    """Name of the stage, and of its directory in the pipeline's output: letters, digits, _ and -."""
    command: str
    """What it runs: sft, pairs, stpo, grpo, nft, mopd, tdm, merge, export, expander data, expander sft or gdpo."""
    recipes: list[str] = field(default_factory=list)
    """Its recipes, as after --config; of several, later ones win."""
    set: dict[str, Any] = field(default_factory=dict)
    """Settings that win over the recipes', by their path, such as optim.lr. ${NAME} in a text is the output of the
    stage NAME, which must come before. Its own output is not set here: it is in the pipeline's."""


@settings
class PipelineConfig:
    """Carry out stages in their order, each in a process of its own, and report on them as one."""

    output: Annotated[str, Filled("name a directory for the pipeline")]
    """Directory of the pipeline, created: a directory for each stage, stages.json and index.html. One that holds a
    pipeline already needs --resume."""
    stages: Annotated[list[StageConfig], Filled("name at least one stage")]
    """What to do, first to last."""
    launch: list[str] = field(default_factory=list)
    """Words that start a command of posttrain, such as [torchrun, --nproc-per-node, "8", -m, posttrain.cli], for all
    stages but export, merge and expander data; none: this Python, one process."""
    gpu_gib: Positive | None = None
    """Memory in GiB of each GPU, for the dry run, which estimates what each stage needs of it. null: no need is
    estimated, and time is that of the measured GPU."""
    price: Positive | None = None
    """Price of a GPU hour in any currency, for the dry run, which then prints each stage's cost; null: it does not."""
    measured: str | None = None
    """Measurement that the dry run estimates hours from: a bench.json of posttrain bench, or the name of a card whose
    measurements ship with the package; null: h200."""
    seed: AtLeast0 | None = None
    """Seed of every stage that has one, unless its `set` names another; null: as their recipes say."""

    @model_validator(mode="after")
    def _fits(self) -> PipelineConfig:
        names: set[str] = set()
        for i, stage in enumerate(self.stages):
            if not re.fullmatch(r"[A-Za-z0-9_][\w-]*", stage.name):
                raise refusal(
                    f"stages[{i}].name", f"is '{stage.name}'; it names a directory: use letters, digits, _ and -"
                )
            # Both would have one directory.
            if stage.name in names:
                raise refusal(f"stages[{i}].name", f"'{stage.name}' is used twice; give each its own name")
            names.add(stage.name)
        return self
