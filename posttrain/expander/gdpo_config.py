"""The recipe of `posttrain expander gdpo` as data; see config.py. Never imports torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from posttrain.config.sections import LoraConfig, TrackConfig
from rewards.base import RewardSpec
from rewards.serve import ServerSpec


@dataclass
class ChatModelConfig:
    """The chat model that expands prompts."""

    path: str
    """Directory or hub id of a chat model, or the run directory of `posttrain expander sft`."""
    adapter: str | None = None
    """LoRA adapter to go on training, which is then the same adapter in the end; null: a new one is begun."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of the frozen weights and of the arithmetic; the adapter stays float32."""


@dataclass
class ExpanderPromptsConfig:
    """Short prompts of users: JSONL or hf:NAME[:SPLIT], with `prompt` and optional requirements, texts, tags, id."""

    train: str
    """What training draws from."""
    heldout: str
    """What evaluation draws; never trained on."""


@dataclass
class RendererConfig:
    """A frozen K2 that draws each expansion once; the members of a group start from one noise."""

    path: str
    """Krea2Pipeline directory or hub id, Turbo best; with `urls` only its tokenizer is read, to count."""
    urls: list[str] = field(default_factory=list)
    """Servers with /v1/images/generations, such as http://127.0.0.1:30000/v1 (SGLang, vLLM-Omni); empty: in process."""
    model: str | None = None
    """Name of the model at these servers; null: path."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the servers' key; null: none is needed."""
    size: list[int] = field(default_factory=lambda: [512, 512])
    """[height, width] in pixels, multiples of 16."""
    steps: int | None = None
    """Steps from noise to image, >= 1; null: 8 for Turbo and 28 for Raw in process, the server's own at `urls`."""
    guidance: float | None = None
    """Guidance in K2's convention, >= 0, 0 is off; null: 0 for Turbo and 4.5 for Raw, the server's own at `urls`."""
    max_tokens: int = 512
    """K2's text length in tokens; what an expansion has beyond it is cut, counted and reported, >= 1."""
    micro_batch: int = 16
    """Images in one forward, >= 1; in process only."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of the weights and of the arithmetic; in process only."""
    concurrency: int = 16
    """Requests to `urls` under way at once in all processes of the run together, >= 1; each has at least one."""
    timeout: float = 120.0
    """Seconds for one attempt, > 0."""
    deadline: float = 300.0
    """Seconds for a request with all its retries, > 0; a picture that takes longer is missing."""
    retries: int = 5
    """Of a request that is refused with 408, 409, 429 or 5xx, >= 0; lost connections are retried until the deadline."""
    max_failures: float = 0.1
    """Share of the last 256 pictures that may be missing before the run stops, in [0, 1]; all of a batch always stop
    it unless this is 1."""


@dataclass
class DiversityConfig:
    """Group diversity: mean distance of a picture to the others of its prompt. On for the whole run."""

    weight: float | list[float] = 0.3
    """Weight of the normalised reward, one number > 0. A list, which would be a schedule, is refused: where the weight
    falls away, so does the diversity."""
    path: str = "facebook/dinov3-vits16-pretrain-lvd1689m"
    """DINOv3 as a directory or hub id, or the directory of a Qwen3-VL, whose image tower is then taken."""
    batch: int = 64
    """Images in one forward, >= 1."""


@dataclass
class SafetySpec:
    """One safety check. Its score is in [0, 1], 1 is safe; a score that cannot be had stops the run."""

    name: str
    """Name in metrics, unique."""
    sees: Literal["text", "image"]
    """What it sees: the expansion, before it is drawn, or its picture."""
    function: str | dict[str, Any]
    """As in rewards: a function or a class, such as rewards.safety.Words, TextJudge, ImageJudge."""
    threshold: float = 0.5
    """Score from which it is safe, in (0, 1]."""
    timeout: float = 600.0
    """Seconds for one batch, > 0."""


@dataclass
class ExpansionGroupsConfig:
    """How many expansions a step draws, over all processes together."""

    prompts_per_step: int = 8
    """Prompts (groups) in a step, a multiple of the number of processes, >= 1."""
    group_size: int = 8
    """Expansions of one prompt that are compared, >= 3: of two, each is as far from the other."""
    micro_batch: int = 16
    """Expansions in one forward and backward, a divisor of a process's part; sets memory, not the result."""


@dataclass
class GenerationConfig:
    """How expansions are sampled: always from the whole distribution, since a cut one biases the ratios."""

    max_tokens: int = 512
    """Longest expansion in tokens, >= 1; one that is cut there fails the format check."""
    temperature: float = 1.0
    """Of the sampling, > 0."""
    use_vllm: bool = False
    """Generate with vLLM, through TRL; false: with transformers."""
    vllm: dict[str, Any] = field(default_factory=dict)
    """TRL's settings of vLLM without their `vllm_`, such as {mode: colocate, gpu_memory_utilization: 0.3} or
    {mode: server, server_base_url: http://127.0.0.1:8000}."""


@dataclass
class ExpanderOptimConfig:
    """AdamW, through TRL; one update on each batch of expansions."""

    lr: float = 1e-5
    """Learning rate after warm-up, > 0."""
    warmup_steps: int = 0
    """Steps over which the rate rises linearly from 0, >= 0."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm, > 0."""
    kl: float = 0.0
    """Weight of the KL divergence to the policy at the start, >= 0; above 0 costs one more forward."""
    clip_low: float = 0.2
    """The ratio is clipped below at 1 - clip_low, in (0, 1)."""
    clip_high: float = 0.2
    """The ratio is clipped above at 1 + clip_high, > 0."""


@dataclass
class AblationConfig:
    """What is switched off to show that it is needed. A run with one says so in its report, metrics and summary."""

    diversity: Literal["kept", "removed", "annealed"] = "kept"
    """removed: weight 0 from the start. annealed: it falls linearly to 0 over the first half of the run."""


@dataclass
class ExpanderEvalConfig:
    """Held-out prompts with fixed seeds, before the first step and after the last, and between."""

    every: int = 25
    """Steps between evaluations, >= 0; 0: only before and after."""
    prompts: int = 32
    """Held-out prompts, from the top of the file, >= 1."""
    group_size: int = 8
    """Expansions of each, >= 2."""
    shown: int = 6
    """Of these prompts, those whose pictures the report shows before and after, >= 0."""
    seed: int = 1234
    """Seed of expansions and noise, >= 0."""


@dataclass
class TrainerCheckpointConfig:
    """TRL's checkpoints, from which --resume goes on."""

    every: int = 25
    """Steps between checkpoints, >= 0; 0: only at the end. Ctrl-C and SIGTERM save too."""
    keep: int = 2
    """Newest checkpoints to keep, >= 1."""


@dataclass
class ExpanderGDPOConfig:
    """Reinforcement learning of the prompt expander by the pictures that its expansions make (GDPO, through TRL)."""

    output: str
    """Run directory, created; one that holds a run already needs --resume. The trained adapter is in adapter/."""
    model: ChatModelConfig
    prompts: ExpanderPromptsConfig
    renderer: RendererConfig
    rewards: list[RewardSpec]
    """Rewards of a picture, which get the user's prompt and its columns, and the column `expansion`. Without gates:
    those are `safety` and the format check."""
    safety: list[SafetySpec]
    """At least one check of the text and one of the image; they multiply every reward."""
    diversity: DiversityConfig = field(default_factory=DiversityConfig)
    worst: dict[str, float] = field(default_factory=dict)
    """Lowest score of each reward that may fall below 0, by its name, which is what a gated expansion gets; it is 0 for
    the others."""
    servers: list[ServerSpec] = field(default_factory=list)
    """Judges to serve while the run lasts; rewards and safety name one as server://NAME."""
    steps: int = 200
    """Training steps, >= 1."""
    seed: int = 0
    """Seed of adapter, prompts, expansions and noise, >= 0."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """The adapter, where a new one is begun; targets null: the attention and feed-forward projections."""
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    groups: ExpansionGroupsConfig = field(default_factory=ExpansionGroupsConfig)
    optim: ExpanderOptimConfig = field(default_factory=ExpanderOptimConfig)
    ablation: AblationConfig = field(default_factory=AblationConfig)
    eval: ExpanderEvalConfig = field(default_factory=ExpanderEvalConfig)
    checkpoint: TrainerCheckpointConfig = field(default_factory=TrainerCheckpointConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
