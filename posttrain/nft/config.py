"""The recipe of `posttrain nft` as data. Never imports torch."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import model_validator

from posttrain.config import metric_names
from posttrain.config.groups import GroupTrainingConfig
from posttrain.config.sections import LoraConfig, require_one_pass
from posttrain.config.types import (
    AtLeast0,
    AtLeast1,
    AtLeast2,
    Float,
    NonNegative,
    Positive,
    Range,
    Sizes,
    keyword_settings,
    refusal,
    settings,
)


@settings
class SamplingConfig:
    """How images are drawn in training: by ODE, each from its own noise, without guidance."""

    sizes: Sizes = field(default_factory=lambda: [[512, 512]])
    """[height, width] pairs in pixels; a group has one size, drawn evenly."""
    steps: AtLeast2 = 10
    """Steps from noise to image. Evaluations draw in eval.steps and, without guidance, in this number too, whose
    figures have it as a suffix (oracle@10steps)."""


@settings
class OldConfig:
    """The old policy, which draws the images and which the loss stays near: after update i it becomes d old +
    (1 - d) policy with d = min(max, ramp (i - flat)), at least 0. It is then d / (1 - d) updates behind."""

    flat: AtLeast0 = 0
    """First updates after which it is the policy itself."""
    ramp: NonNegative = 0.001
    """How much d rises with each update."""
    max: Annotated[Float, Range(0, below=1)] = 0.5
    """The largest d. 0: the old policy is always the policy. This needs no second adapter and no forward of it, and
    beta has no effect."""


@settings
class LossConfig:
    """The forward-process loss: velocities at images that are noised again."""

    form: Literal["nft", "awm"] = "nft"
    """nft: an implicit positive and negative policy (DiffusionNFT). awm: flow matching weighted by the advantage (AWM);
    the same gradient where the policy is the old one, another curvature."""
    beta: Positive = 1.0
    """How far the positive and the negative policy are from the old one, in units of the policy's own distance. Below 1
    the loss lets the policy go further in each update."""
    max_advantage: Positive = 5.0
    """Advantages are clipped to plus or minus this, which are then an optimality of 1 and 0. Times beta it is the
    weight of the distance to the old policy."""
    anchor: Positive = 5.0
    """awm: weight of the distance to the old policy, at least max_advantage: with less, images with low advantages have
    no optimum."""
    times: AtLeast1 = 9
    """Noise levels that each image is trained at: of those of sampling.steps, without replacement."""
    levels: Literal["all", "noisier"] = "all"
    """Which of them are drawn from. noisier: the first half of the steps, which decide on content; a few of all levels
    have damaged images of K2-nano."""
    shared: bool = True
    """One draw of noise levels and noise for all images of a group, so that their difference is less noisy. false: one
    for each image."""
    kl: NonNegative = 0.01
    """Weight of the squared velocity distance to the reference (the weights at the start: adapter off); 0
    turns it off, and saves a forward."""


@keyword_settings
class NFTConfig(GroupTrainingConfig):
    """Reinforcement learning of K2 on the forward process (negative-aware finetuning, DiffusionNFT), without
    guidance, log-probs or stochastic steps."""

    lora: LoraConfig | None = field(default_factory=LoraConfig)
    """The adapter to train. null: train all weights but the text fusion's; wants an optim.lr of 1e-6 to 1e-5, and 16
    bytes a weight (K2: 205 GB), with old.max > 0 another 4 (51 GB), with loss.kl > 0 another copy in model.dtype (K2,
    bfloat16: 26 GB)."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    old: OldConfig = field(default_factory=OldConfig)
    loss: LossConfig = field(default_factory=LossConfig)

    def image_sizes(self) -> list[list[int]]:
        return self.sampling.sizes

    def copies(self) -> int:
        return int(self.old.max > 0)  # the old policy

    def max_advantage(self) -> float:
        return self.loss.max_advantage

    def trained_levels(self) -> int:
        """How many noise levels there are to draw from."""
        # Those that the trajectory itself has visited, from t = 1 on.
        steps = self.sampling.steps
        return steps if self.loss.levels == "all" else (steps + 1) // 2

    def eval_draws(self) -> list[tuple[int, float]]:
        return [*super().eval_draws(), (self.sampling.steps, 0.0)]

    def rollout_suffix(self) -> str:
        """Of the metrics of images that are drawn as in training."""
        return metric_names.steps_suffix(self.sampling.steps, [self.eval.steps])

    def suffixes(self) -> list[str]:
        return [*super().suffixes(), self.rollout_suffix()]

    @model_validator(mode="after")
    def _fits(self) -> NFTConfig:
        if self.model.allow_distilled:
            raise refusal(
                "model.allow_distilled",
                "nft trains at noise levels that a few-step model has not; give a Raw checkpoint",
            )
        levels = self.trained_levels()
        if self.loss.times > levels:
            raise refusal(
                "loss.times",
                f"is {self.loss.times}, but {self.sampling.steps} steps have {levels} noise levels to draw from; lower"
                " it or raise sampling.steps",
            )
        if self.loss.form == "awm" and self.loss.anchor < self.loss.max_advantage:
            raise refusal(
                "loss.anchor",
                f"is {self.loss.anchor:g}, below loss.max_advantage ({self.loss.max_advantage:g}): the loss of images"
                " with the least advantage has no minimum; raise it",
            )
        if self.eval.steps == self.sampling.steps:
            raise refusal(
                "eval.steps",
                f"is {self.eval.steps}, as sampling.steps: a policy that suits one sampler would not show"
                "; use another number",
            )
        require_one_pass(self.optim, "after an update the images are those of an older policy; use 1, and more steps")
        return self
