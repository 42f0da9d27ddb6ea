"""Which two images make a pair, and which pairs are dropped. Pure functions of scores and texts.

Legend: N images, K rewards that decide (neither gates nor held-out rewards).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from posttrain.config.types import changed
from posttrain.pairs.planning import KEPT
from posttrain.training import image_metrics
from posttrain.training.advantages import standardise
from rewards.base import RewardSpec, Scores
from rewards.gates import apply_gates


@dataclass
class Judgement:
    """The scores of N images by the rewards that decide. `values_NK` is 0 where `valid_NK` is False."""

    values_NK: np.ndarray
    valid_NK: np.ndarray
    weights_K: np.ndarray
    flagged_N: np.ndarray
    """The image is below the threshold of a gate."""
    unsure_N: np.ndarray
    """The score of a gate failed, so it is unknown whether the image passes."""

    @staticmethod
    def of(scores: Scores, specs: Sequence[RewardSpec]) -> Judgement:
        """From calibrated scores. Multiplying gates multiply; masking gates only flag, since a loser may be bad."""
        # As a held-out reward, a masking gate neither decides nor removes an image.
        plain = [changed(s, gate="none", heldout_only=True) if s.gate == "mask" else s for s in specs]
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
    """The settings of these names in the recipe."""

    min_margin: float
    tolerance: float
    min_distance: float


def best_and_worst(judgement: Judgement, group_size: int) -> list[tuple[int, int] | None]:
    """The chosen and the rejected image of each group of `group_size` neighbours; None if fewer than two have a score.

    They are ranked by the weighted mean of the rewards. Each is normalised within its group, so that none dominates by
    its spread; a missing score counts as the average of the group. A flagged image is chosen only if all are flagged.
    """
    shape = (-1, group_size, len(judgement.weights_K))  # (P, G, K)
    values = torch.from_numpy(judgement.values_NK).view(*shape)
    valid = torch.from_numpy(judgement.valid_NK).view(*shape)
    ensemble = (standardise(values, valid).numpy() * judgement.weights_K).sum(-1).ravel()
    passes_N = ~(judgement.flagged_N | judgement.unsure_N)
    pairs: list[tuple[int, int] | None] = []
    for first in range(0, len(ensemble), group_size):
        scored = [i for i in range(first, first + group_size) if judgement.valid_NK[i].any()]
        if len(scored) < 2:
            pairs.append(None)
            continue
        candidates = [i for i in scored if passes_N[i]] or scored
        best = max(candidates, key=ensemble.__getitem__)
        # With equal scores best and worst must still be two images.
        scored.remove(best)
        worst = min(scored, key=ensemble.__getitem__)
        pairs.append((best, worst))
    return pairs


def verdict(
    judgement: Judgement | None, chosen: int, rejected: int, distance: float, rules: Rules, ranked: bool, screen: bool
) -> tuple[str, float | None]:
    """`KEPT` or why the pair is dropped, and its margin. Who has had enough pairs drops further ones as "surplus".

    The margin is the weighted mean of the differences between the calibrated scores of chosen and rejected, over the
    rewards that scored both; None if there are none. With `ranked`, the rewards made the order, so they are required.
    Otherwise the order follows from how the images were drawn, and with `screen` the rewards can veto it.
    """
    margin, difference_K = None, np.zeros(0)
    if judgement is not None:
        j = judgement
        both_K = j.valid_NK[chosen] & j.valid_NK[rejected] & (j.weights_K > 0)
        difference_K = (j.values_NK[chosen] - j.values_NK[rejected])[both_K]
        margin = float(np.average(difference_K, weights=j.weights_K[both_K])) if both_K.any() else None
    # Identical images are never a pair, even with min_distance 0.
    if distance < rules.min_distance or distance == 0:
        return "near-duplicate", margin
    if judgement is None or not (ranked or screen):
        return KEPT, margin
    if ranked and (margin is None or judgement.unsure_N[chosen]):
        return "unscored", margin
    if judgement.flagged_N[chosen]:
        return "flagged", margin
    if (difference_K < -rules.tolerance).any():
        return "disagreement", margin
    # A margin of 0 orders nothing, even with min_margin 0.
    if margin is not None and (margin < rules.min_margin or (ranked and margin <= 0)):
        return "small margin", margin
    return KEPT, margin


@dataclass
class Decision:
    """The fate of each candidate of a block, and what the report needs."""

    fates: list[str]
    pairs: list[tuple[int, int] | None]
    """Indices of the chosen and the rejected image; None where the scores do not decide."""
    margins: list[float | None]
    distances: list[float | None]
    scores: Scores | None

    def entry(self) -> dict[str, Any]:
        """Everything except the images, as JSON."""
        entry: dict[str, Any] = {"fates": self.fates, "margins": self.margins, "distances": self.distances}
        if (scores := self.scores) is None:
            return entry
        entry["images"] = len(scores.values_NK)
        entry["missing"] = dict(zip(scores.names, (~scores.valid_NK).sum(0).tolist()))
        entry["failed"] = dict(zip(scores.names, scores.failed_NK.sum(0).tolist()))
        # By reward: how much higher it puts the chosen image of each candidate.
        entry["differences"] = {}
        for k, name in enumerate(scores.names):
            differences = entry["differences"][name] = []
            for pair in self.pairs:
                difference = None
                if pair is not None and scores.valid_NK[list(pair), k].all():
                    difference = float(scores.values_NK[pair[0], k] - scores.values_NK[pair[1], k])
                differences.append(difference)
        return entry


def decide_pairs(
    images: np.ndarray, scores: Scores | None, specs: Sequence[RewardSpec], rules: Rules, screen: bool
) -> Decision:
    """Decides on images (2 N, H, W, 3), N stronger ones before N weaker ones. Without `screen` no reward can veto."""
    count = len(images) // 2
    judgement = None if scores is None else Judgement.of(scores, specs)
    pairs = [(i, count + i) for i in range(count)]
    return _decide(images, scores, judgement, pairs, rules, False, screen)


def decide_groups(
    images: np.ndarray, scores: Scores, specs: Sequence[RewardSpec], rules: Rules, group_size: int
) -> Decision:
    """Decides on images (P * group_size, H, W, 3), one group after the other."""
    judgement = Judgement.of(scores, specs)
    pairs = best_and_worst(judgement, group_size)
    return _decide(images, scores, judgement, pairs, rules, True, True)


def _decide(
    images: np.ndarray,
    scores: Scores | None,
    judgement: Judgement | None,
    pairs: Sequence[tuple[int, int] | None],
    rules: Rules,
    ranked: bool,
    screen: bool,
) -> Decision:
    # Distances are between images of a few pixels: composition and colour count, texture does not.
    decision, small = Decision([], list(pairs), [], [], scores), image_metrics.cells(images)
    for pair in pairs:
        fate, margin, distance = "unscored", None, None
        if pair is not None:
            distance = float(image_metrics.distances(small[[pair[0]]], small[[pair[1]]])[0])
            fate, margin = verdict(judgement, *pair, distance, rules, ranked, screen)
        decision.fates.append(fate)
        decision.margins.append(margin)
        decision.distances.append(distance)
    return decision


# ---- prompts ----------------------------------------------------------------------------------------------

WORD = re.compile(r'"[^"]*"|\S+')
"""Text in quotes is one word: it is to be drawn literally."""
CLAUSE = re.compile(r"\s*[,;]\s+|\s+and\s+|(?<=\.)\s+")


def degrade(prompt: str, share: float, seed: int) -> str:
    """The prompt without about that share of its clauses or, if it has only one, of its words. The seed says which.

    At least one is removed and one stays. A prompt of a single word is returned unchanged.
    """
    clauses = _clauses(prompt)
    parts, separator = (clauses, ", ") if len(clauses) > 1 else (WORD.findall(prompt), " ")
    if len(parts) < 2:
        return prompt
    count = max(1, min(len(parts) - 1, round(share * len(parts))))
    order = np.random.default_rng(seed).permutation(len(parts))
    stays = np.sort(order[count:])
    return separator.join(parts[i] for i in stays)


def _clauses(prompt: str) -> list[str]:
    """Parts between commas, semicolons, full stops and `and`, never split within quotes."""
    quoted = [match.span() for match in re.finditer(r'"[^"]*"', prompt)]
    clauses, start = [], 0
    for cut in CLAUSE.finditer(prompt):
        if not any(a < cut.start() < b for a, b in quoted):
            clauses.append(prompt[start : cut.start()])
            start = cut.end()
    clauses.append(prompt[start:])
    # A prompt that begins or ends with a separator has an empty clause there.
    return list(filter(str.strip, clauses))
