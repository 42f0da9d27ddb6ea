"""The recipe of `expander mine` as data. Never imports torch."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated

from pydantic import model_validator

from posttrain.config.sections import TrackConfig
from posttrain.config.types import (
    AtLeast0,
    AtLeast1,
    AtLeast2,
    BelowOne,
    Filled,
    Share,
    Text,
    keyword_settings,
    refusal,
    settings,
)
from posttrain.expander.gdpo_config import ScoringConfig


@settings
class CandidatesConfig:
    """A file of candidates: traffic, probes, prompts that earlier runs failed on, or that people voted down."""

    path: Text
    """JSONL or hf:NAME[:SPLIT], with `prompt` and the optional fields of any prompt file. A prompt that comes again,
    here or in a later file, is left out."""
    failure: str | None = None
    """Failure class of all its prompts, such as downvoted; null: each row names its own in `column`."""
    column: Text = "failure"
    """Field that names the failure class of a row, a text or a list, of which the first counts."""


@keyword_settings
class ExpanderMineConfig(ScoringConfig):
    """Score candidate prompts by the rewards of a recipe, and keep those that are hard but not hopeless."""

    output: Text
    """Directory to write: train.jsonl, heldout.jsonl and pool.yaml, which `expander gdpo` reads, and scores.jsonl."""
    candidates: Annotated[list[CandidatesConfig], Filled("name at least one file of candidates")]
    """Prompts to choose from."""
    traffic: str | None = None
    """Real prompts of users, in the format of the candidates, which are mixed in as they come; null: none."""
    traffic_share: BelowOne = 0.5
    """Share of traffic in train.jsonl and in the pool's draws; not read without traffic."""
    count: AtLeast1 = 2000
    """Mined prompts to keep, at most, over all classes."""
    group_size: AtLeast2 = 16
    """Expansions of each candidate; each is drawn once, all from one noise."""
    rounds: AtLeast1 = 1
    """Times that a prompt is scored, with other expansions and noise each time. A further round scores only those that
    all scores so far together keep, so that fewer are kept by chance."""
    batch: AtLeast1 = 8
    """Candidates that a process scores at once; a kill loses at most these."""
    low: Share = 0.2
    """Mean composite below which a prompt is hopeless."""
    high: Share = 0.8
    """Mean composite above which a prompt is easy."""
    spread: Share = 0.1
    """Standard deviation of the composite below which a prompt is flat: its expansions score alike."""
    safe: Share = 0.25
    """Share of safe expansions below which a prompt is not trained on."""
    floor: Share = 0.05
    """Least share of a failure class among the mined prompts; above it, shares follow the square root of the classes'
    numbers of kept prompts."""
    heldout: BelowOne = 0.05
    """Share of the candidates and of the traffic that goes into heldout.jsonl, and is not scored."""
    seed: AtLeast0 = 0
    """Seed of expansions, noise and of what is held out."""
    track: TrackConfig = field(default_factory=TrackConfig)

    @model_validator(mode="after")
    def _limits_fit(self) -> ExpanderMineConfig:
        if self.low >= self.high:
            raise refusal("low", f"is {self.low}, not below high ({self.high}); lower it")
        return self
