"""Steps that teach nothing are skipped and counted, told, and end a run when there are too many in a row."""

from collections import Counter

import numpy as np
import pytest

from posttrain.errors import UserError
from posttrain.grpo import train as grpo
from posttrain.grpo import update
from posttrain.training.idle import WARN_AFTER, check_idle, count_idle, idle_reason
from rewards.base import RewardSpec, Scores
from tests.helpers import runs, tiny

CALLS: list[int] = []


def not_at_first(images, prompts):
    """None for the two groups of the first step."""
    CALLS.append(len(images))
    begun = len(CALLS) - 1  # the first call is the evaluation before training
    return [None if begun <= 2 else image.getpixel((0, 0))[0] / 255 for image in images]


def broken(images, prompts):
    raise RuntimeError("no weights")


@pytest.mark.parametrize("kind", ["uniform", "adaptive"])
def test_a_step_without_any_score_is_skipped_and_counted(kind, tmp_path, model, monkeypatch):
    """It makes no update, also of the pool, and the run goes on."""
    CALLS.clear()
    config = runs.config(tmp_path, model)
    config.pool.kind = kind
    config.rewards = [RewardSpec("late", "tests.grpo.test_idle:not_at_first")]
    config.steps, config.checkpoint.every, config.checkpoint.keep = 2, 1, 5
    updates: list[int] = []
    optimise = grpo.optimise
    monkeypatch.setattr(grpo, "optimise", lambda *a: updates.append(len(CALLS)) or optimise(*a))
    grpo.train(config)
    first, second = [row for row in runs.rows(config.output) if "missing" in row]
    assert (first["missing"], first["skipped_steps"], first["reward"]) == (1, 1, None) and "loss" not in first
    assert second["skipped_steps"] == 1 and second["missing"] == 0 and second["loss"] is not None
    assert len(updates) == 1
    assert runs.latest(config.output).state["history"]["skipped_steps"] == 1


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("tests.helpers.runs:nothing", "all None, so none applies to these prompts"),
        ("tests.helpers.runs:constant", "the images of each group score alike"),
        ("tests.grpo.test_idle:broken", "idle: RuntimeError: no weights"),
    ],
)
def test_too_many_in_a_row_end_the_run(function, reason, tmp_path, model):
    config = runs.config(tmp_path, model)
    config.rewards = [RewardSpec("idle", function, max_failures=1)]
    config.steps, config.idle_steps = 9, 2
    with pytest.raises(UserError, match=f"idle_steps: nothing could be learnt from 2 steps in a row: {reason}"):
        grpo.train(config)
    assert [row["step"] for row in runs.rows(config.output) if "missing" in row] == [1, 2]


def alike_for_one(images, prompts):
    """Of one size for the first prompt of the recipe, different for the others."""
    if prompts[0] == tiny.PROMPTS[0]:
        return [0.5] * len(images)
    return [image.getpixel((0, 0))[0] / 255 for image in images]


@pytest.mark.parametrize(("flat", "kl", "left_out"), [("skip", 0.1, True), ("kl", 0.1, False), ("kl", 0.0, True)])
def test_a_group_without_signal_is_left_out(flat, kl, left_out, tmp_path, model, monkeypatch):
    """Unless its distance to the reference is asked for. The loss is a mean over all groups of the step either way."""
    config = runs.config(tmp_path, model)
    config.rewards = [RewardSpec("some", "tests.grpo.test_idle:alike_for_one")]
    config.groups.prompts_per_step, config.groups.flat, config.loss.kl = 3, flat, kl
    config.steps = 1
    trained: list[list[str]] = []
    gradient = update.gradient

    def noted(k2, config, groups, *rest, **options):
        trained.append([group.record.prompt for group in groups])
        return gradient(k2, config, groups, *rest, **options)

    monkeypatch.setattr(update, "gradient", noted)
    grpo.train(config)
    (row,) = [row for row in runs.rows(config.output) if "missing" in row]
    assert row["flat_groups"] == pytest.approx(1 / 3)
    assert (tiny.PROMPTS[0] in trained[0], len(trained[0])) == (not left_out, 2 + (not left_out))
    assert row["ratio"] == pytest.approx(1, abs=1e-4)


def test_counting(capsys):
    """One warning in a row of idle steps; a step that teaches begins again."""
    history = {"skipped_steps": 0, "idle_steps": 0}

    def step(reason, unscored, limit):
        count_idle(history, reason, unscored)
        check_idle(history, reason, limit)

    for _ in range(WARN_AFTER + 2):
        step("all None", True, 9)
    said = capsys.readouterr().err
    assert said.count("nothing could be learnt from 5 steps in a row: all None; after 9 the run ends") == 1
    assert history == {"skipped_steps": 7, "idle_steps": 7}
    step("alike", False, 9)
    with pytest.raises(UserError, match="from 9 steps in a row: alike"):
        step("alike", False, 9)
    for _ in range(99):
        step("alike", False, 0)  # never
    step(None, False, 9)
    assert history == {"skipped_steps": 7, "idle_steps": 0}


def test_reasons():
    shape = (4, 1)
    scores = Scores(["r"], np.zeros(shape), np.zeros(shape, bool), np.zeros(shape, bool), {"r": Counter()}, {}, {})
    assert idle_reason({"missing": 0.75, "flat_groups": 0.5}, scores) is None
    assert idle_reason({"missing": 0.0, "flat_groups": 1.0}, scores) == "the images of each group score alike"
    assert idle_reason({"missing": 1.0, "flat_groups": 1.0}, scores) == "all None, so none applies to these prompts"
    scores.failures["r"].update({"refused": 3, "late": 1})
    assert idle_reason({"missing": 1.0, "flat_groups": 1.0}, scores) == "r: refused"
