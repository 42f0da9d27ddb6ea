"""Errors, paired tests and the sentence that is made of them."""

import numpy as np
import pytest
from scipy import stats

from posttrain.report.statistics import mean_and_error, paired
from posttrain.report.verdict import verdict

NAN = float("nan")


def test_mean_and_error_leave_out_what_is_missing():
    mean, error = mean_and_error(np.array([1.0, NAN, 2.0, 4.0]))
    assert mean == pytest.approx(7 / 3)
    assert error == pytest.approx(stats.sem([1.0, 2.0, 4.0]))
    assert mean_and_error(np.array([NAN])) == (None, None)
    assert mean_and_error(np.array([0.5])) == (0.5, None)


def test_paired_agrees_with_scipy():
    rng = np.random.default_rng(0)
    before = rng.normal(0, 1, 60)
    after = before + rng.normal(0.2, 0.6, 60)
    found = paired(after, before)
    assert found is not None
    assert found.difference == pytest.approx(float((after - before).mean()))
    interval = stats.bootstrap((after - before,), np.mean, method="percentile", rng=1).confidence_interval
    assert (found.low, found.high) == pytest.approx(tuple(interval), abs=0.01)
    assert found.p == pytest.approx(float(stats.ttest_rel(after, before).pvalue), abs=0.02)
    assert found.win_rate == pytest.approx(float((after > before).mean()))


def test_flips_of_few_prompts_are_all_that_there_are():
    found = paired(np.array([1.0, 1.0, 1.0]), np.zeros(3))
    assert found is not None and found.p == pytest.approx(0.25, abs=0.02)  # 2 of 8 sign patterns are as far from 0


def test_a_prompt_without_one_of_the_scores_is_left_out():
    found = paired(np.array([1.0, NAN, 0.0, 0.5]), np.array([0.0, 0.0, NAN, 0.5]))
    assert found is not None and found.prompts == 2 and found.difference == 0.5 and found.win_rate == 0.75
    assert paired(np.array([NAN]), np.array([1.0])) is None


def test_the_order_is_no_matter_of_the_seed():
    after, before = np.random.default_rng(1).normal(0, 1, (2, 30))
    assert paired(after, before, 3) == paired(after, before, 3)


def test_what_fell_comes_first():
    rng = np.random.default_rng(0)
    base = rng.uniform(0.2, 0.6, 64)
    scores = {
        "rubric": (base.tolist(), (base + 0.07 + rng.normal(0, 0.05, 64)).tolist()),
        "artifact_free": (base.tolist(), (base - 0.06 + rng.normal(0, 0.05, 64)).tolist()),
        "text": (base.tolist(), (base + rng.normal(0, 0.3, 64)).tolist()),
        "gone": ([None] * 64, base.tolist()),
    }
    found = verdict(scores, {"image/brightness": (0.5, 0.58), "image/saturation": (0.1, 0.101)})
    assert [len(part) for part in (found.fell, found.rose, found.unclear, found.looks)] == [1, 1, 1, 1]
    assert found.text.startswith("artifact_free fell by .0") and "; rubric +.0" in found.text
    assert "brightness +16 %" in found.text and "within the noise: text" in found.text and "gone" not in found.text
    lower = verdict({"leak": scores["artifact_free"]}, {}, lower=["leak"])
    assert not lower.fell and lower.rose[0].startswith("leak -")
