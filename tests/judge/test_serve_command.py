"""The command posttrain serve, as a process that is stopped and whose servers fail."""

import asyncio
import dataclasses
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from prompts.templates import load_template
from rewards.judge import Judge
from rewards.serve import ServerSpec, commands
from tests.rewards.test_serve import an_image, descendants_alive, fake_executable, needs_vllm, server_spec, wait_for


def recipe(path: Path, *servers: ServerSpec) -> Path:
    """A recipe for training, of which `posttrain serve` reads nothing but the servers."""
    others = {"output": "runs/a", "model": {"path": "k2"}, "steps": 7, "rewards": [{"name": "a"}]}
    path.write_text(yaml.safe_dump(others | {"servers": [dataclasses.asdict(server) for server in servers]}))
    return path


@pytest.fixture
def posttrain_serve() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts the command; what a failed test leaves running is killed."""
    started = []

    def start(*args) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "posttrain.cli", "serve", *map(str, args)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_command_prints_for_another_machine(posttrain_serve, tmp_path):
    specs = [ServerSpec("a", "org/a", gpus=[1]), ServerSpec("b", "org/b", port=9000)]
    for option in (["--config", recipe(tmp_path / "r.yaml", *specs)], [f"--config={tmp_path / 'r.yaml'}"]):
        process = posttrain_serve(*option, "--print_for", "10.0.0.2")
        output, errors = process.communicate()
        assert (process.returncode, errors) == (0, "")
        assert output.splitlines() == commands(specs, "10.0.0.2")
        assert "http://10.0.0.2:8000/v1, models a" in output and "http://10.0.0.2:9000/v1, models b" in output


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("output: a", "servers: missing; add it to the recipe"),
        ("servers: []", "servers: is empty; name at least one server"),
        ("servers: [{name: a, model: m, gpu: [1]}]", "servers[0].gpu: unknown key; did you mean servers[0].gpus?"),
        ("servers: [{name: a}]", "servers[0].model: is missing"),
        ("servers: [{name: a, model: m, executable: no-such}]", "executable: no 'no-such'"),
    ],
)
def test_command_refuses(posttrain_serve, tmp_path, text, says):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    process = posttrain_serve("--config", path, "--logs", tmp_path)
    _, errors = process.communicate()
    assert process.returncode == 2
    last = errors.splitlines()[-1]
    assert last.startswith("posttrain: error: ") and says in last


def test_command_shows_the_log_of_a_server_that_fails(posttrain_serve, tmp_path):
    """The error is one line still, and what the server said stands below it as the server wrote it."""
    fake = tmp_path / "vllm"
    fake.write_text("#!/bin/sh\necho 'ValueError: no space for'\necho '    the KV cache'\nexit 3\n")
    fake.chmod(0o755)
    process = posttrain_serve(
        "--config", recipe(tmp_path / "r.yaml", ServerSpec("vlm", "m", executable=str(fake))), "--logs", tmp_path
    )
    output, errors = process.communicate()
    assert (process.returncode, output) == (2, "")
    assert errors.splitlines() == [
        f"posttrain: starting vlm; logs are in {tmp_path}",
        f"posttrain: error: server vlm died while starting; the end of its log {tmp_path}/vlm.log:",
        "ValueError: no space for",
        "    the KV cache",
        "the server ended with exit code 3",
    ]


@pytest.mark.parametrize("how, code", [("SIGTERM", 0), ("SIGINT", 130)])
def test_command_stops_while_a_server_starts(posttrain_serve, tmp_path, how, code):
    fake = fake_executable(tmp_path)
    path = recipe(tmp_path / "r.yaml", ServerSpec("x", "m", executable=fake))
    process = posttrain_serve("--config", path, "--logs", tmp_path)
    log = tmp_path / "x.log"
    wait_for(lambda: log.exists() and "loading" in log.read_text())
    process.send_signal(signal.Signals[how])
    process.communicate()
    assert process.returncode == code
    assert not descendants_alive(fake)


DYING = """#!{python}
import http.server, json, sys, threading, time

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({{"data": [{{"id": "x"}}]}}).encode())
        if self.path == "/v1/models":
            threading.Timer(0.5, exit_).start()

def exit_():
    print("engine core died", flush=True)
    server.shutdown()

server = http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler)
server.serve_forever()
"""


def test_command_ends_when_a_server_dies(posttrain_serve, tmp_path):
    fake = tmp_path / "vllm"
    fake.write_text(DYING.format(python=sys.executable))
    fake.chmod(0o755)
    path = recipe(tmp_path / "r.yaml", ServerSpec("x", "m", executable=str(fake)))
    process = posttrain_serve("--config", path, "--logs", tmp_path)
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 2 and output.startswith("x: base URL ")
    assert f"posttrain: error: server x died; the end of its log {tmp_path}/x.log:\n" in errors
    assert "engine core died" in errors


@pytest.mark.vllm
@needs_vllm
def test_command_serves_until_it_is_stopped(posttrain_serve, tmp_path):
    path = recipe(tmp_path / "r.yaml", server_spec())
    process = posttrain_serve("--config", path, "--logs", tmp_path)
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.fullmatch(r"vlm: base URL (http://127\.0\.0\.1:\d+/v1), models vlm, aesthetic, artifact\n", line)
    assert found, process.communicate()
    score = asyncio.run(Judge("artifact", found[1]).p_yes(an_image(0), load_template("aesthetic")))
    assert 0 <= score <= 1
    process.terminate()
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (0, "")
    assert "error" not in errors and "Traceback" not in errors
    port = found[1].rpartition(":")[2].removesuffix("/v1")
    assert not descendants_alive(f"--port {port}")
