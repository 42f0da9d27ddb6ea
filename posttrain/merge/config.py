"""The settings of `posttrain merge` and `posttrain extract` as data. Never imports torch."""

from __future__ import annotations

import math
from dataclasses import field
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import model_validator

from posttrain.config.sections import ModelConfig
from posttrain.config.types import (
    AtLeast0,
    AtLeast1,
    AtLeast2,
    Filled,
    Float,
    OpenShare,
    Positive,
    Range,
    Share,
    Size,
    Text,
    refusal,
    settings,
)

SUFFIX = ".safetensors"


class Named(NamedTuple):
    """A parent as it is named."""

    path: str
    weight: float


def named(text: str) -> Named:
    """NAME or NAME:WEIGHT. Raises ValueError, whose text says what is wrong."""
    name, colon, number = text.rpartition(":")
    # A path may have a colon of its own.
    if not colon or Path(text).exists():
        name, number = text, "1"
    if not name:
        raise ValueError("has no name before the colon")
    try:
        weight = float(number)
    except ValueError:
        raise ValueError(f"'{number}' is not a number") from None
    if not math.isfinite(weight) or weight == 0:
        raise ValueError(f"a weight of {number} is not a finite number other than 0")
    return Named(name, weight)


@settings
class MergeConfig:
    """Merge what several runs, adapters, LoRA files or whole models change of one base, into a checkpoint or a model;
    then measure what is kept of each run's gain."""

    parents: Annotated[list[str], Filled("name runs or LoRA files, such as runs/a:0.5 runs/b:0.5")]
    """What to merge, each as NAME or NAME:WEIGHT, of weight 1 where none is given. NAME is a run directory, one of its
    checkpoints, a LoRA as one .safetensors file, or a whole model: a Krea2Pipeline directory, or its transformer as one
    .safetensors file. One parent is scaled by its weight, or brought to another rank."""
    output: Text
    """Directory to write; must not exist. Adapters become a checkpoint, for model.start, sample --adapter and export;
    whole models a Krea2Pipeline directory, for model.path. merge.json in it says what was merged and measured."""
    method: Literal["linear", "ties"] = "linear"
    """linear: base + sum of weight times change (task arithmetic). ties: of each layer's changes only the greatest
    entries (density), and of these the weighted mean of those that have the sign of the sum."""
    density: Annotated[Float, Range(above=0, most=1)] = 0.5
    """Of ties: share of each layer's entries that are kept."""
    scale: Positive = 1.0
    """Of ties: factor of the merged change, lambda in the paper."""
    rank: AtLeast1 | None = None
    """Rank of the merged adapter, by an SVD whose error is printed; null: all ranks beside each other, which is exact.
    Of ties, whose result has full rank: null writes a whole model."""
    dtype: Literal["float32"] | None = None
    """float32: write a whole model's transformer in float32; null: in the types of the base's files, and what rounding
    keeps of the change is printed."""
    model: ModelConfig | None = None
    """The base; null: that of the runs among the parents. Its dtype is the one to measure in."""
    evaluate: bool = True
    """Draw the held-out prompts of each run among the parents with the base, with the run and with the merge, and score
    them with the run's rewards."""
    keep: Share = 0.8
    """Share of a run's gain that the merge should keep; one that keeps less is warned of and marked "loses"."""
    images: AtLeast2 | None = None
    """Held-out prompts of each run to draw; null: as many as its evaluations."""
    size: Size | None = None
    """[height, width] of these images; null: that of the run's evaluations."""
    micro_batch: AtLeast1 = 16
    """Images in one forward of the model."""

    def named(self) -> list[Named]:
        return [named(text) for text in self.parents]

    @model_validator(mode="after")
    def _fits(self) -> MergeConfig:
        if self.method == "linear":
            # Left at their defaults they say nothing; a scale that is not used would be a merge of another size.
            for name, default in (("density", 0.5), ("scale", 1.0)):
                if getattr(self, name) != default:
                    raise refusal(name, "is of ties, and method is linear; use method ties, or weights (NAME:WEIGHT)")
        # Two names of one run are found later, when their paths are known.
        paths: list[str] = []
        for i, text in enumerate(self.parents):
            try:
                path, weight = named(text)
            except ValueError as error:
                raise refusal(f"parents[{i}]", f"is '{text}': {error}; write NAME:WEIGHT, such as runs/a:0.5") from None
            if path in paths:
                raise refusal(f"parents[{i}]", f"{path} is named twice; name it once, with the sum of its weights")
            if self.method == "ties" and weight < 0:
                raise refusal(f"parents[{i}]", f"is '{text}': ties takes a mean, so weights are above 0; use linear")
            paths.append(path)
        if self.model is not None:
            if self.model.start is not None:
                raise refusal("model.start", "has no meaning here: what a run stands on is part of its change")
            self.model.refuse_sequence_parallel("one process merges")
            self.model.refuse_quantize("gains are measured on exact weights")
        return self


@settings
class ExtractConfig:
    """Write the difference of two whole models as a LoRA: by an SVD of each linear, with its error."""

    target: Text
    """Model that the LoRA is to become, such as Turbo: a Krea2Pipeline directory or hub id, its transformer as one
    .safetensors file, or a run that trained all weights."""
    base: Text
    """Model that the LoRA is for, such as Raw: a Krea2Pipeline directory or hub id. Also --from."""
    output: Text
    """LoRA to write, in diffusers' names: a .safetensors file that does not exist. NAME.json beside it has the error of
    each layer."""
    rank: AtLeast1 | None = None
    """Rank of each layer; give this or error."""
    error: OpenShare | None = None
    """Instead of rank: each layer gets the least rank, up to 512, whose relative error is at most this."""
    layers: Literal["blocks", "all"] = "blocks"
    """blocks: the linears of the blocks. all: every linear; text is then fused in every forward."""
    rest: str | None = None
    """File for the target's own values of all tensors that differ and are not in the LoRA, in diffusers' names; null:
    their share of the difference is printed, and no more."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Type of the factors; null: that of the target's weights."""
    measure: bool = True
    """Draw with the target, and compare the velocities of the base with the LoRA and of the target on the way."""
    prompts: str | None = None
    """Prompts to draw, 8 of them: a JSONL file, or hf:NAME[:SPLIT]; null: eight that are built in."""
    size: Size = field(default_factory=lambda: [512, 512])
    """[height, width] of these images."""
    model_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of both models' weights while they draw."""
    seed: AtLeast0 = 1234
    """Seed of the noise."""

    @model_validator(mode="after")
    def _fits(self) -> ExtractConfig:
        if (self.rank is None) == (self.error is None):
            raise refusal("rank", "give either rank, such as 64, or error, such as 0.3")
        for name in ("output", "rest"):
            path = getattr(self, name)
            if path is not None and not path.endswith(SUFFIX):
                raise refusal(name, f"is {path}; it is one file: end it in {SUFFIX}")
        if self.rest == self.output:
            raise refusal("rest", "is the same file as output; choose another")
        # Path, so that a slash at the end makes no difference.
        if Path(self.target) == Path(self.base):
            raise refusal("target", f"is {self.target}, as the base; give the model that differs from it")
        return self
