"""A chat server that writes by rule, so that what `posttrain expander data` keeps and drops is known beforehand.

Its short prompt is the caption's first clause; asked for keywords it adds a dragon, which no caption has, and asked for
a brief it answers with broken JSON when the caption says so. A statement is in a caption if its words are.
"""

import contextlib
import json
import math
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def _quoted(text: str, name: str) -> str:
    found = re.search(rf"^{name}: (\"(?:[^\"\\]|\\.)*\")", text, re.MULTILINE)
    assert found, text
    return json.loads(found[1])


def reply(text: str) -> dict:
    """The first choice of the answer to a rendered template."""
    if "Statement:" in text:
        caption, statement = _quoted(text, "Caption"), _quoted(text, "Statement")
        p = 0.9 if statement.lower() in caption.lower() else 0.1
        top = [{"token": t, "logprob": math.log(q), "bytes": None} for t, q in (("yes", p), ("no", 1 - p))]
        return {"message": {"content": "yes"}, "logprobs": {"content": [{**top[0], "top_logprobs": top}]}}
    if "Description:" in text:
        return {"message": {"content": json.dumps({"requirements": _quoted(text, "Description").split(" and ")})}}
    caption = _quoted(text, "Caption")
    if "Prompt:" in text:
        return {"message": {"content": json.dumps({"thought": _thought(caption, _quoted(text, "Prompt"))})}}
    if "Translate" in text:
        said = caption.replace("a", "α").replace('"', "'" if "unfaithful" in caption else '"')
        return {"message": {"content": json.dumps({"texts": [said]})}}
    said = caption.partition(",")[0]
    if '"keywords"' in text:
        said += " and a dragon"
    content = "{" if "broken" in caption else json.dumps({"prompts": [said]})
    return {"message": {"content": content}}


def _thought(caption: str, prompt: str) -> list[str]:
    """Four sentences; of a caption that says secret one speaks of the caption, and of one that says greedy one asks for
    a dragon. `and` is between facts, as in a description."""
    asked = "a dragon" if "greedy" in caption else prompt
    said = "as the caption has it" if "secret" in caption else "for the rest of what is seen there"
    filler = "the style, the light, the place and the hour of the day are all left open to whoever draws it"
    return [asked, f"{said}, {filler}", "a drawing would fit it best", caption.rpartition(", ")[2]]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        choice = {"index": 0, "finish_reason": "stop", **reply(body["messages"][0]["content"][0]["text"])}
        choice["message"]["role"] = "assistant"
        model = getattr(self.server, "model")  # noqa: B009
        answer = {"id": "x", "object": "chat.completion", "created": 0, "model": model, "choices": [choice]}
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


class _Http(ThreadingHTTPServer):
    request_queue_size = 128  # five, the default, has connections reset when as many come at once
    model = "m"
    """Its name in the answers."""


@contextlib.contextmanager
def serving(model: str = "m") -> Iterator[str]:
    server = _Http(("127.0.0.1", 0), _Handler)
    server.model = model
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        thread.join()
