"""The settings of `posttrain sample` as data. Never imports torch."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import model_validator

from posttrain.config.sections import ModelConfig
from posttrain.config.types import AtLeast0, AtLeast1, Filled, NonNegative, Range, Size, refusal, settings


@settings
class SampleConfig:
    """Draw images from a checkpoint."""

    output: str
    """Directory for the images (000.png, ...) and prompts.json; created."""
    model: ModelConfig
    prompt: Annotated[str, Filled("write what the image should show")] | None = None
    """One prompt; give this or prompts."""
    prompts: str | None = None
    """JSONL file of prompts; give this or prompt."""
    adapter: str | None = None
    """Run directory or checkpoint whose adapter (or weights, if it trained all) is applied, or an adapter of any tool
    as one .safetensors file (LoRA; DoRA, LoKr, LoHa, whole differences are merged); null: the model as it is."""
    size: Size = field(default_factory=lambda: [512, 512])
    """[height, width] in pixels."""
    steps: AtLeast1 | None = None
    """Steps from noise to image; null: 28, or 8 for a Turbo checkpoint or a run of tdm."""
    guidance: NonNegative | None = None
    """Guidance in K2's convention, v = c + s (c - u), 0 is off; null: 4.5, or 0 for those."""
    images: AtLeast1 = 1
    """Images for each prompt."""
    references: list[str] = field(default_factory=list)
    """Images whose style is drawn, each as IMAGE or IMAGE:STRENGTH (`--references a.png:0.8 b.png:0.4`), with an
    adapter of `posttrain style`; at most 10. Where a line of `prompts` has `references` of its own, those count."""
    strength: Literal["attention", "velocity"] = "attention"
    """How strengths act. attention: on how much of the references is seen, 0 to 1, at one forward more in all.
    velocity: on the change of the velocity that each makes, -4 to 4, at a forward more a step for each."""
    reference_size: Annotated[int, Range(16)] | None = None
    """Longest side of a reference in pixels; larger ones are scaled down. null: that of the image, at most 512, as in
    training."""
    expand: str | None = None
    """Draw expansions instead of the prompts, one for each image: chat model, or run directory of `posttrain expander
    sft` or `gdpo`; null: the prompts as they are."""
    micro_batch: AtLeast1 = 8
    """Images in one forward."""
    seed: AtLeast0 = 0
    """Seed of the noise; image i of a prompt uses its own stream."""

    @model_validator(mode="after")
    def _fits(self) -> SampleConfig:
        self.model.refuse_sequence_parallel("one process draws")
        self.model.refuse_float8()
        if (self.prompt is None) == (self.prompts is None):
            raise refusal("prompt", "give either prompt (a text) or prompts (a JSONL file)")
        if self.model.start is not None:
            raise refusal("model.start", "has no meaning here; name that run as adapter")
        return self
