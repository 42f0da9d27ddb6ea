"""A server that speaks just enough of the OpenAI protocol to go wrong: it only injects faults into tests.

Run as `python fake_judge.py PORT [--faults SHARE] [--die-after N] [--broken] [--wandering] [--says error|MODEL]`. Its
score is a function of the image, so a client can tell a right score from a wrong one. An image's fault is one too:
the passing ones (500, 429, hang, closed, cut) are shown once for each image, the lasting ones (truncated JSON, no
log-probs, maybe) always. A broken server answers 500 to everything; a wandering one's scores are 0.5 and 0.504 in turn;
one that says error puts it into the body of a 200, and one that says anything else names that model in its answers.
"""

import argparse
import asyncio
import hashlib
import json
import math
import os
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")
PASSING = ["500", "429", "hang", "closed", "cut"]
LASTING = ["truncated", "no-logprobs", "maybe"]


def score_of(url: str) -> float:
    return (int(hashlib.sha256(url.encode()).hexdigest()[:6], 16) % 1000 + 0.5) / 1000


def fault_of(url: str, share: float) -> str | None:
    number = int(hashlib.sha256(url.encode()).hexdigest()[6:12], 16)
    if number % 1000 >= share * 1000:
        return None
    faults = PASSING + LASTING
    return faults[number // 1000 % len(faults)]


def answer(url: str, fault: str | None, p: float | None = None, model: str | None = None) -> bytes:
    p = score_of(url) if p is None else p
    likely = [("Yes", p * 0.7), (" yes", p * 0.3), ("no", 1 - p)]
    if fault == "maybe":
        likely = [("Maybe", 0.99), ("yes", 0.006), ("no", 0.004)]
    top = [{"token": token, "logprob": math.log(q), "bytes": None} for token, q in likely]
    choice = {
        "index": 0,
        "finish_reason": "length",
        "message": {"role": "assistant", "content": likely[0][0]},
    }
    if fault != "no-logprobs":
        choice["logprobs"] = {"content": [{**top[0], "top_logprobs": top}]}
    reply = {"id": "x", "object": "chat.completion", "created": 0, "choices": [choice], "model": model}
    body = json.dumps(reply).encode()
    return body[: len(body) // 2] if fault == "truncated" else body


def reply(status: str, body: bytes, *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", "Content-Type: application/json", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


async def served(respond: Callable[[str, bytes], bytes], ask: Callable[[str], Awaitable[T]]) -> T:
    """What `ask` gets from the URL of a server whose answers are `respond(head, body)`, each on its own connection."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = head.partition("content-length:")[2].split("\r\n")[0]
        writer.write(respond(head, await reader.readexactly(int(length or 0))))
        writer.close()

    async with await asyncio.start_server(handle, "127.0.0.1", 0, limit=1 << 22) as server:
        return await ask(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1")


class Server:
    def __init__(
        self, faults: float, die_after: int | None, broken: bool = False, wandering: bool = False, says: str = ""
    ):
        self.broken = broken
        self.says = says
        self.wandering = wandering
        self.faults = faults
        self.die_after = die_after
        self.seen: set[str] = set()
        self.requests = 0

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self.one(reader, writer):
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = next((line for line in head.split("\r\n") if line.lower().startswith("content-length")), ":0")
        body = await reader.readexactly(int(length.split(":")[1]))
        if head.startswith("GET"):
            writer.write(reply("200 OK", json.dumps({"object": "list", "data": []}).encode()))
            return True
        self.requests += 1
        if self.requests == self.die_after:
            os._exit(9)
        url = json.loads(body)["messages"][0]["content"][0]["image_url"]["url"]
        fault = fault_of(url, self.faults)
        if fault in PASSING and url in self.seen:
            fault = None
        self.seen.add(url)
        if fault == "500" or self.broken:
            text = {"error": {"message": "CUDA error: an illegal memory access was encountered"}}
            writer.write(reply("500 Internal Server Error", json.dumps(text).encode()))
        elif self.says == "error":
            writer.write(reply("200 OK", b'{"error": {"message": "out of credits", "code": 402}}'))
        elif fault == "429":
            writer.write(reply("429 Too Many Requests", b'{"error": "slow down"}', "Retry-After: 1"))
        elif fault == "hang":
            await asyncio.sleep(3600)
        elif fault == "closed":
            return False
        elif fault == "cut":
            writer.write(reply("200 OK", answer(url, None))[:-40])
            return False
        else:
            p = 0.5 + 0.004 * (self.requests % 2) if self.wandering else None
            writer.write(reply("200 OK", answer(url, fault, p, self.says or None)))
        return True


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("--faults", type=float, default=0.0)
    parser.add_argument("--die-after", type=int)
    parser.add_argument("--broken", action="store_true")
    parser.add_argument("--wandering", action="store_true")
    parser.add_argument("--says", default="")
    args = parser.parse_args()
    server = Server(args.faults, args.die_after, args.broken, args.wandering, args.says)
    async with await asyncio.start_server(server.handle, "127.0.0.1", args.port, limit=1 << 22) as listening:
        await listening.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
