"""The recipe of `expander gdpo`, and what `expander mine` shares with it, as data. Never imports torch."""

from __future__ import annotations

import math
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import model_validator

from posttrain.config.sections import LoraConfig, Rewards, Servers, TrackConfig
from posttrain.config.types import (
    AtLeast0,
    AtLeast1,
    AtLeast2,
    Check,
    Float,
    NonNegative,
    Number,
    OpenShare,
    Positive,
    Range,
    Share,
    Size,
    Text,
    keyword_settings,
    refusal,
    settings,
)
from prompts.pool import PoolConfig
from rewards.base import RewardSpec

DIVERSITY = "diversity"
GATES = ("format", "safe")
"""Names of what is measured besides the rewards of a recipe."""

GROUP = Range(
    3,
    use="use 3 or more",
    why="and of two images each is as far from the other, so that diversity teaches nothing",
)


class _Constant(Check):
    """A schedule is refused: where the weight falls away, so does the diversity."""

    def problem(self, value: float | list[float]) -> str | None:
        if isinstance(value, float) and math.isfinite(value) and value > 0:
            return None
        schedule = ", a schedule," if isinstance(value, list) else ","
        return (
            f"is {value}{schedule} but its weight stays constant for the whole run: where it falls away, a prompt's"
            " expansions become one style again, however diverse they were before; write one number above 0"
            " (ablation.diversity shows what happens otherwise)"
        )


@settings
class ChatModelConfig:
    """The chat model that expands prompts."""

    path: Text
    """Directory or hub id of a chat model, or the run directory of `posttrain expander sft`."""
    adapter: str | None = None
    """LoRA adapter to continue training, which is then the same adapter in the end; null: a new one is begun."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of the frozen weights and of the arithmetic; the adapter stays float32."""
    thinking: bool | None = None
    """Whether it thinks before the caption; null: as its supervised training had it."""


@settings
class ExpanderPromptsConfig:
    """Short prompts of users: JSONL or hf:NAME[:SPLIT], with `prompt` and optional requirements, texts, tags, id."""

    train: Text
    """What training draws from."""
    heldout: Text
    """What evaluation draws; never trained on."""


@settings
class RendererConfig:
    """A frozen K2 that draws each expansion once; the members of a group start from one noise."""

    path: Text
    """Krea2Pipeline directory or hub id, Turbo best; with `urls` only its tokenizer is read, to count."""
    urls: list[str] = field(default_factory=list)
    """Servers with /v1/images/generations, such as http://127.0.0.1:30000/v1 (SGLang, vLLM-Omni); empty: in process."""
    model: str | None = None
    """Name of the model at these servers; null: path."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the servers' key; null: none is needed."""
    size: Size = field(default_factory=lambda: [512, 512])
    """[height, width] in pixels."""
    steps: AtLeast1 | None = None
    """Steps from noise to image; null: 8 for Turbo and 28 for Raw in process, the server's own at `urls`."""
    guidance: NonNegative | None = None
    """Guidance in K2's convention, 0 is off; null: 0 for Turbo and 4.5 for Raw, the server's own at `urls`."""
    max_tokens: AtLeast1 = 512
    """K2's text length in tokens; what an expansion has beyond it is cut, counted and reported."""
    micro_batch: AtLeast1 = 16
    """Images in one forward; in process only."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of the weights and of the arithmetic; in process only."""
    concurrency: AtLeast1 = 16
    """Requests to `urls` under way at once in all processes of the run together; each has at least one."""
    timeout: Positive = 120.0
    """Seconds for one attempt."""
    deadline: Positive = 300.0
    """Seconds for a request with all its retries; an image that takes longer is missing."""
    retries: AtLeast0 = 5
    """Of a request that is refused with 408, 409, 429 or 5xx; lost connections are retried until the deadline."""
    max_failures: Share = 0.1
    """Share of the last 256 images that may be missing before the run stops; all of a batch always stop
    it unless this is 1."""


@settings
class DiversityConfig:
    """Group diversity: mean distance of an image to the others of its prompt. On for the whole run."""

    weight: Annotated[Float | list[Float], _Constant()] = 0.3
    """Weight of the normalised reward, one number > 0. A list, which would be a schedule, is refused: where the weight
    falls away, so does the diversity."""
    path: Text = "facebook/dinov3-vits16-pretrain-lvd1689m"
    """DINOv3 as a directory or hub id, or the directory of a Qwen3-VL, whose image tower is then taken."""
    batch: AtLeast1 = 64
    """Images in one forward."""


@settings
class SafetySpec:
    """One safety check. Its score is in [0, 1], 1 is safe; a score that cannot be had stops the run."""

    name: str
    """Name in metrics, unique."""
    sees: Literal["text", "image"]
    """What it sees: the expansion, before it is drawn, or its image."""
    function: str | dict[str, Any]
    """As in rewards: a function or a class, such as rewards.safety.Words, TextJudge, ImageJudge."""
    threshold: Annotated[Float, Range(above=0, most=1)] = 0.5
    """Score from which it is safe."""
    timeout: Positive = 600.0
    """Seconds for one batch."""


@settings
class ExpansionGroupsConfig:
    """How many expansions a step draws, over all processes together."""

    prompts_per_step: AtLeast1 = 8
    """Prompts (groups) in a step, a multiple of the number of processes."""
    group_size: Annotated[int, GROUP] = 8
    """Expansions of one prompt that are compared: of two, each is as far from the other."""
    micro_batch: AtLeast1 = 16
    """Expansions in one forward and backward, a divisor of a process's part; sets memory, not the result."""


@settings
class GenerationConfig:
    """How expansions are sampled: always from the whole distribution, since a cut one biases the ratios."""

    max_tokens: AtLeast1 = 512
    """Longest expansion in tokens; one that is cut there fails the format check."""
    temperature: Positive = 1.0
    """Of the sampling."""
    use_vllm: bool = False
    """Generate with vLLM, through TRL; false: with transformers."""
    vllm: dict[str, Any] = field(default_factory=dict)
    """TRL's settings of vLLM without their `vllm_`, such as {mode: colocate, gpu_memory_utilization: 0.3} or
    {mode: server, server_base_url: http://127.0.0.1:8000}."""

    @model_validator(mode="after")
    def _fits(self) -> GenerationConfig:
        if self.vllm and not self.use_vllm:
            raise refusal("vllm", "has no effect while generation.use_vllm is false; set that too")
        return self


@settings
class ExpanderOptimConfig:
    """AdamW, through TRL; one update on each batch of expansions."""

    lr: Positive = 1e-5
    """Learning rate after warm-up."""
    warmup_steps: AtLeast0 = 0
    """Steps over which the rate rises linearly from 0."""
    max_grad_norm: Positive = 1.0
    """Gradients are scaled down to this global norm."""
    kl: NonNegative = 0.0
    """Weight of the KL divergence to the policy at the start; above 0 costs one more forward."""
    clip_low: OpenShare = 0.2
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: Positive = 0.2
    """The ratio is clipped above at 1 + clip_high."""


@settings
class AblationConfig:
    """What is switched off to show that it is needed. A run with one says so in its report, metrics and summary."""

    diversity: Literal["kept", "removed", "annealed"] = "kept"
    """removed: weight 0 from the start. annealed: it falls linearly to 0 over the first half of the run."""


@settings
class ExpanderEvalConfig:
    """Held-out prompts with fixed seeds, before the first step and after the last, and between."""

    every: AtLeast0 = 25
    """Steps between evaluations; 0: only before and after."""
    prompts: AtLeast1 = 32
    """Held-out prompts, from the top of the file."""
    group_size: AtLeast2 = 8
    """Expansions of each."""
    shown: AtLeast0 = 6
    """Of these prompts, those whose images the report shows before and after."""
    seed: AtLeast0 = 1234
    """Seed of expansions and noise."""


@settings
class TrainerCheckpointConfig:
    """TRL's checkpoints, that --resume continues from."""

    every: AtLeast0 = 25
    """Steps between checkpoints; 0: only at the end. Ctrl-C and SIGTERM save too."""
    keep: AtLeast1 = 2
    """Newest checkpoints to keep."""


@keyword_settings
class ScoringConfig:
    """What expansions are written and scored with: by `expander gdpo` to train, by `expander mine` to sort prompts."""

    output: Text
    """Directory to write."""
    model: ChatModelConfig
    renderer: RendererConfig
    rewards: Rewards
    """Rewards of an image, which get the user's prompt and its columns, and the column `expansion`. Without gates:
    those are `safety` and the format check."""
    safety: list[SafetySpec]
    """At least one check of the text and one of the image; they multiply every reward."""
    diversity: DiversityConfig = field(default_factory=DiversityConfig)
    worst: dict[str, Number] = field(default_factory=dict)
    """Lowest score of each reward that may fall below 0, by its name, which is what a gated expansion gets; it is 0 for
    the others."""
    servers: Servers = field(default_factory=list)
    """Judges to serve while the run lasts; rewards and safety name one as server://NAME."""
    generation: GenerationConfig = field(default_factory=GenerationConfig)

    @model_validator(mode="after")
    def _scoring_fits(self) -> ScoringConfig:
        self._check_rewards()
        self._check_safety()
        return self

    @property
    def trained(self) -> list[RewardSpec]:
        """The rewards that are not only measured."""
        return [reward for reward in self.rewards if not reward.heldout_only]

    def _check_rewards(self) -> None:
        trained = self.trained
        if sum(reward.weight for reward in trained) <= 0:
            raise refusal("rewards", "none is trained on with a weight above 0; diversity alone teaches no image")
        for i, reward in enumerate(self.rewards):
            if reward.name in (DIVERSITY, *GATES):
                raise refusal(f"rewards[{i}].name", f"'{reward.name}' is measured in every run; choose another")
            # TRL only sums rewards, so what gates them has to act before it sees them.
            if reward.gate != "none":
                raise refusal(f"rewards[{i}].gate", f"is {reward.gate}; what gates an expansion goes under safety")
            if reward.group:
                raise refusal(f"rewards[{i}].group", "is true; what compares a group here is diversity alone")
        names = {reward.name for reward in trained}
        for name, value in self.worst.items():
            if name not in names:
                raise refusal("worst", f"'{name}' is not a reward that is trained on")
            # A gated expansion gets the worst score: of a reward in [0, 1] that is 0 anyway.
            if value >= 0:
                raise refusal("worst", f"{name} is {value}; leave out what cannot fall below 0")

    def _check_safety(self) -> None:
        seen = {check.sees for check in self.safety}
        # A harmless text can make a harmful image, and the other way round.
        for kind in ("text", "image"):
            if kind not in seen:
                raise refusal("safety", f"has no check with sees: {kind}; add one, such as those of rewards/safety.py")
        names: set[str] = set()
        for i, check in enumerate(self.safety):
            if not check.name.strip() or check.name in names:
                raise refusal(f"safety[{i}].name", f"is '{check.name}'; give each check a name of its own")
            names.add(check.name)


@keyword_settings
class ExpanderGDPOConfig(ScoringConfig):
    """Reinforcement learning of the prompt expander by the images that its expansions make (GDPO, through TRL)."""

    output: Text
    """Run directory, created; one that holds a run already needs --resume. The trained adapter is in adapter/."""
    prompts: ExpanderPromptsConfig
    pool: PoolConfig = field(default_factory=PoolConfig)
    steps: AtLeast1 = 200
    """Training steps."""
    idle_steps: AtLeast0 = 50
    """Steps in a row from which nothing could be learnt, as the expansions of each group score alike in every reward or
    have no score, after which the run ends; 5 are warned of. 0: never."""
    seed: AtLeast0 = 0
    """Seed of adapter, prompts, expansions and noise."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """The adapter, where a new one is begun; targets null: the attention and feed-forward projections."""
    groups: ExpansionGroupsConfig = field(default_factory=ExpansionGroupsConfig)
    optim: ExpanderOptimConfig = field(default_factory=ExpanderOptimConfig)
    ablation: AblationConfig = field(default_factory=AblationConfig)
    eval: ExpanderEvalConfig = field(default_factory=ExpanderEvalConfig)
    checkpoint: TrainerCheckpointConfig = field(default_factory=TrainerCheckpointConfig)
    track: TrackConfig = field(default_factory=TrackConfig)

    @model_validator(mode="after")
    def _fits(self) -> ExpanderGDPOConfig:
        expansions = self.groups.prompts_per_step * self.groups.group_size
        # TRL wants whole micro-batches.
        if expansions % self.groups.micro_batch:
            raise refusal(
                "groups.micro_batch",
                f"is {self.groups.micro_batch}; use a divisor of the step's {expansions} expansions",
            )
        return self
