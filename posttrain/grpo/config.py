"""The recipe of `posttrain grpo` as data. Never imports torch."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import model_validator

from posttrain.config.groups import GroupsConfig as SharedGroups
from posttrain.config.groups import GroupTrainingConfig
from posttrain.config.groups import RolloutConfig as SharedRollout
from posttrain.config.sections import LoraConfig
from posttrain.config.types import (
    AtLeast0,
    AtLeast1,
    AtLeast2,
    NonNegative,
    OpenShare,
    Positive,
    Range,
    Sizes,
    keyword_settings,
    refusal,
    settings,
)
from posttrain.errors import counted


@settings
class SamplingConfig:
    """How images are drawn in training. There is no guidance here; evaluation sets its own."""

    sizes: Sizes = field(default_factory=lambda: [[512, 512]])
    """[height, width] pairs in pixels; a group has one size, drawn evenly."""
    steps: AtLeast2 = 8
    """Steps from noise to image. The last is always deterministic."""
    dynamics: Literal["flow", "dance", "cps"] = "flow"
    """How noise enters an SDE step: Flow-SDE, Dance-SDE or coefficient-preserving sampling (cps). With many steps flow
    and dance draw what the ODE of evaluation draws; cps does not, its images vary less: at eta 0.7 and 28 steps, 0.39
    where the ODE has a standard deviation of 0.46, on Gaussian data of 0.5."""
    eta: Positive = 0.7
    """Noise level. Above 0.7, Flow-SDE adds visible excess noise; for cps 1 is the most."""
    window: int | None = 2
    """Number of SDE steps, 1 to steps - 1, the rest are ODE steps; null: all but the last."""
    window_start: AtLeast0 | Literal["random", "sliding"] = "random"
    """First SDE step, counted from 0; or `random`: drawn for each training step within the first half; or
    `sliding`: 0 at first, then one later every window_every steps, and 0 again past the first half (MixGRPO)."""
    window_every: AtLeast1 = 25
    """Training steps that a sliding window stays where it is."""

    @model_validator(mode="after")
    def _fits(self) -> SamplingConfig:
        if self.dynamics == "cps" and self.eta > 1:
            raise refusal("eta", f"is {self.eta}; with cps use at most 1")
        most = self.steps - 1  # the last step has no noise
        if self.window is not None and not 1 <= self.window <= most:
            raise refusal(
                "window",
                f"is {self.window}, but of {counted(self.steps, 'step')} 1 to {most} can have noise (the last has"
                " none); shorten it or raise sampling.steps",
            )
        # Without a window every step but the last has noise.
        if self.window_start == "sliding" and self.window is None:
            raise refusal("window_start", "nothing can slide when sampling.window is null; set a window")
        if isinstance(self.window_start, str):
            return self
        if self.window is None and self.window_start > 0:
            raise refusal("window_start", "has no meaning when sampling.window is null; set a window")
        if self.window_start + (self.window or most) > most:
            raise refusal(
                "window_start",
                f"is {self.window_start}, so a window of {self.window} would end after step {most - 1}; start it"
                " earlier or shorten it",
            )
        return self


@settings
class GroupsConfig(SharedGroups):
    """How many images a training step draws, over all processes together."""

    refill: AtLeast0 = 0
    """Most groups that a step draws in addition, in place of those whose images score alike, from other prompts of the
    pool; 0: none. A step then takes as long as its flat groups make it, and its batch teaches more. Wants pool.kind
    adaptive and rollout.ahead 0."""


@settings
class RolloutConfig(SharedRollout):
    """When, where and in which precision a step's images are drawn."""

    ahead: Literal[0, 1] = 0
    """0: each step waits for its scores. 1: the images of the next step are drawn before this one's update, so that
    judges score them while the policy trains; they are then one update old, and the ratio is to the policy that drew
    them. Takes another copy of what is trained, 4 bytes a weight. Use 1 where `score_wait` is a good part of a step."""
    gpus: AtLeast0 = 0
    """Processes, one a GPU, that only draw, of those that the launcher starts; the others only train on what they drew.
    0: each does both, which uses all GPUs evenly. Wants rollout.ahead 1, and neither FSDP2 nor ZeRO."""
    keep_graphs: bool = False
    """Keeps what backward needs of the stochastic steps from drawing until the update, whose first pass then makes no
    forward. Changes no number. Takes the activations of all images and stochastic steps that a process draws in a
    step, so it is for small models. After a lack of memory a run goes on without it."""

    @model_validator(mode="after")
    def _fits(self) -> RolloutConfig:
        if self.keep_graphs and self.ahead:
            raise refusal("keep_graphs", "is for images of the policy that trains; set it to false, or ahead: 0")
        if self.keep_graphs and self.quantize:
            raise refusal("keep_graphs", "trains on steps as they are drawn, but not in fp8; set it to false")
        if self.gpus and not self.ahead:
            raise refusal("gpus", "GPUs that only draw would wait for each update; set rollout.ahead: 1")
        return self


@settings
class LossConfig:
    """The clipped objective. Log-probs are means over latent elements, hence the small clips.

    With optim.passes 1 and rollout.ahead 0 the policy that trains is the one that sampled, so all ratios are 1 and
    nothing is clipped: the smaller clip is then only how far from 1 a ratio may be before the run is ended.
    """

    clip_low: OpenShare = 1e-4
    """The ratio is clipped below at 1 - clip_low. It acts from the second of optim.passes on, and with
    rollout.ahead."""
    clip_high: Positive = 1e-4
    """The ratio is clipped above at 1 + clip_high. It acts from the second of optim.passes on, and with
    rollout.ahead."""
    max_weight: Annotated[float, Range(1, why="which is the ratio of a policy to itself")] | None = None
    """Truncated importance weights in place of the clips: each sample's gradient is weighted by its ratio, at most by
    this. null: ratios are clipped."""
    kl: NonNegative = 0.01
    """Weight of the squared velocity distance to the reference (the weights at the start: adapter off); 0
    turns it off. With ratio guard each step's distance is weighted as its objective is."""
    ratio: Literal["plain", "guard"] = "guard"
    """plain: exp of the log-prob difference. guard: recentred, and rescaled and weighted so that all steps of the
    schedule are equally sensitive to the velocity."""
    max_advantage: Positive = 5.0
    """Advantages are clipped to plus or minus this."""


@keyword_settings
class GRPOConfig(GroupTrainingConfig):
    """Reinforcement learning of K2 with groups of images (GRPO), without guidance."""

    lora: LoraConfig | None = field(default_factory=LoraConfig)
    """The adapter to train. null: train all weights but the text fusion's; wants an optim.lr of 1e-6 to 1e-5, and 16
    bytes a weight (K2: 205 GB), with loss.kl > 0 another copy in model.dtype (K2, bfloat16: 26 GB), with optim.ema 4
    bytes more (K2: 51 GB)."""
    groups: GroupsConfig = field(default_factory=GroupsConfig)  # type: ignore[assignment]
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)  # type: ignore[assignment]
    loss: LossConfig = field(default_factory=LossConfig)

    def image_sizes(self) -> list[list[int]]:
        return self.sampling.sizes

    def copies(self) -> int:
        return self.rollout.ahead  # the policy that has drawn the images at hand

    def max_advantage(self) -> float:
        return self.loss.max_advantage

    @model_validator(mode="after")
    def _fits(self) -> GRPOConfig:
        if self.model.float8 is not None:
            raise refusal("model.float8", "would make ratios of the noise of 8 bits; leave it out for grpo")
        self._check_refill()
        self._check_rollout()
        if self.loss.max_weight is not None and self.optim.passes == 1 and not self.rollout.ahead:
            raise refusal(
                "loss.max_weight",
                "has no effect where all ratios are 1; set rollout.ahead: 1 or optim.passes: 2, or remove it",
            )
        return self

    def _check_refill(self) -> None:
        if not self.groups.refill:
            return
        if self.pool.kind != "adaptive":
            raise refusal("groups.refill", "draws from the prompt pool; set pool.kind: adaptive, or groups.refill: 0")
        if self.rollout.ahead:
            # A step's scores are known after the next step is drawn, by a policy that may be gone by then.
            raise refusal("groups.refill", "needs a step's scores before its update begins; set rollout.ahead: 0")

    def _check_rollout(self) -> None:
        if self.model.sequence_parallel > 1:
            for name in ("gpus", "keep_graphs"):
                if getattr(self.rollout, name):
                    raise refusal(f"rollout.{name}", "does not go with model.sequence_parallel; leave one of them out")
        if self.rollout.quantize is not None and self.rollout.ahead:
            # The policy that drew is gone when its exact log-probs could be computed.
            why = "needs the policy that draws to be the one that trains; set rollout.ahead: 0"
            raise refusal("rollout.quantize", f"fp8 {why}")
