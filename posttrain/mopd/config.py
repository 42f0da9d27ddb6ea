"""The recipe of `posttrain mopd` as data. Never imports torch."""

from __future__ import annotations

import re
from dataclasses import field
from typing import Annotated, Literal

from pydantic import model_validator

from posttrain.config import metric_names
from posttrain.config.rewards import measured
from posttrain.config.sections import LoraConfig, PromptsConfig, Rewards, TrainingConfig, require_one_pass
from posttrain.config.types import (
    AtLeast0,
    AtLeast1,
    AtLeast2,
    Filled,
    NonNegative,
    Positive,
    Sizes,
    keyword_settings,
    refusal,
    settings,
)

ANCHOR = "anchor"
"""The name, among teachers, of the reference, which teaches the prompts of no teacher."""


@settings
class TeacherConfig:
    """One teacher and the prompts that it teaches. A prompt belongs to one teacher alone."""

    run: str
    """Run directory or checkpoint that trained an adapter on the student's base, or on what the student starts from; or
    a LoRA as .safetensors for that base."""
    guidance: NonNegative = 0.0
    """Its guidance, v = c + s (c - u); the student learns its effect and is drawn without. 0 saves a forward."""
    tags: list[str] = field(default_factory=list)
    """Prompts with one of these tags are its own, of prompts.train and prompts.heldout."""
    prompts: str | None = None
    """Further prompts to train on, in a file of their own; written as prompts.train is."""
    share: Positive = 1.0
    """Its images in a step, in units of `images`. Each teacher's loss has the same weight, whatever its share."""
    reward: str | None = None
    """The reward whose gain the student is to keep, measured on its held-out prompts. It scores an image by itself, and
    no group; null: the first such one of rewards."""

    @model_validator(mode="after")
    def _fits(self) -> TeacherConfig:
        if not self.tags and self.prompts is None:
            raise refusal("tags", "is empty and prompts is null, so it would teach nothing; name tags or a file")
        return self


@settings
class SamplingConfig:
    """How the student draws the trajectories that it learns on: without guidance."""

    sizes: Sizes = field(default_factory=lambda: [[512, 512]])
    """[height, width] pairs in pixels, which training steps take in turn."""
    steps: AtLeast2 = 10
    """Steps from noise to image."""
    states: AtLeast1 = 3
    """States of a trajectory at which the student is compared with its teacher, drawn without replacement."""


@settings
class LossConfig:
    """The distance of the student's velocity to its teacher's, at the student's own states."""

    weight: Literal["velocity", "kl", "mean"] = "velocity"
    """Of a state. velocity: 1, on trajectories of the ODE. kl: that of the exact KL of stochastic steps, which are then
    drawn (Flow-SDE, eta). mean: half the squared step. The last two train late steps almost alone."""
    eta: Positive = 0.7
    """kl: noise level of the steps."""
    reference: NonNegative = 0.01
    """Weight of the squared velocity distance to the reference (the weights at the start), at the same states; the
    student keeps 1 / (1 + this) of a gain at the optimum. 0 turns it off, and saves a forward."""


@keyword_settings
class MOPDConfig(TrainingConfig):
    """On-policy distillation of several teachers into one adapter (MOPD), each teaching its own prompts."""

    prompts: PromptsConfig
    """Each goes to the teacher that has one of its tags; those of no teacher to the anchor."""
    rewards: Rewards = field(default_factory=list)
    """Rewards to measure at evaluation; none is trained on, and weight, gate and heldout_only are not read."""
    teachers: Annotated[dict[str, TeacherConfig], Filled("name at least one teacher")]
    """By name. Each is an adapter in memory (K2, rank 32: 0.43 GB)."""
    anchor: NonNegative = 1.0
    """Images a step, in units of `images`, of prompts of no teacher, whose teacher is the reference; 0: such prompts
    are not used."""
    steps: AtLeast1 = 200
    """Training steps: each draws trajectories for all teachers."""
    images: AtLeast1 = 32
    """Images of a teacher in a step, over all processes together; need not divide by their number."""
    micro_batch: AtLeast1 = 8
    """Images in one forward of the model; sets memory, not the result."""
    update: Literal["cycle", "alternate"] = "cycle"
    """cycle: one update with all teachers. alternate: one after each teacher, in turn."""
    cosines_every: AtLeast0 = 50
    """Steps between measurements of how far the teachers' gradients agree, which keeps one gradient of each; 0: never.
    Only with update cycle."""
    lora: LoraConfig | None = field(default_factory=LoraConfig)
    """The student's adapter; its rank should be at least that of the teachers."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    loss: LossConfig = field(default_factory=LossConfig)

    def image_sizes(self) -> list[list[int]]:
        return self.sampling.sizes

    def images_at_once(self) -> int:
        return self.micro_batch

    def copies(self) -> int:
        return len(self.teachers)  # adapters without an optimiser, about as large as the student's

    def images_of(self, name: str) -> int:
        """Images of a teacher, or of the anchor, in a step."""
        share = self.anchor if name == ANCHOR else self.teachers[name].share
        # At least one image, since a teacher without any would have no loss to take a mean of.
        return max(1, round(self.images * share)) if share else 0

    def single_rewards(self) -> list[str]:
        """The rewards that score each image by itself, and so the prompts of each teacher."""
        return measured(self.rewards, 0)

    def metric_names(self) -> list[str]:
        single = self.single_rewards()
        names = metric_names.names(measured(self.rewards, self.eval.groups), self.eval.guidance, self.eval.groups)
        names += [f"retention/{name}" for name in self.teachers] if single else []
        return [*names, *(f"{ANCHOR}/{name}" for name in single)]

    @model_validator(mode="after")
    def _fits(self) -> MOPDConfig:
        if self.lora is None:
            raise refusal("lora", "is null, but teachers are adapters beside the student's; give rank and alpha")
        if self.sampling.states > self.sampling.steps - (self.loss.weight == "kl"):
            raise refusal(
                "sampling.states", f"is {self.sampling.states}, but {self.sampling.steps} steps have fewer; lower it"
                " (with loss.weight kl the last step has no noise and is left out)",
            )  # fmt: skip
        # A reward of groups cannot say what one prompt's image has gained.
        known = self.single_rewards()
        owners: dict[str, str] = {}
        for name, teacher in self.teachers.items():
            # Names are parts of metrics (distance/NAME, cosine/NAME/NAME) and of roles.
            if not re.fullmatch(r"[A-Za-z]\w*", name) or name == ANCHOR:
                raise refusal(f"teachers.{name}", "names a teacher: use letters, digits and _, and not `anchor`")
            if teacher.reward is not None and teacher.reward not in known:
                raise refusal(
                    f"teachers.{name}.reward",
                    f"'{teacher.reward}' is none of rewards that score an image by itself: {known}",
                )
            for tag in teacher.tags:
                if owners.setdefault(tag, name) != name:
                    raise refusal(f"teachers.{name}.tags", f"'{tag}' is {owners[tag]}'s too; a prompt has one teacher")
        if self.eval.guidance[0] != 0:
            raise refusal(
                "eval.guidance", f"begins with {self.eval.guidance[0]:g}; the student is measured without: 0.0"
            )
        require_one_pass(self.optim, "after an update the trajectories are those of an older student; use 1")
        return self
