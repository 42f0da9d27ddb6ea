"""`posttrain expander serve`, asked by OpenAI's own client, and `expand --vary`."""

import http.client
import json
import os
import re
import signal
import socket
import threading
import time
from pathlib import Path

import openai
import pytest
import torch

from posttrain import cli
from posttrain.config.types import ConfigError
from posttrain.errors import UserError
from posttrain.expander.chat_template import messages
from posttrain.expander.config import ExpanderServeConfig
from posttrain.expander.expand import TIMES, farthest, varied
from posttrain.expander.http_server import LARGEST, Answerer, Handler, Server
from posttrain.expander.model import Expander, Expansion
from tests.expander.test_expander import BASE
from tests.helpers.commands import Commands

PROMPT = "a red star"


@pytest.fixture(scope="module")
def expander():
    return Expander.load(BASE, dtype=torch.float32)


@pytest.fixture(scope="module")
def server(expander):
    config = ExpanderServeConfig(BASE, max_tokens=64, max_n=8)
    with Server(("127.0.0.1", 0), Handler) as made:
        made.answerer = Answerer(expander, config)
        thread = threading.Thread(target=made.serve_forever, daemon=True)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=f"http://127.0.0.1:{server.server_port}/v1", api_key="none", max_retries=0)


def ask(client, content=PROMPT, **options):
    given = {"model": "expander", "messages": [{"role": "user", "content": content}], "seed": 3, **options}
    return client.chat.completions.create(**given)


# ---- what is answered


def test_choices_are_what_expand_gives(client, expander):
    answer = ask(client, n=3, max_tokens=40, temperature=0.7)
    (expected,) = expander.expand([PROMPT], 3, 3, 0.7, 40)
    assert [choice.message.content for choice in answer.choices] == [e.text for e in expected]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [choice.finish_reason for choice in answer.choices] == ["stop" if e.whole else "length" for e in expected]
    asked = expander.tokenizer.apply_chat_template(messages(PROMPT), add_generation_prompt=True, return_dict=False)
    assert answer.usage.prompt_tokens == len(asked)
    assert answer.usage.completion_tokens == sum(e.tokens for e in expected) == answer.usage.total_tokens - len(asked)
    assert answer.model == "expander" and answer.object == "chat.completion"


def test_the_same_request_gets_the_same_answer_and_another_seed_another(client):
    first, again, other = (ask(client, seed=seed).choices[0].message.content for seed in (1, 1, 2))
    assert first == again != other
    unseeded = {ask(client, seed=None).choices[0].message.content for _ in range(4)}
    assert len(unseeded) > 1


def test_what_clients_send_as_well_changes_nothing(client):
    plain = ask(client).choices[0].message.content
    assert ask(client, top_p=1, stream=False, user="me", stop=None).choices[0].message.content == plain
    assert ask(client, content=[{"type": "text", "text": PROMPT}]).choices[0].message.content == plain
    whole = client.chat.completions.create(model="expander", messages=messages(PROMPT), seed=3)
    assert whole.choices[0].message.content == plain
    assert ask(client, max_completion_tokens=64).choices[0].message.content == plain


def test_an_answer_that_is_cut_says_so(client):
    assert ask(client, max_tokens=3).choices[0].finish_reason == "length"


def test_vary_gives_expansions_that_differ(client, expander):
    answer = ask(client, n=4, extra_body={"vary": True})
    texts = [choice.message.content for choice in answer.choices]
    assert len(set(texts)) == 4 and texts == [e.text for e in varied(expander, PROMPT, 4, 3, 1.0, 64)]


def test_models_and_health(client, server):
    assert [model.id for model in client.models.list()] == ["expander"]
    assert request(server, "GET", "/health") == (200, {"status": "ok"})


def test_a_prompt_that_comes_back_as_it_was_is_marked(server, client, monkeypatch):
    monkeypatch.setattr(Expander, "expand", lambda *_, **__: [[Expansion(PROMPT, False, "and on", 9, True)]])
    (choice,) = ask(client).choices
    assert (choice.message.content, choice.finish_reason) == (PROMPT, "length")
    assert choice.message.model_extra == {"unexpanded": True}


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"model": "gpt"}, "model: is 'gpt'; this server has 'expander'"),
        ({"messages": []}, "messages: send one message with role user"),
        ({"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"}]},
         "the expander has a system text of its own"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
         "messages: send one message with role user"),
        ({"messages": [{"role": "user", "content": " "}]}, "messages: the content is not a text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
         "messages: the content is not a text"),
        ({"messages": [{"role": "user", "content": "star " * 2000}]}, "do not fit the model, which takes 1024"),
        ({"n": 9}, "n: is 9; write a whole number from 1 to 8"),
        ({"n": 0}, "n: is 0"),
        ({"temperature": 0}, "temperature: is 0; write a number above 0, at most 2"),
        ({"max_tokens": 65}, "max_tokens: is 65; write a whole number from 1 to 64"),
        ({"max_tokens": 5, "max_completion_tokens": 5}, "max_tokens: is given twice"),
        ({"seed": -1}, "seed: is -1"),
        ({"top_p": 0.9}, "top_p: 0.9 is not supported; leave it out"),
        ({"stream": True}, "stream: True is not supported"),
        ({"stop": ["."]}, "stop: ['.'] is not supported"),
        ({"tools": []}, "tools: is not a field of this server"),
        ({"extra_body": {"vary": "yes"}}, "vary: is 'yes'; write true or false"),
        ({"extra_body": {"vary": True}, "n": 8, "temperature": 1e-6}, "vary: among 32 expansions only 1 differ"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_as_asked_is_refused_in_one_line(client, options, says):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, **options)
    message = caught.value.body["message"]
    assert caught.value.status_code == 400 and says in message and "\n" not in message


def request(server, method, path, body=None, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    found = answer.status, json.loads(answer.read())
    connection.close()
    return found


@pytest.mark.parametrize(
    ("path", "body", "headers", "status", "says"),
    [
        ("/v1/completions", "{}", {"Content-Type": "application/json"}, 404, "there is /v1/chat/completions"),
        ("/v1/chat/completions", "{}", {"Content-Type": "text/plain"}, 400, "Content-Type: is not application/json"),
        ("/v1/chat/completions", "[1]", {"Content-Type": "application/json"}, 400, "is not a JSON object"),
        ("/v1/chat/completions", "{", {"Content-Type": "application/json"}, 400, "the request: not JSON"),
        ("/v1/chat/completions", " " * (LARGEST + 1), {"Content-Type": "application/json"}, 400, "Content-Length: is"),
    ],
)
def test_requests_that_no_client_makes(server, path, body, headers, status, says):
    if len(body) > LARGEST:  # said, not sent
        headers, body = headers | {"Content-Length": str(len(body))}, None
    found, answer = request(server, "POST", path, body, **headers)
    assert found == status and says in answer["error"]["message"]


def test_a_key_is_asked_for(server, monkeypatch):
    monkeypatch.setattr(server, "key", "secret-5", raising=False)
    url = f"http://127.0.0.1:{server.server_port}/v1"
    with pytest.raises(openai.AuthenticationError, match="the key is missing or wrong"):
        ask(openai.OpenAI(base_url=url, api_key="another", max_retries=0))
    assert ask(openai.OpenAI(base_url=url, api_key="secret-5", max_retries=0)).choices


def test_an_error_of_the_servers_own_is_500_and_it_goes_on(server, client, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Expander, "expand", lambda *_, **__: 1 / 0)
        with pytest.raises(openai.InternalServerError, match="the server failed: ZeroDivisionError"):
            ask(client)
    assert ask(client).choices


def test_settings_that_cannot_be(tmp_path, capsys, monkeypatch):
    with pytest.raises(ConfigError, match=r"host: 0\.0\.0\.0 is reached from beyond this machine; set api_key_env"):
        ExpanderServeConfig(BASE, host="0.0.0.0")
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    assert cli.main(["expander", "serve", "--model", BASE, "--api_key_env", "NO_SUCH_KEY"]) == 2
    assert "api_key_env: NO_SUCH_KEY is not set: export it" in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert cli.main(["expander", "serve", "--model", BASE, "--port", port]) == 2
    assert "cannot be listened at" in capsys.readouterr().err


def test_the_command_serves_until_it_is_stopped(tmp_path):
    commands = Commands(tmp_path, "import posttrain.expander.http_server")
    (process,) = commands.start("expander", "serve", "--model", BASE, "--dtype", "float32", "--port", "0")
    said, until = Path(commands.files[0]), time.monotonic() + 60
    while not (found := re.search(r"posttrain: expander serve at (http://\S+)", said.read_text())):
        assert time.monotonic() < until, Path(commands.files[1]).read_text()
        time.sleep(0.05)
    answer = ask(openai.OpenAI(base_url=found[1], api_key="none", max_retries=0), max_tokens=40)
    assert answer.choices[0].message.content
    os.kill(process, signal.SIGTERM)
    assert commands.wait().returncode == 0
    assert "Traceback" not in Path(commands.files[1]).read_text()
    commands.close()


# ---- vary


def test_the_farthest_texts_are_taken():
    """From "a b c": "x y z" shares no pair of words with it, "a b d" two of four, and "a b c e" three of four."""
    assert farthest(["a b c", "a b c e", "a b d", "x y z"], 3) == [0, 3, 2]
    assert farthest(["a", "b"], 5) == [0, 1]


def test_vary_prints_different_expansions(capsys):
    words = ["expand", PROMPT, "--model", BASE, "--dtype", "float32", "--max_tokens", "60"]
    assert cli.main([*words, "--vary", "5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(set(lines)) == 5 == len(lines)
    assert cli.main([*words, "--vary", "2", "--temperature", "1e-6"]) == 2
    assert (
        f"vary: among {2 * TIMES} expansions only 1 differ; lower it, or raise temperature" in capsys.readouterr().err
    )


def test_varied_expansions_differ_more_than_sampled_ones(expander):
    """Of the same prompt, by the least distance of two of them."""

    def least(expansions):
        grams = [set(zip(e.text.split(), e.text.split()[1:])) for e in expansions]
        pairs = [(a, b) for i, a in enumerate(grams) for b in grams[:i]]
        return min(1 - len(a & b) / len(a | b) for a, b in pairs)

    chosen = least(varied(expander, PROMPT, 4, 0, 1.0, 60))
    assert chosen > max(least(expander.expand([PROMPT], 4, seed, 1.0, 60)[0]) for seed in range(3))


def test_whole_expansions_come_first(monkeypatch):
    cut, whole = Expansion("a cut", False), Expansion("a whole one", True)
    monkeypatch.setattr(Expander, "expand", lambda *_, **__: [[cut, cut, whole, cut]])
    assert varied(Expander(None, None), PROMPT, 1, 0) == [whole]
    with pytest.raises(UserError, match="vary: among 12 expansions only 2 differ"):
        varied(Expander(None, None), PROMPT, 3, 0)
