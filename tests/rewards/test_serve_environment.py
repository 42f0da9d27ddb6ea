"""Our own servers: asked with the key, never through a proxy, and only where they are the process that was started."""

import http.server
import os
import sys
import threading
from pathlib import Path

import pytest

from posttrain.errors import UserError
from rewards.serve import ServerError, ServerSpec, serve

FAKE = """#!{python}
import http.server, json, os, sys
port, name = (sys.argv[sys.argv.index(word) + 1] for word in ("--port", "--served-model-name"))
key = os.environ.get("VLLM_API_KEY")
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        known = self.path == "/health" or key is None or self.headers["Authorization"] == f"Bearer {{key}}"
        body = json.dumps({{"data": [{{"id": name}}]}}).encode()
        self.send_response(200 if known else 401)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_):
        pass
if os.environ.get("FAKE_WAITS"):
    import time
    print("key", key, flush=True)
    time.sleep(60)
http.server.ThreadingHTTPServer(("127.0.0.1", int(port)), Handler).serve_forever()
"""


@pytest.fixture
def spec(tmp_path):
    """A stand-in for `vllm serve`, which refuses /v1/models without the key."""
    executable = tmp_path / "vllm"
    executable.write_text(FAKE.format(python=sys.executable))
    executable.chmod(0o755)
    return lambda **options: ServerSpec("j", "m", executable=str(executable), ready_timeout=20.0, **options)


@pytest.mark.parametrize(
    "environment",
    [
        {"http_proxy": "http://127.0.0.1:9"},
        {"HTTP_PROXY": "http://127.0.0.1:9", "ALL_PROXY": "socks5://127.0.0.1:9"},
        {"VLLM_API_KEY": "sk-vllm"},
    ],
)
def test_it_is_up_whatever_the_environment(environment, spec, tmp_path, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with serve([spec()], tmp_path / "logs") as urls:
        assert urls["j"][0].startswith("http://127.0.0.1:")


def test_a_key_that_no_header_holds_is_refused(spec, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "sk-planted\n")
    with pytest.raises(UserError, match="server j: VLLM_API_KEY holds a line's end") as raised:
        serve([spec()], tmp_path / "logs").__enter__()
    assert "planted" not in str(raised.value)


class Older(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = b'{"data": [{"id": "j"}]}'
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_an_older_server_on_the_port_is_not_ours(spec, tmp_path, monkeypatch):
    """Neither if it is there before, nor if it comes between; and the log's end does not tell the key."""
    older = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Older)
    threading.Thread(target=older.serve_forever, daemon=True).start()
    try:
        port = older.server_address[1]
        with pytest.raises(UserError, match=f"server j: port: {port}: .*in use: stop what uses it, or give 0"):
            serve([spec(port=port)], tmp_path / "logs").__enter__()

        monkeypatch.setenv("FAKE_WAITS", "1")
        monkeypatch.setenv("VLLM_API_KEY", "sk-vllm")
        late = spec()
        late.ready_timeout = 1.5
        monkeypatch.setattr("rewards.serve._free_port", lambda _: port)
        with pytest.raises(ServerError, match=r"was not up after 1\.5 s") as raised:
            serve([late], tmp_path / "logs").__enter__()
        assert raised.value.detail == "key ***"
    finally:
        older.shutdown()
        older.server_close()
    assert "sk-vllm" in Path(tmp_path / "logs/j.log").read_text() and os.environ["FAKE_WAITS"]
