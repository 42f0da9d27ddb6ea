"""The recipe of `posttrain tdm` as data; see config.py. Never imports torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from posttrain.config.sections import (
    CheckpointConfig,
    EvalConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    PromptsConfig,
    TrackConfig,
)
from rewards.base import RewardSpec
from rewards.serve import ServerSpec

MOST_STEPS = 16


@dataclass
class StudentConfig:
    """The few-step model. It is drawn without guidance, on the schedule of a Turbo checkpoint (shift 1.15)."""

    steps: list[int] = field(default_factory=lambda: [8])
    """Steps from noise to image, each 1 to 16. Of several each trained image takes one, drawn evenly, and evaluation
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


@dataclass
class TeacherConfig:
    """The model before training, many steps with guidance: what the student is to draw like."""

    guidance: float = 4.5
    """K2's convention, v = c + s (c - u), >= 0; 0 is off. A model that was trained with rewards and without guidance
    wants less: find the best for it on held-out prompts first."""


@dataclass
class FakeConfig:
    """The fake score: an adapter like the student's, which follows what the student draws."""

    rate: float = 5.0
    """Its learning rate in units of optim.lr, > 0."""
    updates: int = 1
    """Its updates for each of the student's, >= 1. Raise it if eval/fake_loss rises while the student trains."""
    warmup: int = 50
    """First training steps in which only the fake score learns, >= 0."""
    target: Literal["reference", "ambient"] = "reference"
    """What it is taught. reference: the published code's target, importance weights included. ambient: one whose
    optimum is the exact score of the student's points, at more variance; posttrain/tdm/losses.py has both."""
    weight: Literal["uniform", "min_snr"] = "uniform"
    """Weight of a noise level: of velocity errors, all alike; or min(SNR, 5) of errors of the clean picture."""
    clip: tuple[float, float] = (0.2, 5.0)
    """Least and greatest importance weight, 0 <= least <= 1 <= greatest; [1, 1] turns them off."""


@dataclass
class TDMConfig:
    """Distil K2 Raw into a few steps without guidance (TDM), from prompts alone."""

    output: str
    """Run directory, created; one that holds a run already needs --resume."""
    model: ModelConfig
    """The teacher. It must be a Raw checkpoint; start names a run of grpo or stpo to go on from."""
    prompts: PromptsConfig
    rewards: list[RewardSpec] = field(default_factory=list)
    """Rewards to measure at evaluation; none is trained on, and weight, gate and heldout_only are not read."""
    servers: list[ServerSpec] = field(default_factory=list)
    """Judges to serve while the run lasts; rewards name one as server://NAME."""
    steps: int = 1000
    """Training steps, those of fake.warmup included, >= 1."""
    batch: int = 64
    """Pictures in a training step, each of another prompt, over all processes together, >= 1; need not divide by their
    number. There must be as many prompts."""
    micro_batch: int = 8
    """Pictures in one forward of the model, >= 1; sets memory, not the result."""
    sizes: list[list[int]] = field(default_factory=lambda: [[512, 512]])
    """[height, width] pairs in pixels, multiples of 16, which training steps take in turn; evaluation takes the
    first."""
    seed: int = 0
    """Seed of everything drawn: adapters, prompts, times, noise; >= 0."""
    lora: LoraConfig | None = field(default_factory=LoraConfig)
    """The student's adapter, with rank, alpha and targets (--lora.help); the fake score has one like it, and the
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
    """steps are the teacher's, whose pictures the student's are compared with; guidance must be [0.0], the student's.
    Figures are also those of posttrain/tdm/train.py (to_teacher/saturation, fake_loss, ...)."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
