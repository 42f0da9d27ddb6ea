"""What a pipeline says that its stages gained."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from posttrain.nano.bench import pipeline
from posttrain.pipeline.gains import Gain, gains
from posttrain.pipeline.plan import Stage
from rewards.base import RewardSpec

REWARDS = [RewardSpec("oracle", "a:b", heldout_only=True), RewardSpec("judge", "a:b", weight=0.5)]


def stage(folder: Path, command: str, name: str, said: dict) -> Stage:
    (folder / name).write_text(json.dumps(said))
    config: Any = SimpleNamespace(rewards=REWARDS)
    return Stage("s", command, config, [], folder, {})


@pytest.mark.parametrize(
    ("command", "trained"), [("grpo", ["reward", "judge"]), ("tdm", []), ("expander gdpo", ["judge", "diversity"])]
)
def test_what_is_trained_on_comes_first(tmp_path, command, trained):
    said = {
        "before": {"oracle": 0.25, "judge": 0.5, "diversity": 0.5, "other": 1.0},
        "after": {"oracle": 0.5, "judge": 0.25, "diversity": 0.5, "other": 1.0},
    }
    found = gains(stage(tmp_path, command, "summary.json", said))
    assert [gain.figure for gain in found if gain.trained] == trained == [gain.figure for gain in found][: len(trained)]
    assert {gain.figure: gain.change for gain in found} == {
        "oracle": 0.25, "judge": -0.25, **({"diversity": 0.0} if "diversity" in trained else {}),
        **({"reward": -0.25} if "reward" in trained else {}),
    }  # fmt: skip


def test_the_reward_of_grpo_is_the_weighted_mean_of_what_is_trained(tmp_path):
    """(1 * 0.5 + 3 * 0.1) / 4 = 0.2 before, (1 * 0.7 + 3 * 0.3) / 4 = 0.4 after; one that could not be had is left
    out, and one that is held out or a gate has no part in it."""
    made = stage(tmp_path, "grpo", "summary.json", {
        "before": {"a": 0.5, "b": 0.1, "none": None, "gate": 1.0, "oracle": 1.0},
        "after": {"a": 0.7, "b": 0.3, "none": None, "gate": 0.0, "oracle": 0.0},
    })  # fmt: skip
    made.config.rewards = [
        RewardSpec("a", "a:b"), RewardSpec("b", "a:b", weight=3), RewardSpec("none", "a:b"),
        RewardSpec("gate", "a:b", gate="mask", threshold=0.5), RewardSpec("oracle", "a:b", heldout_only=True),
    ]  # fmt: skip
    (first, *_) = gains(made)
    assert (first.figure, first.before, first.after) == ("reward", pytest.approx(0.2), pytest.approx(0.4))


def test_accuracy_of_pairs_is_that_of_the_summary(tmp_path):
    said = {"before": {"pairs/accuracy": 0.5, "oracle": 0.25}, "after": {"pairs/accuracy": 0.875, "oracle": 0.5}}
    found = gains(stage(tmp_path, "stpo", "summary.json", said))
    assert found == [Gain("s", "pairs/accuracy", True, 0.5, 0.875), Gain("s", "oracle", False, 0.25, 0.5)]


def test_finetuning_gains_on_images_that_it_was_not_trained_on(tmp_path):
    """Rewards are those of the first guidance."""
    said = {"before": {"heldout/loss": 0.5, "heldout/gain": 0.0, "oracle@4.5": 0.25},
            "after": {"heldout/loss": 0.4, "heldout/gain": 0.2, "oracle@4.5": 0.5, "oracle": 0.1}}  # fmt: skip
    made = stage(tmp_path, "sft", "summary.json", said)
    made.config.eval = SimpleNamespace(guidance=[4.5, 0.0])
    assert gains(made) == [
        Gain("s", "heldout/loss", True, 0.5, 0.4), Gain("s", "heldout/gain", True, 0.0, 0.2),
        Gain("s", "oracle@4.5", False, 0.25, 0.5),
    ]  # fmt: skip


def test_pairs_are_measured_by_rewards_without_a_say(tmp_path):
    agreement = {name: {"share": 0.75, "share_of_kept": 1.0} for name in ("oracle", "judge")}
    said = {"sources": {"guidance": {"agreement": agreement}}}
    found = gains(stage(tmp_path, "pairs", "quality.json", said))
    assert found == [Gain("s", "guidance: oracle agrees", False, 0.75, 1.0)]


def test_the_expanders_supervised_stage_and_those_that_measure_nothing(tmp_path):
    said = {"before": {"loss": 2.0, "mean_token_accuracy": 0.5}, "after": {"loss": 1.5, "mean_token_accuracy": 0.75}}
    made = stage(tmp_path, "expander sft", "summary.json", said)
    assert [(gain.figure, gain.change) for gain in gains(made)] == [("loss", -0.5), ("mean_token_accuracy", 0.25)]
    assert gains(stage(tmp_path, "export", "summary.json", said)) == []
    assert gains(stage(tmp_path / "..", "grpo", "none.json", {})) == []  # not yet measured


def test_the_table_over_seeds():
    """Gains of 0.1, 0.2 and 0.3 have a mean of 0.2 and a spread of 0.1, of which the mean is twice as much."""
    rows = [
        {
            "seed": i,
            "gains": [{"stage": "a", "figure": "f", "trained": True, "before": 0.5, "after": 0.5 + x, "change": x}],
            "seconds": {"a": 10.0 + i, "b": 1.0},
        }
        for i, x in enumerate((0.1, 0.2, 0.3))
    ]
    lines = pipeline.table(rows).splitlines()[2:]
    assert lines == [
        "| a | f | trained | 0.500 | 0.700 | +0.200 | 0.100 | +0.100 to +0.300 | 2.0 | 11 |",
        "| b | | | | | | | | | 1 |",
        "| all | | | | | | | | | 12 |",
    ]
    assert " +0.100 | - | - | - | 10 |" in pipeline.table(rows[:1])
