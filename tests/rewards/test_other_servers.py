"""Endpoints that are not vLLM, and environments that are not empty: no score where there is none, and no key told."""

import asyncio
import json
import math
import re
import socket
from dataclasses import replace

import pytest

from posttrain.errors import UserError
from posttrain.training.judge_check import warn_of_silent_judges
from prompts.templates import load_template
from rewards.base import RewardSpec, score_all
from rewards.endpoints import JudgeError
from rewards.judge import Judge, is_one_hot, same_model
from rewards.load import load_rewards
from rewards.serve import ServerURL
from tests.helpers import fake_judge
from tests.rewards.test_judge_answers import PICTURE, QUESTION, good, ok, run


def ask(judge: Judge):
    return judge.p_yes(PICTURE, QUESTION)


def answered(**changes) -> bytes:
    return ok(json.dumps(json.loads(fake_judge.answer("a", None)) | changes).encode())


@pytest.mark.parametrize(
    ("body", "attempts", "words"),
    [
        (
            {"error": {"message": "insufficient credits", "code": 402}},
            1,
            "HTTP 200 with an error: .*insufficient credits",
        ),
        ({"choices": None, "error": {"message": "overloaded", "code": 502}}, 2, "2 attempts failed: .*overloaded"),
        ({"choices": [], "error": {"message": "slow down", "code": "rate_limit_exceeded"}}, 2, "slow down"),
        ({"choices": [{"error": {"message": "upstream", "code": 500}, "message": {}}]}, 2, "upstream"),
        ({"error": "no such model"}, 1, "no such model"),
    ],
)
def test_an_error_in_the_body_of_a_200_has_its_words_and_is_retried_if_it_may_pass(body, attempts, words):
    asked = []

    def respond(head: str, _: bytes) -> bytes:
        asked.append(head)
        return ok(json.dumps(body).encode())

    with pytest.raises(JudgeError, match=words):
        run(respond, ask, retries=1, deadline=5)
    assert len(asked) == attempts


def test_an_error_that_passes_leaves_a_score():
    replies = [ok(b'{"error": {"message": "slow down", "code": 429}}')]
    score, bodies = run(lambda head, body: replies.pop() if replies else good(body), ask)
    assert 0 < score < 1 and len(bodies) == 2


@pytest.mark.parametrize("text", ["<html>Sign in to Corp Proxy</html>", 'data: {"choices": []}', "null", "[]"])
def test_what_is_no_answer_is_quoted(text):
    """As text and as a list of lines, whatever its type says."""
    kind = "application/json" if text in ("null", "[]") else "text/html"
    page = ok(text.encode()).replace(b"application/json", kind.encode())
    for question in (ask, lambda judge: judge.transcribe(PICTURE, load_template("transcribe"))):
        with pytest.raises(JudgeError) as raised:
            run(lambda head, body: page, question)
        assert text in str(raised.value)


def test_another_model_is_not_the_judge():
    with pytest.raises(JudgeError, match="asked for the model m, llama answered"):
        run(lambda head, body: answered(model="llama"), ask)
    for name in ("m", None):
        score, _ = run(lambda head, body, name=name: answered(model=name), ask)
        assert score == pytest.approx(fake_judge.score_of("a"))


def test_an_alias_is_named():
    """As Azure's deployments, which answer with the name of the model behind them."""

    def aliased(answers_as):
        return lambda judge: ask(replace(judge, answers_as=answers_as))

    score, _ = run(lambda head, body: answered(model="gpt-4o-2024-08-06"), aliased("gpt-4o"))
    assert score == pytest.approx(fake_judge.score_of("a"))
    with pytest.raises(JudgeError, match=r"model m, llama answered: name one .*, set answers_as: llama"):
        run(lambda head, body: answered(model="llama"), aliased(None))
    with pytest.raises(JudgeError, match="model m, which answers as gpt-4o, llama answered"):
        run(lambda head, body: answered(model="llama"), aliased("gpt-4o"))


def test_an_alias_in_a_recipe():
    def scored(**more):
        async def ask(judge: Judge):
            settings = {"model": "my-deployment", "base_urls": judge.base_urls, "retries": 0, **more}
            function = {"class_path": "rewards.image.Aesthetic", "init_args": {"judge": settings}}
            rewards = load_rewards([RewardSpec("taste", function, max_failures=1.0)])
            return await score_all(rewards, [PICTURE], ["a fox"])

        scores, _ = run(lambda head, body: answered(model="gpt-4o"), ask)
        return scores

    assert scored(answers_as="gpt-4o").valid_NK.all()
    (reason,) = scored().failures["taste"]
    assert "asked for the model my-deployment, gpt-4o answered" in reason and "answers_as: gpt-4o" in reason


def test_silence_is_told_before_anything_is_asked(capsys):
    """Of an address that takes no connection, once for the rewards that share it; a refusal is an answer, and a
    recipe's own servers start later."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, and listening to nobody
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/v1"
        rewards = load_rewards([taste("a", url), taste("b", url), taste("c", "server://own")], {"own": [url]})
        warn_of_silent_judges(rewards)
    said = capsys.readouterr().err
    assert said.count("posttrain: warning: ") == 1
    assert f"reward a: {url}: Connection error" in said and "start it, or correct base_urls" in said

    async def silent(address: str):
        return await Judge("m", [address]).silent()

    refusal = fake_judge.reply("401 Unauthorized", b"{}", "Connection: close")
    assert asyncio.run(fake_judge.served(lambda head, body: refusal, silent)) == []


def test_a_key_that_is_not_set_is_told_before_anything_is_asked(monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    rewards = load_rewards([taste("a", "http://127.0.0.1:9/v1", api_key_env="NO_SUCH_KEY")])
    with pytest.raises(UserError, match="api_key_env: NO_SUCH_KEY is not set"):
        warn_of_silent_judges(rewards)


def taste(name: str, urls: str, **judge) -> RewardSpec:
    settings = {"model": "m", "base_urls": urls, **judge}
    return RewardSpec(name, {"class_path": "rewards.image.Aesthetic", "init_args": {"judge": settings}})


@pytest.mark.parametrize(
    ("asked", "answered", "same"),
    [
        ("aesthetic", "aesthetic", True),
        ("openai/gpt-4o", "gpt-4o-2024-08-06", True),
        ("Qwen/Qwen3-VL-8B", "qwen3-vl-8b:latest", True),
        ("qwen/qwen-vl:free", "qwen/qwen-vl", True),
        ("gemini-flash-latest", "gemini-2.5-flash", True),
        ("gpt-4o", "gpt-4o-mini", False),
        ("aesthetic", "vlm", False),
        ("judge", "judge-aesthetic", False),
    ],
)
def test_same_model(asked, answered, same):
    assert same_model(asked, answered) is same


@pytest.mark.parametrize(
    ("top", "one"),
    [
        ([("Yes", 0.0), ("No", -9999.0)], True),
        ([("Yes", -1e-4)], True),
        ([("Yes", 0.0), ("No", -math.inf)], True),
        ([("Yes", -1e-9), ("No", -25.0)], False),
        ([("Yes", -0.5), ("No", -1.0)], False),
    ],
)
def test_log_probs_that_leave_one_token_are_warned_of_once(top, one, capsys):
    assert is_one_hot(top) is one
    rows = [{"token": token, "logprob": max(value, -9999.0)} for token, value in top]
    reply = answered(choices=[{"message": {"content": "Yes"}, "logprobs": {"content": [{"top_logprobs": rows}]}}])

    async def twice(judge: Judge):
        return [await judge.p_yes_text(QUESTION) for _ in range(2)]

    run(lambda head, body: reply, twice)
    assert capsys.readouterr().err.count("each score is 0 or 1") == one


# ---- keys -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["sk-planted\n", "sk-plan\tted", "sk planted", "sk-plänted"])
def test_a_key_that_no_header_holds_is_refused_and_not_told(key, monkeypatch):
    monkeypatch.setenv("MY_KEY", key)
    with pytest.raises(UserError, match="api_key_env: MY_KEY holds a line's end") as raised:
        run(lambda head, body: good(body), ask, api_key_env="MY_KEY")
    assert "planted" not in str(raised.value) and "plan" not in str(raised.value)


def test_a_key_is_not_told_in_any_form(monkeypatch):
    key = "sk-\\pl'a\"n+ted"
    monkeypatch.setenv("MY_KEY", key)
    forms = [key, json.dumps(key), repr(key), "sk-%5Cpl%27a%22n%2Bted"]
    text = " ".join(forms)
    for status in ("401 Unauthorized", "200 OK"):
        reply = fake_judge.reply(status, json.dumps({"error": text}).encode(), "Connection: close")
        with pytest.raises(JudgeError) as raised:
            run(lambda head, body, reply=reply: reply, ask, api_key_env="MY_KEY")
        assert str(raised.value).count("***") == 4 and not re.search("sk-|ted", str(raised.value))


def test_the_recipes_own_servers_get_vllms_key_and_no_other_does(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "sk-vllm")
    heads = []

    def respond(head: str, body: bytes) -> bytes:
        heads.append(head)
        return good(body)

    async def both(url: str):
        for address in (ServerURL(url), url):
            await Judge("m", [address]).p_yes(PICTURE, QUESTION)

    asyncio.run(fake_judge.served(respond, both))
    assert ["bearer sk-vllm" in head for head in heads] == [True, False]


# ---- proxies ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"])
@pytest.mark.parametrize("proxy", ["http://127.0.0.1:9", "socks5://127.0.0.1:9"])
def test_no_proxy_stands_before_this_machine(variable, proxy, monkeypatch):
    monkeypatch.setenv(variable, proxy)
    score, _ = run(lambda head, body: good(body), ask, deadline=5)
    assert 0 < score < 1


def test_a_proxy_that_cannot_be_used_is_one_line(monkeypatch):
    monkeypatch.setenv("ALL_PROXY", "nonsense://127.0.0.1:9")
    with pytest.raises(UserError, match=r"http://example.invalid/v1: the proxy that .* names: "):
        asyncio.run(ask(Judge("m", "http://example.invalid/v1")))
