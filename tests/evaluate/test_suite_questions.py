"""The reward that asks questions: the probability of the right answer, by a server and by a judge in this process."""

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from posttrain.evaluate.suites import KINDS, read
from prompts.records import columns
from prompts.templates import load_template
from rewards.base import Failure, RewardSpec, Scored
from rewards.encode import encode
from rewards.image import OCR, Questions, Rubric
from rewards.judge import Judge, answer_mass
from rewards.load import load_rewards
from rewards.local_judge import LocalJudge
from tests.evaluate.suite_files import DPG, GENEVAL2, jsonl, oneig, unigenbench
from tests.helpers import fake_judge

NANO = str(Path(__file__).parents[2] / "posttrain/nano/weights/judge-nano")
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))


def logprobs(**tokens: float) -> bytes:
    top = [{"token": token, "logprob": float(np.log(p)), "bytes": None} for token, p in tokens.items()]
    choice = {"index": 0, "finish_reason": "length", "message": {"role": "assistant", "content": "x"}}
    return json.dumps({"choices": [{**choice, "logprobs": {"content": [{**top[0], "top_logprobs": top}]}}]}).encode()


def ask(respond, records, **arguments):
    """The scores of one image for each record from a server that answers each question by `respond(its text)`."""

    def reply(head: str, body: bytes) -> bytes:
        text = json.loads(body)["messages"][0]["content"][1]["text"] if body else ""
        return fake_judge.reply("200 OK", respond(text), "Connection: close")

    async def scored(url: str):
        reward = Questions(Judge("m", url), **arguments)
        return await reward([IMAGE] * len(records), [record.prompt for record in records], **columns(records))

    return asyncio.run(asyncio.wait_for(fake_judge.served(reply, scored), 60))


def test_questions_take_the_probability_of_the_right_answer(tmp_path):
    suite = read("geneval2", jsonl(tmp_path / "g.jsonl", GENEVAL2))

    def respond(text: str) -> bytes:
        assert text.endswith("Answer the question in one word.")
        if "How many" in text:
            return logprobs(**{"Three": 0.5, "3": 0.2, " three": 0.1, "Two": 0.15, "the": 0.05})
        return logprobs(Yes=0.6, yes=0.2, No=0.2)

    boats, kite = ask(respond, suite.records)
    assert boats == pytest.approx((0.8 + 0.8 + 0.8) / 3) and kite == pytest.approx(0.8)
    assert isinstance(boats, Scored) and isinstance(kite, Scored)
    assert boats.details["probabilities"] == pytest.approx([0.8, 0.8, 0.8])
    assert boats.details["questions"] == suite.records[0].columns["questions"]
    # With the reward's details as rows, figures follow.
    rows = [{"prompt": i, "score": float(s), **s.details} for i, s in enumerate([boats, kite])]
    assert suite.aggregate(rows)["gm"] == pytest.approx(0.8)


def test_hard_answers_and_parents(tmp_path):
    (tmp_path / "d.csv").write_text(DPG)
    suite = read("dpg", str(tmp_path / "d.csv"))
    p = {"Is there a boat?": 0.3, "Does it have": 0.9, "Is the sail": 0.9, "Is there a hill?": 0.6}

    def respond(text: str) -> bytes:
        (yes,) = [value for key, value in p.items() if key in text]
        return logprobs(yes=yes, no=1 - yes)

    assert suite.reward is not None
    boats, hill = ask(respond, suite.records, **suite.reward["init_args"])
    assert (boats, hill) == (0.0, 1.0) and isinstance(boats, Scored) and boats.details["credits"] == [0.0, 0.0, 0.0]


def test_an_answer_that_is_none_is_a_failure_and_not_zero(tmp_path):
    suite = read("geneval2", jsonl(tmp_path / "g.jsonl", GENEVAL2))

    def no_number(text: str) -> bytes:
        return logprobs(There=0.9, three=0.1) if "How many" in text else logprobs(yes=0.9, no=0.1)

    boats, kite = ask(no_number, suite.records)
    assert isinstance(boats, Failure) and "not a number (numbers share 0.1), but 'There'" in boats.message
    assert kite == pytest.approx(0.9)
    (maybe, _) = ask(lambda text: fake_judge.answer("x", "maybe"), suite.records)
    assert isinstance(maybe, Failure)


def test_words_and_questions_answered_no():
    candidates = [(" Wood", np.log(0.5)), ("wooden", np.log(0.25)), ("Metal", np.log(0.15)), ("w", np.log(0.1))]
    # A first token that begins the word counts, one letter does not.
    assert answer_mass(candidates, "wooden", 0.5) == pytest.approx(0.75)
    assert answer_mass([("4", np.log(0.7)), ("four", np.log(0.2)), ("14", np.log(0.1))], "4", 0.5) == pytest.approx(0.9)

    async def no(url: str) -> float:
        return await Judge("m", url).p_answer(IMAGE, load_template("question"), "No", question="Is it day?")

    reply = fake_judge.reply("200 OK", logprobs(yes=0.25, no=0.75), "Connection: close")
    assert asyncio.run(fake_judge.served(lambda head, body: reply, no)) == pytest.approx(0.75)


def test_a_local_judge_gives_other_words_too():
    judge, template = LocalJudge(NANO, min_mass=0), load_template("question")
    vlm = judge._vlm
    image = Image.new("RGB", (64, 64), "red")

    async def both():
        word = judge._first_token(encode(image), template.render(question="How many?"))
        return await asyncio.gather(word, judge.p_yes(image, template, question="How many?"))

    candidates, p_yes = asyncio.run(both())
    logits = vlm.logits(vlm.inputs([image], [template.render(question="How many?")]))[0].detach()
    expected = logits.softmax(-1)
    order = expected.argsort(descending=True).tolist()
    best = next(token for token in order if token not in vlm.yes + vlm.no)
    assert (candidates[2][0], np.exp(candidates[2][1])) == (
        vlm.tokenizer.decode([best]),
        pytest.approx(float(expected[best]), abs=1e-5),
    )
    assert p_yes == pytest.approx(vlm.p_yes([image], [template.render(question="How many?")])[0], abs=1e-5)


def test_each_suite_names_a_reward_that_loads(tmp_path):
    (tmp_path / "d.csv").write_text(DPG)
    files = {
        "geneval2": jsonl(tmp_path / "g.jsonl", GENEVAL2),
        "dpg": str(tmp_path / "d.csv"),
        "unigenbench": unigenbench(tmp_path / "u.csv"),
        "oneig": oneig(tmp_path),
        "longtext": jsonl(tmp_path / "l.jsonl", [{"prompt_id": 0, "prompt": "a", "text": ["x"]}]),
        "compbench": jsonl(tmp_path / "c.jsonl", [{"prompt": "a", "questions": ["a?"]}]),
        "rubric": jsonl(tmp_path / "r.jsonl", [{"prompt": "a", "requirements": ["x"]}]),
    }
    assert tuple(files) == KINDS
    for kind, path in files.items():
        suite = read(kind, path)
        assert suite.reward is not None
        judge = {"model": "m", "base_urls": "http://localhost:1/v1"}
        function = {**suite.reward, "init_args": {**suite.reward["init_args"], "judge": judge}}
        (reward,) = load_rewards([RewardSpec(kind, function)])
        assert isinstance(reward.function, Questions | OCR | Rubric)
        assert len({record.id for record in suite.records}) == len(suite.records)
