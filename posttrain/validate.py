"""Ranges of the settings, and how they fit together. Every problem names its field and the remedy."""

from __future__ import annotations

import math

from posttrain.bench.config import BenchConfig
from posttrain.config.ranges import ConfigError, at_least, pixels, positive
from posttrain.config.sections import (
    EvalConfig,
    ExportConfig,
    GRPOConfig,
    OptimConfig,
    PoolConfig,
    ReportConfig,
    RewardSpec,
    SampleConfig,
    SamplingConfig,
    ServeConfig,
)
from posttrain.expander.config import ExpandConfig, ExpanderDataConfig, ExpanderSFTConfig
from posttrain.expander.gdpo_config import ExpanderGDPOConfig
from posttrain.export.config import CarryoverConfig
from posttrain.judge.config import JudgeConfig
from posttrain.pairs.config import AnnotateConfig, AnnotationsConfig, PairsConfig
from posttrain.pipeline.config import PipelineConfig
from posttrain.stpo.config import STPOConfig
from posttrain.tdm.config import MOST_STEPS, TDMConfig
from posttrain.training import image_metrics
from posttrain.validate_bench import validate_bench
from posttrain.validate_expander import validate_expand, validate_expander_data, validate_expander_sft
from posttrain.validate_gdpo import validate_gdpo
from posttrain.validate_model import refuse_quantize, validate_lora, validate_model
from posttrain.validate_pairs import (
    validate_annotate,
    validate_annotations,
    validate_pair_set,
    validate_pairs,
    validate_preference_loss,
)
from posttrain.validate_pipeline import validate_pipeline
from posttrain.validate_servers import validate_servers

Config = (
    GRPOConfig
    | STPOConfig
    | TDMConfig
    | PairsConfig
    | JudgeConfig
    | ServeConfig
    | AnnotateConfig
    | AnnotationsConfig
    | ExpanderDataConfig
    | ExpanderSFTConfig
    | ExpanderGDPOConfig
    | ExpandConfig
    | SampleConfig
    | ExportConfig
    | ReportConfig
    | BenchConfig
    | CarryoverConfig
    | PipelineConfig
)


JUDGE_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Layers of a Qwen3-VL's language model that vLLM takes adapters for."""


def validate(config: Config) -> None:
    """Raise ConfigError (field and remedy) if a value is out of range or two do not fit together."""
    match config:
        case GRPOConfig():
            _validate_grpo(config)
        case STPOConfig():
            _validate_stpo(config)
        case TDMConfig():
            _validate_tdm(config)
        case PairsConfig():
            _validate_rewards(config.rewards)
            validate_servers(config.servers)
            validate_pairs(config)
        case JudgeConfig():
            _validate_judge(config)
        case ServeConfig():
            if not config.servers:
                raise ConfigError("servers", "is empty; name at least one server")
            if all(server.urls for server in config.servers):
                raise ConfigError("servers", "all have urls and are up already; there is nothing to start")
            validate_servers(config.servers)
        case AnnotateConfig():
            validate_annotate(config)
        case AnnotationsConfig():
            validate_annotations(config)
        case ExpanderDataConfig():
            validate_expander_data(config)
            validate_servers(config.servers)
        case ExpanderSFTConfig():
            validate_expander_sft(config)
            _validate_optim(config.optim)
        case ExpanderGDPOConfig():
            _validate_rewards(config.rewards)
            validate_servers(config.servers)
            validate_gdpo(config)
        case ExpandConfig():
            validate_expand(config)
        case SampleConfig():
            _validate_sample(config)
        case ExportConfig():
            if config.format != "diffusers" and not config.output.endswith(".safetensors"):
                raise ConfigError("output", f"format {config.format} writes one file; end it in .safetensors")
            if config.format.startswith("lora") and config.dtype is not None:
                raise ConfigError("dtype", f"a file of format {config.format} is in float32 anyway; leave it out")
        case CarryoverConfig():
            _validate_carryover(config)
        case PipelineConfig():
            validate_pipeline(config)
        case ReportConfig():
            if not config.runs:
                raise ConfigError("runs", "is empty; give a run directory")
        case BenchConfig():
            validate_bench(config)


def _validate_grpo(config: GRPOConfig) -> None:
    _validate_run(config)
    at_least("prompts.max_tokens", config.prompts.max_tokens, 1)
    _validate_sampling(config.sampling)
    at_least("groups.prompts_per_step", config.groups.prompts_per_step, 1)
    if config.groups.group_size < 2:
        raise ConfigError(
            "groups.group_size",
            f"is {config.groups.group_size}, but images are compared within a group; use 2 or more",
        )
    at_least("groups.micro_batch", config.groups.micro_batch, 1)
    _validate_pool(config.pool)
    if not 0 < config.loss.clip_low < 1:
        raise ConfigError("loss.clip_low", f"is {config.loss.clip_low}; use a number between 0 and 1")
    positive("loss.clip_high", config.loss.clip_high)
    at_least("loss.kl", config.loss.kl, 0)
    positive("loss.max_advantage", config.loss.max_advantage)
    if not config.rewards:
        raise ConfigError("rewards", "is empty; name at least one reward to train on")
    if sum(reward.weight for reward in config.rewards if reward.gate == "none" and not reward.heldout_only) <= 0:
        raise ConfigError(
            "rewards", "the weights of the trained rewards, gates aside, sum to zero; give one a weight above 0"
        )
    _validate_eval(config.eval, [r.name for r in config.rewards if config.eval.groups or not r.group], [])
    _validate_watched(config.eval, config.rewards)


def _validate_run(config: GRPOConfig | STPOConfig | TDMConfig) -> None:
    """What all methods that train K2 have."""
    if not config.output.strip():
        raise ConfigError("output", "is empty; name a directory for the run")
    at_least("steps", config.steps, 1)
    at_least("seed", config.seed, 0)
    validate_model(config.model, all_weights=config.lora is None)
    if config.lora is not None:
        validate_lora(config.lora)
    _validate_optim(config.optim)
    _validate_rewards(config.rewards)
    validate_servers(config.servers)
    at_least("checkpoint.every", config.checkpoint.every, 0)
    at_least("checkpoint.minutes", config.checkpoint.minutes, 0)
    at_least("checkpoint.keep", config.checkpoint.keep, 1)


def _validate_stpo(config: STPOConfig) -> None:
    _validate_run(config)
    if not config.heldout.strip():
        raise ConfigError("heldout", "is empty; name prompts to evaluate with")
    at_least("batch", config.batch, 1)
    at_least("micro_batch", config.micro_batch, 1)
    if config.optim.passes != 1:
        raise ConfigError("optim.passes", f"is {config.optim.passes}; each update draws its own times and noise; use 1")
    validate_pair_set(config.pairs)
    validate_preference_loss(config.loss)
    if config.loss.kind == "stpo" and config.loss.guard == "exact" and config.lora is None:
        raise ConfigError("loss.guard", "exact needs an adapter's gradients; set lora, or use output")
    _validate_eval(
        config.eval, [reward.name for reward in config.rewards], [*image_metrics.PAIRS, *image_metrics.CHANGES]
    )


def _validate_tdm(config: TDMConfig) -> None:
    _validate_run(config)
    at_least("prompts.max_tokens", config.prompts.max_tokens, 1)
    at_least("batch", config.batch, 1)
    at_least("micro_batch", config.micro_batch, 1)
    if not config.sizes:
        raise ConfigError("sizes", "is empty; name at least one [height, width]")
    for i, size in enumerate(config.sizes):
        pixels(f"sizes[{i}]", size)
    if config.model.allow_distilled:
        raise ConfigError("model.allow_distilled", "a teacher must be able to use many steps; give the Raw checkpoint")
    student, fake = config.student, config.fake
    if not student.steps or len(set(student.steps)) < len(student.steps):
        raise ConfigError(
            "student.steps", f"is {student.steps}; name different numbers of steps, such as [8] or [8, 4]"
        )
    for i, steps in enumerate(student.steps):
        if not 1 <= steps <= MOST_STEPS:
            raise ConfigError(f"student.steps[{i}]", f"is {steps}; use 1 to {MOST_STEPS}")
    at_least("teacher.guidance", config.teacher.guidance, 0)
    positive("fake.rate", fake.rate)
    at_least("fake.updates", fake.updates, 1)
    at_least("fake.warmup", fake.warmup, 0)
    if fake.warmup >= config.steps:
        raise ConfigError(
            "fake.warmup", f"is {fake.warmup} of {config.steps} steps, so no student is trained; lower it"
        )
    least, greatest = fake.clip
    if not 0 <= least <= 1 <= greatest:
        raise ConfigError(
            "fake.clip", f"is [{least:g}, {greatest:g}]; the weights lie around 1: use 0 <= least <= 1 <= greatest"
        )
    if config.optim.passes != 1:
        raise ConfigError("optim.passes", f"is {config.optim.passes}; each update draws its own times and noise; use 1")
    if config.eval.guidance != [0.0]:
        raise ConfigError("eval.guidance", "is that of a student, which has none: leave it out; see teacher.guidance")
    rewards = [r.name for r in config.rewards if config.eval.groups or not r.group]
    _validate_eval(config.eval, [], image_metrics.distilled_names(rewards, student.steps, config.eval.groups))


def _validate_eval(config: EvalConfig, rewards: list[str], more: list[str]) -> None:
    """`more` are figures of the method's own."""
    at_least("eval.every", config.every, 0)
    at_least("eval.prompts", config.prompts, 1)
    at_least("eval.steps", config.steps, 1)
    at_least("eval.seed", config.seed, 0)
    if not config.guidance:
        raise ConfigError("eval.guidance", "is empty; use [0.0] to evaluate without guidance")
    for i, guidance in enumerate(config.guidance):
        at_least(f"eval.guidance[{i}]", guidance, 0)
    at_least("eval.groups", config.groups, 0)
    at_least("eval.group_size", config.group_size, 2)
    known = list(dict.fromkeys([*image_metrics.names(rewards, config.guidance, config.groups), *more]))
    for field, name in (("eval.best", config.best), ("eval.stop.metric", config.stop.metric)):
        if name is not None and name not in known:
            raise ConfigError(field, f"'{name}' is no figure of the evaluation; known here: {', '.join(known)}")
    if config.stop.metric is not None and config.best is None:
        raise ConfigError(
            "eval.best",
            "is null, and eval.stop.metric is set: a run that its stop rule ends hands on its best step; name the"
            " figure that picks it, such as a held-out judge",
        )
    if config.stop.better == "lower" and config.best == config.stop.metric is not None:
        raise ConfigError(
            "eval.best", f"takes the highest {config.best}, and eval.stop.better is lower: name another figure"
        )
    if config.stop.metric is not None and config.every == 0:
        raise ConfigError("eval.stop.metric", "has no meaning when eval.every is 0; evaluate during the run")
    positive("eval.stop.drop", config.stop.drop)
    if config.stop.limit is not None and not math.isfinite(config.stop.limit):
        raise ConfigError("eval.stop.limit", f"is {config.stop.limit}; use a number or null")
    at_least("eval.stop.patience", config.stop.patience, 1)


def _validate_watched(config: EvalConfig, rewards: list[RewardSpec]) -> None:
    """What is trained on rises while it is being cheated, so it can neither pick a step nor end a run."""
    trained = [reward for reward in rewards if not reward.heldout_only]
    watched = {"eval.best": config.best, "eval.stop.metric": config.stop.metric}
    for reward in rewards:
        own = [reward.name + image_metrics.suffix(scale) for scale in config.guidance]
        field = next((field for field, name in watched.items() if name in own), None)
        alike = next((other.name for other in trained if other.function == reward.function), None)
        if field is None or alike is None:
            continue
        how = "is trained on" if reward in trained else f"is the same function as '{alike}', which is trained on"
        raise ConfigError(
            field,
            f"'{watched[field]}' {how}, so it rises while it is being cheated; name a reward with heldout_only: true,"
            " best a judge of another model family, or a figure such as image/diversity",
        )


def _validate_judge(config: JudgeConfig) -> None:
    for name in ("output", "model", "data"):
        if not getattr(config, name).strip():
            raise ConfigError(name, "is empty; name one")
    if not 0 < config.heldout < 1:
        raise ConfigError("heldout", f"is {config.heldout}; use a number between 0 and 1")
    at_least("steps", config.steps, 1)
    at_least("batch", config.batch, 1)
    at_least("micro_batch", config.micro_batch, 1)
    if config.batch % config.micro_batch:
        raise ConfigError("micro_batch", f"is {config.micro_batch}; use a divisor of batch ({config.batch})")
    at_least("workers", config.workers, 0)
    at_least("seed", config.seed, 0)
    if not 0 <= config.max_bad < 1:
        raise ConfigError("max_bad", f"is {config.max_bad}; use at least 0 and below 1")
    if config.columns is not None and config.mode == "artifact":
        raise ConfigError("columns", "are of a set of pairs, which mode artifact does not read; leave them out")
    at_least("checkpoint.every", config.checkpoint.every, 0)
    at_least("checkpoint.minutes", config.checkpoint.minutes, 0)
    at_least("checkpoint.keep", config.checkpoint.keep, 1)
    at_least("lora.rank", config.lora.rank, 1)
    positive("lora.alpha", config.lora.alpha)
    wrong = [t for t in config.lora.targets or () if t not in JUDGE_TARGETS]
    if wrong or config.lora.targets == []:
        named = f"names {wrong[0]}" if wrong else "is empty"
        raise ConfigError("lora.targets", f"{named}; vLLM serves {', '.join(JUDGE_TARGETS)} of the language model")
    _validate_optim(config.optim)
    if config.optim.passes != 1:
        raise ConfigError("optim.passes", f"is {config.optim.passes}; a judge makes one update on each batch")
    if config.optim.cooldown_steps:
        raise ConfigError("optim.cooldown_steps", "a judge's rate falls along half a cosine from the start; leave it 0")


def _validate_sampling(sampling: SamplingConfig) -> None:
    if not sampling.sizes:
        raise ConfigError("sampling.sizes", "is empty; give at least one [height, width]")
    for i, size in enumerate(sampling.sizes):
        pixels(f"sampling.sizes[{i}]", size)
    at_least("sampling.steps", sampling.steps, 2)
    positive("sampling.eta", sampling.eta)
    if sampling.dynamics == "cps" and sampling.eta > 1:
        raise ConfigError("sampling.eta", f"is {sampling.eta}; with cps use at most 1")
    most = sampling.steps - 1
    if sampling.window is not None and not 1 <= sampling.window <= most:
        raise ConfigError(
            "sampling.window",
            f"is {sampling.window}, but {sampling.steps} steps leave 1 to {most} for noise (the last has"
            " none); shorten it or raise sampling.steps",
        )
    at_least("sampling.window_every", sampling.window_every, 1)
    if sampling.window_start == "sliding" and sampling.window is None:
        raise ConfigError("sampling.window_start", "nothing can slide when sampling.window is null; set a window")
    if isinstance(sampling.window_start, str):
        return
    at_least("sampling.window_start", sampling.window_start, 0)
    if sampling.window is None and sampling.window_start > 0:
        raise ConfigError("sampling.window_start", "has no meaning when sampling.window is null; set a window")
    if sampling.window_start + (sampling.window or most) > most:
        raise ConfigError(
            "sampling.window_start",
            f"is {sampling.window_start}, so a window of {sampling.window} would end after step {most - 1};"
            " start it earlier or shorten it",
        )


def _validate_pool(pool: PoolConfig) -> None:
    shares = {"decay": 0.01, "explore": 0.01, "low_variance": 0, "easy": 0, "hard": 0, "floor": 0}
    for name, least in shares.items():
        if not least <= getattr(pool, name) <= 1:
            raise ConfigError(f"pool.{name}", f"is {getattr(pool, name)}; use {least} to 1")
    at_least("pool.sharpness", pool.sharpness, 0)
    if pool.hard >= pool.easy:
        raise ConfigError("pool.hard", f"is {pool.hard}, not below pool.easy ({pool.easy}); lower it")
    for name in ("staleness", "prune_after", "cooldown"):
        at_least(f"pool.{name}", getattr(pool, name), 1)
    if not 0 <= pool.audit < 1:
        raise ConfigError("pool.audit", f"is {pool.audit}; use at least 0 and below 1")
    for tag, quota in pool.quotas.items():
        positive(f"pool.quotas.{tag}", quota)
    if sum(pool.quotas.values()) > 1 + 1e-9:
        raise ConfigError("pool.quotas", f"add up to {sum(pool.quotas.values()):g}; lower them to at most 1 together")


def _validate_optim(optim: OptimConfig) -> None:
    positive("optim.lr", optim.lr)
    for beta in optim.betas:
        if not 0 <= beta < 1:
            raise ConfigError("optim.betas", f"holds {beta}; each must be at least 0 and below 1")
    at_least("optim.weight_decay", optim.weight_decay, 0)
    positive("optim.eps", optim.eps)
    if optim.clip_factor != 0:
        at_least("optim.clip_factor", optim.clip_factor, 1)
    at_least("optim.passes", optim.passes, 1)
    at_least("optim.warmup_steps", optim.warmup_steps, 0)
    at_least("optim.cooldown_steps", optim.cooldown_steps, 0)
    if not 0 <= optim.ema < 1:
        raise ConfigError("optim.ema", f"is {optim.ema}; it must be at least 0 and below 1")


def _validate_rewards(rewards: list[RewardSpec]) -> None:
    seen: set[str] = set()
    for i, reward in enumerate(rewards):
        if not reward.name.strip():
            raise ConfigError(f"rewards[{i}].name", "is empty; give the reward a name")
        if reward.name in seen:
            raise ConfigError(f"rewards[{i}].name", f"'{reward.name}' is used twice; give each its own name")
        if reward.name in (*image_metrics.LOOK, image_metrics.DIVERSITY):
            raise ConfigError(f"rewards[{i}].name", f"'{reward.name}' is a figure of every evaluation; choose another")
        seen.add(reward.name)
        if isinstance(reward.function, str) and not all(reward.function.partition(":")):
            raise ConfigError(
                f"rewards[{i}].function", f"'{reward.function}' is not written as package.module:function"
            )
        at_least(f"rewards[{i}].weight", reward.weight, 0)
        if reward.noise is not None:
            at_least(f"rewards[{i}].noise", reward.noise, 0)


def _validate_sample(config: SampleConfig) -> None:
    if (config.prompt is None) == (config.prompts is None):
        raise ConfigError("prompt", "give either prompt (a text) or prompts (a JSONL file)")
    if config.prompt is not None and not config.prompt.strip():
        raise ConfigError("prompt", "is empty; write what the image should show")
    pixels("size", config.size)
    validate_model(config.model)
    if config.model.start is not None:
        raise ConfigError("model.start", "has no meaning here; name that run as adapter")
    if config.steps is not None:
        at_least("steps", config.steps, 1)
    if config.guidance is not None:
        at_least("guidance", config.guidance, 0)
    at_least("images", config.images, 1)
    at_least("micro_batch", config.micro_batch, 1)
    at_least("seed", config.seed, 0)


def _validate_carryover(config: CarryoverConfig) -> None:
    for name in ("check", "turbo"):
        if not getattr(config, name).strip():
            raise ConfigError(name, "is empty; name one")
    _validate_rewards(config.rewards)
    validate_servers(config.servers)
    at_least("pictures", config.pictures, 2)
    at_least("steps", config.steps, 1)
    at_least("guidance", config.guidance, 0)
    at_least("turbo_steps", config.turbo_steps, 1)
    if config.size is not None:
        pixels("size", config.size)
    if config.model is not None and config.model.start is not None:
        raise ConfigError("model.start", "has no meaning here: what a run stands on is part of its LoRA")
    if config.model is not None:
        refuse_quantize(config.model, "what a LoRA does is measured on exact weights")
    at_least("max_tokens", config.max_tokens, 1)
    at_least("micro_batch", config.micro_batch, 1)
    at_least("seed", config.seed, 0)
