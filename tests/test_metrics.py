"""The definitions of metrics: one place, and docs/metrics.md is made from it."""

from pathlib import Path

import pytest

from posttrain.config import metric_names, metrics

ROOT = Path(__file__).parents[1]


def test_the_page_is_made_from_the_definitions():
    assert (ROOT / "docs/metrics.md").read_text() == metrics.page()


def test_each_metric_is_defined_once():
    patterns = [metric.pattern for metric in (*metrics.METRICS, *metrics.EVALUATION, metrics.SCORE)]
    assert len(patterns) == len(set(patterns))


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("fake_grad_norm", "*grad_norm"),
        ("eval/image/saturation@2.5", "image/saturation"),
        ("eval/to_teacher/contrast@8steps", "to_teacher/*"),
        ("teacher/image/contrast", "image/contrast"),
        ("eval/pairs/winner", "winner"),
        ("eval/pairs/winner_t2", "pairs/*_t[1-4]"),
        ("eval/loss", "loss"),
        ("eval/oracle@1.5", "*"),
    ],
)
def test_a_logged_name_finds_its_definition(name, pattern):
    metric = metrics.find(name)
    assert metric is not None and metric.pattern == pattern


def test_what_has_no_definition():
    assert metrics.find("unheard_of") is None and metrics.describe("unheard_of") == ""
    assert metrics.find("eval/pairs/unheard_of") is None


def test_all_metrics_of_images_and_pairs_are_defined():
    for name in (*metric_names.LOOK, *metric_names.CHANGES, metric_names.DIVERSITY, *metric_names.PAIRS):
        assert metrics.find(f"eval/{name}") not in (None, metrics.SCORE), name
