"""Several OpenAI-compatible servers as one: balanced by load, dropped when they fail, probed, re-admitted."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from time import time
from typing import TypeVar

from openai import APIConnectionError, APIStatusError, AsyncOpenAI, DefaultAsyncHttpxClient, Timeout

T = TypeVar("T")

RETRIED = {408, 409, 429}  # and every 5xx
FAILURES_TO_DROP = 3  # in a row
BACKOFF = (0.5, 8.0)  # seconds: the first ceiling, which doubles, and the last
PROBE = (0.25, 5.0)  # seconds between health probes, doubling
CONNECT_SECONDS = 5.0


class JudgeError(Exception):
    """No usable answer. The message holds the server's own words."""


@dataclass(eq=False)
class Endpoint:
    url: str
    client: AsyncOpenAI
    in_flight: int = 0
    failures: int = 0  # in a row
    probe: asyncio.Task[None] | None = None  # set while the endpoint is dropped


class Endpoints:
    """Belongs to the event loop in which it is made."""

    def __init__(self, urls: list[str], api_key: str, timeout: float, deadline: float, retries: int):
        limits = Timeout(timeout, connect=min(timeout, CONNECT_SECONDS))
        self.endpoints = [Endpoint(url, _client(url, api_key, limits)) for url in urls]
        self.deadline = deadline
        self.retries = retries
        self._some_up = asyncio.Event()
        self._some_up.set()
        self._down_since = 0.0
        self._last_error = ""

    async def request(self, send: Callable[[AsyncOpenAI], Awaitable[T]]) -> T:
        """The answer to `send`, within the deadline and all retries, or a JudgeError."""
        limit = asyncio.timeout(self.deadline)
        errors: list[str] = []
        try:
            async with limit:
                return await self._attempts(send, errors, asyncio.get_running_loop().time() + self.deadline)
        except TimeoutError:
            reason = (errors or [self._last_error or "the server did not answer"])[-1]
            raise JudgeError(f"no answer within {self.deadline:g} s: {reason}") from None

    async def _attempts(self, send: Callable[[AsyncOpenAI], Awaitable[T]], errors: list[str], until: float) -> T:
        """Refusals are counted; lost connections are not, since a server may take its time to come back."""
        ceiling = BACKOFF[0]
        refusals = 0
        while True:
            endpoint = await self._pick()
            wait = 0.0
            endpoint.in_flight += 1
            try:
                answer = await send(endpoint.client)
            except APIConnectionError as error:
                errors.append(f"{endpoint.url}: {_reason(error)}")
                self._failed(endpoint, errors[-1])
            except APIStatusError as error:
                errors.append(f"{endpoint.url}: {_status_text(error)}")
                if error.status_code < 500 and error.status_code not in RETRIED:
                    raise JudgeError(errors[-1]) from error
                if error.status_code >= 500:
                    self._failed(endpoint, errors[-1])
                wait = _retry_after(error)
                refusals += 1
            else:
                self._succeeded(endpoint)
                return answer
            finally:
                endpoint.in_flight -= 1
            wait = max(wait, random.uniform(0, ceiling))
            if refusals > self.retries:
                raise JudgeError(f"{len(errors)} attempts failed: {errors[-1]}")
            if asyncio.get_running_loop().time() + wait > until:
                raise JudgeError(f"no answer within {self.deadline:g} s: {errors[-1]}")
            await asyncio.sleep(wait)
            ceiling = min(2 * ceiling, BACKOFF[1])

    async def _pick(self) -> Endpoint:
        """The endpoint with the least in flight. While all are dropped, the request waits for one."""
        while not (up := [endpoint for endpoint in self.endpoints if endpoint.probe is None]):
            if asyncio.get_running_loop().time() - self._down_since > self.deadline:
                raise JudgeError(f"no server for more than {self.deadline:g} s: {self._last_error}")
            await self._some_up.wait()
        return min(up, key=lambda endpoint: (endpoint.in_flight, random.random()))

    def _failed(self, endpoint: Endpoint, reason: str) -> None:
        self._last_error = reason
        endpoint.failures += 1
        if endpoint.failures >= FAILURES_TO_DROP and endpoint.probe is None:
            endpoint.probe = asyncio.create_task(self._probe(endpoint))
            if all(other.probe for other in self.endpoints):
                self._some_up.clear()
                self._down_since = asyncio.get_running_loop().time()

    def _succeeded(self, endpoint: Endpoint) -> None:
        endpoint.failures = 0
        if endpoint.probe is not None:
            endpoint.probe.cancel()
            self._admit(endpoint)

    def _admit(self, endpoint: Endpoint) -> None:
        endpoint.failures = 0
        endpoint.probe = None
        self._some_up.set()

    async def _probe(self, endpoint: Endpoint) -> None:
        pause = PROBE[0]
        while True:
            await asyncio.sleep(pause)
            pause = min(2 * pause, PROBE[1])
            try:
                await endpoint.client.models.list(timeout=CONNECT_SECONDS)
            except APIConnectionError:
                continue
            except APIStatusError as error:  # any answer but a 5xx shows a living server
                if error.status_code >= 500:
                    continue
            self._admit(endpoint)
            return


def _client(url: str, api_key: str, limits: Timeout) -> AsyncOpenAI:
    # The library's own default closes its connections when collected, which fails once their loop has ended.
    http_client = DefaultAsyncHttpxClient(timeout=limits)
    return AsyncOpenAI(base_url=url, api_key=api_key, timeout=limits, max_retries=0, http_client=http_client)


def _reason(error: APIConnectionError) -> str:
    cause = error.__cause__
    return f"{error} ({type(cause).__name__}: {cause})" if cause is not None else str(error)


def _status_text(error: APIStatusError) -> str:
    """The server's whole answer, in one line, since what it says is what the user has to know."""
    return f"HTTP {error.status_code}: {' '.join(error.response.text.split())[:1000]}"


def _retry_after(error: APIStatusError) -> float:
    """Seconds from the Retry-After header, which holds a number or a date; 0 without one."""
    value = error.response.headers.get("retry-after", "0")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time())
    except ValueError:
        return 0.0
