"""The image rewards, with a judge whose answers are known."""

import asyncio
import json
from pathlib import Path

import pytest

from posttrain.errors import UserError
from prompts.records import columns, read_prompts
from prompts.templates import load_template
from rewards.base import RewardSpec, Scored
from rewards.image import OCR, Artifact, Rubric
from rewards.judge import Judge
from rewards.load import check_addresses, load_rewards, record
from tests.rewards.test_rewards import WHITE, spec


class Canned(Judge):
    """A judge with fixed answers, which counts what it is asked."""

    def __init__(self, answer):
        super().__init__("m", "http://unused/v1")
        self.answer = answer
        self.asked: list[str] = []

    async def _p_yes(self, encoded, text):
        self.asked.append(text)
        return self.answer(text)

    async def _list_of_strings(self, key, text, encoded):
        self.asked.append(text)
        await asyncio.sleep(0.01)
        return self.answer(text)


def test_rubric_asks_each_requirement_and_keeps_the_answers():
    judge = Canned(lambda text: 0.9 if "red" in text else 0.3)
    columns = {"requirements": [["a red cube", "a dog"], []]}
    scores = asyncio.run(Rubric(judge)([WHITE] * 2, ["x", "y"], **columns))
    assert scores == [pytest.approx(0.6), None]
    assert isinstance(scores[0], Scored)
    assert scores[0].details == {"requirements": ["a red cube", "a dog"], "answers": [0.9, 0.3]}


def test_rubric_decomposes_a_prompt_once(tmp_path):
    file = str(tmp_path / "pool.requirements.jsonl")
    judge = Canned(lambda text: ["a dog", "a hat"] if "Break it" in text else 0.5)
    asyncio.run(Rubric(judge, requirements_file=file)([WHITE] * 8, ["a dog with a hat"] * 8))
    assert sum("Break it" in text for text in judge.asked) == 1
    again = Canned(lambda text: 0.5)
    (scored,) = asyncio.run(Rubric(again, requirements_file=file)([WHITE], ["a dog with a hat"]))
    assert isinstance(scored, Scored) and scored.details["requirements"] == ["a dog", "a hat"]
    Path(file).write_text("{}\n")
    with pytest.raises(UserError, match="line 1: not a requirements record"):
        Rubric(again, requirements_file=file)


def test_rubric_of_another_column():
    """What a reference shows: asked as it stands, never found by the judge, and refused where nobody gives it."""
    judge = Canned(lambda text: 0.8 if "star" in text else 0.1)
    leaks = {"leaks": [["a star", "a ring"], None, []], "requirements": [["x"]] * 3}
    scores = asyncio.run(Rubric(judge, column="leaks")([WHITE] * 3, ["x"] * 3, **leaks))
    assert scores == [pytest.approx(0.45), None, None] and len(judge.asked) == 2
    with pytest.raises(UserError, match="there is no column leak, which a rubric asks for"):
        asyncio.run(Rubric(judge, column="leak")([WHITE], ["x"], leaks=[["a star"]]))


def test_a_prompt_of_a_file_that_says_no_requirements_is_decomposed(tmp_path):
    """As `grpo` and `pairs` hand the columns on; an empty list says that there is nothing to ask."""
    rows = [{"prompt": "a dog"}, {"prompt": "fog", "requirements": []}, {"prompt": "x", "requirements": ["a cat"]}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    records = read_prompts(tmp_path / "p.jsonl")
    judge = Canned(lambda text: ["a dog"] if "Break it" in text else 0.5)
    scores = asyncio.run(Rubric(judge)([WHITE] * 3, [r.prompt for r in records], **columns(records)))
    assert scores == [0.5, None, 0.5] and sum("Break it" in text for text in judge.asked) == 1


def test_ocr_and_artifact():
    columns = {"texts": [["Grand opening"], [], None]}
    scores = asyncio.run(OCR(Canned(lambda text: ["grand openning"]))([WHITE] * 3, ["x"] * 3, **columns))
    assert scores == [pytest.approx(0.9375), None, None]
    # With `unasked`, two words too many cost 0.2 each where no text is asked for; a quoted text may be asked for.
    judge = Canned(lambda text: ["grand openning"])
    prompts = ["x", "a dog", 'a sign that reads "no"', "a sign that says 「営業中」"]
    scored = asyncio.run(OCR(judge, unasked=0.2)([WHITE] * 4, prompts, texts=[["Grand opening"], [], [], None]))
    assert scored == [pytest.approx(0.9375), pytest.approx(0.6), None, None] and len(judge.asked) == 2
    assert isinstance(scored[1], Scored) and scored[1].details == {"lines": ["grand openning"], "extra": 2}
    for lines, expected in (([], 1.0), (["a b", "c d e f g"], 0.0)):
        scored = asyncio.run(OCR(Canned(lambda text: lines), unasked=0.2)([WHITE], ["a dog"], texts=[[]]))  # noqa: B023
        assert scored == [pytest.approx(expected)]
    with pytest.raises(UserError, match="unasked: is 2: use a number above 0, at most 1, or null"):
        OCR(judge, unasked=2)
    assert asyncio.run(Artifact(Canned(lambda text: 0.2))([WHITE], ["x"])) == [pytest.approx(0.8)]


def test_record_has_template_hashes():
    for bad in (5, [1]):
        with pytest.raises(UserError, match=r"judge.base_urls: is .*; give a URL or a list of them"):
            check_addresses({"judge": {"base_urls": bad}}, [], "reward a")
    check_addresses({"judge": {"base_urls": None}}, [], "reward a")
    judge = {"model": "m", "base_urls": "server://vlm"}
    specs = [
        RewardSpec("rubric", function={"class_path": "rewards.image.Rubric", "init_args": {"judge": judge}}),
        spec("constant"),
    ]
    rewards = load_rewards(specs, {"vlm": ["http://a/v1", "http://b/v1"]})
    templates = {name: load_template(name).hash for name in ("rubric", "decompose")}
    assert record(rewards) == {"rubric": {"model": "m", "templates": templates}}
    assert rewards[0].function.judge.base_urls == ["http://a/v1", "http://b/v1"]  # pyright: ignore
