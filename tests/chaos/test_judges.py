"""Judges that go wrong under every method that scores: what cannot be had is missing, too much of it ends the run."""

import json

import pytest

from tests.chaos import methods
from tests.chaos.test_faults import fails
from tests.helpers import runs
from tests.rewards.test_judge_client import serving


def scored(tmp_path, parts, method: str, url: str, max_failures: float):
    made = methods.METHODS[method][0](tmp_path, parts, method)
    judge = {"model": "m", "base_urls": url, "timeout": 0.5, "deadline": 3.0, "retries": 2}
    data = json.loads(runs.recipe(made, tmp_path / "recipe.yaml").read_text())
    reward = {"name": "judged", "function": {"class_path": "rewards.image.Aesthetic", "init_args": {"judge": judge}}}
    data["rewards"] = [*data["rewards"], reward | {"max_failures": max_failures}]
    (tmp_path / "recipe.yaml").write_text(json.dumps(data))
    return tmp_path / "recipe.yaml"


@pytest.mark.parametrize("method", methods.SCORING)
def test_faults_are_missing_scores(command, parts, tmp_path, method):
    """Of eight pictures three show a fault: five kinds that pass when it is asked again, and three that do not."""
    with serving("--faults", "0.4") as url:
        result = command(*method.split(), "--config", scored(tmp_path, parts, method, url, 1.0))
    assert result.returncode == 0, result.stderr
    text = (tmp_path / "run/metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text and "Traceback" not in result.stderr
    rows = runs.rows(tmp_path / "run")
    if method in ("grpo", "nft"):
        assert any(0 < row["failed"] < 0.5 for row in rows if "failed" in row)
    if method == "pairs":
        quality = json.loads((tmp_path / "run/quality.json").read_text())
        assert 0 < quality["scores"]["judged"]["failed"] < quality["scores"]["judged"]["images"]


@pytest.mark.parametrize("how", ["--broken", "--die-after"])
@pytest.mark.parametrize("method", methods.SCORING)
def test_a_judge_that_fails_for_good_ends_the_run(command, parts, tmp_path, method, how):
    """With the server's own words, or that it does not answer."""
    with serving(how, *(["5"] if how == "--die-after" else [])) as url:
        result = command(*method.split(), "--config", scored(tmp_path, parts, method, url, 0.0))
    fails(result, "judged", "illegal memory access" if how == "--broken" else url.removesuffix("/v1"))
