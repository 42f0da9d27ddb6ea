"""What the judge client itself costs for one question about an image: `python -m posttrain.bench.judge_client`.

Encoding, sending and parsing against a local server that answers at once, the client pinned to one core.
Images are all different, smooth with a little noise; the cost is the client's processor time, of the median
round. Four rewards ask four questions or more about an image, which is encoded once.
"""

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import time
from multiprocessing.connection import Connection

import numpy as np
from PIL import Image

from prompts.templates import Template
from rewards.judge import Judge


def serve_at_once(port: Connection) -> None:
    """Answers every request with the same log-probs. Never leaves the loopback interface."""
    top = [{"token": "yes", "logprob": -0.1, "bytes": None}, {"token": "no", "logprob": -2.4, "bytes": None}]
    top += [{"token": f"t{i}", "logprob": -9.0 - i, "bytes": None} for i in range(18)]
    choice = {"index": 0, "finish_reason": "length", "message": {"role": "assistant", "content": "yes"}}
    choice |= {"logprobs": {"content": [{**top[0], "top_logprobs": top}]}}
    answer = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
    body = json.dumps(answer).encode()
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):  # the client hung up
            while True:
                request = await reader.readuntil(b"\r\n\r\n")
                length = request.lower().partition(b"content-length:")[2].split(b"\r\n")[0]
                await reader.readexactly(int(length))
                writer.write(head + body)

    async def main() -> None:
        async with await asyncio.start_server(handle, "127.0.0.1", 0, limit=1 << 24) as server:
            port.send(server.sockets[0].getsockname()[1])
            await server.serve_forever()

    asyncio.run(main())


def noisy_images(count: int, size: int, seed: int) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), dtype=float)
        noisy = smooth + rng.normal(0, 2, smooth.shape)
        made.append(Image.fromarray(noisy.clip(0, 255).astype(np.uint8)))
    return made


async def ask_all(url: str, images: list[Image.Image], questions: int) -> tuple[float, float]:
    """(processor, wall) milliseconds a request, encoding included."""
    judge = Judge("m", url)
    templates = [Template(f"q{i}", f"Is this image {i}? Answer yes or no.") for i in range(questions)]
    await judge.p_yes(images[-1], templates[0])  # connect, import what is imported late
    begun = time.process_time(), time.perf_counter()
    questions_asked = [judge.p_yes(image, template) for image in images[:-1] for template in templates]
    await asyncio.gather(*questions_asked)
    ended = time.process_time(), time.perf_counter()
    requests = (len(images) - 1) * questions
    return (ended[0] - begun[0]) / requests * 1e3, (ended[1] - begun[1]) / requests * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve_at_once, args=(theirs,), daemon=True)
    server.start()
    url = f"http://127.0.0.1:{ours.recv()}/v1"
    # One core, so that the client's own work cannot hide in another thread's.
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    for questions in (1, 4):
        costs = []
        for seed in range(args.rounds):
            images = noisy_images(args.images + 1, args.size, 10 * questions + seed)
            costs.append(asyncio.run(ask_all(url, images, questions)))
        processor, wall = np.median(costs, axis=0)
        print(f"{questions} questions an image: {processor:.2f} ms a request ({wall:.2f} ms wall), ", end="")
        print(f"best round {min(costs)[0]:.2f} ms")
    server.kill()


if __name__ == "__main__":
    main()
