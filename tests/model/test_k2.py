"""K2 against stock diffusers, on a tiny real pipeline in fp32."""

import numpy as np
import pytest
import torch

from posttrain.errors import UserError
from posttrain.model import k2, sampler
from posttrain.model.k2 import K2, Text
from tests.helpers import tiny

SIZES = [(32, 32), (32, 56)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("tiny") / "raw")


@pytest.fixture(scope="module")
def turbo_directory(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("tiny") / "turbo", distilled=True)


@pytest.fixture(scope="module")
def model(directory):
    return K2.load(directory)


@pytest.fixture(scope="module")
def stock():
    pipe = tiny.pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(model, height, width, batch=1, seed=0):
    seeds = [sampler.seed_for(seed, i) for i in range(batch)]
    return sampler.noise(seeds, (model.image_tokens(height, width), model.latent_channels))


def distance(a, b):
    return (a - b).abs().max().item()


# parity with the stock pipeline


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("guidance", [0.0, 4.5])
def test_raw_latents_equal_stock(model, stock, guidance, height, width):
    prompts = tiny.PROMPTS[:3]  # of different lengths: stock pads, we mask
    noise = latents(model, height, width, len(prompts))
    expected = stock(
        prompts,
        height=height,
        width=width,
        num_inference_steps=6,
        guidance_scale=guidance,
        latents=noise.clone(),
        output_type="latent",
        max_sequence_length=64,
    ).images
    text, null = model.text(prompts, max_tokens=64), model.text([""], max_tokens=64)
    ours = model.sample(text, noise, 6, height, width, guidance, null)
    assert distance(ours, expected) < 1e-4
    assert distance(ours, noise) > 1


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_turbo_latents_equal_stock(turbo_directory, height, width):
    model, stock = K2.load(turbo_directory), tiny.pipeline(distilled=True)
    assert model.is_distilled and model.mu(height, width) == 1.15
    stock.set_progress_bar_config(disable=True)
    noise = latents(model, height, width, 2)
    prompt = tiny.PROMPTS[1]
    expected = stock(
        [prompt] * 2,
        height=height,
        width=width,
        num_inference_steps=8,
        guidance_scale=0.0,
        latents=noise.clone(),
        output_type="latent",
    ).images
    ours = model.sample(model.text([prompt]), noise, 8, height, width)
    assert distance(ours, expected) < 1e-4


def test_pictures_equal_stock(model, stock):
    height, width = 32, 56
    z = latents(model, height, width, 3)
    expected = stock(
        prompt=tiny.PROMPTS[:3], height=height, width=width, num_inference_steps=1, guidance_scale=0.0,
        latents=z.clone(), output_type="pil", max_sequence_length=64,
    ).images  # fmt: skip
    ours = model.sample(model.text(tiny.PROMPTS[:3]), z, 1, height, width)
    pictures = model.decode(ours, height, width, batch=2)
    assert pictures.shape == (3, height, width, 3) and pictures.dtype == torch.uint8
    for mine, theirs in zip(k2.to_pil(pictures), expected):
        assert mine.size == (width, height)
        assert np.abs(np.asarray(mine, int) - np.asarray(theirs, int)).max() <= 1
    assert pictures.float().std() > 1


def test_encoding_equals_stock_padded(model, stock):
    prompts = ["", *tiny.PROMPTS]
    states, mask = stock.get_text_hidden_states(prompts, 64)
    encoding = model.encode(prompts, max_tokens=64, batch=2)
    assert encoding.cut == [0] * len(prompts)
    assert len(encoding.features[0]) == 5  # the empty prompt is the suffix alone
    for ours, theirs, keep in zip(encoding.features, states, mask):
        assert ours.shape == theirs[keep].shape
        assert distance(ours, theirs[keep]) < 1e-5
        assert ours.std() > 0.1


def test_long_prompts_are_cut_as_stock_cuts_them(model, stock):
    prompt = " ".join(tiny.PROMPTS)
    states, mask = stock.get_text_hidden_states(prompt, 16)
    encoding = model.encode([prompt, "a red circle"], max_tokens=16)
    assert mask.all() and distance(encoding.features[0], states[0]) < 1e-5
    assert encoding.cut == [len(stock.tokenizer(prompt)["input_ids"]) - (16 - 5), 0]


def test_cached_text_and_dropped_padding_equal_the_stock_forward(model, stock):
    """Stock fuses padded, masked text each time; we fuse real tokens once and mask only mixed lengths."""
    height, width = 32, 56
    prompts = tiny.PROMPTS[:3]
    x, t = latents(model, height, width, 3), torch.tensor([0.9, 0.5, 0.2])
    states, mask = stock.get_text_hidden_states(prompts, 64)
    ids = stock.prepare_position_ids(64, *model.grid(height, width), torch.device("cpu"))
    with torch.no_grad():
        expected = stock.transformer(x, states, t, ids, mask, return_dict=False)[0]
        unmasked = stock.transformer(x, states, t, ids, None, return_dict=False)[0]
        mixed = model.velocity(x, t, model.text(prompts), height, width)
        alone = [
            model.velocity(x[i : i + 1], t[i], model.text([prompt]), height, width) for i, prompt in enumerate(prompts)
        ]
    scale = expected.abs().max().item()
    assert distance(mixed, expected) < 1e-5 * scale
    assert distance(torch.cat(alone), expected) < 1e-5 * scale
    assert distance(unmasked, expected) > 0.1 * scale  # the mask matters, so does dropping what it hid


def test_dropped_tokens_equal_masked_tokens_in_double_precision():
    transformer = tiny.pipeline().transformer.double()
    states = torch.randn(1, 12, 3, 48, dtype=torch.float64)
    mask = torch.tensor([[True] * 4 + [False] * 5 + [True] * 3])
    x, t = torch.randn(1, 16, 64, dtype=torch.float64), torch.tensor([0.6])
    pipe = tiny.Krea2Pipeline
    with torch.no_grad():
        masked = transformer(x, states, t, pipe.prepare_position_ids(12, 4, 4, "cpu"), mask, return_dict=False)[0]
        short_ids = pipe.prepare_position_ids(7, 4, 4, "cpu")
        dropped = transformer(x, states[:, mask[0]], t, short_ids, None, return_dict=False)[0]
    assert distance(masked, dropped) < 1e-12


def test_fused_text_ignores_time_and_velocity_does_not(model):
    height, width = 32, 32
    x = latents(model, height, width)
    captured = []
    hook = model.transformer.txt_in.register_forward_hook(lambda *call: captured.append(call[2]))
    states = model.encode(tiny.PROMPTS[:1]).features[0][None]
    ids = tiny.Krea2Pipeline.prepare_position_ids(states.shape[1], 4, 4, "cpu")
    with torch.no_grad():
        for t in (0.1, 0.9):
            model.transformer(x, states, torch.tensor([t]), ids)
    hook.remove()
    assert torch.equal(*captured)
    assert torch.equal(captured[0][0], model.fuse(states[0]))

    text, other = model.text([tiny.PROMPTS[0]]), model.text([tiny.PROMPTS[1]])
    v = model.velocity(x, 0.9, text, height, width)
    assert v.abs().mean() > 0.1
    assert distance(v, model.velocity(x, 0.1, text, height, width)) > 0.1
    assert distance(v, model.velocity(x, 0.9, other, height, width)) > 0.1
    assert distance(v, model.velocity(latents(model, 32, 32, seed=1), 0.9, text, height, width)) > 0.1


def test_pipeline_time_rounding_can_be_reproduced(model):
    text, x = model.text([""]), latents(model, 32, 32)
    exact = model.velocity(x, 0.956724, text, 32, 32)
    model.time_dtype = torch.bfloat16
    rounded = model.velocity(x, 0.956724, text, 32, 32)
    model.time_dtype = torch.float32
    assert distance(rounded, model.velocity(x, 0.95703125, text, 32, 32)) == 0
    assert distance(rounded, exact) > 0


# shapes


def test_pack_and_unpack():
    x = torch.arange(4 * 6 * 8, dtype=torch.float32).view(1, 4, 6, 8)
    tokens = k2.pack(x)
    assert tokens.shape == (1, 12, 16)
    assert tokens[0, 0, :6].tolist() == [0, 1, 8, 9, 48, 49]
    assert torch.equal(k2.unpack(tokens, 3, 4), x)
    pipe = tiny.Krea2Pipeline
    assert torch.equal(tokens, pipe._pack_latents(type("P", (), {"patch_size": 2}), x, 1, 4, 6, 8))


def test_sizes(model):
    assert model.pixel_multiple == 8  # two halvings and a patch of 2 here; 16 for the released checkpoint
    assert model.grid(32, 56) == (4, 7) and model.image_tokens(32, 56) == 28 and model.latent_channels == 64
    assert not model.is_distilled and model.mu(128, 128) == 0.5  # 256 tokens
    with pytest.raises(UserError, match="33x32: both must be multiples of 8"):
        model.grid(33, 32)
    with pytest.raises(ValueError, match="not for 32x32"):
        model.velocity(torch.zeros(1, 28, 64), 0.5, Text(torch.zeros(1, 5, 128)), 32, 32)


def test_aspect_ratios_alternate_in_one_run(model):
    text = {n: model.text([prompt]) for n, prompt in enumerate(tiny.PROMPTS)}
    calls = [(32, 56, 0), (56, 32, 3), (32, 56, 2), (16, 16, 1)]
    first = [model.velocity(latents(model, h, w), 0.5, text[n], h, w) for h, w, n in calls]
    again = [model.velocity(latents(model, h, w), 0.5, text[n], h, w) for h, w, n in reversed(calls)]
    assert all(torch.equal(a, b) for a, b in zip(first, reversed(again)))


def test_text_batches(model):
    fused = [model.fuse(features) for features in model.encode(tiny.PROMPTS[:2]).features]
    mixed = Text.of(fused)
    assert mixed.mask is not None and mixed.mask.sum(1).tolist() == [len(tokens) for tokens in fused]
    assert Text.of([fused[0], fused[0]]).mask is None
    groups = mixed.repeat(3)
    assert len(groups) == 6 and torch.equal(groups.tokens[2], mixed.tokens[0])
    # One text serves a whole group of samples.
    x = latents(model, 32, 32, 3)
    one, many = Text.of(fused[:1]), Text.of(fused[:1]).repeat(3)
    assert torch.equal(model.velocity(x, 0.5, one, 32, 32), model.velocity(x, 0.5, many, 32, 32))


def test_texts_are_fused_together_as_alone(model):
    """In the order of the prompts, whatever their lengths, also where more than one batch has a length."""
    features = [model.random_features(length, seed) for seed, length in enumerate([5, 9, 5, *[7] * 20, 9])]
    for together, own in zip(model.all_text_tokens(features), features, strict=True):
        torch.testing.assert_close(together, model.text_tokens(own), rtol=1e-5, atol=1e-5)
        assert together._base is None
    assert model.all_text_tokens([]) == []


def test_images_to_latents(model, stock):
    images = torch.randint(0, 256, (3, 32, 56, 3), dtype=torch.uint8)
    z = model.encode_images(images, batch=2)
    assert z.shape == (3, 28, 64) and z.dtype == torch.float32
    assert distance(z, model.encode_images(k2.to_pil(images))) < 1e-6
    with torch.no_grad():
        raw = stock.vae.encode(images.permute(0, 3, 1, 2).float()[:, :, None] / 127.5 - 1).latent_dist.mode()
    mean, std = (torch.tensor(stock.vae.config[key]).view(1, 16, 1, 1) for key in ("latents_mean", "latents_std"))
    assert distance(k2.unpack(z, 4, 7), (raw[:, :, 0] - mean) / std) < 1e-5
    many = images.repeat(k2.ENCODED // 3 + 1, 1, 1, 1)
    assert distance(model.encode_images(many)[-3:], z) < 1e-6
    with pytest.raises(UserError, match=r"multiples of 8"):
        model.encode_images(torch.zeros(1, 30, 32, 3, dtype=torch.uint8))


def test_result_does_not_depend_on_the_batch(model):
    noise = latents(model, 32, 32, 4)
    assert torch.equal(noise[2:3], sampler.noise([sampler.seed_for(0, 2)], (16, 64)))
    text = model.text(tiny.PROMPTS[:1])
    together = model.sample(text, noise, 4, 32, 32)
    assert distance(together[2:3], model.sample(text, noise[2:3], 4, 32, 32)) < 1e-5
