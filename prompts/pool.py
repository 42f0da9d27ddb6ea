"""The adaptive prompt pool: draws more of the prompts whose images still score differently from each other.

A group of images teaches as much as its scores differ. Each visit of a prompt updates, for each reward, a decayed mean
and within-group variance, and from these come its informativeness I, its class and its weight in the draw:

    weight = (explore + (1 - explore) I^sharpness) (1 + min(1, age / staleness))

A prompt whose scores keep being alike rests, and comes back after a cool-down or by a random audit. This is a
curriculum without importance correction: what a run has reached is measured on held-out prompts and nowhere else.

A step's draw comes from the seed and the step's number. Weights are computed only for prompts that are proposed, so
it costs one scan for the prompts that rest, however many there are.

Legend: N prompts of the pool, K rewards, P prompts of a step, G images of a prompt, R any rows. Rows are the pool's
own order, by category and then by key; `places` leads from them to the records.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import field
from enum import IntEnum
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import model_validator

from posttrain.config.types import AtLeast1, BelowOne, Float, NonNegative, Positive, Range, Share, refusal, settings
from posttrain.errors import UserError
from prompts.informativeness import ALIKE, group_moments, informativeness, weighted_mean
from prompts.records import PromptRecord

SPREAD_RATE = 0.05
"""Least share of a step in the mean spread of a reward over the groups; slow, since a step has few groups."""
PROPOSED = 512
"""Prompts proposed at once in a draw."""


@settings
class PoolConfig:
    """Which prompts a step trains on. Everything but kind is for the adaptive pool."""

    kind: Literal["uniform", "adaptive"] = "uniform"
    """uniform: every prompt once in random order, then again. adaptive: more of those whose images still score
    differently; wants scores in [0, 1]."""
    decay: Annotated[Float, Range(0.01, 1)] = 0.3
    """Least share of a prompt's newest visit in its mean and variance."""
    explore: Annotated[Float, Range(0.01, 1)] = 0.1
    """Weight of a prompt that teaches nothing, where the best has 1."""
    sharpness: NonNegative = 1.0
    """Exponent of informativeness in the weight; 0: whatever does not rest is drawn by age alone."""
    staleness: AtLeast1 = 200
    """Steps without a visit after which a prompt's weight is twice what it was."""
    low_variance: Share = 0.2
    """Informativeness below which a prompt teaches too little."""
    easy: Share = 0.9
    """Mean score above which a prompt of low variance is too easy, above hard."""
    hard: Share = 0.1
    """Mean score below which a prompt of low variance is too hard."""
    prune_after: AtLeast1 = 2
    """Visits of low variance in a row after which a prompt rests."""
    cooldown: AtLeast1 = 300
    """Steps that a too hard prompt rests; a flat one rests twice and a too easy one four times as long."""
    audit: BelowOne = 0.02
    """Share of the draws that take a resting prompt at random."""
    floor: Share = 0.1
    """Share of the prompts below which no more are sent to rest, among those of each quota too; at least those of one
    step stay."""
    quotas: dict[str, Positive] = field(default_factory=dict)
    """Share of the draws for the prompts of a tag, such as {text: 0.25}, together at most 1; the rest goes to the
    others, as does what a tag cannot give while its prompts rest. A prompt counts for its first tag of these."""

    @model_validator(mode="after")
    def _fits(self) -> PoolConfig:
        if self.hard >= self.easy:
            raise refusal("hard", f"is {self.hard}, not below pool.easy ({self.easy}); lower it")
        total = sum(self.quotas.values())
        if total > 1 + 1e-9:  # thirds add up to a little more than 1
            raise refusal("quotas", f"add up to {total:g}; lower them to at most 1 together")
        return self


class Kind(IntEnum):
    """The class of a prompt; it has one from its second visit on."""

    NEW = 0
    INFORMATIVE = 1
    EASY = 2
    HARD = 3
    FLAT = 4


class Pool:
    """`draw` a step's prompts and later `update` them with their scores. All state is in arrays by row."""

    def __init__(
        self,
        records: Sequence[PromptRecord],
        weights: Mapping[str, float],
        config: PoolConfig,
        prompts_per_step: int,
        seed: int,
    ):
        """`weights` are those of the rewards trained on. Raises UserError if the records cannot give a step."""
        if len(records) < prompts_per_step:
            raise UserError(
                f"groups.prompts_per_step: is {prompts_per_step}, but prompts.train holds {len(records)} and an"
                " adaptive pool draws different ones; lower it or add prompts"
            )
        self.config, self.seed, self.prompts_per_step = config, seed, prompts_per_step
        self.rewards, self.weights_K = list(weights), np.array(list(weights.values()), float)
        self.floor = max(prompts_per_step, math.ceil(config.floor * len(records)))

        keys = np.fromiter((_key(record.id) for record in records), np.int64, len(records))
        categories = np.fromiter((_category(record.tags, config.quotas) for record in records), int, len(records))
        # By category first, so that a quota is a slice; then by key, so that the file's order changes nothing.
        self.places = np.lexsort((keys, categories))
        self.keys = keys[self.places]
        ends = np.bincount(categories, minlength=len(config.quotas) + 1).cumsum()
        self._categories = [slice(int(a), int(b)) for a, b in zip([0, *ends[:-1]], ends)]
        for tag, rows in zip(config.quotas, self._categories):
            if rows.start == rows.stop:
                raise UserError(f"pool.quotas.{tag}: no prompt of prompts.train is left for this tag; remove it")
        self._floors = self._category_floors()

        shape = (len(records), len(self.rewards))
        self.visits = np.zeros(len(records), np.int32)
        self.drawn = np.zeros(len(records), np.int32)
        """Step of the last draw; 0: never."""
        self.streak = np.zeros(len(records), np.int32)
        """Visits of low variance in a row."""
        self.returns = np.zeros(len(records), np.int32)
        """Step at which a resting prompt comes back; 0: it does not rest."""
        self.mean_NK, self.variance_NK = np.full(shape, np.nan), np.full(shape, np.nan)
        self.spread_K = np.zeros(len(self.rewards))
        """Mean within-group standard deviation of each reward ..."""
        self.spread_steps_K = np.zeros(len(self.rewards), np.int32)
        """... and the number of steps it was taken over."""

    def _category_floors(self) -> list[int]:
        """How many prompts of each category stay awake: what its quota takes of a step, and the share `floor`."""
        quotas = list(self.config.quotas.values())
        floors = []
        for rows, share in zip(self._categories, [*quotas, max(0.0, 1 - sum(quotas))]):
            size = rows.stop - rows.start
            # A little less, so that thirds are not rounded up by the last bit.
            floors.append(min(size, math.ceil(max(share * self.prompts_per_step, self.config.floor * size) - 1e-9)))
        return floors

    # ---- draw ---------------------------------------------------------------------------------------------

    def draw(self, step: int) -> np.ndarray:
        """(P,) rows of different prompts; the same for the same state, seed and step."""
        rng = np.random.default_rng((self.seed, step))
        self._end_rests(step)  # first, so that prompts whose rest is over can be drawn in this step
        drawn = self._audited(rng)
        self._readmit(drawn)  # an audit ends the rest of a prompt, since it will be scored again
        drawn = np.concatenate([drawn, self._others(rng, step, drawn, self.prompts_per_step - len(drawn))])
        self.drawn[drawn] = step
        return rng.permutation(drawn)

    def redraw(self, step: int, attempt: int, drawn: np.ndarray, count: int) -> np.ndarray:
        """`count` further rows that do not rest; fewer where no more are left. `drawn` are those of the step so far.

        The same for the same state, seed, step and attempt (1, 2, ...). It marks nothing: `update` does.
        """
        return self._others(np.random.default_rng((self.seed, step, attempt)), step, drawn, count)

    def _others(self, rng: np.random.Generator, step: int, drawn: np.ndarray, count: int) -> np.ndarray:
        """`count` rows that do not rest and are not among `drawn`, by quota and weight."""
        free = self.returns == 0
        free[drawn] = False
        others = np.empty(0, np.int64)
        for rows, share in [*zip(self._categories, self._slots(rng, count)), (slice(0, len(free)), None)]:
            if share is None:  # the last round, over all rows: what the categories could not give
                share = count - len(others)
            if share:
                taken = self._take(rng, step, rows.start + np.flatnonzero(free[rows]), share)
                free[taken] = False
                others = np.concatenate([others, taken])
        return others

    def _take(self, rng: np.random.Generator, step: int, candidates: np.ndarray, count: int) -> np.ndarray:
        """`count` different candidates, each drawn by weight from those left, or all if there are no more.

        Candidates are proposed evenly and accepted with chance weight / 2, which no weight exceeds.
        """
        taken = np.empty(0, np.int64)
        count = min(count, len(candidates))
        while len(taken) < count:
            proposed = candidates[rng.integers(len(candidates), size=PROPOSED)]
            accepted = proposed[2 * rng.random(PROPOSED) < self.weight(proposed, step)]
            taken = np.concatenate([taken, accepted])
            # Each row once, in the order of its first acceptance: sorted rows would favour the low ones.
            taken = taken[np.sort(np.unique(taken, return_index=True)[1])][:count]
        return taken

    def _slots(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """How many of `count` draws each category gets: its share of them, rounded up or down at random."""
        ends = np.cumsum(list(self.config.quotas.values()))
        # Evenly spaced points with one random offset: each share is met to within one draw (systematic sampling).
        at = (np.arange(count) + rng.random()) / max(count, 1)
        return np.bincount(np.searchsorted(ends, at, side="right"), minlength=len(ends) + 1)

    def _audited(self, rng: np.random.Generator) -> np.ndarray:
        count = rng.binomial(self.prompts_per_step, self.config.audit)
        resting = np.flatnonzero(self.returns > 0) if count else np.empty(0, np.int64)
        return rng.choice(resting, min(count, len(resting)), replace=False)

    def _end_rests(self, step: int) -> None:
        """Readmits those whose time is over, and the next in turn if too few are left, as when the file was changed."""
        resting = np.flatnonzero(self.returns > 0)
        self._readmit(resting[self.returns[resting] <= step])
        missing = self.floor - np.count_nonzero(self.returns == 0)
        if missing > 0:
            resting = np.flatnonzero(self.returns > 0)
            self._readmit(resting[np.argsort(self.returns[resting], kind="stable")[:missing]])

    def _readmit(self, rows: np.ndarray) -> None:
        """A prompt that comes back keeps its statistics and its streak, so that one more visit settles it."""
        self.returns[rows] = 0
        self.visits[rows] = 1

    # ---- update -------------------------------------------------------------------------------------------

    def update(
        self,
        step: int,
        rows: np.ndarray,
        values_PGK: np.ndarray,
        valid_PGK: np.ndarray,
        floor_K: np.ndarray | None = None,
    ) -> None:
        """Takes in the scores of all prompts drawn in `step`; a missing one leaves that reward's statistics alone.

        Scores of a group that differ by less than `floor_K` are noise, and count as alike. A prompt without two scores
        of any reward has not been visited. Raises UserError if the first scores ever are outside [0, 1], where too easy
        and too hard have no meaning.
        """
        if not self.visits.any():
            self._check_calibration(values_PGK, valid_PGK)
        self.drawn[rows] = np.maximum(self.drawn[rows], step)  # a later step may have drawn one of them already
        mean_PK, variance_PK = group_moments(values_PGK, valid_PGK, floor_K)
        self._update_spread(variance_PK)
        # 1 / visits at first, which is a plain mean, until the decayed rate is larger.
        rate_P1 = np.maximum(self.config.decay, 1 / (self.visits[rows, None] + 1))
        for old_NK, new_PK in ((self.mean_NK, mean_PK), (self.variance_NK, variance_PK)):
            # A first score stands for the past that is not there; a missing one changes nothing.
            old_PK = np.where(np.isnan(old_NK[rows]), new_PK, old_NK[rows])
            old_NK[rows] = np.where(np.isnan(new_PK), old_PK, old_PK + rate_P1 * (new_PK - old_PK))
        visited = rows[~np.isnan(weighted_mean(mean_PK, self.weights_K))]
        self.visits[visited] += 1
        low = self.kinds(visited) > Kind.INFORMATIVE
        self.streak[visited] = np.where(low, self.streak[visited] + 1, 0)
        self._prune(step, visited[low & (self.streak[visited] >= self.config.prune_after)])

    def _update_spread(self, variance_PK: np.ndarray) -> None:
        seen_K = ~np.isnan(variance_PK).all(0)
        spread_K = np.nanmean(np.sqrt(variance_PK[:, seen_K]), axis=0)
        self.spread_steps_K[seen_K] += 1
        rate_K = np.maximum(SPREAD_RATE, 1 / self.spread_steps_K[seen_K])
        self.spread_K[seen_K] += rate_K * (spread_K - self.spread_K[seen_K])

    def _prune(self, step: int, rows: np.ndarray) -> None:
        """Sends prompts to rest, the least informative first, as long as the floor is not reached."""
        rows = rows[np.argsort(self.informativeness(rows), kind="stable")]
        # A quota whose prompts all rest would give its draws to others, so each category has a floor of its own.
        awake = self.returns == 0
        kept = [np.empty(0, np.int64)]
        for category, floor in zip(self._categories, self._floors):
            own = rows[(rows >= category.start) & (rows < category.stop)]
            kept.append(own[: max(np.count_nonzero(awake[category]) - floor, 0)])
        rows = rows[np.isin(rows, np.concatenate(kept))]
        # An empty pool would stop training, so the floor wins over what the scores say.
        rows = rows[: max(np.count_nonzero(awake) - self.floor, 0)]
        kinds = self.kinds(rows)
        # A hard prompt comes back first, since the policy grows; an easy one has the least left to teach.
        times = np.select([kinds == Kind.EASY, kinds == Kind.FLAT], [4, 2], 1)
        self.returns[rows] = step + times * self.config.cooldown

    def _check_calibration(self, values_PGK: np.ndarray, valid_PGK: np.ndarray) -> None:
        outside = valid_PGK & ((values_PGK < -ALIKE) | (values_PGK > 1 + ALIKE))
        if outside.any():
            k = int(outside.any((0, 1)).argmax())
            raise UserError(
                f"rewards: {self.rewards[k]} gave {values_PGK[..., k][outside[..., k]][0]:.4g}, but an adaptive pool"
                " tells easy from hard by scores in [0, 1]; set its scale and offset, or pool.kind to uniform"
            )

    # ---- what the pool knows ------------------------------------------------------------------------------

    def weight(self, rows: np.ndarray, step: int) -> np.ndarray:
        """(R,) in (0, 2]: how likely each is drawn, relative to the others."""
        explore, age = self.config.explore, step - self.drawn[rows]
        value = explore + (1 - explore) * self.informativeness(rows) ** self.config.sharpness
        return value * (1 + np.minimum(1.0, age / self.config.staleness))

    def informativeness(self, rows: np.ndarray) -> np.ndarray:
        return informativeness(self.variance_NK[rows], self.spread_K, self.weights_K)

    def score(self, rows: np.ndarray) -> np.ndarray:
        """(R,) weighted mean of the decayed mean scores; NaN where there is none."""
        return weighted_mean(self.mean_NK[rows], self.weights_K)

    def kinds(self, rows: np.ndarray) -> np.ndarray:
        """(R,) the `Kind` of each."""
        score, config = self.score(rows), self.config
        conditions = [
            self.visits[rows] < 2,
            self.informativeness(rows) >= config.low_variance,
            score > config.easy,
            score < config.hard,
        ]
        return np.select(conditions, [Kind.NEW, Kind.INFORMATIVE, Kind.EASY, Kind.HARD], Kind.FLAT)

    def counts(self) -> dict[str, int]:
        """Prompts of each class, which add up to all; those that rest; and those drawn whose images had no score."""
        visited = np.flatnonzero(self.visits > 0)
        counts = np.bincount(self.kinds(visited), minlength=len(Kind))
        counts[Kind.NEW] += len(self.visits) - len(visited)
        unscored = np.count_nonzero((self.drawn > 0) & (self.visits == 0))
        classes = {kind.name.lower(): int(n) for kind, n in zip(Kind, counts)}
        return {**classes, "resting": int(np.count_nonzero(self.returns)), "unscored": int(unscored)}

    def ends(self, count: int) -> dict[str, np.ndarray]:
        """Rows of the easiest, the hardest and the most informative prompts of those visited, most so first."""
        rows = np.flatnonzero(self.visits > 0)
        score, visits = self.score(rows), self.visits[rows]
        orders = {"easiest": -score, "hardest": score, "most informative": -self.informativeness(rows)}
        return {name: rows[np.lexsort((-visits, by))[:count]] for name, by in orders.items()}

    # ---- checkpoints --------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Everything that differs from a fresh pool, as arrays (by prompt drawn so far, with its key) and JSON."""
        rows = np.flatnonzero(self.drawn)  # of a million prompts a run draws few
        arrays = {name: getattr(self, name)[rows] for name in ARRAYS}
        spread = {"spread": self.spread_K.tolist(), "spread_steps": self.spread_steps_K.tolist()}
        return arrays, {"rewards": self.rewards, **spread}

    def load_state(self, arrays: Mapping[str, np.ndarray], state: Mapping[str, Any]) -> None:
        """Puts back what `state` gave, by the prompts' ids and the rewards' names; others are as if never seen."""
        # By key and not by row: the file may have been reordered, and prompts added or removed.
        _, rows, old = np.intersect1d(self.keys, arrays["keys"], return_indices=True)
        for name in ("visits", "drawn", "streak", "returns"):
            getattr(self, name)[rows] = arrays[name][old]
        for k, reward in enumerate(self.rewards):
            if reward not in state["rewards"]:
                continue
            old_k = state["rewards"].index(reward)
            self.spread_K[k], self.spread_steps_K[k] = state["spread"][old_k], state["spread_steps"][old_k]
            self.mean_NK[rows, k] = arrays["mean_NK"][old, old_k]
            self.variance_NK[rows, k] = arrays["variance_NK"][old, old_k]


ARRAYS = ("keys", "visits", "drawn", "streak", "returns", "mean_NK", "variance_NK")


def _key(id: str) -> int:
    """64 bits of the id's SHA-1: among a million prompts two are alike with a chance of 3e-8, and share a state."""
    return int.from_bytes(hashlib.sha1(id.encode()).digest()[:8], "little", signed=True)


def _category(tags: Sequence[str], quotas: Mapping[str, float]) -> int:
    return next((i for i, tag in enumerate(quotas) if tag in tags), len(quotas))
