"""Renderers of expansions: K2 in process, and a real HTTP server with OpenAI's images endpoint."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from posttrain.config.types import ConfigError
from posttrain.errors import UserError
from posttrain.expander.gdpo_config import RendererConfig
from posttrain.expander.renderer import EndpointRenderer, K2Renderer, make_renderer
from tests.helpers import tiny
from tests.helpers.images_server import ImagesServer

PROMPTS = ["a red circle", "two blue squares above a green triangle", "a red circle"]


@pytest.fixture(scope="module")
def config(model):
    return RendererConfig(str(model), size=[32, 32], steps=2, guidance=0.0, dtype="float32", micro_batch=2)


@pytest.fixture(scope="module")
def k2(config):
    return K2Renderer(config, torch.device("cpu"))


def drawn_by(k2):
    def draw(body):
        return k2([body["prompt"]], [body["seed"]]).images[0]

    return draw


def flat(body):
    return Image.new("RGB", (32, 32), (body["seed"] % 256, 0, 0))


def pixels(image):
    return np.asarray(image, int)


def endpoint(config, server, **options):
    quick = {"timeout": 30.0, "deadline": 30.0, "retries": 2, **options}
    return EndpointRenderer(replace(config, urls=[server.url], **quick))


def test_the_same_prompt_and_seed_are_the_same_picture_wherever_they_stand(k2):
    """Of other lengths in the batch some padding remains, which moves a picture by no more than a rounding."""
    together = k2(PROMPTS, [5, 5, 5])
    alone = [k2([prompt], [5]).images[0] for prompt in PROMPTS]
    for one, other in zip(together.images, alone):
        assert np.abs(pixels(one) - pixels(other)).max() <= 1
    assert (pixels(together.images[0]) != pixels(k2(PROMPTS[:1], [6]).images[0])).any()
    assert (pixels(together.images[0]) != pixels(together.images[1])).any()


@pytest.mark.parametrize(("distilled", "steps", "guidance"), [(True, 8, 0.0), (False, 28, 4.5)])
def test_steps_and_guidance_are_the_checkpoints_own(tmp_path, distilled, steps, guidance):
    path = str(tiny.save(tmp_path / "pipe", distilled))
    made = make_renderer(RendererConfig(path, size=[32, 32], dtype="float32"), torch.device("cpu"))
    assert isinstance(made, K2Renderer)
    assert (made.steps, made.guidance) == (steps, guidance)


def test_a_prompt_beyond_the_text_length_is_cut_and_says_by_how_much(config, k2):
    with ImagesServer(flat) as server:
        long = " ".join(PROMPTS) * 3
        whole = len(k2.k2.tokenizer(long).input_ids)
        short = replace(config, max_tokens=20)
        cut = whole + 5 - 20  # five more tokens of that length are the template's
        assert cut > 0
        assert K2Renderer(short, torch.device("cpu"))([PROMPTS[0], long], [1, 1]).cut == [0, cut]
        assert endpoint(short, server)([PROMPTS[0], long], [1, 1]).cut == [0, cut]


def test_an_endpoint_draws_what_it_is_asked_for(config, k2):
    with ImagesServer(drawn_by(k2)) as server:
        rendering = endpoint(config, server, model="k2-turbo")(PROMPTS, [5, 2**40 + 7, 5])
    expected = k2(PROMPTS, [5, (2**40 + 7) % 2**31, 5])
    for one, other in zip(rendering.images, expected.images):
        assert np.abs(pixels(one) - pixels(other)).max() <= 1
    body = next(b for b in server.requests if b["prompt"] == PROMPTS[1])
    assert body == {
        "model": "k2-turbo", "prompt": PROMPTS[1], "n": 1, "size": "32x32", "response_format": "b64_json",
        "seed": (2**40 + 7) % 2**31, "num_inference_steps": 2, "guidance_scale": 0.0,
    }  # fmt: skip
    assert rendering.failures == {}


def test_settings_that_the_recipe_leaves_open_are_the_servers(config):
    with ImagesServer(flat) as server:
        endpoint(config, server, steps=None, guidance=None)(PROMPTS[:1], [1])
    assert {"num_inference_steps", "guidance_scale"}.isdisjoint(server.requests[0])


def test_a_server_that_stumbles_is_asked_again(config):
    def fault(number, body):
        return (503, b'{"error": {"message": "warming up"}}') if number < 2 else None

    with ImagesServer(flat, fault) as server:
        rendering = endpoint(config, server, deadline=20.0)(PROMPTS[:1], [9])
    assert pixels(rendering.images[0])[0, 0].tolist() == [9, 0, 0]
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ((400, b'{"error": {"message": "seed must be small"}}'), "seed must be small"),
        ((200, b'{"data": []}'), "is not an image"),
        ((200, b'{"data": [{"b64_json": "bm8gcGljdHVyZQ=="}]}'), "is not an image"),
        ((200, b"<html>"), "is not an image"),
    ],
)
def test_a_picture_that_cannot_be_had_is_missing(config, answer, reason):
    """Of seventeen, one: below the limit. It is None, and the others are what they should be."""

    def fault(number, body):
        return answer if body["seed"] == 4 else None

    with ImagesServer(flat, fault) as server:
        rendering = endpoint(config, server)([f"circle {i}" for i in range(17)], list(range(17)))
    assert [image is None for image in rendering.images] == [i == 4 for i in range(17)]
    [(message, count)] = rendering.failures.items()
    assert reason in message and count == 1


def test_a_picture_of_another_size_is_missing(config):
    def draw(body):
        return Image.new("RGB", (64, 64) if body["seed"] == 0 else (32, 32))

    with ImagesServer(draw) as server:
        rendering = endpoint(config, server)(PROMPTS[:2], [0, 1])
    assert rendering.images[0] is None and rendering.images[1] is not None
    assert list(rendering.failures) == ["the server drew 64 x 64 pixels, not 32 x 32"]


def test_a_slow_server_leaves_pictures_missing_and_then_ends_the_run(config):
    with ImagesServer(flat, seconds=1.0) as server:
        slow = endpoint(config, server, timeout=0.1, deadline=0.3)
        with pytest.raises(UserError, match=r"renderer: 2 of the last 2 images missing .*timed out"):
            slow(PROMPTS[:2], [1, 2])
        patient = endpoint(config, server, timeout=0.1, deadline=0.3, max_failures=1.0)
        assert patient(PROMPTS[:2], [1, 2]).images == [None, None]


def test_the_servers_own_message_ends_the_run_when_too_much_is_missing(config):
    def fault(number, body):
        return (400, b'{"error": {"message": "out of memory on device 0"}}') if body["seed"] % 2 else None

    with ImagesServer(flat, fault) as server:
        renderer = endpoint(config, server, max_failures=0.05)  # 12.8 of 256
        renderer([f"circle {i}" for i in range(24)], list(range(24)))
        with pytest.raises(UserError, match=r"13 of the last 26 images .*out of memory on device 0"):
            renderer(PROMPTS[:2], [1, 2])


def test_a_server_that_is_down_ends_the_run(config):
    down = EndpointRenderer(replace(config, urls=["http://127.0.0.1:9/v1"], deadline=0.5, timeout=0.5))
    with pytest.raises(UserError, match=r"renderer: 1 of the last 1 image missing .*127\.0\.0\.1:9"):
        down(PROMPTS[:1], [1])


def test_a_key_is_sent_and_never_repeated(config, monkeypatch):
    with pytest.raises(UserError, match=r"renderer.api_key_env: DRAWS is not set"):
        EndpointRenderer(replace(config, urls=["http://127.0.0.1:9/v1"], api_key_env="DRAWS"))
    monkeypatch.setenv("DRAWS", "hidden-key")
    refusal = json.dumps({"error": {"message": "hidden-key is not allowed"}}).encode()
    with ImagesServer(flat, lambda number, body: (401, refusal)) as server, pytest.raises(UserError) as raised:
        endpoint(config, server, api_key_env="DRAWS")(PROMPTS[:1], [1])
    assert "*** is not allowed" in str(raised.value) and "hidden-key" not in str(raised.value)
    assert server.keys == {"Bearer hidden-key"}


def test_a_renderer_without_a_tokenizer_is_refused(config, tmp_path):
    with pytest.raises(UserError, match=r"renderer.path: .*/tokenizer: no such directory, so it has no tokenizer"):
        EndpointRenderer(replace(config, path=str(tmp_path), urls=["http://127.0.0.1:9/v1"]))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("size", [30, 32], "use 32"), ("timeout", 0.0, "above 0"), ("max_failures", 2.0, "0 to 1"), ("steps", 0, "1 or")],
)
def test_ranges(config, field, value, message):
    with pytest.raises(ConfigError, match=message) as raised:
        replace(config, **{field: value})
    assert raised.value.field == field
