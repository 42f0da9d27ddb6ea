"""The recipe of `posttrain pairs` as data. Never imports torch."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated

from pydantic import model_validator

from posttrain.config.sections import ModelConfig, Rewards, Servers, TrackConfig
from posttrain.config.types import (
    AtLeast0,
    AtLeast1,
    BelowOne,
    Filled,
    Float,
    NonNegative,
    Positive,
    Range,
    Share,
    Sizes,
    Text,
    changed,
    refusal,
    settings,
)

BASE = "base"
"""Names what the policy began as, its reference."""


@settings
class DrawConfig:
    """A way to draw an image. Left as it is, it is how the policy draws: its images are on-policy."""

    checkpoint: Annotated[str, Filled("use policy, base or a run directory")] = "policy"
    """policy; base: what the policy began as, its reference; or another run directory or checkpoint that trained an
    adapter on that base."""
    guidance: NonNegative = 0.0
    """Guidance in K2's convention, v = c + s (c - u), 0 is off."""
    steps: AtLeast1 | None = None
    """Steps from noise to image; null: those of the recipe."""
    drop: BelowOne = 0.0
    """Share of the prompt left out: of its clauses or, where there is one, of its words; drawn by
    the pair's seed, at least one and never all. The pair keeps the whole prompt."""
    noise: BelowOne = 0.0
    """Time, to which the finished latents are noised again before they are decoded."""


@settings
class DeltaConfig:
    """Pairs ordered by how they were drawn (delta learning): both from one noise, so that little else differs."""

    stronger: DrawConfig
    """How the chosen image is drawn."""
    weaker: DrawConfig
    """How the rejected one is drawn."""
    screen: bool = True
    """Drop a pair about which the rewards say otherwise; false: they only report. Where they say nothing, the pair
    stays."""


@settings
class JudgedConfig:
    """Pairs ordered by the rewards: the best against the worst image of a group."""

    draw: DrawConfig = field(default_factory=DrawConfig)
    """How the group is drawn."""
    group_size: Annotated[int, Range(2, why="but the best is paired with the worst")] = 4
    """Images in it."""


@settings
class PairSource:
    """Where some of the pairs come from; give either delta or judged."""

    name: str
    """Name in the report, unique in the recipe."""
    share: Positive = 1.0
    """Its part of the pairs, relative to the other sources."""
    delta: DeltaConfig | None = None
    """Two ways to draw, of which one is known to be better."""
    judged: JudgedConfig | None = None
    """A group of images that the rewards rank."""

    @property
    def group_size(self) -> int:
        """Images of a candidate that are drawn with one setting."""
        return self.judged.group_size if self.judged is not None else 1

    def draws(self) -> list[DrawConfig]:
        """The settings that it draws with: stronger and weaker, or those of the group."""
        if self.delta is not None:
            return [self.delta.stronger, self.delta.weaker]
        assert self.judged is not None
        return [self.judged.draw]


@settings
class PairsConfig:
    """Make preference pairs from prompts: drawn in two ways, or the best and the worst of a group by the rewards."""

    output: Text
    """Directory of the pairs and of the report on them, created; one that holds pairs already needs --resume."""
    model: ModelConfig
    prompts: Text
    """What the pairs show: a JSONL file, or hf:NAME[:SPLIT] for a dataset that `datasets` loads."""
    sources: Annotated[list[PairSource], Filled("name at least one")]
    """What makes the images of a pair differ; each source gets its share of the pairs."""
    policy: str | None = None
    """Run directory or checkpoint of the policy that will be trained; null: the model as it is."""
    rewards: Rewards = field(default_factory=list)
    """Rewards that rank, veto and report; those with heldout_only only report. A winner below the threshold of a gate
    is dropped; gate: multiply also multiplies the others."""
    servers: Servers = field(default_factory=list)
    """Judges to serve while the pairs are made; rewards name one as server://NAME."""
    pairs: AtLeast1 = 1000
    """Pairs to make."""
    on_policy_share: Share = 0.6
    """Least share of the pairs that hold an image of the policy. Sources that do are given more than their
    share where that takes it; if too many of their pairs are dropped, the command fails."""
    min_margin: NonNegative = 0.02
    """Least weighted mean by which the rewards must put the chosen image above the other."""
    tolerance: NonNegative = 0.0
    """A pair is dropped if a reward puts the rejected image higher by more than this."""
    min_distance: Share = 0.03
    """Near-duplicates: a pair is dropped if its images, made small, differ by less (root mean square; see
    image/diversity)."""
    tries: Annotated[Float, Range(1)] = 5.0
    """Candidates that a source draws at most for each of its pairs."""
    sizes: Sizes = field(default_factory=lambda: [[512, 512]])
    """[height, width] pairs in pixels; a pair has one size, and blocks of pairs take turns."""
    steps: AtLeast1 = 28
    """Steps from noise to image. Images drawn in fewer or more do not count as on-policy."""
    max_tokens: AtLeast1 = 512
    """Longest prompt in text tokens; what lies beyond is cut with a warning."""
    seed: AtLeast0 = 0
    """Seed of everything drawn: order of the prompts, noise, what is left out."""
    block: AtLeast1 = 32
    """Candidates that are drawn, judged and decided together, by one process."""
    micro_batch: AtLeast1 = 16
    """Images in one forward of the model; sets memory, and changes the images by no more than rounding."""
    shard: AtLeast1 = 64
    """Pairs in a file. After a kill, --resume draws again what was in no file yet."""
    # Making pairs has no curve to watch.
    track: TrackConfig = field(default_factory=lambda: TrackConfig(tensorboard=False))

    @model_validator(mode="after")
    def _fits(self) -> PairsConfig:
        # What is preferred must not be what rounding changed.
        self.model.refuse_sequence_parallel("each process draws pairs of its own")
        self.model.refuse_float8()
        self.model.refuse_quantize("pairs show what the exact weights draw")
        for i, reward in enumerate(self.rewards):
            if reward.group:
                raise refusal(f"rewards[{i}].group", f"'{reward.name}' sees whole groups, and pairs are none; drop it")
        names: set[str] = set()
        for i, source in enumerate(self.sources):
            if not source.name.strip() or source.name in names:
                raise refusal(f"sources[{i}].name", f"is '{source.name}'; give each source a name of its own")
            names.add(source.name)
            self._check_source(f"sources[{i}]", source)
        # No number of candidates would help.
        if self.on_policy_share and not any(map(self.on_policy, self.sources)):
            raise refusal(
                "on_policy_share",
                f"is {self.on_policy_share:g}, and no source draws as the policy does (checkpoint: policy, all else"
                " left out); add one or use 0",
            )
        return self

    def _check_source(self, path: str, source: PairSource) -> None:
        if (source.delta is None) == (source.judged is None):
            raise refusal(path, f"'{source.name}' needs either delta or judged")
        if source.delta is not None:
            # Both come from one noise, so nothing would differ.
            if self.resolved(source.delta.stronger) == self.resolved(source.delta.weaker):
                raise refusal(f"{path}.delta", "stronger and weaker draw alike; change one of them")
            return
        # A held-out reward only measures, and a gate only drops.
        if not any(r.gate == "none" and not r.heldout_only and r.weight > 0 for r in self.rewards):
            raise refusal("rewards", f"hold none that ranks for source {source.name}: no gate, not heldout_only")

    # What settings of drawing mean.

    def resolved(self, draw: DrawConfig) -> DrawConfig:
        """The same settings with `policy` and defaults replaced by what they mean."""
        checkpoint = (self.policy or BASE) if draw.checkpoint == "policy" else draw.checkpoint
        return changed(draw, checkpoint=checkpoint, steps=draw.steps or self.steps)

    def forwards(self, draw: DrawConfig) -> int:
        """Forwards of the model for one image; guidance takes the empty prompt too."""
        return (draw.steps or self.steps) * (2 if draw.guidance else 1)

    def is_policy(self, draw: DrawConfig) -> bool:
        """Whether it draws as the policy does: the policy's checkpoint, no guidance, the recipe's steps, nothing
        degraded."""
        return self.resolved(draw) == self.resolved(DrawConfig())

    def on_policy(self, source: PairSource) -> bool:
        """Whether each pair of the source holds an image of the policy."""
        return any(self.is_policy(draw) for draw in source.draws())
