"""The annotation page as people use it: its server in a process, and someone at it in a browser."""

import json
import os
import re
import time
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page

from posttrain.preferences.dataset import Preference
from posttrain.preferences.writer import PreferenceWriter
from tests.helpers.commands import Commands

PAIRS = 10
# Says on stderr when the server looks up or calls any other machine.
PREPARE = """
import sys
import time
import posttrain.annotate.serve, posttrain.annotate.app, uvicorn
def watch(event, args):
    if event == "socket.connect" and isinstance(args[1], tuple):
        host = args[1][0]
    elif event == "socket.getaddrinfo":
        host = args[0]
    else:
        return
    if host not in (None, "127.0.0.1", "localhost", "::1", "0.0.0.0"):
        print("called", host, file=sys.stderr, flush=True)
sys.addaudithook(watch)
"""


class Server:
    """`posttrain annotate` on a free port, which it keeps over a restart."""

    def __init__(self, command: Commands, folder: Path, *options: str):
        self.command, self.options, self.port = command, options, 0
        self.pairs, self.store = folder / "pairs", folder / "choices.jsonl"
        self.about, self.things = ["--pairs", self.pairs], f"{PAIRS} pairs"
        self.write()
        self.start()

    def write(self) -> None:
        with PreferenceWriter(self.pairs) as writer:
            for i in range(PAIRS):
                chosen = Image.new("RGB", (48, 32), (10 * i, 255, 0))
                rejected = Image.new("RGB", (48, 32), (10 * i, 0, 255))
                prompt = f"prompt <b>{i}</b> & ${{more}}"
                writer.add(Preference(prompt, chosen, rejected, "synthetic", margin=0.1 * i))

    def start(self) -> None:
        given = [*self.about, "--store", self.store, "--port", self.port, "--repeats", 0.2, *self.options]
        out = Path(self.command.files[0])
        out.write_text("")
        (self.process,) = self.command.start("annotate", *given)
        self.runs = True
        until = time.monotonic() + 60
        while not (found := re.fullmatch(rf"posttrain: {self.things} at http://\S+:(\d+)/\n", out.read_text())):
            assert time.monotonic() < until, self.errors()
            time.sleep(0.02)
        self.port = int(found[1])
        self.url = f"http://127.0.0.1:{self.port}"

    def end(self, number: int) -> int:
        os.kill(self.process, number)
        self.runs = False
        return self.command.wait().returncode

    def errors(self) -> str:
        return Path(self.command.files[1]).read_text()

    def lines(self) -> list[dict]:
        return [json.loads(line) for line in self.store.read_text().splitlines()[1:]]


class ImageServer(Server):
    """The same of single images, as `posttrain sample` leaves them; the last one has no prompt."""

    def write(self) -> None:
        self.about, self.things = ["--mode", "artifact", "--images", self.pairs], "6 images"
        self.pairs.mkdir()
        for i in range(6):
            Image.new("RGB", (48, 32), (10 * i, 255, 0)).save(self.pairs / f"{i:03d}.png")
        prompts = [{"prompt": f"prompt <b>{i}</b>", "seed": i} for i in range(5)]
        (self.pairs / "prompts.json").write_text(json.dumps(prompts))


class Person:
    """Someone at the page, in a browser profile of their own, who sees pixels and presses keys."""

    def __init__(self, browser: Browser, url: str):
        self.page: Page = browser.new_context(viewport={"width": 1000, "height": 700}).new_page()
        self.page.set_default_timeout(60_000)
        self.asked: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(url)

    def begin(self, name: str) -> None:
        self.page.fill("#name", name)
        self.page.press("#name", "Enter")
        self.ready()

    def ready(self) -> None:
        """Wait until a choice counts: both images are there."""
        self.page.wait_for_selector("#work:not([hidden]) #pair:not(.loading)")
        self.page.wait_for_function("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def count(self) -> str:
        return (self.page.text_content("#count") or "").partition(",")[0]

    def sees(self, ids: tuple[str, ...] = ("left", "right")) -> list[list[int]]:
        """Number of the pair and whether it is `chosen`, of the left and the right image, by their pixels."""
        script = """(id) => {
            const image = document.getElementById(id), canvas = document.createElement("canvas");
            [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
            canvas.getContext("2d").drawImage(image, 0, 0);
            return [...canvas.getContext("2d").getImageData(9, 9, 1, 1).data];
        }"""
        colours = [self.page.evaluate(script, side) for side in ids]
        return [[red // 10, int(green == 255)] for red, green, _, _ in colours]

    def press(self, key: str) -> None:
        """Press a key that moves on to another pair, and wait for that."""
        before = self.count()
        self.page.keyboard.press(key)
        self.page.wait_for_function(
            "(before) => !document.querySelector('#count').textContent.startsWith(before)", arg=before
        )
        if self.page.is_hidden("#done"):
            self.ready()


KEYS = {"ArrowLeft": "left", "1": "left", "a": "left", "ArrowRight": "right", "2": "right", "D": "right",
        "ArrowDown": "tie", "t": "tie", "s": "skip"}  # fmt: skip
