"""`posttrain expander serve`: an expander behind OpenAI's /v1/chat/completions, for a product to put before K2.

    posttrain expander serve --model runs/nano-expander-sft --port 8001

A request has one user message, the prompt; each choice of the answer is an expansion, without its thought. Beside
OpenAI's `n`, `seed`, `temperature` and `max_tokens` there is `vary: true`, for n expansions that differ. What is not
known is refused with 400 and one line, never ignored. Requests are answered one at a time.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import math
import secrets
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from accelerate import PartialState

from posttrain.errors import UserError
from posttrain.expander.chat_template import messages, system_text
from posttrain.expander.config import ExpanderServeConfig
from posttrain.expander.expand import varied
from posttrain.expander.model import Expander, Expansion
from posttrain.log import log
from posttrain.runs.stop import until_terminated
from prompts.parse import parse_json
from rewards.serve import read_key

LARGEST = 2**20
"""Bytes of a request."""
NEUTRAL: dict[str, Any] = {
    "top_p": 1, "stream": False, "presence_penalty": 0, "frequency_penalty": 0, "logprobs": False, "stop": None,
}  # fmt: skip
"""Fields of OpenAI that clients send with the value that changes nothing; others of theirs would, and are refused."""
IGNORED = ("user", "metadata", "store", "safety_identifier")
"""Fields that say nothing about the answer."""
READ = ("model", "messages", "n", "seed", "temperature", "max_tokens", "max_completion_tokens", "vary")


def serve(config: ExpanderServeConfig) -> None:
    """The command. Raises UserError for a model that cannot be loaded, a key that is not set and a port in use."""
    key = read_key(config.api_key_env, "api_key_env") if config.api_key_env is not None else None
    if config.api_key_env is not None and key is None:
        raise UserError(f"api_key_env: {config.api_key_env} is not set: export it")
    device = PartialState().device or "cpu"
    with until_terminated():
        # The port is taken before the model is loaded, which takes longer; requests wait until it is there.
        try:
            server = Server((config.host, config.port), Handler)
        except OSError as error:
            raise UserError(
                f"port: {config.host}:{config.port} cannot be listened at ({error.strerror}); choose another --port"
            ) from None
        with server:
            expander = Expander.load(
                config.model, config.adapter, getattr(torch, config.dtype), device, config.thinking
            )
            server.answerer, server.key = Answerer(expander, config), key
            print(f"posttrain: expander serve at http://{config.host}:{server.server_port}/v1", flush=True)
            server.serve_forever()


class Answerer:
    """Answers requests, one at a time: a model has one cache."""

    def __init__(self, expander: Expander, config: ExpanderServeConfig):
        self.expander, self.config = expander, config
        self._one_at_a_time = threading.Lock()

    def __call__(self, body: Any) -> dict[str, Any]:
        """The answer to a request's JSON. Raises UserError, in one line, for what cannot be answered as asked."""
        prompt, options = self._read(body)
        n, seed = options["n"], options["seed"]
        settings = (options["temperature"], options["max_tokens"])
        with self._one_at_a_time:
            if options["vary"]:
                expansions = varied(self.expander, prompt, n, seed, *settings)
            else:
                (expansions,) = self.expander.expand([prompt], n, seed, *settings)
        if any(expansion.unexpanded for expansion in expansions):
            log.warning("a prompt was sent back as it was: no thought ended; raise max_tokens")
        asked, written = self._prompt_tokens(prompt), sum(expansion.tokens for expansion in expansions)
        return {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": self.config.name,
            "choices": [_choice(i, expansion) for i, expansion in enumerate(expansions)],
            "usage": {"prompt_tokens": asked, "completion_tokens": written, "total_tokens": asked + written},
        }

    def _read(self, body: Any) -> tuple[str, dict[str, Any]]:
        """(prompt, checked options)."""
        if not isinstance(body, dict):
            raise UserError("the request is not a JSON object")
        for name, value in body.items():
            if name in NEUTRAL and value not in (None, NEUTRAL[name]):
                raise UserError(f"{name}: {value!r} is not supported; leave it out")
            if name not in (*NEUTRAL, *IGNORED, *READ):
                raise UserError(f"{name}: is not a field of this server; leave it out")
        if body.get("model") != self.config.name:
            raise UserError(f"model: is {body.get('model')!r}; this server has '{self.config.name}'")
        if body.get("max_tokens") is not None and body.get("max_completion_tokens") is not None:
            raise UserError("max_tokens: is given twice; leave out max_completion_tokens")
        # OpenAI's newer name of the same field.
        limit = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
        longest = self.config.max_tokens
        options = {
            "n": _whole(body, "n", 1, 1, self.config.max_n),
            "seed": _whole(body, "seed", secrets.randbelow(2**31), 0, 2**63 - 1),
            "max_tokens": _whole(body, limit, longest, 1, longest),
            "temperature": _temperature(body),
            "vary": body.get("vary") or False,
        }
        if not isinstance(options["vary"], bool):
            raise UserError(f"vary: is {body['vary']!r}; write true or false")
        prompt = self._prompt(body.get("messages"))
        room = getattr(self.expander.model.config, "max_position_embeddings", None)
        if room is not None and self._prompt_tokens(prompt) + options["max_tokens"] > room:
            raise UserError(
                f"messages: the prompt and max_tokens do not fit the model, which takes {room}; shorten one"
            )
        return prompt, options

    def _prompt(self, given: Any) -> str:
        if not isinstance(given, list) or not all(isinstance(message, dict) for message in given):
            raise UserError("messages: is not a list of messages; send one with role user")
        *before, last = given or [{}]
        # A client may send the system text that the model was trained under, and no other.
        own = system_text(self.expander.thinking)
        if last.get("role") != "user" or any(m.get("role") != "system" or _text(m) != own for m in before):
            raise UserError("messages: send one message with role user; the expander has a system text of its own")
        prompt = _text(last)
        if prompt is None or not prompt.strip():
            raise UserError("messages: the content is not a text; send the prompt as text")
        return prompt

    def _prompt_tokens(self, prompt: str) -> int:
        asked = messages(prompt, self.expander.thinking)
        ids = self.expander.tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        return len(ids)


def _text(message: dict[str, Any]) -> str | None:
    """A message's text, which OpenAI also takes as a list of one part; None for what is none."""
    content = message.get("content")
    if isinstance(content, list) and len(content) == 1 and isinstance(content[0], dict):
        content = content[0].get("text") if content[0].get("type") == "text" else None
    return content if isinstance(content, str) else None


def _whole(body: dict[str, Any], name: str, default: int, least: int, most: int) -> int:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise UserError(f"{name}: is {value!r}; write a whole number from {least} to {most}")
    return value


def _temperature(body: dict[str, Any]) -> float:
    value = body.get("temperature")
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and 0 < value <= 2):
        raise UserError(f"temperature: is {value!r}; write a number above 0, at most 2")
    return float(value)


def _choice(index: int, expansion: Expansion) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": expansion.text}
    if expansion.unexpanded:  # said, so that a client can tell it from an expansion
        message["unexpanded"] = True
    return {"index": index, "message": message, "finish_reason": "stop" if expansion.whole else "length"}


class Server(ThreadingHTTPServer):
    answerer: Answerer
    key: str | None = None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections stay open between requests

    @property
    def _own(self) -> Server:
        assert isinstance(self.server, Server)
        return self.server

    def do_GET(self) -> None:
        if not self._is_allowed():
            return
        if self.path == "/health":
            self._send(200, {"status": "ok"})
        elif self.path == "/v1/models":
            name = self._own.answerer.config.name
            self._send(200, {"object": "list", "data": [{"id": name, "object": "model", "owned_by": "posttrain"}]})
        else:
            self._refuse(404, f"{self.path}: there is /v1/chat/completions, /v1/models and /health")

    def do_POST(self) -> None:
        if not self._is_allowed():
            return
        if self.path != "/v1/chat/completions":
            self._refuse(404, f"{self.path}: there is /v1/chat/completions")
            return
        try:
            answer = self._own.answerer(self._body())
        except UserError as error:
            self._refuse(400, str(error))
        except Exception as error:  # the server goes on; the client is told that it was not its fault
            log.exception("a request could not be answered")
            self._refuse(500, f"the server failed: {type(error).__name__}")
        else:
            self._send(200, answer)

    def _body(self) -> Any:
        # A page of another site can send anything but this without asking the browser first.
        if self.headers.get_content_type() != "application/json":
            raise UserError("Content-Type: is not application/json")
        length = self.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdigit() or int(length) > LARGEST:
            raise UserError(f"Content-Length: is missing or above {LARGEST} bytes")
        try:
            return parse_json(self.rfile.read(int(length)))
        except ValueError as error:
            raise UserError(f"the request: {error}") from None

    def _is_allowed(self) -> bool:
        key = self._own.key
        # In constant time: how long a comparison takes must not tell how much of a key is right.
        if key is None or hmac.compare_digest(self.headers.get("Authorization", "").encode(), f"Bearer {key}".encode()):
            return True
        self._refuse(401, "Authorization: the key is missing or wrong")
        return False

    def _refuse(self, status: int, message: str) -> None:
        # What is left of the request is not read, so the connection cannot go on.
        self.close_connection = True
        kind = "invalid_request_error" if status < 500 else "server_error"
        self._send(status, {"error": {"message": message, "type": kind, "param": None, "code": None}})

    def _send(self, status: int, answer: dict[str, Any]) -> None:
        data = json.dumps(answer, ensure_ascii=False).encode()
        with contextlib.suppress(ConnectionError):  # the client has gone
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            if self.close_connection:
                self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Requests hold what users wrote, which is not logged."""
