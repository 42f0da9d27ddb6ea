"""The recipe of `posttrain stpo` as data. Never imports torch."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import model_validator

from posttrain.config import metric_names
from posttrain.config.rewards import measured
from posttrain.config.sections import EvalConfig, LoraConfig, OptimConfig, Rewards, TrainingConfig, require_one_pass
from posttrain.config.types import (
    AtLeast0,
    AtLeast1,
    BelowOne,
    Filled,
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
from posttrain.preferences.config import ColumnMap


@settings
class PairSetConfig:
    """Pairs of images of one prompt, of which one is preferred. Latents and text are encoded once, into a cache."""

    train: Text
    """Directory of `posttrain pairs` or `posttrain annotate`; JSONL or CSV with prompt, chosen, rejected,
    where images are paths from its directory; parquet; a dataset saved to disk; or hf:NAME[:SPLIT]."""
    columns: ColumnMap | None = None
    """Which columns hold what; null: those of posttrain/preferences/dataset.py. Required: prompt,
    chosen, rejected."""
    max_bad: BelowOne = 0.01
    """Share of the rows that may be bad (an image that is missing or cut off, two that are the same, no prompt)
    and are left out with a warning; more end the run."""
    size: Size | None = None
    """[height, width] that all images are scaled and cropped to; null: as they are, where both of a pair have one size.
    """
    max_tokens: AtLeast1 = 512
    """Longest prompt in text tokens; what lies beyond is cut with a warning."""
    drop_prompt: BelowOne = 0.0
    """Share of the pairs that are trained with the empty prompt, both images."""
    heldout: OpenShare = 0.05
    """Share of the prompts whose pairs are never trained on; at least one prompt."""
    measured: Annotated[int, Range(4)] = 128
    """Pairs of these that each evaluation measures."""
    cache: Text = "runs/cache"
    """Directory for the encoded pairs: one folder inside for each set, model, size and max_tokens. At 512 x 512 a pair
    takes 0.5 MB and a prompt about 1 MB."""


@settings
class PreferenceLossConfig:
    """STPO, or Diffusion-DPO; posttrain/stpo/losses.py has the formula."""

    kind: Literal["stpo", "dpo"] = "stpo"
    """dpo: plain Diffusion-DPO, without guard, bound, anchor and hinge, which are not read then."""
    beta: Positive = 2000.0
    """How far from the reference a preference may lead, the less the higher. Errors are means over latent elements
    here; where they are sums, divide by their number."""
    guard: Literal["output", "exact", "none"] = "output"
    """How the rejected image's gradient is kept from raising the chosen one's error. output: for each pair, by the
    errors at the network's output. exact: for the whole batch, by the adapter's gradients; a step takes about
    twice as long, and not with lora: null."""
    guard_share: Share = 0.6
    """Share of the unopposed decrease of the chosen image's error that a step keeps at least."""
    bound: Positive | None = None
    """Most that the rejected image may add to the margin, in nats, such as 8 to 12; null: any."""
    anchor: NonNegative = 0.01
    """Pull of both images' velocities to the reference's, relative to the preference's pull."""
    hinge: NonNegative = 0.25
    """Pull on the chosen images' error while its mean over the batch is above the reference's. Above 0, a step
    of several micro-batches costs one more forward of the chosen images to learn that mean."""
    time_mean: Number = 0.0
    """Mean of the logit of the training times, before the resolution's shift is added."""
    time_std: Positive = 1.0
    """Standard deviation of that logit."""
    terms_every: AtLeast0 = 25
    """Steps between measurements of each term's share of the gradient, from the first step on; such a step takes about
    twice as long; 0: none. With lora: null there are none."""


@keyword_settings
class STPOConfig(TrainingConfig):
    """Preference optimisation of K2 on pairs (STPO), with plain Diffusion-DPO as an ablation."""

    pairs: PairSetConfig
    heldout: Annotated[str, Filled("name prompts to evaluate with")]
    """Prompts that evaluation draws: a JSONL file, or hf:NAME[:SPLIT]; they should be in no pair."""
    rewards: Rewards = field(default_factory=list)
    """Rewards to measure at evaluation; none is trained on, and weight, gate and heldout_only are not read."""
    steps: AtLeast1 = 500
    """Updates."""
    batch: AtLeast1 = 64
    """Pairs in an update, over all processes together; need not divide by their number."""
    micro_batch: AtLeast1 = 8
    """Pairs in one forward of the model; sets memory, not the result."""
    lora: LoraConfig | None = field(default_factory=LoraConfig)
    """The adapter to train, with rank, alpha and targets. null: train all weights but the text fusion's;
    see posttrain grpo --help for what that takes, the reference's copy included."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """passes must be 1."""
    loss: PreferenceLossConfig = field(default_factory=PreferenceLossConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Its figures are also pairs/winner, pairs/loser, pairs/accuracy, ... of held-out pairs (posttrain/stpo/train.py)
    and image/contrast, image/high_energy and image/high_energy_ratio, to that before the first step."""

    def image_sizes(self) -> list[list[int]]:
        return [self.pairs.size] if self.pairs.size else []

    def images_at_once(self) -> int:
        return 2 * self.micro_batch  # the chosen and the rejected image of a pair share a forward

    def metric_names(self) -> list[str]:
        rewards = measured(self.rewards, self.eval.groups)
        names = metric_names.names(rewards, self.eval.guidance, self.eval.groups)
        return [*names, *metric_names.PAIRS, *metric_names.CHANGES]

    @model_validator(mode="after")
    def _fits(self) -> STPOConfig:
        require_one_pass(self.optim, "each update draws its own times and noise; use 1")
        # The exact guard keeps the gradients of both images: of an adapter they are small.
        if self.loss.kind == "stpo" and self.loss.guard == "exact" and self.lora is None:
            raise refusal("loss.guard", "exact needs an adapter's gradients; set lora, or use output")
        return self
