"""Several OpenAI-compatible servers as one: balanced by load, dropped when they fail, probed, re-admitted."""

import asyncio
import ipaddress
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from time import time
from typing import Any, TypeVar
from urllib.parse import urlsplit

from openai import APIConnectionError, APIError, APIStatusError, AsyncOpenAI, DefaultAsyncHttpxClient, Timeout

from posttrain.errors import UserError, counted
from rewards.traffic import BACKOFF, JITTER, Sent, ServerState, state_of

T = TypeVar("T")

RETRIED = {408, 409, 429}  # and every 5xx
BUSY = {429, 503}  # the server is left alone for a while, by all requests of the process
FAILURES_TO_DROP = 3  # in a row
PROBE = (0.25, 5.0)  # seconds between health probes, doubling
CONNECT_SECONDS = 5.0


@dataclass(frozen=True)
class Refusal:
    """A request that the server has not carried out, by its status or by an error in the body of a 200."""

    status: int
    text: str
    """The server's words."""
    after: float = 0.0
    """Seconds that it asks to be left alone."""


class JudgeError(Exception):
    """No usable answer. The message holds the server's own words."""


@dataclass(eq=False)
class Endpoint:
    url: str
    client: AsyncOpenAI
    state: ServerState
    in_flight: int = 0
    failures: int = 0  # in a row
    probe: asyncio.Task[None] | None = None  # set while the endpoint is dropped

    async def silence(self) -> str:
        """Why it takes no connection now; empty if it does, since even a refusal is an answer."""
        try:
            await self.client.models.list(timeout=CONNECT_SECONDS)
        except APIConnectionError as error:
            return f"{self.url}: {_reason(error)}"
        except (APIError, ValueError):  # what it says to a question is another matter
            pass
        return ""


class Endpoints:
    """Belongs to the event loop in which it is made."""

    def __init__(self, urls: list[str], api_key: str, timeout: float, deadline: float, retries: int):
        limits = Timeout(timeout, connect=min(timeout, CONNECT_SECONDS))
        self.endpoints = [Endpoint(url, _client(url, api_key, limits), state_of(url)) for url in urls]
        self.deadline = deadline
        self.retries = retries
        self._some_up = asyncio.Event()
        self._some_up.set()
        self._down_since = 0.0
        self._last_error = ""

    async def request(self, send: Callable[[AsyncOpenAI, Sent], Awaitable[T]], image: str | None = None) -> T:
        """The answer to `send`, within the deadline and all retries, or a JudgeError.

        `image` is the hash of the image that the request is about; `send` is told how the image is to be sent.
        """
        limit = asyncio.timeout(self.deadline)
        errors: list[str] = []
        try:
            async with limit:
                until = asyncio.get_running_loop().time() + self.deadline
                return await self._attempts(send, image, errors, until)
        except TimeoutError:
            reason = (errors or [self._last_error or "the server did not answer"])[-1]
            raise JudgeError(f"no answer within {self.deadline:g} s: {reason}") from None

    async def _attempts(
        self, send: Callable[[AsyncOpenAI, Sent], Awaitable[T]], image: str | None, errors: list[str], until: float
    ) -> T:
        """Refusals are counted; lost connections are not, since a server may take its time to come back."""
        ceiling = BACKOFF[0]
        refusals = 0
        loop = asyncio.get_running_loop()
        while True:
            endpoint = await self._pick(image, until)
            how, sent, wait = endpoint.state.how(image), loop.time(), 0.0
            refusal: Refusal | None = None
            endpoint.in_flight += 1
            try:
                answer = await send(endpoint.client, how)
            except APIConnectionError as error:
                errors.append(f"{endpoint.url}: {_reason(error)}")
                self._failed(endpoint, errors[-1])
                wait = JITTER.uniform(0, ceiling)
            except APIStatusError as error:
                refusal = Refusal(error.status_code, _status_text(error), _retry_after(error))
            else:
                refusal = refusal_in(answer)
                if refusal is None:
                    self._succeeded(endpoint)
                    endpoint.state.answered(answer, image, how)
                    return answer
            finally:
                endpoint.in_flight -= 1
            if refusal is not None:
                errors.append(f"{endpoint.url}: {refusal.text}")
                if how == "id" and image is not None and refusal.status not in BUSY:
                    endpoint.state.missed(image)  # if anything else is wrong, the server repeats it for the bytes
                    continue
                if refusal.status < 500 and refusal.status not in RETRIED:
                    raise JudgeError(errors[-1])
                if refusal.status >= 500:
                    self._failed(endpoint, errors[-1])
                wait = refusal.after
                if refusal.status in BUSY:
                    endpoint.state.refused(sent, wait, errors[-1])
                    wait = 0.0
                else:
                    wait = max(wait, JITTER.uniform(0, ceiling))
                refusals += 1
            if refusals > self.retries:
                raise JudgeError(f"{counted(len(errors), 'attempt')} failed: {errors[-1]}")
            if loop.time() + wait > until:
                raise JudgeError(f"no answer within {self.deadline:g} s: {errors[-1]}")
            await asyncio.sleep(wait)
            ceiling = min(2 * ceiling, BACKOFF[1])

    async def _pick(self, image: str | None, until: float) -> Endpoint:
        """The endpoint that holds the image, or the one with the least in flight. While all are dropped or busy, the
        request waits for one."""
        loop = asyncio.get_running_loop()
        while True:
            while not (up := [endpoint for endpoint in self.endpoints if endpoint.probe is None]):
                if loop.time() - self._down_since > self.deadline:
                    raise JudgeError(f"no server for more than {self.deadline:g} s: {self._last_error}")
                await self._some_up.wait()
            holding = [endpoint for endpoint in up if endpoint.state.holds(image) and not endpoint.state.pause()]
            choice = min(holding or up, key=lambda e: (e.state.pause(), e.in_flight, JITTER.random()))
            pause = choice.state.pause()
            if not pause:
                return choice
            if loop.time() + pause > until:
                raise JudgeError(f"no answer within {self.deadline:g} s: {choice.state.reason}")
            await asyncio.sleep(pause + JITTER.uniform(0, BACKOFF[0]))

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


def share(total: int) -> int:
    """This process's part of the requests that a whole run may have under way, at least one.

    Launchers say how many processes there are.
    """
    return max(1, total // int(os.environ.get("WORLD_SIZE", "1")))


def _client(url: str, api_key: str, limits: Timeout) -> AsyncOpenAI:
    # The library's own default closes its connections when collected, which fails once their loop has ended.
    try:
        http_client = DefaultAsyncHttpxClient(timeout=limits, trust_env=not _is_loopback(url))
    except (ImportError, ValueError) as error:  # a SOCKS proxy without its package, a proxy that is not a URL
        raise UserError(f"{url}: the proxy that HTTP_PROXY, HTTPS_PROXY or ALL_PROXY names: {error}") from error
    return AsyncOpenAI(base_url=url, api_key=api_key, timeout=limits, max_retries=0, http_client=http_client)


def _is_loopback(url: str) -> bool:
    """Whether the server is on this machine: what the environment says about proxies is not about it."""
    host = urlsplit(url).hostname or ""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    return address.is_loopback or address.is_unspecified


def refusal_in(answer: Any) -> Refusal | None:
    """What a body with status 200 says has gone wrong, as gateways do: {"error": {"message": ..., "code": 429}}."""
    if not isinstance(answer, dict):
        return None
    choices = answer.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    error = answer.get("error") or (first.get("error") if isinstance(first, dict) else None)
    if not error:
        return None
    code = error.get("code", error.get("status", "")) if isinstance(error, dict) else ""
    status = 429 if "rate_limit" in str(code) else int(code) if str(code).isdecimal() else 400
    return Refusal(status, f"HTTP 200 with an error: {' '.join(str(error).split())[:1000]}")


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
