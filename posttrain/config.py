"""Recipes as data: one dataclass for each command, sections as nested dataclasses. Never imports torch.

The docstring under a field is its help text: what it is, its unit and its range. `validate` checks ranges and
how fields fit together; types and unknown keys are checked where recipes are read (`recipe.py`, `cli.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from prompts.errors import UserError


class ConfigError(UserError):
    """A field of a recipe holds what it may not. `field` is its path, such as `optim.lr`."""

    def __init__(self, field: str, problem: str):
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem


@dataclass
class ModelConfig:
    """The K2 checkpoint to start from."""

    path: str
    """Diffusers directory or hub id of a Krea2Pipeline (with transformer_file: for the other parts)."""
    transformer_file: str | None = None
    """Transformer as one safetensors file in the original key names; replaces the one in path."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of the frozen weights. Adapters, latents and log-probs stay float32."""


@dataclass
class LoraConfig:
    """The adapter that is trained; the base stays frozen and is the reference."""

    rank: int = 32
    """Rank of each update, >= 1."""
    alpha: float = 32.0
    """Scale: the update is multiplied by alpha / rank, > 0."""
    targets: list[str] | None = None
    """Names of the layers that get an adapter, matched at the end of the module path; null: the attention
    and feed-forward projections of the main blocks."""


@dataclass
class PromptsConfig:
    """Prompt pools: JSONL, one object a line, with `prompt` and optional requirements, texts, tags, id."""

    train: str
    """JSONL file that training draws from."""
    heldout: str
    """JSONL file for evaluation; never trained on."""
    max_tokens: int = 512
    """Longest prompt in text tokens; what lies beyond is cut with a warning, >= 1."""


@dataclass
class SamplingConfig:
    """How images are drawn in training. There is no guidance here; evaluation sets its own."""

    sizes: list[list[int]] = field(default_factory=lambda: [[512, 512]])
    """[height, width] pairs in pixels, multiples of 16; a group has one size, drawn evenly."""
    steps: int = 8
    """Steps from noise to image, >= 2. The last is always deterministic."""
    dynamics: Literal["flow", "dance", "cps"] = "flow"
    """How noise enters an SDE step: Flow-SDE, Dance-SDE or coefficient-preserving sampling."""
    eta: float = 0.7
    """Noise level, > 0. Above 0.7, Flow-SDE adds visible excess noise; for cps 1 is the most."""
    window: int | None = 2
    """Number of SDE steps, 1 to steps - 1, the rest are ODE steps; null: all but the last."""
    window_start: int | Literal["random"] = "random"
    """First SDE step, counted from 0, or `random`: drawn for each training step within the first half."""


@dataclass
class GroupsConfig:
    """How many images a training step draws, over all processes together."""

    prompts_per_step: int = 8
    """Prompts (groups) in a training step, >= 1; need not divide by the number of processes."""
    group_size: int = 16
    """Images of one prompt that are compared with each other, >= 2."""
    micro_batch: int = 8
    """Images in one forward of the model, >= 1; sets memory, not the result."""


@dataclass
class OptimConfig:
    """AdamW."""

    lr: float = 1e-4
    """Learning rate after warm-up, > 0."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Decay of the two moments, each in [0, 1)."""
    weight_decay: float = 0.0
    """Decoupled weight decay, >= 0."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm, > 0."""
    passes: int = 1
    """Optimiser updates on each batch of images, >= 1; more than two leaves the policy that drew them."""
    warmup_steps: int = 0
    """Updates over which the rate rises linearly from 0, >= 0."""


@dataclass
class LossConfig:
    """The clipped objective. Log-probs are means over latent elements, hence the small clips."""

    clip_low: float = 1e-4
    """The ratio is clipped below at 1 - clip_low, in (0, 1)."""
    clip_high: float = 1e-4
    """The ratio is clipped above at 1 + clip_high, > 0."""
    kl: float = 0.01
    """Weight of the squared velocity distance to the reference (adapter off), >= 0; 0 turns it off."""
    ratio: Literal["plain", "guard"] = "guard"
    """plain: exp of the log-prob difference. guard: recentred and rescaled so that steps share one scale."""
    max_advantage: float = 5.0
    """Advantages are clipped to plus or minus this, > 0."""


@dataclass
class RewardSpec:
    """One reward: a callable `(images, prompts, **columns) -> list[float | None]` named by import path."""

    name: str
    """Name in metrics and reports, unique in the recipe."""
    function: str
    """Import path as `package.module:function`."""
    weight: float = 1.0
    """Weight of the normalised reward in the advantage, >= 0; relative to the other rewards."""
    heldout_only: bool = False
    """Measure at evaluation and never train on it."""


@dataclass
class EvalConfig:
    """Held-out prompts with fixed seeds, sampled by ODE. Always before the first step and after the last."""

    every: int = 25
    """Training steps between evaluations, >= 0; 0: only before and after."""
    prompts: int = 64
    """Held-out prompts used, from the top of the file, >= 1."""
    steps: int = 28
    """Steps from noise to image, >= 1."""
    guidance: list[float] = field(default_factory=lambda: [0.0])
    """Guidance settings to evaluate, each >= 0, in K2's convention: v = c + s (c - u), 0 is off."""
    seed: int = 1234
    """Seed of the evaluation noise; fixed, so that images can be compared over the run."""


@dataclass
class CheckpointConfig:
    """When to save, and how many checkpoints to keep."""

    every: int = 25
    """Training steps between checkpoints, >= 0; 0: only at the end. Ctrl-C and SIGTERM save too."""
    minutes: float = 30.0
    """Save also when this many minutes have passed since the last checkpoint, >= 0; 0: never by time."""
    keep: int = 2
    """Newest checkpoints to keep, >= 1; the best one is kept besides."""


@dataclass
class TrackConfig:
    """Where metrics go, besides metrics.jsonl."""

    tensorboard: bool = True
    """Write tensorboard event files into the run directory."""
    trackers: list[Literal["wandb", "trackio"]] = field(default_factory=list)
    """Further trackers, through accelerate; each must be installed and logged in."""


@dataclass
class GRPOConfig:
    """Reinforcement learning of K2 with groups of images (GRPO), without guidance."""

    output: str
    """Run directory, created; one that holds a run already needs --resume."""
    model: ModelConfig
    prompts: PromptsConfig
    rewards: list[RewardSpec]
    """Rewards to train on, each with name, function, weight, heldout_only."""
    steps: int = 200
    """Training steps: each draws images, scores them and updates, >= 1."""
    seed: int = 0
    """Seed of everything drawn: adapter, prompts, noise; >= 0."""
    advantages: Literal["gdpo", "sum"] = "gdpo"
    """gdpo: normalise each reward in its group, then weigh, then normalise over the batch.
    sum: weigh, then normalise in the group."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    groups: GroupsConfig = field(default_factory=GroupsConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    track: TrackConfig = field(default_factory=TrackConfig)


@dataclass
class SampleConfig:
    """Draw images from a checkpoint."""

    output: str
    """Directory for the images (000.png, ...) and prompts.json; created."""
    model: ModelConfig
    prompt: str | None = None
    """One prompt; give this or prompts."""
    prompts: str | None = None
    """JSONL file of prompts; give this or prompt."""
    adapter: str | None = None
    """Run directory or checkpoint whose adapter is applied; null: the model as it is."""
    size: list[int] = field(default_factory=lambda: [512, 512])
    """[height, width] in pixels, multiples of 16."""
    steps: int | None = None
    """Steps from noise to image, >= 1; null: 28, or 8 for a Turbo checkpoint."""
    guidance: float | None = None
    """Guidance in K2's convention, v = c + s (c - u), >= 0, 0 is off; null: 4.5, or 0 for Turbo."""
    images: int = 1
    """Images for each prompt, >= 1."""
    micro_batch: int = 8
    """Images in one forward, >= 1."""
    seed: int = 0
    """Seed of the noise, >= 0; image i of a prompt uses its own stream."""


@dataclass
class ExportConfig:
    """Turn a checkpoint into files that other tools load."""

    source: str
    """Run directory (its newest checkpoint) or one checkpoint, such as runs/a/checkpoints/best."""
    output: str
    """Directory (diffusers) or .safetensors file (the other formats) to write; must not exist."""
    format: Literal["diffusers", "lora", "original", "lora-original"] = "diffusers"
    """diffusers: a Krea2Pipeline directory with the adapter merged. lora: the adapter for load_lora_weights.
    original, lora-original: the same in the key names of the official repository and ComfyUI."""


@dataclass
class ReportConfig:
    """Write report.html for a run: curves, images before and after, settings; opens without a network."""

    run: str
    """Run directory."""
    output: str | None = None
    """HTML file to write; null: report.html in the run directory."""


Config = GRPOConfig | SampleConfig | ExportConfig | ReportConfig


def validate(config: Config) -> None:
    """Raise ConfigError (field and remedy) if a value is out of range or two do not fit together."""
    match config:
        case GRPOConfig():
            _validate_grpo(config)
        case SampleConfig():
            _validate_sample(config)
        case ExportConfig():
            if config.format != "diffusers" and not config.output.endswith(".safetensors"):
                raise ConfigError("output", f"format {config.format} writes one file; end it in .safetensors")
        case ReportConfig():
            pass


def _validate_grpo(config: GRPOConfig) -> None:
    if not config.output.strip():
        raise ConfigError("output", "is empty; name a directory for the run")
    _at_least("steps", config.steps, 1)
    _at_least("seed", config.seed, 0)
    _at_least("prompts.max_tokens", config.prompts.max_tokens, 1)
    _at_least("lora.rank", config.lora.rank, 1)
    _positive("lora.alpha", config.lora.alpha)
    if config.lora.targets == []:
        raise ConfigError("lora.targets", "is empty, so nothing would be trained; name layers or use null")
    _validate_sampling(config.sampling)
    _at_least("groups.prompts_per_step", config.groups.prompts_per_step, 1)
    if config.groups.group_size < 2:
        raise ConfigError(
            "groups.group_size",
            f"is {config.groups.group_size}, but images are compared within a group; use 2 or more",
        )
    _at_least("groups.micro_batch", config.groups.micro_batch, 1)
    _validate_optim(config.optim)
    if not 0 < config.loss.clip_low < 1:
        raise ConfigError("loss.clip_low", f"is {config.loss.clip_low}; use a number between 0 and 1")
    _positive("loss.clip_high", config.loss.clip_high)
    _at_least("loss.kl", config.loss.kl, 0)
    _positive("loss.max_advantage", config.loss.max_advantage)
    _validate_rewards(config.rewards)
    _at_least("eval.every", config.eval.every, 0)
    _at_least("eval.prompts", config.eval.prompts, 1)
    _at_least("eval.steps", config.eval.steps, 1)
    _at_least("eval.seed", config.eval.seed, 0)
    if not config.eval.guidance:
        raise ConfigError("eval.guidance", "is empty; use [0.0] to evaluate without guidance")
    for i, guidance in enumerate(config.eval.guidance):
        _at_least(f"eval.guidance[{i}]", guidance, 0)
    _at_least("checkpoint.every", config.checkpoint.every, 0)
    _at_least("checkpoint.minutes", config.checkpoint.minutes, 0)
    _at_least("checkpoint.keep", config.checkpoint.keep, 1)


def _validate_sampling(sampling: SamplingConfig) -> None:
    if not sampling.sizes:
        raise ConfigError("sampling.sizes", "is empty; give at least one [height, width]")
    for i, size in enumerate(sampling.sizes):
        _size(f"sampling.sizes[{i}]", size)
    _at_least("sampling.steps", sampling.steps, 2)
    _positive("sampling.eta", sampling.eta)
    if sampling.dynamics == "cps" and sampling.eta > 1:
        raise ConfigError("sampling.eta", f"is {sampling.eta}; with cps use at most 1")
    most = sampling.steps - 1
    if sampling.window is not None and not 1 <= sampling.window <= most:
        raise ConfigError(
            "sampling.window",
            f"is {sampling.window}, but {sampling.steps} steps leave 1 to {most} for noise (the last has"
            " none); shorten it or raise sampling.steps",
        )
    if sampling.window_start == "random":
        return
    _at_least("sampling.window_start", sampling.window_start, 0)
    if sampling.window is None and sampling.window_start > 0:
        raise ConfigError(
            "sampling.window_start", "has no meaning when sampling.window is null; set a window"
        )
    if sampling.window_start + (sampling.window or most) > most:
        raise ConfigError(
            "sampling.window_start",
            f"is {sampling.window_start}, so a window of {sampling.window} would end after step {most - 1};"
            " start it earlier or shorten it",
        )


def _validate_optim(optim: OptimConfig) -> None:
    _positive("optim.lr", optim.lr)
    for beta in optim.betas:
        if not 0 <= beta < 1:
            raise ConfigError("optim.betas", f"holds {beta}; each must be at least 0 and below 1")
    _at_least("optim.weight_decay", optim.weight_decay, 0)
    _positive("optim.max_grad_norm", optim.max_grad_norm)
    _at_least("optim.passes", optim.passes, 1)
    _at_least("optim.warmup_steps", optim.warmup_steps, 0)


def _validate_rewards(rewards: list[RewardSpec]) -> None:
    if not rewards:
        raise ConfigError("rewards", "is empty; name at least one reward to train on")
    seen: set[str] = set()
    for i, reward in enumerate(rewards):
        if not reward.name.strip():
            raise ConfigError(f"rewards[{i}].name", "is empty; give the reward a name")
        if reward.name in seen:
            raise ConfigError(f"rewards[{i}].name", f"'{reward.name}' is used twice; give each its own name")
        seen.add(reward.name)
        module, _, function = reward.function.partition(":")
        if not (module and function):
            raise ConfigError(
                f"rewards[{i}].function", f"'{reward.function}' is not written as package.module:function"
            )
        _at_least(f"rewards[{i}].weight", reward.weight, 0)
    if sum(reward.weight for reward in rewards if not reward.heldout_only) <= 0:
        raise ConfigError(
            "rewards", "the weights of the trained rewards sum to zero; give one a weight above 0"
        )


def _validate_sample(config: SampleConfig) -> None:
    if (config.prompt is None) == (config.prompts is None):
        raise ConfigError("prompt", "give either prompt (a text) or prompts (a JSONL file)")
    if config.prompt is not None and not config.prompt.strip():
        raise ConfigError("prompt", "is empty; write what the image should show")
    _size("size", config.size)
    if config.steps is not None:
        _at_least("steps", config.steps, 1)
    if config.guidance is not None:
        _at_least("guidance", config.guidance, 0)
    _at_least("images", config.images, 1)
    _at_least("micro_batch", config.micro_batch, 1)
    _at_least("seed", config.seed, 0)


def _size(path: str, size: Sequence[int]) -> None:
    if len(size) != 2:
        raise ConfigError(path, f"is {list(size)}; write [height, width] in pixels")
    for pixels in size:
        if pixels < 16 or pixels % 16:
            nearest = max(16, round(pixels / 16) * 16)
            raise ConfigError(path, f"{pixels} pixels is not a multiple of 16; use {nearest}")


def _at_least(path: str, value: float, least: float) -> None:
    if not (math.isfinite(value) and value >= least):
        raise ConfigError(path, f"is {value}; use {least} or more")


def _positive(path: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(path, f"is {value}; use a number above 0")
