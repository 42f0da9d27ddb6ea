"""The recipe of `posttrain stpo` as data; see config.py. Never imports torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from posttrain.config.sections import CheckpointConfig, EvalConfig, LoraConfig, ModelConfig, OptimConfig, TrackConfig
from posttrain.preferences.config import ColumnMap
from rewards.base import RewardSpec
from rewards.serve import ServerSpec


@dataclass
class PairSetConfig:
    """Pairs of pictures of one prompt, of which one is preferred. Latents and text are encoded once, into a cache."""

    train: str
    """Directory of `posttrain pairs` or `posttrain annotate`; JSONL with prompt, chosen, rejected, where pictures are
    paths from its directory; parquet; a dataset saved to disk; or hf:NAME[:SPLIT]."""
    columns: ColumnMap | None = None
    """Which columns hold what; null: those of posttrain/preferences/dataset.py, of which prompt, chosen, rejected must be
    there."""
    max_bad: float = 0.01
    """Share of the rows that may be bad (a picture that is missing or cut off, two that are the same, no prompt)
    and are left out with a warning, in [0, 1); more end the run."""
    size: list[int] | None = None
    """[height, width] that all pictures are scaled and cropped to, multiples of 16; null: as they are."""
    max_tokens: int = 512
    """Longest prompt in text tokens; what lies beyond is cut with a warning, >= 1."""
    drop_prompt: float = 0.0
    """Share of the pairs that are trained with the empty prompt, both pictures, in [0, 1)."""
    heldout: float = 0.05
    """Share of the prompts whose pairs are never trained on, between 0 and 1; at least one prompt."""
    measured: int = 128
    """Pairs of these that each evaluation measures, >= 4."""
    cache: str = "runs/cache"
    """Directory for the encoded pairs: one folder inside for each set, model, size and max_tokens. At 512 x 512 a pair
    takes 0.5 MB and a prompt about 1 MB."""


@dataclass
class PreferenceLossConfig:
    """STPO, or Diffusion-DPO; posttrain/stpo/losses.py has the formula."""

    kind: Literal["stpo", "dpo"] = "stpo"
    """dpo: plain Diffusion-DPO, without guard, bound, anchor and hinge, which are not read then."""
    beta: float = 2000.0
    """How far from the reference a preference may lead, the less the higher, > 0. Errors are means over latent elements
    here; where they are sums, divide by their number."""
    guard: Literal["output", "exact", "none"] = "output"
    """How the rejected picture's gradient is kept from raising the chosen one's error. output: for each pair, by the
    errors at the network's output. exact: for the whole batch, by the adapter's gradients; a step takes about
    twice as long, and not with lora: null."""
    guard_share: float = 0.6
    """Share of the unopposed decrease of the chosen picture's error that a step keeps at least, in [0, 1]."""
    bound: float | None = None
    """Most that the rejected picture may add to the margin, in nats, > 0, such as 8 to 12; null: any."""
    anchor: float = 0.01
    """Pull of both pictures' velocities to the reference's, relative to the preference's pull, >= 0."""
    hinge: float = 0.25
    """Pull on the chosen pictures' error while its mean over the batch is above the reference's, >= 0. Above 0, a step
    of several micro-batches costs one more forward of the chosen pictures to learn that mean."""
    time_mean: float = 0.0
    """Mean of the logit of the training times, before the resolution's shift is added."""
    time_std: float = 1.0
    """Standard deviation of that logit, > 0."""
    terms_every: int = 25
    """Steps between measurements of each term's share of the gradient, from the first step on; such a step takes about
    twice as long; >= 0; 0: none. With lora: null there are none."""


@dataclass
class STPOConfig:
    """Preference optimisation of K2 on pairs (STPO), with plain Diffusion-DPO as an ablation."""

    output: str
    """Run directory, created; one that holds a run already needs --resume."""
    model: ModelConfig
    pairs: PairSetConfig
    heldout: str
    """Prompts that evaluation draws: a JSONL file, or hf:NAME[:SPLIT]; they should be in no pair."""
    rewards: list[RewardSpec] = field(default_factory=list)
    """Rewards to measure at evaluation; none is trained on, and weight, gate and heldout_only are not read."""
    servers: list[ServerSpec] = field(default_factory=list)
    """Judges to serve while the run lasts; rewards name one as server://NAME."""
    steps: int = 500
    """Updates, >= 1."""
    batch: int = 64
    """Pairs in an update, over all processes together, >= 1; need not divide by their number."""
    micro_batch: int = 8
    """Pairs in one forward of the model, >= 1; sets memory, not the result."""
    seed: int = 0
    """Seed of everything drawn: adapter, order, times, noise; >= 0."""
    lora: LoraConfig | None = field(default_factory=LoraConfig)
    """The adapter to train, with rank, alpha and targets (--lora.help). null: train all weights but the text fusion's;
    see posttrain grpo --help for what that takes, the reference's copy included."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """passes must be 1."""
    loss: PreferenceLossConfig = field(default_factory=PreferenceLossConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Its figures are also pairs/winner, pairs/loser, pairs/accuracy, ... of held-out pairs (posttrain/stpo/train.py) and
    image/contrast, image/high_energy and image/high_energy_ratio, to that before the first step."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
