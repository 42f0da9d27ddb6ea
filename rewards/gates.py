"""Gates: scores that multiply or mask the others, and are never summed, since quality could outbid a sum.

`multiply`: every summed reward becomes g * R before any normalisation, where g is 1 or 0 as the gate's score
reaches its threshold or not, or the score itself (in [0, 1]) where no threshold is given. 0 must be the worst
score, so R >= 0 is required. `mask`: a sample below the threshold leaves the batch. A gate whose score failed
masks its sample, since nobody knows; a gate that does not apply lets it pass.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rewards.base import NO_NOISE, Noise, RewardError, RewardSpec, Scores


@dataclass
class Gated:
    """The rewards that are summed, K of them, after the gates."""

    names: list[str]
    weights_K: np.ndarray
    values_NK: np.ndarray
    valid_NK: np.ndarray
    noise_K: np.ndarray
    """`Noise.spread` of each; 0 where nothing is known."""
    floor_K: np.ndarray
    """`Noise.floor` of each."""


def settings_of(
    specs: Sequence[RewardSpec], noise: Mapping[str, Noise]
) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    """(names, weights_K, noise_K, floor_K) of these rewards, as `Gated` has them."""
    names, rows = [], []
    for spec in specs:
        known = noise.get(spec.name, NO_NOISE)
        names.append(spec.name)
        rows.append((spec.weight, known.spread, known.floor))
    weights_K, noise_K, floor_K = np.array(rows, float).reshape(-1, 3).T.copy()
    return names, weights_K, noise_K, floor_K


def apply_gates(scores: Scores, specs: Sequence[RewardSpec], noise: Mapping[str, Noise] | None = None) -> Gated:
    """Applies and removes the gates. Gates and held-out rewards are not among the K that come back.

    `noise` by reward. A gate whose score multiplies adds its own to that of every other, times the largest score.
    """
    noise = noise or {}
    summed = [k for k, spec in enumerate(specs) if spec.gate == "none" and not spec.heldout_only]
    values_NK, valid_NK = scores.values_NK[:, summed].copy(), scores.valid_NK[:, summed].copy()
    names, weights_K, noise_K, floor_K = settings_of([specs[k] for k in summed], noise)
    for k, spec in enumerate(specs):
        if spec.gate == "none":
            continue
        score_N, applies_N = scores.values_NK[:, k], scores.valid_NK[:, k]
        valid_NK &= ~scores.failed_NK[:, k : k + 1]  # nobody knows whether the sample passes
        if spec.gate == "mask":
            valid_NK &= ~(applies_N & (score_N < spec.threshold))[:, None]
            continue
        factor_N = score_N if spec.threshold is None else (score_N >= spec.threshold).astype(float)
        factor_N = np.where(applies_N, factor_N, 1.0)  # a gate that does not apply lets the sample pass
        if factor_N.min(initial=0) < 0 or factor_N.max(initial=1) > 1:
            raise RewardError(f"reward {spec.name}: a multiplying gate must stay in [0, 1]: set threshold")
        # A negative reward would rise where the gate closes.
        negative_K = ((values_NK < 0) & valid_NK).any(0)
        if negative_K.any():
            name = names[int(negative_K.argmax())]
            raise RewardError(f"reward {name}: negative under gate {spec.name}: set scale and offset")
        values_NK *= factor_N[:, None]
        if spec.threshold is None:  # d(g R) = R dg + g dR, bounded by the largest R
            largest_K = np.where(valid_NK, scores.values_NK[:, summed], 0.0).max(0, initial=0.0)
            own = noise.get(spec.name, NO_NOISE)
            noise_K, floor_K = noise_K + largest_K * own.spread, floor_K + largest_K * own.floor
    values_NK[~valid_NK] = 0  # as in Scores, so that no leftover looks like a score
    return Gated(names, weights_K, values_NK, valid_NK, noise_K, floor_K)
