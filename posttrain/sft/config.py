"""The recipe of `posttrain sft` as data. Never imports torch."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated

from pydantic import model_validator

from posttrain.config import metric_names
from posttrain.config.rewards import measured
from posttrain.config.sections import EvalConfig, LoraConfig, OptimConfig, Rewards, TrainingConfig, require_one_pass
from posttrain.config.types import (
    AtLeast1,
    BelowOne,
    Filled,
    Float,
    Number,
    OpenShare,
    Positive,
    Range,
    Share,
    Text,
    keyword_settings,
    refusal,
    settings,
)
from posttrain.sft.buckets import buckets

TURBO_STEPS = 8
"""Steps of a Turbo that does not say how many it was trained for; sampler.STEPS has the same."""


@settings
class ImageColumns:
    """Which columns of a set of images hold what."""

    image: str = "image"
    """Column of the image: a path from the set's directory, or the image itself."""
    captions: Annotated[dict[str, Positive], Filled("name a column, such as {caption: 1}")] = field(
        default_factory=lambda: {"caption": 1.0}
    )
    """Columns of captions and how often each is taken, relative to the others: {long: 3, short: 1}. A cell may hold a
    list of captions, which share it. A row needs one of them."""


@settings
class ImageSetConfig:
    """Images with captions. Latents and text are encoded once, into a cache."""

    train: Text
    """A folder of images with captions beside them (.txt, .json); a folder or file of webdataset (.tar); JSONL or CSV
    whose images are paths from its directory; parquet; a dataset saved to disk; or hf:NAME[:SPLIT]."""
    columns: ImageColumns = field(default_factory=ImageColumns)
    max_bad: BelowOne = 0.01
    """Share of the rows that may be bad (an image that is missing or cut off, no caption) and are left out with a
    warning; more end the run before it trains."""
    resolutions: Annotated[list[AtLeast1], Filled("give at least one, such as [1024]")] = field(
        default_factory=lambda: [1024]
    )
    """Sides in pixels of the squares that have as many pixels as the buckets. Of several, an image is trained in each
    that it is large enough for."""
    multiple: AtLeast1 = 64
    """Pixels that the sides of all buckets are multiples of: the smaller, the more buckets, and the less is cropped."""
    max_ratio: Annotated[Float, Range(1)] = 2.0
    """Longest side of a bucket in units of its shorter one."""
    max_enlarge: Annotated[Float, Range(1)] = 1.0
    """How many times larger an image may be made to fill its bucket; smaller ones are left out and counted."""
    max_cut: Share = 0.25
    """Share of an image's area that the crop may cut off; images that would lose more are left out and counted, as
    their captions name what the crop has cut away."""
    max_tokens: AtLeast1 = 512
    """Longest caption in text tokens; what lies beyond is cut with a warning."""
    drop_caption: BelowOne = 0.1
    """Share of the images that are trained with the empty caption, which guidance needs."""
    heldout: OpenShare = 0.05
    """Share of the images that are never trained on; at least one."""
    measured: Annotated[int, Range(4)] = 128
    """Most of these that each evaluation measures the loss on."""
    cache: Text = "runs/cache"
    """Directory for the encoded images: one folder inside for each set, model and sizes. At 1024 x 1024 an image takes
    1 MB, and a caption about 1 MB."""

    @model_validator(mode="after")
    def _fits(self) -> ImageSetConfig:
        for side in self.resolutions:
            if not buckets(side, self.multiple, self.max_ratio):
                sides = f"sides that are multiples of {self.multiple}, within max_ratio ({self.max_ratio:g})"
                raise refusal("resolutions", f"{side} has no bucket with {sides}; raise it, or lower multiple")
        # Twice would put each image of that size twice into every epoch.
        if len(set(self.resolutions)) < len(self.resolutions):
            raise refusal("resolutions", f"is {self.resolutions}; name each once")
        return self


@keyword_settings
class SFTConfig(TrainingConfig):
    """Supervised finetuning of K2 on images with captions."""

    images: ImageSetConfig
    heldout: str | None = None
    """Prompts that evaluation draws: a JSONL file, or hf:NAME[:SPLIT]; null: captions of held-out images."""
    rewards: Rewards = field(default_factory=list)
    """Rewards to measure at evaluation; none is trained on, and weight, gate and heldout_only are not read."""
    steps: AtLeast1 = 1000
    """Updates."""
    batch: AtLeast1 = 32
    """Images in an update, all of one bucket, over all processes together; need not divide by their number."""
    micro_batch: AtLeast1 = 4
    """Images in one forward of the model; sets memory, not the result."""
    lora: LoraConfig | None = field(default_factory=LoraConfig)
    """The adapter to train, with rank, alpha and targets. null: train all weights but the text fusion's, with an
    optim.lr of about 1e-5; no copy of them is kept as reference."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """passes must be 1."""
    shift: Number = 0.0
    """Added to the shift of the training times, which is that of the bucket's image tokens; above 0 they are noisier.
    Sampling keeps its own. Try -0.5, 0 and 0.5."""
    time_mean: Number = 0.0
    """Mean of the logit of the training times, before the shift is added."""
    time_std: Positive = 1.0
    """Standard deviation of that logit."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Its figures are also heldout/loss, heldout/gain and heldout/drift of held-out images, which are defined in
    posttrain/sft/heldout.py."""
    turbo: Text | None = None
    """A run or checkpoint of posttrain tdm, or a LoRA (.safetensors) that makes Turbo of Raw: each evaluation draws
    with it too, and these figures end in @turbo. Needs lora. null: none."""
    turbo_steps: AtLeast1 | None = None
    """Steps of these images; null: those that the student was trained for, 8 of a LoRA."""

    def image_sizes(self) -> list[list[int]]:
        """The largest bucket of each resolution."""
        # It takes the most memory of its resolution.
        sizes = []
        for side in self.images.resolutions:
            found = buckets(side, self.images.multiple, self.images.max_ratio)
            sizes.append(list(max(found, key=lambda size: size[0] * size[1])))
        return sizes

    def images_at_once(self) -> int:
        return self.micro_batch

    def eval_draws(self) -> list[tuple[int, float]]:
        more = [] if self.turbo is None else [(self.turbo_steps or TURBO_STEPS, 0.0)]
        return [*super().eval_draws(), *more]

    def metric_names(self) -> list[str]:
        rewards = measured(self.rewards, self.eval.groups)
        names = metric_names.names(rewards, self.eval.guidance, self.eval.groups)
        if self.turbo is not None:
            of_one = metric_names.names(rewards, [0.0], self.eval.groups)
            names += [name + metric_names.TURBO for name in of_one]
        return [*names, *metric_names.HELDOUT]

    @model_validator(mode="after")
    def _fits(self) -> SFTConfig:
        require_one_pass(self.optim, "each update draws its own times and noise; use 1")
        # A loss over all noise levels blurs what few steps draw.
        if self.model.allow_distilled:
            raise refusal(
                "model.allow_distilled",
                "finetuning blurs a distilled model; give the Raw checkpoint, and see its images on Turbo by turbo",
            )
        if self.turbo is not None and self.lora is None:
            raise refusal("turbo", "stands beside an adapter, and lora is null; set one of the two")
        if self.turbo_steps is not None and self.turbo is None:
            raise refusal("turbo_steps", "is of turbo, which is null; name a Turbo, or leave it out")
        return self
