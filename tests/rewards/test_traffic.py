"""What grows with processes and questions: an image's bytes travel once to a server that holds images, requests are
limited for a whole run, a busy server is left alone by all, and what is kept is limited in bytes."""

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from posttrain.errors import UserError
from posttrain.pipeline import ranks
from posttrain.training import image_metrics
from posttrain.training.prompt_source import FusedTexts
from prompts.templates import Template
from rewards import encode as encoding
from rewards import traffic
from rewards.base import RewardSpec
from rewards.encode import encode
from rewards.endpoints import share
from rewards.judge import Judge
from tests.helpers import fake_judge

QUESTIONS = [Template(f"q{i}", f"Question {i}? Answer yes or no.") for i in range(4)]


@pytest.fixture(autouse=True)
def large_enough(monkeypatch):
    """The images of these tests are small, and stand for large ones."""
    monkeypatch.setattr(traffic, "NAMED", 0)


def images(count: int) -> list[Image.Image]:
    return [Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)) for i in range(count)]


class Holding:
    """vLLM, as far as images go: it keeps the newest `room` of those that come with an id."""

    def __init__(self, room: int, fingerprint: str = "vllm-0.32.0-x", forgets_at: int = -1):
        self.room, self.fingerprint, self.forgets_at = room, fingerprint, forgets_at
        self.held: dict[str | None, str] = {}
        self.sent: list[str] = []
        """How each request had its image: bytes, bytes and id, id, or missed."""

    def respond(self, head: str, body: bytes) -> bytes:
        if len(self.sent) == self.forgets_at:
            self.held.clear()
        part = json.loads(body)["messages"][0]["content"][0]
        name, url = part.get("uuid"), (part["image_url"] or {}).get("url")
        if url is None and name not in self.held:
            self.sent.append("missed")
            error = {"error": {"message": "Cache miss for image at index 0 but data is not provided.", "code": 400}}
            return fake_judge.reply("400 Bad Request", json.dumps(error).encode(), "Connection: close")
        self.sent.append("id" if url is None else "bytes and id" if name else "bytes")
        if name is not None:
            self.held[name] = self.held.pop(name, None) or url
            while len(self.held) > self.room:
                del self.held[next(iter(self.held))]
        answer = json.loads(fake_judge.answer(url or self.held.get(name) or "", None))
        answer["system_fingerprint"] = self.fingerprint
        return fake_judge.reply("200 OK", json.dumps(answer).encode(), "Connection: close")


def ask(server: Holding, count: int, concurrency: int = 8) -> None:
    """Two judges ask four questions each about each image; every score is the image's."""
    shown = images(count)

    async def scores(url: str) -> list[list[float]]:
        judges = [Judge(name, url, concurrency=concurrency) for name in ("a", "b")]
        asked = [[judge.p_yes(image, q) for judge in judges for q in QUESTIONS] for image in shown]
        return await asyncio.gather(*(asyncio.gather(*row) for row in asked))

    found = asyncio.run(asyncio.wait_for(fake_judge.served(server.respond, scores), 30))
    expected = [[fake_judge.score_of(encode(image).url)] * 8 for image in shown]
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_an_images_bytes_travel_once_for_all_its_questions():
    """But for the very first question, which shows what kind of server it is."""
    server = Holding(room=100)
    ask(server, 6)
    assert [server.sent.count(how) for how in ("bytes", "bytes and id", "id", "missed")] == [1, 6, 6 * 8 - 7, 0]


def test_no_more_images_than_requests_are_under_way():
    """So that a server with room for two has not dropped one of two before its last question."""
    server = Holding(room=2)
    ask(server, 6, concurrency=2)
    assert server.sent.count("missed") == 0 and server.sent.count("bytes and id") == 6


def test_an_image_that_the_server_has_dropped_is_sent_again():
    server = Holding(room=100, forgets_at=20)
    ask(server, 6, concurrency=2)
    missed = server.sent.count("missed")
    again = server.sent.count("bytes and id") - 6
    assert 1 <= missed <= again <= 4 and server.sent.count("bytes") == 1  # four are under way


def test_ids_are_given_up_where_they_are_never_known():
    server = Holding(room=0)
    ask(server, 12)
    assert server.sent.count("id") == 0 and server.sent.count("missed") <= traffic.MISSES + 8  # those under way
    assert server.sent.count("bytes") > 12 * 8 / 2


def test_a_small_image_travels_with_each_question(monkeypatch):
    """And waits for no other's answer."""
    monkeypatch.setattr(traffic, "NAMED", 1 << 16)
    server = Holding(room=100)
    ask(server, 6)
    assert set(server.sent) == {"bytes"} and len(server.sent) == 48


def test_another_server_gets_no_ids():
    server = Holding(room=100, fingerprint="fp_1")
    ask(server, 3)
    assert set(server.sent) == {"bytes"} and len(server.sent) == 24


def test_a_busy_server_is_left_alone_by_all_requests_of_the_process():
    """Four are refused at once, for a second: eight questions of two judges take twelve requests, none before that."""
    times: list[float] = []

    def respond(head: str, body: bytes) -> bytes:
        times.append(time.monotonic())
        if times[-1] < times[0] + 0.5:
            return fake_judge.reply("429 Too Many Requests", b"{}", "Connection: close", "Retry-After: 1")
        return fake_judge.reply("200 OK", fake_judge.answer("x", None), "Connection: close")

    async def main(url: str) -> None:
        judges = [Judge(name, url, concurrency=2) for name in ("a", "b")]
        await asyncio.gather(*(judge.p_yes_text(q) for judge in judges for q in QUESTIONS))

    asyncio.run(asyncio.wait_for(fake_judge.served(respond, main), 30))
    assert len(times) == 4 + 8 and times[3] - times[0] < 0.5
    assert times[4] - times[0] >= 1 and times[-1] - times[0] < 5


def test_pauses_double_with_new_refusals_only(monkeypatch):
    monkeypatch.setattr(traffic.JITTER, "uniform", lambda low, high: high)

    async def main() -> None:
        now = asyncio.get_running_loop().time
        state = traffic.ServerState("u")
        for pause in (0.5, 1.0, 2.0):
            state.opens = 0.0
            earlier = now() - 1
            state.refused(now(), 0.0, "busy")
            state.refused(earlier, 0.0, "busy")  # it was under way
            assert state.pause() == pytest.approx(pause, abs=0.1)
        state.answered({}, None, "bytes")
        state.opens = 0.0
        state.refused(now(), 0.0, "busy")
        assert state.pause() == pytest.approx(0.5, abs=0.1)

    asyncio.run(main())


def test_concurrency_is_the_runs(monkeypatch):
    assert [share(n) for n in (1, 128)] == [1, 128]
    monkeypatch.setenv("WORLD_SIZE", "56")
    assert [share(n) for n in (1, 128, 560)] == [1, 2, 10]
    with pytest.raises(UserError, match="judge m: concurrency: 0: use 1 or more"):
        Judge("m", "http://127.0.0.1:1/v1", concurrency=0)


def test_encoded_images_are_kept_up_to_a_number_of_bytes(monkeypatch):
    made: list[int] = []
    stored: Callable[[Image.Image], bytes] = encoding._stored_png

    def counted(image: Image.Image) -> bytes:
        made.append(1)
        return stored(image)

    monkeypatch.setattr(encoding, "_stored_png", counted)
    shown = [Image.new("RGB", (9, 9), (i, 0, 0)) for i in range(4)]
    size = len(encode(shown[0]).url)
    monkeypatch.setattr(encoding, "_encoded", type(encoding._encoded)())
    monkeypatch.setattr(encoding, "_kept", 0)
    monkeypatch.setattr(encoding, "CACHED_BYTES", 3 * size)
    made.clear()
    for i in (0, 1, 2, 0, 3, 0, 1):  # 3 pushes 1 out, which was used before 0 was again
        encode(shown[i])
    assert len(made) == 5 and encoding._kept == 3 * size == sum(len(f.result().url) for f in encoding._encoded.values())


def test_fused_text_is_kept_up_to_a_number_of_bytes():
    """In RAM; what was not asked for the longest goes first, and comes back the same."""

    class Stub:
        device = torch.device("cpu")

        def __init__(self):
            self.encoded: list[str] = []

        def encode(self, prompts, max_tokens, batch):
            assert batch == 1
            self.encoded += prompts
            return type("Encoding", (), {"features": [torch.full((4, 2), float(p)) for p in prompts]})()

        def text_tokens(self, features):
            return features + 1

    k2 = Stub()
    texts = FusedTexts(k2, 64, limit=3 * 32)  # type: ignore[arg-type]
    for prompts in (["0", "1", "2"], ["0"], ["3"], ["0", "1"], ["4", "5", "6", "7"]):
        assert [float(text[0, 0]) - 1 for text in texts(prompts)] == [float(p) for p in prompts]
        assert texts.bytes <= 3 * 32
    assert k2.encoded == ["0", "1", "2", "3", "1", "4", "5", "6", "7"]


def test_measures_of_single_images_come_to_the_figures_of_all():
    rng = np.random.default_rng(0)
    shown, latents = rng.integers(0, 256, (5, 32, 48, 3), dtype=np.uint8), rng.normal(size=(5, 6, 8)).astype(np.float32)
    found = image_metrics.means([image_metrics.measure(*one) for one in zip(shown, latents)])
    assert found == pytest.approx(
        {
            "image/brightness": image_metrics.brightness(shown),
            "image/saturation": image_metrics.saturation(shown),
            "image/high_frequency": image_metrics.high_frequency(shown),
            "image/latent_norm": float(np.sqrt(np.square(latents).mean())),
            "image/contrast": image_metrics.contrast(shown),
            "image/high_energy": image_metrics.high_energy(shown),
        },
        rel=1e-6,
    )


# ---- the model of the traffic -----------------------------------------------------------------------------


def test_bytes_and_requests_are_counted_as_the_arithmetic_says():
    image = ranks.Images(1024, 1024)
    assert image.raw == 3 * 2**20 and image.latents == 2**20
    # Of 16 images shown, ranks 1 to 3 of 4 have 12; of two groups of 2 the images 1, 2 and 3 are on another rank than
    # their group: 1 on 1 for 0, 2 on 2 for 1, 3 on 3 for 1.
    assert ranks.evaluation_bytes(64, 2, 2, False, 4, image) == 12 * image.raw
    assert ranks.evaluation_bytes(64, 2, 2, True, 4, image) == 15 * image.raw
    rewards = [RewardSpec(kind, f"rewards.image:{kind}") for kind in ("Rubric", "OCR", "Artifact")]
    assert ranks.questions(rewards, 4.0, 0.5) == 5.5
    before, after = ranks.judge_bytes(10, 5.5, image)
    assert before == 55 * (2 * 2**20 + 500) and after == 10 * (2 * 2**20 + 4.5 * 500)
    assert ranks.in_flight(4, 56) == (7168, 448)


def test_the_table_of_the_64_gpus_is_what_the_docs_show():
    assert ranks.table("recipes/k2/pipeline_64.yaml", [512, 1024]) in Path("docs/scaling.md").read_text()
