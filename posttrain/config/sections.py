"""The sections that several commands share. Never imports torch.

The docstring below a field is its help: what it is and its unit. Its range is its type's (types.py), and what must fit
together is checked by the section that holds both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from typing import Annotated, ClassVar, Literal

from pydantic import model_validator

from posttrain.config import metric_names, metrics
from posttrain.config.optimizer import OptimConfig as OptimConfig
from posttrain.config.optimizer import refuse_muon
from posttrain.config.optimizer import require_one_pass as require_one_pass
from posttrain.config.rewards import Rewards as Rewards
from posttrain.config.rewards import Servers as Servers
from posttrain.config.types import (
    AtLeast0,
    AtLeast1,
    AtLeast2,
    Filled,
    Finite,
    Float,
    NonNegative,
    Positive,
    Run,
    changed,
    keyword_settings,
    refusal,
    settings,
)
from posttrain.model.adapters import targets

MOST_STEPS = 16
"""Of a few-step student."""
JUDGE_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Layers of a Qwen3-VL's language model that vLLM takes adapters for."""


@keyword_settings
class RuntimeConfig:
    """How K2 is run. None of this is part of a checkpoint."""

    compile: bool | None = None
    """Compile the transformer's blocks, which takes up to a minute at first and is kept on disk for later runs; results
    agree within rounding, which `posttrain bench` measures. null: on a GPU in bfloat16, but not where it is sharded,
    nor for the few images of `posttrain sample`."""
    recompute: AtLeast0 | None = None
    """Blocks whose activations are computed again in backward instead of kept (K2 has 28): each saves memory and
    costs a forward of it; results are the same. null: as many as do not fit into the GPU's free memory; on a CPU 0."""
    attention: Literal["native", "packed", "cudnn"] = "native"
    """Kernels of attention. native: those that torch chooses. packed: the same, but where prompts of several lengths
    are in one forward torch's flash kernel for such batches instead of one that takes a mask. cudnn: cuDNN's, which may
    be faster with large images. The last two want an NVIDIA GPU and bfloat16; results agree within rounding."""
    quantize: Literal["fp8"] | None = None
    """fp8: hold and multiply the frozen weights of the transformer's blocks in 8 bits (K2: 12.6 GiB instead of 24), in
    bfloat16 and under an adapter only. It changes results, by what `posttrain bench` measures, and what is exported is
    the adapter for the exact base. Needs an NVIDIA GPU of compute capability 8.9 or more (a CPU is slow), and
    pip install 'posttrain[fp8]'. null: exact."""
    float8: Literal["tensorwise", "rowwise", "auto"] | None = None
    """Multiply in 8 bits in the blocks while all weights are trained (lora: null), forward and backward, in bfloat16;
    weights, moments and what is evaluated and exported stay exact. tensorwise: one scale for a whole factor, the
    fastest. rowwise: one for each row, nearer to exact. auto: tensorwise up to 256 x 256 pixels, rowwise below
    1024 x 1024, and off from there on, by the largest of the images. It changes results. Needs an NVIDIA GPU of compute
    capability 8.9 or more (a CPU emulates it), and pip install 'posttrain[fp8]'. Not for grpo. null: exact."""
    offload: list[Literal["text_encoder", "vae"]] = field(default_factory=list)
    """Parts that wait in the CPU's memory while they are not used: each use copies them to the GPU (K2: 8.3 and 0.25
    GB); results are the same."""


@settings
class ModelConfig(RuntimeConfig):
    """The K2 checkpoint to start from, and how it is run."""

    path: str
    """Diffusers directory or hub id of a Krea2Pipeline (with transformer_file: for the other parts). A hub id
    may have a branch, tag or commit behind an @: OWNER/NAME@REVISION."""
    transformer_file: str | None = None
    """Transformer as one safetensors file in the original key names; replaces the one in path."""
    transformer_format: Literal["fp8_scaled"] | None = None
    """How that file holds its weights. null: float32, float16 or bfloat16. fp8_scaled: as ComfyUI's scaled fp8 files,
    with a scale beside each 8-bit weight; each becomes weight times scale, in dtype, when it is read."""
    start: str | None = None
    """Run directory or checkpoint of an earlier method to continue from: what it trained, and what it started from
    itself, is part of the model and of the reference. To branch off a run, name one of its checkpoints, as in
    RUN/checkpoints/step-000010. Or an adapter of any tool, as one .safetensors file. It must stay where it is. Adapters
    stay adapters, in float32, so that nothing of them is rounded; a run that trained all weights replaces the base's,
    in dtype, and what of a file is not a LoRA (DoRA, LoKr, LoHa, whole differences) is merged into them."""
    start_as: Literal["merge", "continue"] = "merge"
    """merge: start becomes part of the model and of the reference, and training begins without a difference to it.
    continue: training continues the adapter of start itself, and the reference is the model below it; lora must name
    its layers and have at least its rank."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of the frozen weights, and of the arithmetic. What is trained, latents and log-probs stay float32."""
    sequence_parallel: AtLeast1 = 1
    """Processes (GPUs) that share the tokens of each sample in training, where images are too large for one. It must
    divide the number of processes and the model's heads. Blocks are not compiled then, and all are recomputed in
    backward unless recompute says otherwise. Not where the model is sharded."""
    allow_distilled: bool = False
    """Train a distilled checkpoint (Turbo, or a run of posttrain tdm as start) as if it were Raw. Losses over all noise
    levels blur what few steps draw: the order that works is to train Raw and to distil it last."""

    @model_validator(mode="after")
    def _fits(self) -> ModelConfig:
        # torch's fp8 products have bfloat16 inputs and outputs.
        if self.quantize is not None and self.dtype != "bfloat16":
            raise refusal("quantize", f"fp8 multiplies in bfloat16, and model.dtype is {self.dtype}; change it")
        if self.float8 is not None and self.dtype != "bfloat16":
            raise refusal("float8", f"fp8 multiplies in bfloat16, and model.dtype is {self.dtype}; change it")
        if self.float8 is not None and self.sequence_parallel > 1:
            raise refusal("float8", "scales would be those of a part of the tokens; set model.sequence_parallel: 1")
        if self.attention == "packed" and self.sequence_parallel > 1:
            raise refusal("attention", "packed keys are those of whole samples; use native or sequence_parallel: 1")
        if self.start_as == "continue" and self.start is None:
            raise refusal("start_as", "has nothing to continue: name a run or a LoRA file as start")
        if self.transformer_format is not None and self.transformer_file is None:
            raise refusal(
                "transformer_format", "is about transformer_file, which is null; name that file, or leave it out"
            )
        return self

    def refuse_sequence_parallel(self, why: str) -> None:
        """For commands whose samples stay whole, in their own check."""
        if self.sequence_parallel > 1:
            raise refusal("model.sequence_parallel", f"{why}; leave it out")

    def refuse_float8(self) -> None:
        """For commands that do not train, in their own check."""
        if self.float8 is not None:
            raise refusal("model.float8", "is for training, and this command does not train; leave it out")

    def refuse_quantize(self, why: str) -> None:
        """For commands that need exact weights, in their own check."""
        if self.quantize is not None:
            raise refusal("model.quantize", f"{why}; leave it out")


@settings
class LoraConfig:
    """The adapter that is trained; the base stays frozen and is the reference."""

    rank: AtLeast1 = 32
    """Rank of each update."""
    alpha: Positive = 32.0
    """Scale: the update is multiplied by alpha / rank."""
    targets: Annotated[list[str], Filled("name layers or use null", "so nothing would be trained")] | None = None
    """Layers that get an adapter, by diffusers' names. null: the attention and feed-forward projections of the model's
    main blocks. Of K2 also the word blocks for these, the word all for every linear, and the parts before and behind
    the blocks, whole or a linear of them (docs/runs.md, What an adapter reaches); where they fuse the text, it is
    fused in every forward instead of once a prompt."""


@settings
class PromptsConfig:
    """Prompts: JSONL, one object a line, or rows of a dataset, with `prompt` and optional requirements, texts,
    tags, id."""

    train: str
    """What training draws from: JSONL, CSV, parquet, a directory of `save_to_disk`, or hf:NAME[:SPLIT] for a dataset
    that `datasets` loads, such as hf:owner/name:train[:5000]; SPLIT is train if not given and NAME is of the hub."""
    heldout: str
    """What evaluation draws; written as train is, and never trained on."""
    max_tokens: AtLeast1 = 512
    """Longest prompt in text tokens; what lies beyond is cut with a warning."""


@settings
class StopConfig:
    """Ends the run, saved and with exit code 0, when a figure of the evaluation has got worse and stays so. Such a run
    hands on its best step, by eval.best."""

    metric: str | None = None
    """Figure to watch, named as in eval.best and like that one not trained on; null: never stop. Needs eval.best."""
    better: Literal["higher", "lower"] = "higher"
    """Which is better. lower suits pairs/winner and to_teacher/saturation."""
    drop: Positive = 0.1
    """How far from its best so far the figure may get, as a share of that best: 0.1 lets 0.8 fall to 0.72.
    Made for figures above 0."""
    limit: Annotated[Float, Finite("use a number or null")] | None = None
    """Instead of drop: the worst that the figure may be, whatever its best was; null: drop decides."""
    patience: AtLeast1 = 2
    """Evaluations in a row that must be worse than that."""


@settings
class EvalConfig:
    """Held-out prompts with fixed seeds, sampled by ODE. Always before the first step and after the last."""

    every: AtLeast0 = 25
    """Training steps between evaluations; 0: only before and after."""
    prompts: AtLeast1 = 64
    """Held-out prompts used, from the top of the file."""
    steps: AtLeast1 = 28
    """Steps from noise to image."""
    guidance: Annotated[list[NonNegative], Filled("use [0.0] to evaluate without guidance")] = field(
        default_factory=lambda: [0.0]
    )
    """Guidance settings to evaluate, in K2's convention: v = c + s (c - u), 0 is off."""
    seed: AtLeast0 = 1234
    """Seed of the evaluation noise; fixed, so that images can be compared over the run."""
    groups: AtLeast0 = 8
    """Of these prompts, those that each guidance setting draws a group of images of, to measure diversity;
    0: none."""
    group_size: AtLeast2 = 8
    """Images in such a group."""
    best: str | None = None
    """Figure, the higher the better, whose best step is kept as checkpoints/best, and handed on by a run that eval.stop
    ended: a reward that is not trained on (oracle; with guidance 1.5, oracle@1.5) or image/diversity, image/brightness,
    ...; null: none is kept."""
    stop: StopConfig = field(default_factory=StopConfig)
    """Guard against reward hacking."""


@settings
class CheckpointConfig:
    """When to save, and how many checkpoints to keep."""

    every: AtLeast0 = 25
    """Training steps between checkpoints; 0: only at the end. Ctrl-C and SIGTERM save too."""
    minutes: NonNegative = 30.0
    """Save also when this many minutes have passed since the last checkpoint; 0: never by time."""
    keep: AtLeast1 = 2
    """Newest checkpoints to keep; the best one is kept besides."""


@settings
class TrackConfig:
    """Where metrics go, besides metrics.jsonl."""

    tensorboard: bool = True
    """Write tensorboard event files into the run directory."""
    trackers: list[Literal["wandb", "trackio"]] = field(default_factory=list)
    """Further trackers, through accelerate; each must be installed and logged in."""


# ---- training ----------------------------------------------------------------------------------------------------


@keyword_settings
class TrainingConfig:
    """What all methods that train K2 have. Each adds `rewards`, which mean different things to them."""

    adapters: ClassVar[int] = 1
    """Adapters that are trained, each with an optimiser of its own; estimates of memory count them."""

    output: Run
    """Run directory, created; one that holds a run already needs --resume."""
    model: ModelConfig
    servers: Servers = field(default_factory=list)
    """Judges to serve while the run lasts; rewards name one as server://NAME."""
    steps: AtLeast1 = 500
    """Training steps."""
    seed: AtLeast0 = 0
    """Seed of everything drawn: adapters, order, prompts, times, noise."""
    lora: LoraConfig | None = field(default_factory=LoraConfig)
    """The adapter to train. null: all weights but the text fusion's."""
    # Sections that most methods leave at these defaults; a method with others declares its own.
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    track: TrackConfig = field(default_factory=TrackConfig)

    def image_sizes(self) -> list[list[int]]:
        """[height, width] of the images in pixels; empty where they are not known, and then no need is estimated."""
        return []

    def images_at_once(self) -> int:
        """Images in one forward with gradients."""
        return 1

    def copies(self) -> int:
        """Copies of what is trained that a run keeps on the device, besides the average of optim.ema."""
        return 0

    def eval_draws(self) -> list[tuple[int, float]]:
        """(steps, guidance) of each way in which an evaluation draws all its images."""
        return [(self.eval.steps, scale) for scale in self.eval.guidance]

    def metric_names(self) -> list[str]:
        """What eval.best and eval.stop.metric may name."""
        return metric_names.names([], self.eval.guidance, self.eval.groups)

    @model_validator(mode="after")
    def _training_fits(self) -> TrainingConfig:
        # Weights in 8 bits cannot take the small updates of training.
        if self.lora is None and self.model.quantize is not None:
            raise refusal(
                "model.quantize", "fp8 holds weights that stay as they are, and lora is null; use one of the two"
            )
        # The weights of an earlier run are the base's then, so there is nothing to continue.
        if self.lora is None and self.model.start_as == "continue":
            raise refusal("model.start_as", "continue needs an adapter to train, and lora is null; use merge or a lora")
        self._check_float8()
        if self.lora is not None:
            refuse_muon(self.optim, "lora trains factors of their change; use adamw, or lora: null")
        # By their names alone: whether this model has the layers is known once it is read.
        for target in (self.lora.targets if self.lora is not None else None) or ():
            if not targets.is_known(target):
                raise refusal(
                    "lora.targets", f"names {target}, which K2 does not have; choose from {targets.choices()}"
                )
        check_metrics(self.eval, self.metric_names())
        return self

    def _check_float8(self) -> None:
        """Decides what auto means here."""
        if self.model.float8 is None:
            return
        if self.lora is not None:
            raise refusal(
                "model.float8",
                "is for training all weights, and lora is set; use model.quantize: fp8 for its base, or lora: null",
            )
        if self.model.float8 == "auto":
            sizes = self.image_sizes()
            if not sizes:
                raise refusal(
                    "model.float8", "auto goes by image sizes, which are not set; use tensorwise, rowwise or null"
                )
            pixels = [height * width for height, width in sizes]
            self.model = changed(self.model, float8=float8_for(max(pixels)))


def float8_for(pixels: int) -> Literal["tensorwise", "rowwise"] | None:
    """What model.float8: auto means for images of so many pixels: K2's own choices at 256, 512 and 1024."""
    if pixels <= 256**2:
        return "tensorwise"
    return "rowwise" if pixels < 1024**2 else None


def _falls(name: str) -> bool:
    """Whether this metric of an evaluation falls while the model gets better. Rewards, which have no group, rise."""
    metric = metrics.find(metrics.EVAL + name)
    # A reward may have the name of a metric of training, such as `loss`.
    is_reward = "/" not in name and name != metric_names.FAKE_LOSS
    return metric is not None and metric.better == "lower" and not is_reward


def check_metrics(config: EvalConfig, known: Sequence[str]) -> None:
    """Refuses metrics that an evaluation does not have, and a stop rule that cannot work."""
    known = list(dict.fromkeys(known))  # each once, for the message
    for name, metric in (("eval.best", config.best), ("eval.stop.metric", config.stop.metric)):
        if metric is not None and metric not in known:
            raise refusal(name, f"'{metric}' is no metric of the evaluation; known here: {', '.join(known)}")
    if config.best is not None and _falls(config.best):
        raise refusal("eval.best", f"takes the highest, and {config.best} is better the lower it is; name another")
    # What follows is about the stop rule.
    if config.stop.metric is None:
        return
    if config.stop.better == "higher" and _falls(config.stop.metric):
        raise refusal("eval.stop.better", f"is higher, and {config.stop.metric} is better the lower it is; set lower")
    # A run that was stopped has got worse, so its last step is not the one to hand on.
    if config.best is None:
        raise refusal(
            "eval.best",
            "is null, and eval.stop.metric is set: a run that its stop rule ends hands on its best step; name the"
            " metric that picks it, such as a held-out judge",
        )
    # `best` has no direction of its own: the highest value would be the worst step.
    if config.stop.better == "lower" and config.best == config.stop.metric:
        raise refusal(
            "eval.best", f"takes the highest {config.best}, and eval.stop.better is lower: name another metric"
        )
    if config.every == 0:
        raise refusal("eval.stop.metric", "has no meaning when eval.every is 0; evaluate during the run")
