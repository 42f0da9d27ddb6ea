"""A page where people choose between the two images of each pair, or mark single images that have faults, served until
Ctrl-C or SIGTERM.

posttrain annotate --pairs pairs/a --store choices.jsonl
posttrain annotate --mode artifact --images runs/a --store marks.jsonl

The page asks this process for every step, and an answer is on disk before the next pair or image is shown. It keeps no
state but the name of who is answering, so a page that was open survives a restart. Nothing it shows tells which image
the record calls chosen, or which model drew it: images are sent as new PNGs under random names, and sides are random
for each annotator.
"""

from __future__ import annotations

import importlib
import io
import math
import os
import secrets
import socket
import statistics
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from posttrain.annotate.answers import ANSWERS, Mode, Schedule, Showing, Side, Store, person, schedule
from posttrain.annotate.config import AnnotateConfig
from posttrain.annotate.export import Pairs
from posttrain.annotate.marked_images import Images
from posttrain.config.types import is_loopback
from posttrain.errors import UserError, counted
from posttrain.log import log
from posttrain.runs.stop import until_terminated

MIN_CHARACTERS = 8  # of a password
ANSWERS_TO_ESTIMATE = 5  # before the page estimates how long the rest takes


def annotate(config: AnnotateConfig) -> None:
    """The command `posttrain annotate`. Raises UserError before it serves if anything given is wrong."""
    password = _password(config)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
    try:
        importlib.import_module("gradio")
    except ImportError:
        raise UserError("annotate: needs gradio, which is not installed; pip install 'posttrain[annotate]'") from None
    items = Pairs(config.pairs, config.max_bad) if config.pairs is not None else Images(config.images or "")
    store = Store(Path(config.store), Schedule(config.seed, config.repeats, config.mode))
    try:
        with until_terminated():
            items.require(store.pairs(), config.store)
            with _listen(config) as listener:
                _serve(Desk(items, store), config, password, listener)
    finally:
        store.close()


Part = Side | int | None
"""What of an item an image is: a side of a pair, the number of a reference, or None for a single image."""


class Desk:
    """The functions that the page calls. Each returns what to show next, or `error`, one line for the annotator."""

    def __init__(self, items: Pairs | Images, store: Store):
        self.items, self.store = items, store
        self.mode: Mode = store.schedule.mode
        self.thing = "pair" if self.mode == "preference" else "image"
        self._names: dict[tuple[str, Part], str] = {}
        self._images: dict[str, tuple[str, Part]] = {}
        self._schedule = lru_cache(maxsize=None)(lambda name: schedule(list(items.prompts), name, store.schedule))
        self._item = lru_cache(maxsize=8)(items.__getitem__)  # of a pair two images; one is shown, one read ahead

    def start(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """`asked`: name."""
        return self._view(person(str(asked["name"])))

    def choose(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """`asked`: name, pair, again, choice and seconds. Saved when this returns without an error."""
        name, choice, seconds = person(str(asked["name"])), asked["choice"], float(asked["seconds"])
        wanted = (asked["pair"], asked["again"])
        showing = next((s for s in self._schedule(name) if (s.pair, s.again) == wanted), None)
        if showing is None or choice not in ANSWERS[self.mode] or not math.isfinite(seconds) or seconds < 0:
            raise UserError("the page is out of date; reload it")
        if self.store.add(name, showing, choice, round(seconds, 3)):
            return self._view(name)
        return self._view(name, f"That {self.thing} had been answered already. Undo takes the answer back.")

    def undo(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """`asked`: name."""
        name = person(str(asked["name"]))
        self.store.undo(name)
        return self._view(name)

    def png(self, name: str) -> bytes:
        """An image by the name that a view gave it. Raises KeyError for another, UserError if it cannot be read."""
        key, part = self._images[name]
        item = self._item(key)
        if isinstance(item, Image.Image):
            shown = item
        else:
            shown = item.references[part].image if isinstance(part, int) else getattr(item, part or "")
        buffer = io.BytesIO()
        shown.save(buffer, "png", compress_level=1)  # someone is waiting, and the default takes several times as long
        return buffer.getvalue()

    def _view(self, name: str, note: str = "") -> dict[str, Any]:
        choices = self.store.choices(name)
        done = {(choice.pair, choice.again) for choice in choices}
        left = [s for s in self._schedule(name) if (s.pair, s.again) not in done]
        view = {"name": name, "done": len(choices), "total": len(choices) + len(left), "note": note, "pair": None}
        view["rest"] = ""
        if len(choices) >= ANSWERS_TO_ESTIMATE and left:
            minutes = statistics.median(choice.seconds for choice in choices) * len(left) / 60
            view["rest"] = f"about {minutes:.0f} min left" if minutes >= 1 else "less than a minute left"
        if left:
            now = left[0]
            view |= {"pair": now.pair, "again": now.again, "prompt": self.items.prompts[now.pair]}
            view["images"], view["references"] = self._urls(now), self._references(now)
            # The browser loads the next images while someone looks at these.
            view["ahead"] = self._urls(left[1]) if len(left) > 1 else []
        return view

    def _urls(self, showing: Showing) -> list[str]:
        sides: tuple[Part, ...] = (None,)
        if showing.left is not None:
            sides = ("chosen", "rejected") if showing.left == "chosen" else ("rejected", "chosen")
        return self._named(showing.pair, sides)

    def _references(self, showing: Showing) -> list[str]:
        """URLs of the images in whose style both images of a pair were drawn."""
        count = self.items.references.get(showing.pair, 0) if isinstance(self.items, Pairs) else 0
        return self._named(showing.pair, range(count))

    def _named(self, item: str, parts: Iterable[Part]) -> list[str]:
        urls = []
        for part in parts:
            key = (item, part)
            # A random name does not tell which side of the record it is.
            name = self._names.setdefault(key, secrets.token_urlsafe(16))
            self._images[name] = key
            urls.append(f"image/{name}.png")
        return urls


def _serve(desk: Desk, config: AnnotateConfig, password: str | None, listener: socket.socket) -> None:
    import uvicorn

    from posttrain.annotate.app import page

    port, everywhere = listener.getsockname()[1], config.host in ("0.0.0.0", "::")
    host = socket.gethostname() if everywhere else config.host
    app = page(desk, password, {"localhost", "127.0.0.1", "::1", host}, config.root_path)
    # Gradio starts in the lifespan; with "auto" an error there would be swallowed.
    options = {"log_level": "warning", "timeout_graceful_shutdown": 1, "lifespan": "on"}
    server = uvicorn.Server(uvicorn.Config(app, **options))
    if not is_loopback(config.host):
        log.warning(
            "images and the password cross the network unencrypted; use one that you trust, or put an HTTPS proxy"
            " before this"
        )
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}/"
    print(f"posttrain: {counted(len(desk.items.prompts), desk.thing)} at {url}", flush=True)
    server.run(sockets=[listener])


def _password(config: AnnotateConfig) -> str | None:
    if config.password_env is None:
        return None
    password = os.environ.get(config.password_env, "")
    if len(password) < MIN_CHARACTERS:
        raise UserError(
            f"password_env: {config.password_env} {'is too short' if password else 'is not set'}; put a password of"
            f" {MIN_CHARACTERS} characters or more into that environment variable"
        )
    return password


def _listen(config: AnnotateConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        return socket.create_server((config.host, config.port), family=family)
    except OSError as error:
        raise UserError(
            f"port: {config.host}:{config.port} cannot be listened at ({os.strerror(error.errno or 0)});"
            " choose another --port, or 0 for any free one"
        ) from None
