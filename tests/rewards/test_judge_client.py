"""The judge client against a server that goes wrong: every score is right or missing."""

import asyncio
import base64
import contextlib
import io
import json
import logging
import math
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from posttrain.errors import UserError
from prompts.templates import Template, load_template
from rewards.background import ScoreQueue
from rewards.base import Noise, RewardError, RewardSpec
from rewards.encode import encode
from rewards.endpoints import JudgeError
from rewards.judge import Judge, spread, yes_share
from rewards.load import load_rewards
from rewards.noise import noise_metrics, noise_of, repeatability
from tests.helpers import fake_judge

TEMPLATE = load_template("aesthetic")


def an_image(seed: int, size: int = 8) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(port: int, *arguments: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, str(Path(fake_judge.__file__)), str(port), *arguments])
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return process
        time.sleep(0.02)


@contextlib.contextmanager
def serving(*arguments: str) -> Iterator[str]:
    port = free_port()
    process = start(port, *arguments)
    try:
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()


Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def ask_one(respond: Callable[[int], bytes], image: Image.Image | None = None, **options) -> tuple[float, int]:
    """(score, requests) with a server whose n-th answer is `respond(n)`."""

    requests = 0

    def counted(head: str, body: bytes) -> bytes:
        nonlocal requests
        requests += 1
        return respond(requests)

    ask = fake_judge.served(counted, lambda url: Judge("m", url, **options).p_yes(image or an_image(0), TEMPLATE))
    return asyncio.run(ask), requests


def good(image: Image.Image) -> bytes:
    body = fake_judge.answer(encode(image).url, None)
    return fake_judge.reply("200 OK", body, "Connection: close")


def test_right_score():
    image = an_image(3)
    score, _ = ask_one(lambda n: good(image), image)
    assert score == pytest.approx(fake_judge.score_of(encode(image).url), abs=1e-9)


@pytest.mark.parametrize(
    ("size", "kind"), [((1, 1), "png"), ((7, 5), "png"), ((512, 512), "png"), ((513, 512), "webp")]
)
def test_pictures_arrive_pixel_for_pixel(size, kind):
    """What the server decodes is the picture, which is stored when it is small and compressed when it is not."""
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    head, _, data = encode(Image.fromarray(pixels)).url.partition(",")
    assert head == f"data:image/{kind};base64"
    decoded = Image.open(io.BytesIO(base64.b64decode(data)))
    assert decoded.format == kind.upper() and decoded.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(decoded), pixels)


def test_request_body():
    """It is the JSON of the API, also where text and model name hold what marks the picture's place."""
    bodies = []

    def respond(head: str, body: bytes) -> bytes:
        assert "content-type: application/json\r\n" in head
        bodies.append(json.loads(body))
        return good(an_image(0))

    template = Template("t", 'data:, \u00e9 "$prompt')
    judge = {"model": "m/data:,", "seed": 3}
    ask = fake_judge.served(
        respond, lambda url: Judge(base_urls=url, **judge).p_yes(an_image(0), template, prompt="data:,x")
    )
    asyncio.run(ask)
    image = {"type": "image_url", "image_url": {"url": encode(an_image(0)).url}}
    text = {"type": "text", "text": 'data:, \u00e9 ""data:,x"'}
    assert bodies == [{
        "model": "m/data:,",
        "messages": [{"role": "user", "content": [image, text]}],
        "temperature": 0,
        "seed": 3,
        "max_tokens": 1,
        "logprobs": True,
        "top_logprobs": 20,
    }]  # fmt: skip


def test_yes_share_sums_spellings():
    # yes: 0.5 + 0.1, no: 0.2; 'yesterday' is no spelling of yes
    top = [("Yes", 0.5), (" no", 0.2), ("yesterday", 0.1), ("YES", 0.1)]
    assert yes_share([(t, math.log(p)) for t, p in top], 0.5) == pytest.approx(0.6 / 0.8)


@pytest.mark.parametrize("top", [[], [("maybe", -0.01), ("yes", -5.0)], [("yes", math.nan), ("no", -1.0)]])
def test_neither_yes_nor_no_is_no_score(top):
    with pytest.raises(JudgeError, match="neither yes nor no"):
        yes_share(top, 0.5)


def test_client_errors_are_not_retried_and_keep_the_servers_words():
    refused = b'{"error": {"message": "model m does not exist"}}'
    counted = []

    def respond(n: int) -> bytes:
        counted.append(n)
        return fake_judge.reply("404 Not Found", refused, "Connection: close")

    with pytest.raises(JudgeError, match=r"HTTP 404.*model m does not exist"):
        ask_one(respond)
    assert counted == [1]


def test_retry_after_is_honoured():
    image = an_image(0)
    busy = fake_judge.reply("429 Too Many Requests", b"{}", "Connection: close", "Retry-After: 1")
    begun = time.monotonic()
    _, requests = ask_one(lambda n: busy if n == 1 else good(image))
    assert requests == 2 and time.monotonic() - begun >= 1


def test_retry_after_beyond_the_deadline_fails_at_once():
    headers = ("Connection: close", "Retry-After: 60")
    busy = fake_judge.reply("429 Too Many Requests", b'{"error": "quota"}', *headers)
    begun = time.monotonic()
    with pytest.raises(JudgeError, match="quota"):
        ask_one(lambda n: busy, deadline=5)
    assert time.monotonic() - begun < 3


def test_retries_end():
    broken = fake_judge.reply("503 Service Unavailable", b"engine is dead", "Connection: close")
    with pytest.raises(JudgeError, match=r"3 attempts failed.*HTTP 503: engine is dead"):
        ask_one(lambda n: broken, retries=2)


def test_no_server_at_all():
    judge = Judge("m", f"http://127.0.0.1:{free_port()}/v1", deadline=1)
    with pytest.raises(JudgeError, match="Connection error"):
        asyncio.run(judge.p_yes(an_image(0), TEMPLATE))


def test_key_is_never_shown(monkeypatch, caplog):
    monkeypatch.setenv("MY_KEY", "sk-secret-123")
    caplog.set_level(logging.DEBUG)
    echo = fake_judge.reply("401 Unauthorized", b'{"error": "bad key sk-secret-123"}', "Connection: close")
    with pytest.raises(JudgeError, match=r"bad key \*\*\*") as caught:
        ask_one(lambda n: echo, api_key_env="MY_KEY")
    judge = Judge("m", "http://127.0.0.1:1/v1", api_key_env="MY_KEY")
    assert "sk-secret" not in repr(judge) + str(caught.value) + repr(vars(judge)) + caplog.text
    monkeypatch.delenv("MY_KEY")
    with pytest.raises(UserError, match="MY_KEY is not set"):
        asyncio.run(judge.p_yes(an_image(0), TEMPLATE))


def test_load_is_balanced_and_a_dead_server_dropped_and_readmitted():
    async def main() -> None:
        counts = [0, 0]
        broken = True

        def handler(i: int) -> Handler:
            async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                server = fake_judge.Server(0, None)
                while not (i == 1 and broken):
                    counts[i] += 1
                    if not await server.one(reader, writer):
                        break
                    await asyncio.sleep(0.01)
                writer.close()

            return handle

        async with contextlib.AsyncExitStack() as stack:
            urls = []
            for i in range(2):
                server = await stack.enter_async_context(
                    await asyncio.start_server(handler(i), "127.0.0.1", 0, limit=1 << 22)
                )
                urls.append(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1")
            judge = Judge("m", urls, concurrency=8)
            await asyncio.gather(*(judge.p_yes(an_image(i), TEMPLATE) for i in range(40)))
            assert counts[1] == 0 and judge._endpoints.endpoints[1].probe is not None
            broken = False
            while judge._endpoints.endpoints[1].probe is not None:
                await asyncio.sleep(0.05)
            counts[:] = [0, 0]
            await asyncio.gather(*(judge.p_yes(an_image(i), TEMPLATE) for i in range(40, 100)))
            assert min(counts) >= 20

    asyncio.run(asyncio.wait_for(main(), 30))


def test_cache_asks_once():
    async def main(url: str) -> None:
        judge = Judge("m", url)
        first = await judge.p_yes(an_image(1), TEMPLATE)
        judge.base_urls = "http://127.0.0.1:1/v1"
        judge._loop = None  # connects anew: only the cache can answer
        assert await judge.p_yes(an_image(1), TEMPLATE) == first

    with serving() as url:
        asyncio.run(main(url))


def test_repeatability_asks_every_time():
    with serving() as url:
        judge, images = Judge("m", url), [an_image(0), an_image(1)]
        alone = asyncio.run(judge.asked_alone(images, TEMPLATE, 2))
        assert spread(alone, asyncio.run(judge.asked_together(images, TEMPLATE, 2))) == 0


def test_preflight_warns_of_a_judge_that_wanders_or_fails():
    """One line for each judge, whichever rewards share it; what is no judge's is not asked about."""

    def spec(name: str, kind: str, url: str, **options) -> RewardSpec:
        judge = {"base_urls": url, "model": "m", "retries": 0, **options}
        return RewardSpec(name, {"class_path": f"rewards.image.{kind}", "init_args": {"judge": judge}})

    with serving("--wandering") as wanders, serving("--broken") as broken:
        specs = [
            spec("nice", "Aesthetic", wanders),
            spec("words", "OCR", wanders),
            spec("true", "Rubric", broken),
            RewardSpec("bright", "tests.helpers.runs:brightness"),
        ]
        asked = repeatability(load_rewards(specs), [an_image(0), an_image(1)], ["a red cube", "x"])
        judges = asyncio.run(asked)
    assert [(judge.judge, judge.rewards) for judge in judges] == [
        (f"m at {wanders}", ["nice", "words"]),
        (f"m at {broken}", ["true"]),
    ]
    assert [judge.spread for judge in judges] == [pytest.approx(0.004), None]
    # Three times what was measured; what is no P(yes) has no floor; what could not be measured has the least one.
    specs[3].scale, specs[3].noise = 2.0, 0.05
    noise = noise_of(load_rewards(specs), noise_metrics(judges))
    assert noise["words"] == Noise(0, 0)
    assert astuple(noise["nice"]) == pytest.approx((0.004, 0.012))
    assert astuple(noise["true"]) == pytest.approx((0.01 / 3, 0.01))
    assert astuple(noise["bright"]) == pytest.approx((0.1, 0.3))
    specs[0].scale, specs[2].noise = -10, 0.0
    noise = noise_of(load_rewards(specs), noise_metrics(judges))
    assert noise["nice"].floor == pytest.approx(0.12) and noise["true"] == Noise(0, 0)
    lines = [judge.line for judge in judges]
    assert lines[0].startswith(
        f"warning: judge m at {wanders}: 20 scores of one image differ by at most 0.004 in P(yes)"
    )
    assert 'VLLM_BATCH_INVARIANT: "1"' in lines[0]
    assert lines[1].startswith(f"warning: judge m at {broken}: its repeatability is unknown")
    assert "illegal memory access" in lines[1] and lines[1].endswith("see that its server runs and serves this model")
    assert asyncio.run(repeatability(load_rewards(specs[3:]), [an_image(0)], ["x"])) == []


def test_a_judge_that_answers_otherwise_beside_another_is_found():
    """As a base did beside its adapters in vLLM on a CPU: alone, and in batches of its own, it repeats itself."""
    asked: dict[str, int] = {"base": 0, "adapter": 0}

    class Beside(Judge):
        async def _p_yes(self, encoded, text):
            asked[self.model] += 1
            await asyncio.sleep(0.01)
            asked[self.model] -= 1
            return 0.9 if self.model == "base" and asked["adapter"] else 0.2

    rewards = []
    for model in asked:
        reward = load_rewards([RewardSpec(model, {"class_path": "rewards.image.Aesthetic", "init_args": {
            "judge": {"model": model, "base_urls": "http://127.0.0.1:1/v1"}}})])[0]  # fmt: skip
        reward.function.judge = Beside(model, "http://127.0.0.1:1/v1")
        rewards.append(reward)
    base, adapter = asyncio.run(repeatability(rewards, [an_image(0), an_image(1)], ["x"]))
    assert base.spread == pytest.approx(0.7) and base.remedy and adapter.spread == 0
    assert asyncio.run(repeatability(rewards[:1], [an_image(0)], ["x"]))[0].spread == 0


@pytest.mark.long
def test_thousand_requests_with_faults_and_a_killed_server():
    """10 % of 1,000 pictures meet a fault, and the server dies on the way and comes back."""
    port = free_port()
    processes = [start(port, "--faults", "0.1", "--die-after", "400")]

    def restart() -> None:
        processes[0].wait()
        time.sleep(1)
        processes.append(start(port, "--faults", "0.1"))

    threading.Thread(target=restart, daemon=True).start()
    images = [an_image(i) for i in range(1000)]
    spec = RewardSpec(
        "aesthetic",
        {
            "class_path": "rewards.image.Aesthetic",
            "init_args": {"judge": {"base_urls": "server://vlm", "model": "m", "timeout": 2, "deadline": 60}},
        },
    )
    rewards = load_rewards([spec], {"vlm": [f"http://127.0.0.1:{port}/v1"]})
    try:
        with ScoreQueue(rewards) as queue:
            for i in range(0, 1000, 100):
                queue.submit(images[i : i + 100], ["x"] * 100)
            scores = queue.gather()
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert len(processes) == 2, "the server was not killed"
    urls = [encode(image).url for image in images]
    faults = [fake_judge.fault_of(url, 0.1) for url in urls]
    assert {*fake_judge.PASSING, *fake_judge.LASTING} <= {*faults}
    lasting = np.array([fault in fake_judge.LASTING for fault in faults])
    assert scores.values_NK.shape == (1000, 1)
    np.testing.assert_array_equal(scores.failed_NK[:, 0], lasting)
    np.testing.assert_array_equal(scores.valid_NK[:, 0], ~lasting)
    expected = np.array([fake_judge.score_of(url) for url in urls])
    np.testing.assert_allclose(scores.values_NK[~lasting, 0], expected[~lasting], atol=1e-9)
    assert sum(scores.failures["aesthetic"].values()) == lasting.sum()


def test_run_stops_with_the_servers_message():
    with serving("--broken") as url:
        judge = {"base_urls": url, "model": "m", "retries": 1}
        spec = RewardSpec("nice", {"class_path": "rewards.image.Aesthetic", "init_args": {"judge": judge}})
        stopped = pytest.raises(RewardError, match=r"reward nice: 4 of the last 4 .*illegal memory access")
        with ScoreQueue(load_rewards([spec])) as queue, stopped:
            queue.submit([an_image(i) for i in range(4)], ["x"] * 4)
            queue.gather()
