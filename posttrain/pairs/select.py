"""Which two pictures make a pair, and which pairs are dropped. Pure: scores and texts in, decisions out.

Legend: N pictures, K rewards that decide (no gates, none that is held out).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from posttrain.pairs.planning import KEPT
from posttrain.training import image_metrics
from posttrain.training.advantages import standardise
from rewards.base import RewardSpec, Scores
from rewards.gates import apply_gates

REASONS = ("near-duplicate", "unscored", "flagged", "disagreement", "small margin", "surplus")
"""Why a candidate makes no pair, in the order in which it is asked; surplus: its source had enough by then."""


@dataclass
class Judgement:
    """What the rewards said about N pictures, where it decides. `values_NK` is 0 where `valid_NK` is False."""

    values_NK: np.ndarray
    valid_NK: np.ndarray
    weights_K: np.ndarray
    flagged_N: np.ndarray
    """Below the threshold of a gate."""
    unsure_N: np.ndarray
    """A gate's score failed, so nobody knows."""

    @staticmethod
    def of(scores: Scores, specs: Sequence[RewardSpec]) -> Judgement:
        """From calibrated scores. Multiplying gates multiply; those that mask only flag, since a loser may be bad."""
        plain = [replace(s, gate="none", heldout_only=True) if s.gate == "mask" else s for s in specs]
        gated = apply_gates(scores, plain)
        flagged_N, unsure_N = np.zeros((2, len(scores.values_NK)), bool)
        for k, spec in enumerate(specs):
            if spec.gate != "none":
                unsure_N |= scores.failed_NK[:, k]
                if spec.threshold is not None:
                    flagged_N |= scores.valid_NK[:, k] & (scores.values_NK[:, k] < spec.threshold)
        return Judgement(gated.values_NK, gated.valid_NK, gated.weights_K, flagged_N, unsure_N)


@dataclass(frozen=True)
class Rules:
    """See the settings of the same names."""

    min_margin: float
    tolerance: float
    min_distance: float


def best_and_worst(judgement: Judgement, group_size: int) -> list[tuple[int, int] | None]:
    """The picture to choose and the one to reject of each `group_size` neighbours; None where two are not scored.

    By the weighted mean of the rewards, each normalised in its group, so that no reward rules by its spread; one that
    is missing counts as the group's average. A flagged picture is chosen only where there is no other.
    """
    shape = (-1, group_size, len(judgement.weights_K))
    values = torch.from_numpy(judgement.values_NK).view(*shape)
    valid = torch.from_numpy(judgement.valid_NK).view(*shape)
    ensemble = (standardise(values, valid).numpy() * judgement.weights_K).sum(-1).ravel()
    found: list[tuple[int, int] | None] = []
    for first in range(0, len(ensemble), group_size):
        rows = [i for i in range(first, first + group_size) if judgement.valid_NK[i].any()]
        if len(rows) < 2:
            found.append(None)
            continue
        fit = [i for i in rows if not (judgement.flagged_N[i] or judgement.unsure_N[i])]
        best = max(fit or rows, key=lambda i: ensemble[i])
        found.append((best, min((i for i in rows if i != best), key=lambda i: ensemble[i])))
    return found


def verdict(
    judgement: Judgement | None, chosen: int, rejected: int, distance: float, rules: Rules, ranked: bool, screen: bool
) -> tuple[str, float | None]:
    """`KEPT` or why the pair is dropped, and its margin.

    The margin is how much higher the rewards put the chosen picture: the weighted mean of the differences of calibrated
    scores, over the rewards that scored both; None if there are none. With `ranked` the rewards alone made the order,
    so it needs their word. Otherwise the order is known from how the pictures were drawn, and they can only veto it,
    if they may: `screen`.
    """
    gap, difference_K = None, np.zeros(0)
    if judgement is not None:
        j = judgement
        both_K = j.valid_NK[chosen] & j.valid_NK[rejected] & (j.weights_K > 0)
        difference_K = (j.values_NK[chosen] - j.values_NK[rejected])[both_K]
        gap = float(np.average(difference_K, weights=j.weights_K[both_K])) if both_K.any() else None
    if distance < rules.min_distance or distance == 0:
        return "near-duplicate", gap
    if judgement is None or not (ranked or screen):
        return KEPT, gap
    if ranked and (gap is None or judgement.unsure_N[chosen]):
        return "unscored", gap
    if judgement.flagged_N[chosen]:
        return "flagged", gap
    if (difference_K < -rules.tolerance).any():
        return "disagreement", gap
    if gap is not None and (gap < rules.min_margin or (ranked and gap <= 0)):
        return "small margin", gap
    return KEPT, gap


@dataclass
class Decision:
    """What became of each candidate of a block, and what the report needs to know of them."""

    fates: list[str]
    pairs: list[tuple[int, int] | None]
    """The chosen and the rejected of the pictures; None where nothing says which."""
    margins: list[float | None]
    distances: list[float | None]
    scores: Scores | None

    def entry(self) -> dict[str, Any]:
        """Everything but the pictures, as JSON can hold it."""
        entry: dict[str, Any] = {"fates": self.fates, "margins": self.margins, "distances": self.distances}
        if (scores := self.scores) is None:
            return entry
        counts = {"missing": (~scores.valid_NK).sum(0).tolist(), "failed": scores.failed_NK.sum(0).tolist()}
        by_reward = {name: dict(zip(scores.names, numbers)) for name, numbers in counts.items()}
        differences = {
            name: [
                float(np.subtract(*scores.values_NK[list(pair), k]))
                if pair is not None and scores.valid_NK[list(pair), k].all()
                else None
                for pair in self.pairs
            ]
            for k, name in enumerate(scores.names)
        }
        return {**entry, "images": len(scores.values_NK), **by_reward, "differences": differences}


def decide_pairs(
    images: np.ndarray, scores: Scores | None, specs: Sequence[RewardSpec], rules: Rules, screen: bool
) -> Decision:
    """Of pictures (2 N, H, W, 3), first all the stronger and then all the weaker; without `screen` no reward vetoes."""
    count = len(images) // 2
    judgement = None if scores is None else Judgement.of(scores, specs)
    return _decide(images, scores, judgement, [(i, count + i) for i in range(count)], rules, False, screen)


def decide_groups(
    images: np.ndarray, scores: Scores, specs: Sequence[RewardSpec], rules: Rules, group_size: int
) -> Decision:
    """Of pictures (P * group_size, H, W, 3), group after group."""
    judgement = Judgement.of(scores, specs)
    return _decide(images, scores, judgement, best_and_worst(judgement, group_size), rules, True, True)


def _decide(
    images: np.ndarray,
    scores: Scores | None,
    judgement: Judgement | None,
    pairs: Sequence[tuple[int, int] | None],
    rules: Rules,
    ranked: bool,
    screen: bool,
) -> Decision:
    decision, small = Decision([], list(pairs), [], [], scores), image_metrics.cells(images)
    for pair in pairs:
        fate, gap, distance = "unscored", None, None
        if pair is not None:
            distance = float(image_metrics.distances(small[[pair[0]]], small[[pair[1]]])[0])
            fate, gap = verdict(judgement, *pair, distance, rules, ranked, screen)
        decision.fates.append(fate)
        decision.margins.append(gap)
        decision.distances.append(distance)
    return decision


# ---- prompts ----------------------------------------------------------------------------------------------

WORD = re.compile(r'"[^"]*"|\S+')
"""What stands in quotes is one word: it is to be drawn as it is."""
CLAUSE = re.compile(r"\s*[,;]\s+|\s+and\s+|(?<=\.)\s+")


def degrade(prompt: str, share: float, seed: int) -> str:
    """The prompt without about that share of its clauses or, where it has one, of its words; which ones, says the seed.

    At least one goes and one stays. A prompt of a single word stays as it is.
    """
    clauses = _clauses(prompt)
    parts, joint = (clauses, ", ") if len(clauses) > 1 else (WORD.findall(prompt), " ")
    gone = max(1, min(len(parts) - 1, round(share * len(parts))))
    if len(parts) < 2:
        return prompt
    out = set(np.random.default_rng(seed).permutation(len(parts))[:gone].tolist())
    return joint.join(part for i, part in enumerate(parts) if i not in out)


def _clauses(prompt: str) -> list[str]:
    """Parts between commas, semicolons, full stops and `and`, but never within quotes."""
    quoted = [match.span() for match in re.finditer(r'"[^"]*"', prompt)]
    clauses, start = [], 0
    for cut in CLAUSE.finditer(prompt):
        if not any(a < cut.start() < b for a, b in quoted):
            clauses.append(prompt[start : cut.start()])
            start = cut.end()
    return [clause for clause in [*clauses, prompt[start:]] if clause.strip()]
