"""Recipes as data: one dataclass for each command, sections as nested dataclasses. Never imports torch.

The docstring under a field is its help text: what it is, its unit and its range. Types and
unknown keys are checked where recipes are read (`recipe.py`, `cli.py`), ranges in `validate.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from prompts.pool import PoolConfig
from rewards.base import RewardSpec
from rewards.serve import ServerSpec


@dataclass
class ModelConfig:
    """The K2 checkpoint to start from."""

    path: str
    """Diffusers directory or hub id of a Krea2Pipeline (with transformer_file: for the other parts)."""
    transformer_file: str | None = None
    """Transformer as one safetensors file in the original key names; replaces the one in path."""
    start: str | None = None
    """Run directory or checkpoint of an earlier method to go on from: what it trained, and what it started from
    itself, is part of the model and of the reference. It must stay where it is. Adapters stay adapters, in float32, so
    that nothing of them is rounded; a run that trained all weights replaces the base's, in dtype."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of the frozen weights, and of the arithmetic. What is trained, latents and log-probs stay float32."""
    compile: bool | None = None
    """Compile the transformer's blocks, which takes up to a minute at first and is kept on disk for later runs; results
    agree within rounding, which `posttrain bench` measures. null: on a GPU in bfloat16, but not where it is sharded,
    nor for the few pictures of `posttrain sample`."""
    recompute: int | None = None
    """Blocks whose activations are computed again in backward instead of kept, >= 0 (K2 has 28): each saves memory and
    costs a forward of it; results are the same. null: as many as do not fit into the GPU's free memory; on a CPU 0."""
    attention: Literal["native", "cudnn"] = "native"
    """Kernels of attention. native: those that torch chooses. cudnn: cuDNN's, on an NVIDIA GPU in bfloat16, which may
    be faster with large pictures; results agree within rounding."""
    quantize: Literal["fp8"] | None = None
    """fp8: hold and multiply the frozen weights of the transformer's blocks in 8 bits (K2: 12.6 GiB instead of 24), in
    bfloat16 and under an adapter only. It changes results, by what `posttrain bench` measures, and what is exported is
    the adapter for the exact base. Needs an NVIDIA GPU of compute capability 8.9 or more (a CPU is slow), and
    pip install 'posttrain[fp8]'. null: exact."""
    offload: list[Literal["text_encoder", "vae"]] = field(default_factory=list)
    """Parts that wait in the CPU's memory while they are not used: each use copies them to the GPU (K2: 8.3 and 0.25
    GB); results are the same."""
    allow_distilled: bool = False
    """Train a distilled checkpoint (Turbo, or a run of posttrain tdm as start) as if it were Raw. Losses over all noise
    levels blur what few steps draw: the order that works is to train Raw and to distil it last."""


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
    """Prompts: JSONL, one object a line, or rows of a dataset, with `prompt` and optional requirements, texts,
    tags, id."""

    train: str
    """What training draws from: a JSONL file, or hf:NAME[:SPLIT] for a dataset that `datasets` loads, such as
    hf:owner/name:train[:5000]; SPLIT is train if not given."""
    heldout: str
    """What evaluation draws; written as train is, and never trained on."""
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
    """How noise enters an SDE step: Flow-SDE, Dance-SDE or coefficient-preserving sampling (cps). With many steps flow
    and dance draw what the ODE of evaluation draws; cps does not, its images vary less: at eta 0.7 and 28 steps, 0.39
    where the ODE has a standard deviation of 0.46, on Gaussian data of 0.5."""
    eta: float = 0.7
    """Noise level, > 0. Above 0.7, Flow-SDE adds visible excess noise; for cps 1 is the most."""
    window: int | None = 2
    """Number of SDE steps, 1 to steps - 1, the rest are ODE steps; null: all but the last."""
    window_start: int | Literal["random", "sliding"] = "random"
    """First SDE step, counted from 0; or `random`: drawn for each training step within the first half; or
    `sliding`: 0 at first, then one later every window_every steps, and 0 again past the first half (MixGRPO)."""
    window_every: int = 25
    """Training steps that a sliding window stays where it is, >= 1."""


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
    eps: float = 1e-15
    """Added to the root of the second moment, > 0. Gradients are means over all latent elements: for K2 that root is
    1e-8 and less, so the usual 1e-8 would set the rate, differently at each resolution and number of images. The
    metric eps_share is what eps takes of the rate."""
    clip_factor: float = 3.0
    """Gradients whose global norm is above this many times the median of the last 64 norms are scaled down to that,
    >= 1, or 0: never. The first 16 updates are not clipped. The metric clipped_updates counts them."""
    passes: int = 1
    """Optimiser updates on each batch of images, >= 1; more than two leaves the policy that drew them."""
    warmup_steps: int = 0
    """Updates over which the rate rises linearly from 0, >= 0."""
    cooldown_steps: int = 0
    """Last training steps over which the rate falls linearly to 0, >= 0; 0: it stays."""
    ema: float = 0.0
    """Decay of the moving average of the weights that evaluation and export use, in [0, 1); 0: the weights."""
    kind: Literal["adamw", "adamw8bit"] = "adamw"
    """adamw8bit: keep the two moments in 8 bits, 2 bytes a trained weight instead of 8. It changes results, by what
    `posttrain bench` measures; needs pip install 'posttrain[fp8]'. A run keeps to its kind."""


@dataclass
class LossConfig:
    """The clipped objective. Log-probs are means over latent elements, hence the small clips.

    With optim.passes 1 the policy that trains is the one that sampled, so all ratios are 1 and nothing is clipped: the
    smaller clip is then only how far from 1 a ratio may be before the run is ended.
    """

    clip_low: float = 1e-4
    """The ratio is clipped below at 1 - clip_low, in (0, 1). It acts from the second of optim.passes on."""
    clip_high: float = 1e-4
    """The ratio is clipped above at 1 + clip_high, > 0. It acts from the second of optim.passes on."""
    kl: float = 0.01
    """Weight of the squared velocity distance to the reference (the weights at the start: adapter off), >= 0; 0
    turns it off. With ratio guard each step's distance is weighted as its objective is."""
    ratio: Literal["plain", "guard"] = "guard"
    """plain: exp of the log-prob difference. guard: recentred, and rescaled and weighted so that all steps of the
    schedule are equally sensitive to the velocity."""
    max_advantage: float = 5.0
    """Advantages are clipped to plus or minus this, > 0."""


@dataclass
class StopConfig:
    """Ends the run, saved and with exit code 0, when a figure of the evaluation has got worse and stays so. Such a run
    hands on its best step, by eval.best."""

    metric: str | None = None
    """Figure to watch, named as in eval.best and like that one not trained on; null: never stop. Needs eval.best."""
    better: Literal["higher", "lower"] = "higher"
    """Which is better. lower suits pairs/winner and to_teacher/saturation."""
    drop: float = 0.1
    """How far from its best so far the figure may get, as a share of that best, > 0: 0.1 lets 0.8 fall to 0.72.
    Made for figures above 0."""
    limit: float | None = None
    """Instead of drop: the worst that the figure may be, whatever its best was; null: drop decides."""
    patience: int = 2
    """Evaluations in a row that must be worse than that, >= 1."""


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
    groups: int = 8
    """Of these prompts, those that each guidance setting draws a group of images of, to measure diversity, >= 0;
    0: none."""
    group_size: int = 8
    """Images in such a group, >= 2."""
    best: str | None = None
    """Figure, the higher the better, whose best step is kept as checkpoints/best, and handed on by a run that eval.stop
    ended: a reward that is not trained on (oracle; with guidance 1.5, oracle@1.5) or image/diversity, image/brightness,
    ...; null: none is kept."""
    stop: StopConfig = field(default_factory=StopConfig)
    """Guard against reward hacking."""


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
    servers: list[ServerSpec] = field(default_factory=list)
    """Judges to serve while the run lasts; rewards name one as server://NAME."""
    steps: int = 200
    """Training steps: each draws images, scores them and updates, >= 1."""
    seed: int = 0
    """Seed of everything drawn: adapter, prompts, noise; >= 0."""
    advantages: Literal["gdpo", "sum"] = "gdpo"
    """gdpo: normalise each reward in its group, then weigh, then normalise over the batch.
    sum: weigh, then normalise in the group."""
    lora: LoraConfig | None = field(default_factory=LoraConfig)
    """The adapter to train, with rank, alpha and targets (--lora.help). null: train all weights but the text
    fusion's; wants an optim.lr of 1e-6 to 1e-5, and 16 bytes a weight (K2: 205 GB), with loss.kl > 0 another copy
    in model.dtype (K2, bfloat16: 26 GB), with optim.ema 4 bytes more (K2: 51 GB)."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    groups: GroupsConfig = field(default_factory=GroupsConfig)
    pool: PoolConfig = field(default_factory=PoolConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    track: TrackConfig = field(default_factory=TrackConfig)


@dataclass
class ServeConfig:
    """Serve a recipe's judges until Ctrl-C or SIGTERM. Keys of the recipe other than those below are not read."""

    servers: list[ServerSpec]
    """Servers to start."""
    logs: str = "runs/servers"
    """Directory for the servers' logs, NAME.log; created."""
    print_for: str | None = None
    """Address of another machine, such as 10.0.0.2: print the shell commands that serve there, and start nothing;
    whoever reaches that address may ask. null: serve here, for this machine only."""


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
    """Run directory or checkpoint whose adapter (or weights, if it trained all) is applied; null: the model as
    it is."""
    size: list[int] = field(default_factory=lambda: [512, 512])
    """[height, width] in pixels, multiples of 16."""
    steps: int | None = None
    """Steps from noise to image, >= 1; null: 28, or 8 for a Turbo checkpoint or a run of tdm."""
    guidance: float | None = None
    """Guidance in K2's convention, v = c + s (c - u), >= 0, 0 is off; null: 4.5, or 0 for those."""
    images: int = 1
    """Images for each prompt, >= 1."""
    expand: str | None = None
    """Draw expansions instead of the prompts, one for each image: chat model, or run directory of `posttrain expander
    sft` or `gdpo`; null: the prompts as they are."""
    micro_batch: int = 8
    """Images in one forward, >= 1."""
    seed: int = 0
    """Seed of the noise, >= 0; image i of a prompt uses its own stream."""


@dataclass
class ExportConfig:
    """Turn a checkpoint into files that other tools load."""

    source: str
    """Run directory (its newest checkpoint; its best step if eval.stop ended it) or one checkpoint, such as
    runs/a/checkpoints/best."""
    output: str
    """Directory (diffusers) or .safetensors file (the other formats) to write; must not exist. Its model card is
    README.md in the directory, or NAME.md beside NAME.safetensors."""
    format: Literal["diffusers", "lora", "original", "lora-original"] = "diffusers"
    """diffusers: a Krea2Pipeline directory with what was trained. lora: the adapter for load_lora_weights.
    original, lora-original: the same in the key names of the official repository and ComfyUI. A run that trained
    all weights has no adapter: diffusers or original."""
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


@dataclass
class ReportConfig:
    """posttrain report RUN [RUN ...]: write report.html for a run, with curves, images before and after, settings; or
    compare several runs on one page. It opens without a network."""

    runs: list[str]
    """Run directories. Several are compared: those whose recipes differ only in the seed are one line with a band."""
    output: str | None = None
    """HTML file to write; null: report.html in the run directory, comparison.html beside the first of several."""
