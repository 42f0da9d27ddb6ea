"""UnifiedReward: its answers read, its question, and a server that speaks its form."""

import asyncio
import json

import pytest
from PIL import Image

from posttrain.errors import UserError
from prompts.templates import load_template
from rewards.base import Failure, RewardSpec
from rewards.endpoints import JudgeError
from rewards.load import check_rewards
from rewards.ready import UnifiedReward
from rewards.ready.unified import read_ratings
from tests.helpers import fake_judge
from tests.helpers.runs import ROOT

IMAGE = Image.new("RGB", (32, 32), "navy")
# The example output of its authors' script
ANSWER = """
Alignment Score (1-5): 2.694700002670288
Coherence Score (1-5): 2.371500015258789
Style Score (1-5): 2.802500009536743
"""


def asked(text, finish="stop", **settings):
    """Score and request where a server says `text`."""
    bodies = []

    def respond(head, body):
        bodies.append(json.loads(body))
        choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text}}
        reply = {"id": "x", "object": "chat.completion", "created": 0, "choices": [choice], "model": "unified"}
        return fake_judge.reply("200 OK", json.dumps(reply).encode(), "Connection: close")

    async def ask(url):
        reward = UnifiedReward({"model": "unified", "base_urls": url}, **settings)
        return await reward([IMAGE], ["a fox"])

    (score,) = asyncio.run(fake_judge.served(respond, ask))
    return score, bodies


def test_its_authors_example():
    """(2.6947 + 2.3715 + 2.8025) / 3 = 2.6229, and (2.6229 - 1) / 4."""
    score, (body,) = asked(ANSWER)
    assert score == pytest.approx(0.405725, abs=1e-6)
    assert score.details["ratings"]["style"] == pytest.approx(2.8025)
    assert asked(ANSWER, axes=["style"])[0] == pytest.approx((2.8025 - 1) / 4, abs=1e-6)
    image, text = body["messages"][0]["content"]
    assert image["type"] == "image_url" and text["text"].endswith('Text Caption: ["a fox"]')
    assert body["temperature"] == 0 and "response_format" not in body


@pytest.mark.parametrize("axis", ["alignment", "coherence", "style"])
def test_a_rating_that_is_not_there_is_a_failure(axis):
    lines = [line for line in ANSWER.splitlines() if axis not in line.lower()]
    with pytest.raises(JudgeError, match=f"no {axis} score from 1 to 5"):
        read_ratings("\n".join(lines))
    with pytest.raises(JudgeError, match=f"no {axis} score from 1 to 5"):
        read_ratings("\n".join([*lines, f"{axis} score (1-5): 7"]))


def test_other_ways_to_write_them():
    written = "**Alignment Score (1-5):** 5\nCoherence Score: 1\nstyle score (1-5) : 3"
    assert read_ratings(written.replace("*", "")) == {"alignment": 5, "coherence": 1, "style": 3}


@pytest.mark.parametrize(
    ("text", "finish", "says"),
    [
        ("A lovely fox.", "stop", "no alignment score"),
        (None, "stop", "is not a text"),
        (ANSWER, "length", "longer than"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_a_failure(text, finish, says):
    score, _ = asked(text, finish)
    assert isinstance(score, Failure) and says in score.message


def test_a_recipe():
    judge = {"model": "unified", "base_urls": "server://unified"}
    function = {"class_path": "rewards.ready.UnifiedReward", "init_args": {"judge": judge}}
    check_rewards([RewardSpec("unified", function)], ["unified"])
    with pytest.raises(UserError, match="axes: beauty: use some of alignment"):
        UnifiedReward(judge | {"base_urls": "http://a/v1"}, axes=["beauty"])
    assert load_template("unified").fields == {"prompt"}


def test_a_judge_in_this_process_is_asked_too():
    """judge-nano knows nothing of ratings, so it fails, with its answer in the message."""
    judge = {"path": str(ROOT / "posttrain/nano/weights/judge-nano"), "max_text_tokens": 8, "device": "cpu"}
    (score,) = asyncio.run(UnifiedReward(judge)([IMAGE], ["a red circle"]))
    assert isinstance(score, Failure) and "answer" in score.message
