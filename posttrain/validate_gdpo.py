"""Ranges of `posttrain expander gdpo`'s settings; see validate.py."""

from __future__ import annotations

import math

from posttrain.config.ranges import ConfigError, at_least, pixels, positive, share
from posttrain.expander.gdpo_config import DiversityConfig, ExpanderGDPOConfig, RendererConfig
from posttrain.validate_model import validate_lora

DIVERSITY = "diversity"
GATES = ("format", "safe")
"""Names of what is measured besides the rewards of a recipe."""
ANNEALED = (
    "its weight stays constant for the whole run: where it falls away, a prompt's expansions become one style again,"
    " however diverse they were before; write one number above 0 (ablation.diversity shows what happens otherwise)"
)


def validate_gdpo(config: ExpanderGDPOConfig) -> None:
    """Rewards' names and servers are checked where those of all methods are."""
    for name, value in {
        "output": config.output,
        "model.path": config.model.path,
        "prompts.train": config.prompts.train,
        "prompts.heldout": config.prompts.heldout,
        "renderer.path": config.renderer.path,
        "diversity.path": config.diversity.path,
    }.items():
        if not value.strip():
            raise ConfigError(name, "is empty; name one")
    at_least("steps", config.steps, 1)
    at_least("seed", config.seed, 0)
    validate_lora(config.lora)
    _renderer(config.renderer)
    _rewards(config)
    _diversity(config.diversity, config.groups.group_size)
    _safety(config)
    groups = config.groups
    at_least("groups.prompts_per_step", groups.prompts_per_step, 1)
    at_least("groups.micro_batch", groups.micro_batch, 1)
    if groups.prompts_per_step * groups.group_size % groups.micro_batch:
        raise ConfigError(
            "groups.micro_batch",
            f"is {groups.micro_batch}; use a divisor of the step's {groups.prompts_per_step * groups.group_size}"
            " expansions",
        )
    at_least("generation.max_tokens", config.generation.max_tokens, 1)
    positive("generation.temperature", config.generation.temperature)
    if config.generation.vllm and not config.generation.use_vllm:
        raise ConfigError("generation.vllm", "has no effect while generation.use_vllm is false; set that too")
    _optim(config)
    at_least("eval.every", config.eval.every, 0)
    at_least("eval.prompts", config.eval.prompts, 1)
    at_least("eval.group_size", config.eval.group_size, 2)
    at_least("eval.shown", config.eval.shown, 0)
    at_least("eval.seed", config.eval.seed, 0)
    at_least("checkpoint.every", config.checkpoint.every, 0)
    at_least("checkpoint.keep", config.checkpoint.keep, 1)


def _renderer(config: RendererConfig) -> None:
    pixels("renderer.size", config.size)
    if config.steps is not None:
        at_least("renderer.steps", config.steps, 1)
    if config.guidance is not None:
        at_least("renderer.guidance", config.guidance, 0)
    for name in ("max_tokens", "micro_batch", "concurrency"):
        at_least(f"renderer.{name}", getattr(config, name), 1)
    positive("renderer.timeout", config.timeout)
    positive("renderer.deadline", config.deadline)
    at_least("renderer.retries", config.retries, 0)
    share("renderer.max_failures", config.max_failures, 1)


def _rewards(config: ExpanderGDPOConfig) -> None:
    trained = [reward for reward in config.rewards if not reward.heldout_only]
    if sum(reward.weight for reward in trained) <= 0:
        raise ConfigError("rewards", "none is trained on with a weight above 0; diversity alone teaches no picture")
    for i, reward in enumerate(config.rewards):
        if reward.name in (DIVERSITY, *GATES):
            raise ConfigError(f"rewards[{i}].name", f"'{reward.name}' is measured in every run; choose another")
        if reward.gate != "none":
            raise ConfigError(f"rewards[{i}].gate", f"is {reward.gate}; what gates an expansion goes under safety")
        if reward.group:
            raise ConfigError(f"rewards[{i}].group", "is true; what compares a group here is diversity alone")
    unknown = [name for name in config.worst if name not in [reward.name for reward in trained]]
    if unknown:
        raise ConfigError("worst", f"'{unknown[0]}' is no reward that is trained on")
    for name, value in config.worst.items():
        if not (math.isfinite(value) and value < 0):
            raise ConfigError("worst", f"{name} is {value}; leave out what cannot fall below 0")


def _diversity(config: DiversityConfig, group_size: int) -> None:
    if isinstance(config.weight, list):
        raise ConfigError("diversity.weight", f"is {config.weight}, a schedule, but {ANNEALED}")
    if not (math.isfinite(config.weight) and config.weight > 0):
        raise ConfigError("diversity.weight", f"is {config.weight}, but {ANNEALED}")
    at_least("diversity.batch", config.batch, 1)
    if group_size < 3:
        raise ConfigError(
            "groups.group_size",
            f"is {group_size}, and of two pictures each is as far from the other, so that diversity teaches nothing;"
            " use 3 or more",
        )


def _safety(config: ExpanderGDPOConfig) -> None:
    kinds = [check.sees for check in config.safety]
    for kind in ("text", "image"):
        if kind not in kinds:
            raise ConfigError("safety", f"has no check with sees: {kind}; add one, such as those of rewards/safety.py")
    for i, check in enumerate(config.safety):
        if not check.name.strip() or check.name in [other.name for other in config.safety[:i]]:
            raise ConfigError(f"safety[{i}].name", f"is '{check.name}'; give each check a name of its own")
        if not 0 < check.threshold <= 1:
            raise ConfigError(f"safety[{i}].threshold", f"is {check.threshold}; use a number above 0, up to 1")
        positive(f"safety[{i}].timeout", check.timeout)


def _optim(config: ExpanderGDPOConfig) -> None:
    optim = config.optim
    positive("optim.lr", optim.lr)
    at_least("optim.warmup_steps", optim.warmup_steps, 0)
    positive("optim.max_grad_norm", optim.max_grad_norm)
    at_least("optim.kl", optim.kl, 0)
    if not 0 < optim.clip_low < 1:
        raise ConfigError("optim.clip_low", f"is {optim.clip_low}; use a number between 0 and 1")
    positive("optim.clip_high", optim.clip_high)
