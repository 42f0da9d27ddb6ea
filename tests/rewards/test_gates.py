"""Gates multiply or mask the other rewards."""

from typing import Any

import numpy as np
import pytest

from rewards.base import Noise, RewardError, RewardSpec, Scores
from rewards.gates import apply_gates


def gate_scores(values: Any, valid: Any = True, failed: Any = False) -> Scores:
    values_NK = np.array(values, float)
    valid_NK = np.broadcast_to(valid, values_NK.shape) & np.ones_like(values_NK, bool)
    failed_NK = np.zeros_like(valid_NK) | failed
    return Scores(["r", "g"], np.where(valid_NK, values_NK, 0), valid_NK, failed_NK, {}, {}, {})


R, MULTIPLY = RewardSpec("r", "m:f", weight=2), RewardSpec("g", "m:f", gate="multiply", threshold=0.5)


def test_gate_multiplies():
    gated = apply_gates(gate_scores([[0.9, 0.8], [0.9, 0.2]]), [R, MULTIPLY])
    assert gated.names == ["r"] and gated.weights_K.tolist() == [2]
    assert gated.values_NK.tolist() == [[0.9], [0]] and gated.valid_NK.all()
    soft = apply_gates(gate_scores([[0.8, 0.5]]), [R, RewardSpec("g", "m:f", gate="multiply")])
    assert soft.values_NK.tolist() == [[0.4]]


def test_noise_of_a_gate_is_that_of_what_it_multiplies():
    """A gate at .5 or at 1 by turns makes r differ by .9 times as much; one with a threshold is 1 or 0."""
    scores, noise = gate_scores([[0.8, 0.5], [0.9, 0.9]]), {"r": Noise(0.1, 0.3), "g": Noise(0.02, 0.06)}
    soft = apply_gates(scores, [R, RewardSpec("g", "m:f", gate="multiply")], noise)
    assert soft.noise_K.tolist() == [pytest.approx(0.118)] and soft.floor_K.tolist() == [pytest.approx(0.354)]
    assert apply_gates(scores, [R, MULTIPLY], noise).floor_K.tolist() == [0.3]
    assert apply_gates(scores, [R, MULTIPLY]).floor_K.tolist() == [0]


def test_gate_masks():
    mask = RewardSpec("g", "m:f", gate="mask", threshold=0.5)
    gated = apply_gates(gate_scores([[0.9, 0.8], [0.9, 0.2]]), [R, mask])
    assert gated.valid_NK.tolist() == [[True], [False]]


def test_unknown_gate_masks_and_inapplicable_gate_passes():
    missing = gate_scores([[0.9, 0.0], [0.9, 0.0]], valid=[True, False], failed=[[False, True], [False, False]])
    gated = apply_gates(missing, [R, MULTIPLY])
    assert gated.valid_NK.tolist() == [[False], [True]] and gated.values_NK.tolist() == [[0], [0.9]]


def test_negative_reward_under_a_gate_is_refused():
    with pytest.raises(RewardError, match="reward r: negative under gate g"):
        apply_gates(gate_scores([[-0.9, 0.2]]), [R, MULTIPLY])
