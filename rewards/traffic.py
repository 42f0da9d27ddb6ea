"""What all judges of one process know of a server: when it takes requests again, and which images it holds.

A server that refuses (429, 503) is left alone by all of them until one pause is over, which doubles with each further
refusal. An image's bytes go to a vLLM server once: its first question brings them with an id, and the others, which
wait for it, name the id alone. vLLM keeps the newest images (--mm-processor-cache-gb), so no more images than requests
are under way at once; one that it has dropped is sent again. A small image travels with each question: its bytes cost
less than the wait for its first answer, which leaves a server fewer questions to answer at once.
"""

import asyncio
import contextlib
import random
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from weakref import WeakKeyDictionary

BACKOFF = (0.5, 8.0)  # seconds: the first ceiling of a pause, which doubles, and the last
HELD = 4096  # images that a server is taken to hold, at most
NAMED = 64 << 10  # bytes of an image in a request from which on it is named by an id
MISSES = 8  # ids a server may not know before it is asked whether it is worth naming them
JITTER = random.Random()  # of its own: libraries give all processes the same seed

Sent = Literal["bytes", "bytes and id", "id"]
"""How an image goes into a request."""


@dataclass(eq=False)
class ServerState:
    """State of one server, in one event loop. Times are the loop's."""

    url: str
    opens: float = 0.0
    """Before this time nothing is sent to it."""
    reason: str = ""
    """Why it is left alone."""
    _closed: float = 0.0
    _ceiling: float = BACKOFF[0]
    _held: OrderedDict[str, None] = field(default_factory=OrderedDict)
    _hits: int = 0
    _misses: int = 0

    def pause(self) -> float:
        """Seconds until it takes requests again."""
        return max(0.0, self.opens - asyncio.get_running_loop().time())

    def refused(self, sent: float, after: float, reason: str) -> None:
        """A request of the time `sent` was refused for at least `after` seconds.

        Requests that were under way when another was refused are refused as well, and lengthen nothing.
        """
        now = asyncio.get_running_loop().time()
        pause = after
        if sent >= self._closed:
            pause = max(after, JITTER.uniform(0, self._ceiling))
            self._closed, self._ceiling = now, min(2 * self._ceiling, BACKOFF[1])
        self.opens, self.reason = max(self.opens, now + pause), reason

    def answered(self, answer: Any, image: str | None, how: Sent) -> None:
        """It has answered a question about this image, if it is about one."""
        self._ceiling = BACKOFF[0]
        if image is None:
            return
        if self.url not in _names_images:
            fingerprint = answer.get("system_fingerprint") if isinstance(answer, dict) else None
            _names_images[self.url] = str(fingerprint).startswith("vllm")
        self._hits += how == "id"
        if how != "bytes":
            self._held[image] = None
            self._held.move_to_end(image)
            while len(self._held) > HELD:
                self._held.popitem(last=False)

    def missed(self, image: str) -> None:
        """It does not know the id; where that is the rule, as behind a balancer, ids are no longer named."""
        self._held.pop(image, None)
        self._misses += 1
        if self._misses > max(MISSES, self._hits):
            _names_images[self.url] = False

    def holds(self, image: str | None) -> bool:
        return image in self._held

    def how(self, image: str | None) -> Sent:
        """How this image is sent to it."""
        if image is None or not _names_images.get(self.url):
            return "bytes"
        return "id" if self.holds(image) else "bytes and id"


@dataclass(eq=False)
class _Open:
    """An image with questions that are not answered yet."""

    first: asyncio.Future[None]
    """Done when its first question is."""
    questions: int = 0
    admitted: bool = False


class Turns:
    """Whose turn it is to ask about an image, in one event loop, among all judges with the same servers."""

    def __init__(self, urls: Sequence[str], at_once: int):
        self.urls = urls
        self._room = asyncio.Semaphore(at_once)
        self._open: dict[str, _Open] = {}
        self._tried: asyncio.Future[None] | None = None

    @contextlib.asynccontextmanager
    async def turn(self, image: str | None) -> AsyncIterator[None]:
        """Waits for the image's first question to be answered, or to be the first one while there is room for it."""
        if image is not None and not any(url in _names_images for url in self.urls):
            if self._tried is None:  # one question, to see what kind of server it is
                self._tried = asyncio.get_running_loop().create_future()
                try:
                    yield
                finally:
                    self._tried.set_result(None)
                return
            await asyncio.shield(self._tried)
        if image is None or not any(map(_names_images.get, self.urls)):
            yield
            return
        state = self._open.get(image)
        leads = state is None
        if state is None:
            state = self._open[image] = _Open(asyncio.get_running_loop().create_future())
        state.questions += 1
        try:
            if leads:
                await self._room.acquire()
                state.admitted = True
            else:
                await asyncio.shield(state.first)  # a question that is given up must not end the wait of the others
            yield
        finally:
            if leads:
                state.first.set_result(None)
            state.questions -= 1
            if state.questions == 0:
                del self._open[image]
                if state.admitted:
                    self._room.release()


_names_images: dict[str, bool] = {}
"""URL -> whether the server takes ids of images, as vLLM does. Known from its first answer."""
_states: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, ServerState]] = WeakKeyDictionary()
_turns: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[tuple[str, ...], Turns]] = WeakKeyDictionary()


def state_of(url: str) -> ServerState:
    """The server's state in the running event loop."""
    states = _states.setdefault(asyncio.get_running_loop(), {})
    return states.setdefault(url, ServerState(url))


def turns_of(urls: Sequence[str], at_once: int) -> Turns:
    """The servers' turns in the running event loop. The first judge decides how many images are under way at once."""
    turns, key = _turns.setdefault(asyncio.get_running_loop(), {}), tuple(urls)
    if key not in turns:
        turns[key] = Turns(key, at_once)
    return turns[key]
