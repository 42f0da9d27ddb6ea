"""The settings of `posttrain export --check` as data; see config.py. Never imports torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from posttrain.config.sections import ModelConfig
from rewards.base import RewardSpec
from rewards.serve import ServerSpec


@dataclass
class CarryoverConfig:
    """Draw with a LoRA that was trained on Raw, on Raw and on Turbo, and say how much of its effect is left there."""

    check: str
    """Run directory or checkpoint that trained an adapter, with the adapters of the runs that it stands on; or a LoRA
    as one .safetensors file in diffusers' or the original names."""
    turbo: str
    """Turbo: a distilled Krea2Pipeline directory or hub id; or a run directory or checkpoint of posttrain tdm."""
    model: ModelConfig | None = None
    """Raw, on which the LoRA was trained; null: that of the run. Its dtype is also Turbo's."""
    prompts: str | None = None
    """Prompts to draw: a JSONL file, or hf:NAME[:SPLIT]; null: those that the run held out."""
    rewards: list[RewardSpec] = field(default_factory=list)
    """Rewards to measure; none: all those of the run's recipe, that see one picture at a time."""
    servers: list[ServerSpec] = field(default_factory=list)
    """Judges to serve meanwhile, if rewards are given; else those of the run's recipe."""
    pictures: int = 128
    """Pictures, each of another prompt from the top of the file, >= 2."""
    steps: int = 28
    """Steps on Raw, >= 1."""
    guidance: float = 0.0
    """Guidance on Raw, in K2's convention, >= 0, 0 is off: what the LoRA was trained for."""
    turbo_steps: int = 8
    """Steps on Turbo, >= 1; there is no guidance there."""
    size: list[int] | None = None
    """[height, width] in pixels, multiples of 16; null: that of the run's evaluations."""
    max_tokens: int = 512
    """Longest prompt in text tokens, >= 1."""
    micro_batch: int = 16
    """Pictures in one forward of the model, >= 1."""
    seed: int = 1234
    """Seed of the noise, the same with and without the LoRA, >= 0."""
    output: str | None = None
    """JSON file for the figures; must not exist. null: they are only printed."""
