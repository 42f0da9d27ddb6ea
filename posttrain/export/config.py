"""The settings of `posttrain export` and `export --check` as data. Never imports torch."""

from __future__ import annotations

from dataclasses import field
from typing import Literal

from pydantic import model_validator

from posttrain.config.sections import ModelConfig, Rewards, Servers
from posttrain.config.types import AtLeast0, AtLeast1, AtLeast2, NonNegative, Size, Text, refusal, settings


@settings
class ExportConfig:
    """Turn a checkpoint into files that other tools load. With --check LORA it measures instead what a LoRA that was
    trained on Raw does on Turbo: see posttrain export --check --help."""

    source: str
    """Run directory (its newest checkpoint; its best step if eval.stop ended it) or one checkpoint, such as
    runs/a/checkpoints/best; or an adapter of any tool, as one .safetensors file, with the model that it is for."""
    output: str
    """Directory (diffusers) or .safetensors file (the other formats) to write; must not exist. Its model card is
    README.md in the directory, or NAME.md beside NAME.safetensors."""
    format: Literal["diffusers", "lora", "original", "lora-original"] = "diffusers"
    """diffusers: a Krea2Pipeline directory with what was trained. lora: the adapter for load_lora_weights.
    original, lora-original: the same in the key names of the official repository and ComfyUI. A run that trained
    all weights has no adapter: diffusers or original."""
    model: ModelConfig | None = None
    """The model that an adapter's file is for; null for runs and checkpoints, whose model is known."""
    dtype: Literal["float32"] | None = None
    """float32: write the transformer of diffusers or original in float32, which keeps all of what was trained (K2: 51
    GB). null: in the type that the run's model had."""
    allow_rounding: bool = False
    """Write diffusers or original although its type keeps less than 0.98 of what was trained."""
    license: str | None = None
    """Licence of the card, a name that the hub knows, such as apache-2.0; null: as the base model's card says."""
    push: str | None = None
    """Hub id, such as owner/name, to upload the export to, with its card; needs a token. null: it stays here."""
    private: bool = True
    """Make the hub's repository private, if push makes a new one."""

    @model_validator(mode="after")
    def _fits(self) -> ExportConfig:
        if self.format != "diffusers" and not self.output.endswith(".safetensors"):
            raise refusal("output", f"format {self.format} writes one file; end it in .safetensors")
        # A run names the model that it was trained on, and a file names none.
        if self.source.endswith(".safetensors") != (self.model is not None):
            why = "is null, and a file does not say which model it is for; give its path"
            raise refusal("model", why if self.model is None else "has no meaning here: that of a run is known")
        if self.model is not None:
            if self.model.start is not None:
                raise refusal("model.start", "has no meaning here: the file is exported for the model alone")
            self.model.refuse_sequence_parallel("one process exports")
            self.model.refuse_quantize("exports are of exact weights")
        # Adapters are trained in float32 and stay so.
        if self.format.startswith("lora") and self.dtype is not None:
            raise refusal("dtype", f"a file of format {self.format} is in float32 anyway; leave it out")
        return self


@settings
class CarryoverConfig:
    """Draw with a LoRA that was trained on Raw, on Raw and on Turbo, and say how much of its effect is left there."""

    check: Text
    """Run directory or checkpoint that trained an adapter, with the adapters of the runs that it stands on; or a LoRA
    as one .safetensors file in diffusers' or the original names."""
    turbo: Text
    """Turbo: a distilled Krea2Pipeline directory or hub id; or a run directory or checkpoint of posttrain tdm."""
    model: ModelConfig | None = None
    """Raw, on which the LoRA was trained; null: that of the run. Its dtype is also Turbo's."""
    prompts: str | None = None
    """Prompts to draw: a JSONL file, or hf:NAME[:SPLIT]; null: those that the run held out."""
    rewards: Rewards = field(default_factory=list)
    """Rewards to measure; none: all those of the run's recipe, that see one image at a time."""
    servers: Servers = field(default_factory=list)
    """Judges to serve meanwhile, if rewards are given; else those of the run's recipe."""
    images: AtLeast2 = 128
    """Images, each of another prompt from the top of the file."""
    steps: AtLeast1 = 28
    """Steps on Raw."""
    guidance: NonNegative = 0.0
    """Guidance on Raw, in K2's convention, 0 is off: what the LoRA was trained for."""
    turbo_steps: AtLeast1 = 8
    """Steps on Turbo; there is no guidance there."""
    size: Size | None = None
    """[height, width] in pixels; null: that of the run's evaluations."""
    max_tokens: AtLeast1 = 512
    """Longest prompt in text tokens."""
    micro_batch: AtLeast1 = 16
    """Images in one forward of the model."""
    seed: AtLeast0 = 1234
    """Seed of the noise, the same with and without the LoRA."""
    output: str | None = None
    """JSON file for the figures; must not exist. null: they are only printed."""

    @model_validator(mode="after")
    def _fits(self) -> CarryoverConfig:
        if self.model is not None:
            if self.model.start is not None:
                raise refusal("model.start", "has no meaning here: what a run stands on is part of its LoRA")
            self.model.refuse_sequence_parallel("one process draws")
            self.model.refuse_float8()
            self.model.refuse_quantize("what a LoRA does is measured on exact weights")
        return self
