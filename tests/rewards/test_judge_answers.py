"""The judge client: lists of strings and questions about text alone, what it remembers, and how long it waits."""

import asyncio
import json
import time
from email.utils import formatdate

import numpy as np
import pytest
from PIL import Image

from posttrain.errors import UserError
from prompts.templates import Template, load_template
from rewards import judge as module
from rewards.encode import encode
from rewards.endpoints import JudgeError
from rewards.judge import Judge
from tests.helpers import fake_judge

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
OTHERS = [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(3)]
QUESTION = load_template("aesthetic")


def good(body: bytes) -> bytes:
    """The score of the picture in a request, or of the text where there is none."""
    content = json.loads(body)["messages"][0]["content"]
    return ok(fake_judge.answer(content[0].get("image_url", {}).get("url") or content[0]["text"], None))


def ok(body: bytes) -> bytes:
    return fake_judge.reply("200 OK", body, "Connection: close")


def says(content: object, finish: str = "stop") -> bytes:
    message = {"role": "assistant", "content": content}
    return ok(json.dumps({"choices": [{"index": 0, "finish_reason": finish, "message": message}]}).encode())


def run(respond, ask, **options):
    """(what `ask(judge)` gets, the bodies of its requests)."""
    bodies = []

    def noted(head: str, body: bytes) -> bytes:
        if body:
            bodies.append(json.loads(body))
        return respond(head, body)

    async def main():
        return await fake_judge.served(noted, lambda url: ask(Judge("m", url, **options)))

    return asyncio.run(asyncio.wait_for(main(), 60)), bodies


# ---- lists of strings -------------------------------------------------------------------------------------


def test_a_transcription_is_a_list_that_the_request_asks_for_and_is_asked_for_once():
    async def twice(judge: Judge):
        return [await judge.transcribe(PICTURE, load_template("transcribe")) for _ in range(2)]

    lines, bodies = run(lambda head, body: says('{"lines": ["OPEN", "late \\u00e9"]}'), twice, max_text_tokens=77)
    assert lines == [["OPEN", "late é"]] * 2 and len(bodies) == 1
    kind = bodies[0]["response_format"]["json_schema"]
    assert bodies[0]["max_tokens"] == 77 and kind["strict"] and kind["schema"]["required"] == ["lines"]
    assert [part["type"] for part in bodies[0]["messages"][0]["content"]] == ["image_url", "text"]


def test_requirements_come_from_the_prompt_alone():
    found, bodies = run(
        lambda head, body: says('{"requirements": []}'),
        lambda judge: judge.decompose(load_template("decompose"), "fox"),
    )
    assert found == []
    (part,) = bodies[0]["messages"][0]["content"]
    assert part["type"] == "text" and '"fox"' in part["text"]


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        (says('{"lines": ["half', "length"), "longer than 512 tokens"),
        (says('{"lines": ["half'), "not the JSON that was asked for"),
        (says(None), "not the JSON that was asked for"),
        (ok(b'{"choices": []}'), "not the JSON that was asked for"),
        (says('["OPEN"]'), "not a list of strings under 'lines': "),
        (says('{"lines": ["OPEN"], "note": "hi"}'), "not a list of strings under 'lines': "),
        (says('{"lines": "OPEN"}'), "not a list of strings under 'lines': "),
        (says('{"lines": ["OPEN", 5]}'), "not a list of strings under 'lines': "),
        (ok(b'{"choices": ['), "the server's answer is malformed"),
    ],
)
def test_any_other_answer_is_no_transcription(reply, why):
    with pytest.raises(JudgeError, match=why):
        run(lambda head, body: reply, lambda judge: judge.transcribe(PICTURE, load_template("transcribe")))


# ---- yes and no -------------------------------------------------------------------------------------------


def test_a_question_about_text_alone_sends_no_picture():
    template = Template("t", "Is $text safe?")
    asked = 'Is "a \\"fox\\"" safe?'
    score, bodies = run(lambda head, body: good(body), lambda judge: judge.p_yes_text(template, text='a "fox"'))
    assert bodies[0]["messages"] == [{"role": "user", "content": [{"type": "text", "text": asked}]}]
    assert score == pytest.approx(fake_judge.score_of(asked), abs=1e-9)

    async def twice(judge: Judge):
        return [await judge.p_yes(None, template, text='a "fox"') for _ in range(2)]

    assert run(lambda head, body: good(body), twice) == ([score] * 2, bodies)  # which is asked once


def test_what_was_asked_longest_ago_is_forgotten_first(monkeypatch):
    monkeypatch.setattr(module, "CACHED_ANSWERS", 2)

    async def ask(judge: Judge):
        for i in (0, 1, 0, 2, 0, 1):  # 2 pushes 1 out, which was used before 0 was again
            await judge.p_yes(OTHERS[i], QUESTION)

    _, bodies = run(lambda head, body: good(body), ask)
    urls = [body["messages"][0]["content"][0]["image_url"]["url"] for body in bodies]
    assert urls == [encode(OTHERS[i]).url for i in (0, 1, 2, 1)]


def test_a_picture_that_cannot_be_encoded_is_told_to_all_who_wait():
    wide = Image.new("RGB", (17000, 20))  # beyond what WebP holds
    for _ in range(2):
        with pytest.raises(ValueError, match="16383"):
            encode(wide)


@pytest.mark.parametrize(
    ("urls", "why"),
    [
        ([], "base_urls: empty: give a URL"),
        ("https://me:sk-1@host/v1", "base_urls: a URL holds a key"),
        (["http://a/v1", "https://host/v1?api_KEY=sk-1"], "base_urls: a URL holds a key"),
    ],
)
def test_addresses_are_checked_and_a_key_in_one_is_not_repeated(urls, why):
    with pytest.raises(UserError, match=why) as caught:
        Judge("m", urls)
    assert "sk-1" not in str(caught.value)


# ---- how long it waits ------------------------------------------------------------------------------------


def test_a_date_to_wait_for_beyond_the_deadline_fails_at_once_and_what_is_no_date_is_no_wait():
    def busy(after: str) -> bytes:
        return fake_judge.reply("429 Too Many Requests", b"quota", "Connection: close", f"Retry-After: {after}")

    replies = [busy("soon")]
    ask = lambda judge: judge.p_yes(PICTURE, QUESTION)  # noqa: E731
    score, bodies = run(lambda head, body: replies.pop() if replies else good(body), ask)
    assert len(bodies) == 2 and score == pytest.approx(fake_judge.score_of(encode(PICTURE).url), abs=1e-9)
    asked = []
    with pytest.raises(JudgeError, match=r"no answer within 20 s: .*quota"):
        run(lambda head, body: asked.append(1) or busy(formatdate(time.time() + 3600)), ask, deadline=20)
    assert asked == [1]


def test_a_server_that_takes_requests_and_never_answers_ends_with_the_deadline():
    async def main():
        async with await asyncio.start_server(lambda *_: asyncio.sleep(60), "127.0.0.1", 0) as server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
            with pytest.raises(JudgeError, match=r"no answer within 0\.3 s: the server did not answer"):
                await Judge("m", url, deadline=0.3).p_yes(PICTURE, QUESTION)

    asyncio.run(main())


def test_when_no_server_has_been_there_for_the_deadline_requests_fail_without_waiting():
    async def main():
        async with await asyncio.start_server(lambda *_: None, "127.0.0.1", 0) as server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"  # nobody listens there any more
        judge = Judge("m", url, deadline=0.5)
        first = await asyncio.gather(*(judge.p_yes(p, QUESTION) for p in OTHERS), return_exceptions=True)
        assert all(isinstance(error, JudgeError) for error in first)
        await asyncio.sleep(0.6)
        with pytest.raises(JudgeError, match=r"no server for more than 0\.5 s: .*Connection error"):
            await judge.p_yes(PICTURE, QUESTION)

    asyncio.run(main())


def test_a_dropped_server_is_back_when_it_answers_a_probe_with_anything_but_a_fault_of_its_own():
    probed = []

    def respond(head: str, body: bytes) -> bytes:
        if head.startswith("get"):
            probed.append("503 Service Unavailable" if not probed else "404 Not Found")
            return fake_judge.reply(probed[-1], b"{}", "Connection: close")
        if len(probed) < 2:
            return fake_judge.reply("500 Internal Server Error", b"loading", "Connection: close")
        return good(body)

    score, _ = run(respond, lambda judge: judge.p_yes(PICTURE, QUESTION), retries=50)
    assert probed == ["503 Service Unavailable", "404 Not Found"]
    assert score == pytest.approx(fake_judge.score_of(encode(PICTURE).url), abs=1e-9)
