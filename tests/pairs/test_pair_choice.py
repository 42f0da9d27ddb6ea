"""Pairs from prompts, by hand: the plan, the choice and the report."""

import asyncio
import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from posttrain.pairs import planning, quality
from posttrain.pairs.config import DeltaConfig, DrawConfig, PairSource
from posttrain.pairs.select import Judgement, Rules, best_and_worst, decide_groups, decide_pairs, degrade, verdict
from rewards.base import Failure, Reward, RewardSpec, score_all
from tests.helpers.pair_runs import recipe

# ---- the plan -----------------------------------------------------------------------------------------------


def test_quotas():
    share = planning.quotas
    assert share(10, [1, 1], [True, False], 0.0) == [5, 5]
    assert share(10, [1, 1], [True, False], 0.6) == [6, 4]  # lifted to the least share
    assert share(10, [3, 1], [True, False], 0.6) == [8, 2]  # 7.5 is above it already
    assert share(11, [1, 1, 2], [True, True, False], 0.6) == [4, 3, 4]  # ceil(6.6) = 7 for two
    assert share(7, [1, 1], [True, True], 0.6) == [4, 3] and share(7, [1], [False], 0.6) == [7]
    assert planning.largest_remainder(10, [1, 1, 1]) == [4, 3, 3]
    assert planning.largest_remainder(10, [0.26, 0.26, 0.48]) == [3, 2, 5]  # 2.6, 2.6, 4.8


def test_plan_draws_more_for_what_was_dropped(tmp_path):
    config = recipe(tmp_path, Path("k2"), tries=3.0)
    plan = planning.Plan(config)
    first = plan.generation()
    assert [(b.source, b.first, b.count) for b in first] == [(0, 0, 3), (0, 3, 3), (1, 0, 3), (1, 3, 3)]
    assert [b.index for b in first] == [0, 1, 2, 3] and [b.size for b in first] == [(32, 32), (16, 48)] * 2
    assert [plan.prompt(b, 0) for b in first] == [0, 6, 1, 7]  # sources take turns, so none has another's prompt
    for block, kept in zip(first, (3, 3, 1, 1)):
        plan.take(block, kept)
    again = plan.generation()
    # Of six candidates two were kept, so four more pairs take twelve; three times the six pairs are the most.
    assert [(b.index, b.source, b.first, b.count) for b in again] == [(4 + i, 1, 6 + 3 * i, 3) for i in range(4)]
    for block in again:
        plan.take(block, 0)
    assert plan.generation() == [] and (plan.kept, plan.made) == ([6, 2], [6, 18])


def test_on_policy_is_the_policys_own_way(tmp_path):
    config = recipe(tmp_path, Path("k2"))
    for draw in (DrawConfig(), DrawConfig("base"), DrawConfig(steps=2)):
        assert config.is_policy(draw)
    for change in ({"guidance": 0.5}, {"steps": 3}, {"drop": 0.5}, {"noise": 0.5}, {"checkpoint": "runs/a"}):
        assert not config.is_policy(DrawConfig(**change))
    config.policy = "runs/a"
    assert not config.is_policy(DrawConfig("base"))
    assert config.is_policy(DrawConfig("policy")) and config.is_policy(DrawConfig("runs/a"))


# ---- the choice ---------------------------------------------------------------------------------------------


def judged(columns: dict[str, list], *specs: RewardSpec):
    """Scores and the specs: a reward of weight 1 for each column that no spec names."""
    named = {spec.name: spec for spec in specs}
    full = [named.get(name, RewardSpec(name, "m:f")) for name in columns]
    asked = [
        Reward(dataclasses.replace(spec, max_failures=1), lambda *_, column=column: column, set(), False)
        for spec, column in zip(full, columns.values())
    ]
    images = [Image.new("RGB", (16, 16))] * len(next(iter(columns.values())))
    return asyncio.run(score_all(asked, images, [""] * len(images))), full


def test_best_and_worst_by_rewards_normalised_in_the_group():
    """The second reward spans a tenth of the first; each counts in its own standard deviations."""
    scores, specs = judged({"a": [0.0, 0.5, 1.0], "b": [0.2, 0.3, 0.1]})
    # a: -1, 0, 1; b: 0, 1, -1; together -1, 1, 0
    assert best_and_worst(Judgement.of(scores, specs), 3) == [(1, 0)]
    specs[1].weight = 0.4  # -1, 0.4, 0.6
    assert best_and_worst(Judgement.of(scores, specs), 3) == [(2, 0)]


def test_missing_scores_are_no_numbers():
    scores, specs = judged({"a": [0.9, None, 0.1, 0.5, None, Failure("x")]})
    assert best_and_worst(Judgement.of(scores, specs), 3) == [(0, 2), None]


def test_gates_flag_winners_and_never_losers():
    gate = RewardSpec("clean", "m:f", gate="mask", threshold=0.5)
    columns = {"a": [0.9, 0.5, 0.1], "clean": [0.4, 0.6, 0.0]}
    scores, specs = judged(columns, gate)
    judgement = Judgement.of(scores, specs)
    assert judgement.weights_K.tolist() == [1.0] and judgement.flagged_N.tolist() == [True, False, True]
    assert best_and_worst(judgement, 3) == [(1, 2)]  # the best of those that may win; the flagged one may lose
    unsure = Judgement.of(*judged({"a": [0.9, 0.1], "clean": [Failure("x"), None]}, gate))
    assert unsure.unsure_N.tolist() == [True, False] and not unsure.flagged_N.any()
    factor = RewardSpec("clean", "m:f", gate="multiply")
    assert Judgement.of(*judged(columns, factor)).values_NK[:, 0].tolist() == pytest.approx([0.36, 0.3, 0.0])


RULES = Rules(min_margin=0.1, tolerance=0.02, min_distance=0.05)


@pytest.mark.parametrize(
    ("columns", "distance", "ranked", "fate", "margin"),
    [
        ({"a": [0.6, 0.2], "b": [0.5, 0.5]}, 0.1, True, "kept", 0.2),  # (0.4 + 0) / 2
        ({"a": [0.6, 0.2], "b": [0.5, 0.5]}, 0.04, True, "near-duplicate", 0.2),
        ({"a": [0.6, 0.2], "b": [0.50, 0.51]}, 0.1, True, "kept", 0.195),  # within the tolerance
        ({"a": [0.9, 0.2], "b": [0.40, 0.45]}, 0.1, True, "disagreement", 0.325),
        ({"a": [0.6, 0.45], "b": [0.5, 0.5]}, 0.1, True, "small margin", 0.075),
        ({"a": [0.6, 0.2], "b": [0.5, None]}, 0.1, True, "kept", 0.4),  # b has nothing to say
        ({"a": [0.6, None], "b": [None, 0.5]}, 0.1, True, "unscored", None),
        ({"a": [0.6, None], "b": [None, 0.5]}, 0.1, False, "kept", None),  # the order is known without them
        ({"a": [0.6, 0.2], "gate": [0.3, 0.9]}, 0.1, True, "flagged", 0.4),
        ({"a": [0.6, 0.2], "gate": [0.3, 0.9]}, 0.1, False, "flagged", 0.4),
        ({"a": [0.6, 0.2], "gate": [0.9, 0.3]}, 0.1, True, "kept", 0.4),
        ({"a": [0.6, 0.2], "gate": [Failure("x"), 0.9]}, 0.1, True, "unscored", 0.4),
        ({"a": [0.6, 0.2], "gate": [Failure("x"), 0.9]}, 0.1, False, "kept", 0.4),
        ({"a": [0.2, 0.6]}, 0.1, False, "disagreement", -0.4),
    ],
)
def test_verdict(columns, distance, ranked, fate, margin):
    judgement = Judgement.of(*judged(columns, RewardSpec("gate", "m:f", gate="mask", threshold=0.5)))
    said = verdict(judgement, 0, 1, distance, RULES, ranked, screen=True)
    assert said == (fate, margin if margin is None else pytest.approx(margin))


def test_rewards_that_only_report():
    judgement = Judgement.of(*judged({"a": [0.2, 0.6]}))
    assert verdict(judgement, 0, 1, 0.1, RULES, ranked=False, screen=False) == ("kept", pytest.approx(-0.4))
    assert verdict(None, 0, 1, 0.1, RULES, ranked=False, screen=True) == ("kept", None)
    no_rules = Rules(0, 0, 0)
    assert verdict(None, 0, 1, 0.0, no_rules, ranked=False, screen=True) == ("near-duplicate", None)
    assert verdict(Judgement.of(*judged({"a": [0.5, 0.5]})), 0, 1, 0.1, no_rules, True, True)[0] == "small margin"


def test_degrade():
    prompt = 'white background, flat style, the word "SALT AND, PEPPER" and a small star'
    parts = ["white background", "flat style", 'the word "SALT AND, PEPPER"', "a small star"]
    for seed in range(20):
        left = [part for part in parts if part in degrade(prompt, 0.5, seed)]
        assert len(left) == 2 and degrade(prompt, 0.5, seed) == ", ".join(left)
    assert {degrade(prompt, 0.01, seed) for seed in range(40)} == {
        ", ".join(parts[:i] + parts[i + 1 :]) for i in range(4)
    }
    assert {degrade("a red circle", 0.99, seed) for seed in range(40)} == {"a", "red", "circle"}
    assert degrade("circle", 0.5, 0) == "circle"


def test_near_duplicates_and_fates_of_a_block():
    """Pictures of 16 x 16 are their own small versions: 5 of 255 everywhere is a distance of 0.0196."""
    dark = np.zeros((16, 16, 3), np.uint8)
    images = np.stack([dark + 100, dark + 100, dark + 105, dark + 200])
    decision = decide_pairs(images, None, [], Rules(0, 0, 0.02), screen=True)
    assert decision.pairs == [(0, 2), (1, 3)] and decision.fates == ["near-duplicate", "kept"]
    assert decision.distances == pytest.approx([5 / 255, 100 / 255]) and decision.margins == [None, None]
    scores, specs = judged({"a": [0.1, 0.2, 0.3, 0.9]})
    grouped = decide_groups(images, scores, specs, Rules(0, 0, 0.02), 2)
    assert grouped.pairs == [(1, 0), (3, 2)] and grouped.fates == ["near-duplicate", "kept"]
    assert grouped.entry()["differences"] == {"a": pytest.approx([0.1, 0.6])}


# ---- the report ---------------------------------------------------------------------------------------------


def entry(source: str, fates: list[str], differences: list[float | None], margins: list[float | None]) -> dict:
    return {"source": source, "fates": fates, "margins": margins, "distances": [0.1, 0.2, 0.3][: len(fates)],
            "prompts": [0, 1, 2][: len(fates)], "cut": 1, "images": 2 * len(fates), "missing": {"brightness": 1},
            "failed": {"brightness": 0}, "differences": {"brightness": differences}}  # fmt: skip


def test_quality_by_hand(tmp_path):
    config = recipe(tmp_path, Path("k2"))
    config.sources.append(PairSource("prompt", delta=DeltaConfig(DrawConfig(guidance=1), DrawConfig(drop=0.5))))
    config.sources[2].delta = DeltaConfig(DrawConfig(guidance=1), DrawConfig(guidance=1, drop=0.5))
    entries = [
        entry("guidance", ["kept", "kept", "disagreement"], [0.2, 0.0, -0.1], [0.25, None, -0.1]),
        entry("guidance", ["kept", "surplus"], [-0.3, None], [-1.7, 0.1]),
        entry("prompt", ["kept"], [0.4], [0.4]),
    ]
    found = quality.quality(config, entries)
    assert (found["pairs"], found["candidates"], found["on_policy_share"]) == (4, 6, 0.75)
    assert found["dropped"] == {"disagreement": 1, "surplus": 1}
    guidance = found["sources"]["guidance"]
    assert (guidance["pairs"], guidance["share"], guidance["on_policy"]) == (3, 0.75, True)
    assert found["sources"]["prompt"]["on_policy"] is False and found["sources"]["judged"]["pairs"] == 0
    # Of five candidates one agrees, two disagree, one is a tie, one has no score; of the three kept, one and one.
    assert guidance["agreement"]["brightness"] == {
        "agree": 1, "disagree": 2, "tie": 1, "missing": 1, "share": pytest.approx(1 / 3), "share_of_kept": 0.5,
    }  # fmt: skip
    counts = dict(zip(found["margin_edges"], guidance["margin"]["counts"]))
    assert {low: n for low, n in counts.items() if n} == {-1.0: 1, 0.2: 1} and guidance["margin"]["unknown"] == 1
    assert guidance["distance"]["median"] == pytest.approx(0.2)  # of 0.1, 0.2, 0.3, 0.1, 0.2
    assert found["scores"] == {"brightness": {"images": 12, "missing": 3, "failed": 0}}
    assert found["prompts"] == {"used": 2, "most_pairs": 3, "cut": 3}
    lines = "\n".join(quality.in_words(found))
    assert "4 pairs of 6 candidates; 75% hold an image of the policy" in lines
    assert "warning: longer than max_tokens and cut: 3 prompts" in lines
    assert "guidance: 3 pairs (75%, on-policy); dropped: 1 disagreement, 1 surplus" in lines
