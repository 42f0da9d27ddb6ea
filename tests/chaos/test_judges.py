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


FAILURES = {
    "broken": (["--broken"], "illegal memory access"),
    "dead": (["--die-after", "5"], "http://127.0.0.1:"),
    "an error in the body of a 200": (["--says", "error"], "out of credits"),
    "another model": (["--says", "llama"], "asked for the model m, llama answered"),
}
"""What is wrong with a judge, and what the user is told."""


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("method", methods.SCORING)
def test_a_judge_that_fails_for_good_ends_the_run(command, parts, tmp_path, method, failure):
    """With the server's own words, or that it does not answer."""
    arguments, says = FAILURES[failure]
    with serving(*arguments) as url:
        result = command(*method.split(), "--config", scored(tmp_path, parts, method, url, 0.0))
    fails(result, "judged", says)


PROXIES = {"http_proxy": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9", "ALL_PROXY": "socks5://127.0.0.1:9"}


@pytest.mark.parametrize("method", methods.SCORING)
def test_no_proxy_stands_before_a_judge_on_this_machine(command, parts, tmp_path, method):
    with serving() as url:
        result = command(*method.split(), "--config", scored(tmp_path, parts, method, url, 0.0), **PROXIES)
    assert result.returncode == 0, result.stderr
