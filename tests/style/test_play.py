"""The page of `posttrain style play`, served by a real process, in a real Chromium."""

import os
import re
import signal
import socket
import time
from pathlib import Path

import pytest

from posttrain import cli
from tests.helpers import runs, style_runs, tiny
from tests.helpers.commands import Commands


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    commands = Commands(
        tmp_path_factory.mktemp("commands"), "import posttrain.style.train, posttrain.style_page, gradio, uvicorn"
    )
    yield commands
    commands.close()


@pytest.mark.long
def test_strengths_are_dragged(command, browser, config, tmp_path):
    """An image at once, another one for another strength, and a line for what cannot be drawn; then it ends."""
    config.sweep = []
    # In another process, since the browser's loop runs in this one.
    trained = command("style", "--config", runs.recipe(config, tmp_path / "recipe.yaml"))
    assert trained.returncode == 0, trained.stderr
    words = ["--model.path", config.model.path, "--model.dtype", "float32", "--adapter", config.output]
    words += ["--references", str(tmp_path / "a.png"), "--prompt", tiny.PROMPTS[0], "--size", "[32,32]", "--steps", "2"]
    (process,) = command.start("style", "play", *words, "--guidance", "0", "--port", "0")
    said = Path(command.files[0])
    until = time.monotonic() + 60
    while not (found := re.search(r"posttrain: style play at (http://\S+)", said.read_text())):
        assert time.monotonic() < until, Path(command.files[1]).read_text()
        time.sleep(0.05)
    page = browser.new_context(viewport={"width": 1200, "height": 900}).new_page()
    page.set_default_timeout(60_000)
    page.goto(found[1])
    changed = "(before) => { const i = document.querySelector('#result img'); return i && i.src !== before; }"
    page.wait_for_function(changed, arg="")
    first = page.get_attribute("#result img", "src")
    page.fill("#strength-1 input[type=number]", "0.1")
    page.press("#strength-1 input[type=number]", "Enter")
    page.wait_for_function(changed, arg=first)
    assert re.fullmatch(r"\s*\d+\.\d s\s*", page.text_content("#note") or "")
    page.fill("#prompt textarea", " ")
    page.press("#prompt textarea", "Enter")
    page.wait_for_selector("text=Write what the image should show.")
    os.kill(process, signal.SIGTERM)
    assert command.wait().returncode == 0
    assert "Traceback" not in Path(command.files[1]).read_text()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--host", "0.0.0.0"], "host: 0.0.0.0 is reached from beyond this machine"),
        (["--slots", "1", "--references", "{a}", "{b}"], "slots: is 1, and references names 2; raise it"),
        (["--references", "{a}:x"], "references: {a}:x: 'x' is not a number"),
        (["--port", "{port}"], "cannot be listened at"),
    ],
)
def test_mistakes(tmp_path, model, capsys, words, says):
    for name in ("a", "b"):
        style_runs.image(1).save(tmp_path / f"{name}.png")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        at = {"a": tmp_path / "a.png", "b": tmp_path / "b.png", "port": taken.getsockname()[1]}
        given = [word.format(**at) for word in words]
        assert cli.main(["style", "play", "--model.path", str(model), "--model.dtype", "float32", *given]) == 2
    assert says.format(**at) in capsys.readouterr().err
