"""The recipe of `posttrain tdm` as data. Never imports torch."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, ClassVar, Literal

from pydantic import Strict, model_validator

from posttrain.config import metric_names
from posttrain.config.rewards import measured
from posttrain.config.sections import (
    MOST_STEPS,
    EvalConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    PromptsConfig,
    Rewards,
    TrainingConfig,
    require_one_pass,
)
from posttrain.config.types import (
    AtLeast0,
    AtLeast1,
    Float,
    NonNegative,
    Positive,
    Range,
    Sizes,
    keyword_settings,
    refusal,
    settings,
)
from posttrain.errors import counted


@settings
class StudentConfig:
    """The few-step model. It is drawn without guidance, on the schedule of a Turbo checkpoint (shift 1.15)."""

    steps: list[Annotated[int, Range(1, MOST_STEPS)]] = field(default_factory=lambda: [8])
    """Steps from noise to image. Of several each trained image takes one, drawn evenly, and evaluation
    draws with each; the first is the one that previews show and whose figures have no suffix (oracle@4steps). A student
    of several is a compromise, as it is not told which it takes: see docs/tdm.md."""
    midpoints: bool = True
    """Judge a step where it would be anywhere on its way to the next time, instead of there only: a regulariser. The
    last step is always judged at its end, the image. A student of several numbers of steps does better without."""
    levels: Literal["separate", "joint"] = "separate"
    """Noise levels at which a step is judged. separate: those below its own time, so that each level belongs to one
    step. joint: all above the point it leads to, which the fake score must then know for all steps at once."""
    distance: Literal["square", "huber"] = "square"
    """Distance to where the scores point. huber: nearly the absolute value, which no element can dominate."""

    @model_validator(mode="after")
    def _fits(self) -> StudentConfig:
        if not self.steps or len(set(self.steps)) < len(self.steps):
            raise refusal("steps", f"is {self.steps}; name different numbers of steps, such as [8] or [8, 4]")
        return self


@settings
class TeacherConfig:
    """The model before training, many steps with guidance: what the student is to draw like."""

    guidance: NonNegative = 4.5
    """K2's convention, v = c + s (c - u); 0 is off. A model that was trained with rewards and without guidance
    wants less: find the best for it on held-out prompts first."""


@settings
class FakeConfig:
    """The fake score: an adapter like the student's, which follows what the student draws."""

    rate: Positive = 5.0
    """Its learning rate in units of optim.lr."""
    updates: AtLeast1 = 1
    """Its updates for each of the student's. Raise it if eval/fake_loss rises while the student trains."""
    warmup: AtLeast0 = 50
    """First training steps in which only the fake score learns."""
    target: Literal["reference", "ambient"] = "reference"
    """What it is taught. reference: the published code's target, importance weights included. ambient: one whose
    optimum is the exact score of the student's points, at more variance; posttrain/tdm/losses.py has both."""
    weight: Literal["uniform", "min_snr"] = "uniform"
    """Weight of a noise level: of velocity errors, all alike; or min(SNR, 5) of errors of the clean image."""
    clip: Annotated[tuple[Float, Float], Strict(False)] = (0.2, 5.0)
    """Least and greatest importance weight, 0 <= least <= 1 <= greatest; [1, 1] turns them off."""

    @model_validator(mode="after")
    def _fits(self) -> FakeConfig:
        least, greatest = self.clip
        if not 0 <= least <= 1 <= greatest:
            raise refusal(
                "clip", f"is [{least:g}, {greatest:g}]; the weights lie around 1: use 0 <= least <= 1 <= greatest"
            )
        return self


@keyword_settings
class TDMConfig(TrainingConfig):
    """Distil K2 Raw into a few steps without guidance (TDM), from prompts alone."""

    adapters: ClassVar[int] = 2  # student and fake score

    model: ModelConfig
    """The teacher. It must be a Raw checkpoint; start names a run of grpo or stpo to continue from."""
    prompts: PromptsConfig
    rewards: Rewards = field(default_factory=list)
    """Rewards to measure at evaluation; none is trained on, and weight, gate and heldout_only are not read."""
    steps: AtLeast1 = 1000
    """Training steps, those of fake.warmup included."""
    batch: AtLeast1 = 64
    """Images in a training step, each of another prompt, over all processes together; need not divide by their
    number. There must be as many prompts."""
    micro_batch: AtLeast1 = 8
    """Images in one forward of the model; sets memory, not the result."""
    sizes: Sizes = field(default_factory=lambda: [[512, 512]])
    """[height, width] pairs in pixels, which training steps take in turn; evaluation takes the
    first."""
    lora: LoraConfig | None = field(default_factory=LoraConfig)
    """The student's adapter, with rank, alpha and targets; the fake score has one like it, and the
    teacher is the model without it. null: student and fake score are all weights but the text fusion's, of copies;
    wants an optim.lr of 1e-6 to 1e-5, 32 bytes a weight for the two (K2: 410 GB), and another copy in model.dtype
    (26 GB)."""
    student: StudentConfig = field(default_factory=StudentConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    fake: FakeConfig = field(default_factory=FakeConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(betas=(0.0, 0.95), ema=0.99))
    """The student's, and, at fake.rate times its learning rate and without average, the fake score's; passes must be
    1. The average is evaluated and exported, and never trained with."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """steps are the teacher's, whose images the student's are compared with; guidance must be [0.0], the student's.
    Figures are also those of posttrain/tdm/train.py (to_teacher/saturation, fake_loss, ...)."""

    def image_sizes(self) -> list[list[int]]:
        return self.sizes

    def images_at_once(self) -> int:
        return self.micro_batch

    def eval_draws(self) -> list[tuple[int, float]]:
        return [(steps, 0.0) for steps in self.student.steps]

    def metric_names(self) -> list[str]:
        rewards = measured(self.rewards, self.eval.groups)
        distilled = metric_names.distilled_names(rewards, self.student.steps, self.eval.groups)
        return [*metric_names.names([], self.eval.guidance, self.eval.groups), *distilled]

    @model_validator(mode="after")
    def _fits(self) -> TDMConfig:
        # The other methods may train a distilled model; here it is the teacher.
        if self.model.allow_distilled:
            raise refusal("model.allow_distilled", "a teacher must be able to use many steps; give the Raw checkpoint")
        # The student learns from the fake score, which needs a start.
        if self.fake.warmup >= self.steps:
            raise refusal(
                "fake.warmup",
                f"is {self.fake.warmup} of {counted(self.steps, 'step')}, so no student is trained; lower it",
            )
        require_one_pass(self.optim, "each update draws its own times and noise; use 1")
        # eval's guidance is for what is drawn, and a student is drawn without.
        if self.eval.guidance != [0.0]:
            raise refusal("eval.guidance", "is that of a student, which has none: leave it out; see teacher.guidance")
        return self
