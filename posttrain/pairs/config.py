"""The recipes of `posttrain pairs`, `annotate` and `annotations` as data; see config.py. Never imports torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from posttrain.config.sections import ModelConfig, TrackConfig
from rewards.base import RewardSpec
from rewards.serve import ServerSpec


@dataclass
class DrawConfig:
    """A way to draw an image. Left as it is, it is how the policy draws: its images are on-policy."""

    checkpoint: str = "policy"
    """policy; base: what the policy began as, its reference; or another run directory or checkpoint that trained an
    adapter on that base."""
    guidance: float = 0.0
    """Guidance in K2's convention, v = c + s (c - u), >= 0, 0 is off."""
    steps: int | None = None
    """Steps from noise to image, >= 1; null: those of the recipe."""
    drop: float = 0.0
    """Share of the prompt left out, from 0 to below 1: of its clauses or, where there is one, of its words; drawn by
    the pair's seed, at least one and never all. The pair keeps the whole prompt."""
    noise: float = 0.0
    """Time, from 0 to below 1, to which the finished latents are noised again before they are decoded."""


@dataclass
class DeltaConfig:
    """Pairs ordered by how they were drawn (delta learning): both from one noise, so that little else differs."""

    stronger: DrawConfig
    """How the chosen image is drawn."""
    weaker: DrawConfig
    """How the rejected one is drawn."""
    screen: bool = True
    """Drop a pair about which the rewards say otherwise; false: they only report. Where they say nothing, the pair
    stays."""


@dataclass
class JudgedConfig:
    """Pairs ordered by the rewards: the best against the worst image of a group."""

    draw: DrawConfig = field(default_factory=DrawConfig)
    """How the group is drawn."""
    group_size: int = 4
    """Images in it, >= 2."""


@dataclass
class PairSource:
    """Where some of the pairs come from; give either delta or judged."""

    name: str
    """Name in the report, unique in the recipe."""
    share: float = 1.0
    """Its part of the pairs, relative to the other sources, > 0."""
    delta: DeltaConfig | None = None
    """Two ways to draw, of which one is known to be better."""
    judged: JudgedConfig | None = None
    """A group of images that the rewards rank."""


@dataclass
class PairsConfig:
    """Make preference pairs from prompts: drawn in two ways, or the best and the worst of a group by the rewards."""

    output: str
    """Directory of the pairs and of the report on them, created; one that holds pairs already needs --resume."""
    model: ModelConfig
    prompts: str
    """What the pairs show: a JSONL file, or hf:NAME[:SPLIT] for a dataset that `datasets` loads."""
    sources: list[PairSource]
    """What makes the images of a pair differ; each source gets its share of the pairs."""
    policy: str | None = None
    """Run directory or checkpoint of the policy that will be trained; null: the model as it is."""
    rewards: list[RewardSpec] = field(default_factory=list)
    """Rewards that rank, veto and report; those with heldout_only only report. A winner below the threshold of a gate
    is dropped; gate: multiply also multiplies the others."""
    servers: list[ServerSpec] = field(default_factory=list)
    """Judges to serve while the pairs are made; rewards name one as server://NAME."""
    pairs: int = 1000
    """Pairs to make, >= 1."""
    on_policy_share: float = 0.6
    """Least share of the pairs that hold an image of the policy, 0 to 1. Sources that do are given more than their
    share where that takes it; if too many of their pairs are dropped, the command fails."""
    min_margin: float = 0.02
    """Least weighted mean by which the rewards must put the chosen image above the other, >= 0."""
    tolerance: float = 0.0
    """A pair is dropped if a reward puts the rejected image higher by more than this, >= 0."""
    min_distance: float = 0.03
    """Near-duplicates: a pair is dropped if its images, made small, differ by less, in [0, 1] (root mean square; see
    image/diversity)."""
    tries: float = 5.0
    """Candidates that a source draws at most for each of its pairs, >= 1."""
    sizes: list[list[int]] = field(default_factory=lambda: [[512, 512]])
    """[height, width] pairs in pixels, multiples of 16; a pair has one size, and blocks of pairs take turns."""
    steps: int = 28
    """Steps from noise to image, >= 1. Images drawn in fewer or more do not count as on-policy."""
    max_tokens: int = 512
    """Longest prompt in text tokens; what lies beyond is cut with a warning, >= 1."""
    seed: int = 0
    """Seed of everything drawn: order of the prompts, noise, what is left out; >= 0."""
    block: int = 32
    """Candidates that are drawn, judged and decided together, by one process, >= 1."""
    micro_batch: int = 16
    """Images in one forward of the model, >= 1; sets memory, and changes the images by no more than rounding."""
    shard: int = 64
    """Pairs in a file, >= 1. After a kill, --resume draws again what was in no file yet."""
    track: TrackConfig = field(default_factory=lambda: TrackConfig(tensorboard=False))


@dataclass
class AnnotateConfig:
    """Serve a page where people choose between the two images of each pair, or mark single images that have faults,
    until Ctrl-C or SIGTERM."""

    store: str
    """JSONL file that each answer is appended to; made if it is not there, gone on with if it is."""
    mode: Literal["preference", "artifact"] = "preference"
    """preference: which image of a pair is better; needs pairs. artifact: whether an image has faults; needs images."""
    pairs: str | None = None
    """Preference set to choose from: a directory of pairs; or JSONL, parquet or hf:NAME[:SPLIT] with columns prompt,
    chosen and rejected."""
    images: str | None = None
    """Images to mark: a run directory (its samples/), an output of `posttrain sample`, or a directory of images."""
    host: str = "127.0.0.1"
    """Address to listen at. Beyond this machine (such as 0.0.0.0) it needs password_env."""
    port: int = 7860
    """Port to listen at, 1 to 65535, or 0 for any free one."""
    password_env: str | None = None
    """Name of the environment variable with the password that everyone who chooses logs in with, under a name of
    their own; 8 characters or more. null: none."""
    repeats: float = 0.1
    """Share of the pairs or images that each annotator sees a second time, pairs with sides swapped, to measure
    consistency, 0 to 0.5."""
    seed: int = 0
    """Seed of the order and of the sides, >= 0; each annotator has an order of their own."""
    max_bad: float = 0.01
    """Share of the rows of pairs that may be bad (an image missing or cut off, ...), 0 to 1; they are left out and
    named."""


@dataclass
class AnnotationsConfig:
    """Say how far people agree with each other and with the judges; with an output, write what they answered."""

    store: str
    """What annotate wrote; it may still be running."""
    pairs: str | None = None
    """Preference set that they chose from, as for annotate; give this or images."""
    images: str | None = None
    """Images that they marked, as for annotate; give this or pairs."""
    output: str | None = None
    """Directory to write; must not exist or be empty. Of pairs it is the preference record, source: human; of images
    artifacts.jsonl with the images, for `posttrain judge --mode artifact`. null: only the report."""
    max_bad: float = 0.01
    """As for annotate."""
