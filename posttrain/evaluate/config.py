"""The settings of `posttrain evaluate` as data. Never imports torch."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from pydantic import model_validator

from posttrain.config.sections import ModelConfig
from posttrain.config.types import AtLeast0, AtLeast1, NonNegative, Number, Size, refusal, settings
from rewards.base import RewardSpec
from rewards.serve import ServerSpec

RAW = "krea/Krea-2-Raw"


@settings
class SuiteConfig:
    """A public benchmark in the files that it is published in; docs/evaluate.md has their list."""

    kind: str
    """Which benchmark it is."""
    path: str
    """Its file or directory."""
    judge: dict[str, Any] | None = None
    """The judge that answers its questions, with the fields of a reward's judge; null: only `rewards` score."""


@settings
class EvaluateConfig:
    """Score models, adapters, exports, endpoints or folders of images on the same prompts and noise."""

    output: str
    """Directory for images, scores, table.md, evaluation.json and report.html. What it holds already is kept: the same
    command continues where it was stopped, and more subjects or rewards can be added."""
    subjects: list[str]
    """What is scored, each as NAME=PLACE or PLACE; the first is what the others are compared with. PLACE is `base` (the
    model as it is), a run, a checkpoint or an adapter's file on it, a directory of a whole model, a folder of images,
    or the address of a server with the images API of OpenAI (http://HOST:PORT/v1, or with #MODEL)."""
    model: ModelConfig = field(default_factory=lambda: ModelConfig(path=RAW))
    prompts: str | None = None
    """JSONL file of prompts; give this or suite."""
    suite: SuiteConfig | None = None
    rewards: list[RewardSpec] = field(default_factory=list)
    servers: list[ServerSpec] = field(default_factory=list)
    first: AtLeast1 | None = None
    """Prompts to take, from the first on; null: all."""
    images: AtLeast1 = 1
    """Images of each prompt; from 2 on their diversity is measured."""
    size: Size = field(default_factory=lambda: [512, 512])
    """[height, width] in pixels."""
    steps: AtLeast1 | None = None
    """Steps from noise to image; null: 28, or 8 for a Turbo."""
    guidance: list[NonNegative] = field(default_factory=list)
    """Each in K2's convention, 0 is off; every model is drawn with each. Empty: 4.5, or 0 for a Turbo."""
    expand: dict[str, str] = field(default_factory=dict)
    """By subject: the expander that rewrites its prompts, a chat model or a run of `posttrain expander`. Rewards always
    see the prompts themselves."""
    expand_system: dict[str, str] = field(default_factory=dict)
    """By subject: a text file with the system text of its expander, where that is a chat model that was not trained
    here, such as the one that K2's repository gives. Others have posttrain's own."""
    micro_batch: AtLeast1 = 8
    """Images in one forward; images in one call of a reward are eight times as many."""
    max_tokens: AtLeast1 = 512
    """Tokens of a prompt, beyond which it is cut."""
    seed: AtLeast0 = 0
    """Seed of the noise: image i of prompt j has the same in every subject."""
    least_change: dict[str, Number] = field(default_factory=dict)
    """By reward: how much a subject's mean may differ from the first subject's at least, such as -0.02. A subject below
    it fails, and the exit code is 1."""
    shown: AtLeast0 = 12
    """Pairs of images on the page, of each subject and the first, that differ most."""

    @model_validator(mode="after")
    def _fits(self) -> EvaluateConfig:
        self.model.refuse_sequence_parallel("processes draw images of their own")
        self.model.refuse_float8()
        if not self.subjects:
            raise refusal("subjects", "name at least one: base, a run, a folder of images")
        if (self.prompts is None) == (self.suite is None):
            raise refusal("prompts", "give either prompts (a JSONL file) or suite")
        if self.model.start is not None:
            raise refusal("model.start", "has no meaning here; name that run as a subject")
        names = {reward.name for reward in self.rewards} | ({self.suite.kind} if self.suite else set())
        if not names:
            raise refusal("rewards", "name at least one, or a suite with its judge")
        for name in self.least_change:
            if name not in names:
                raise refusal(
                    "least_change", f"{name} is not a reward of this evaluation; it has {', '.join(sorted(names))}"
                )
        if self.images == 1:
            for i, reward in enumerate(self.rewards):
                if reward.group:
                    raise refusal(f"rewards[{i}].group", "compares the images of a prompt; set images to 2 or more")
        return self
