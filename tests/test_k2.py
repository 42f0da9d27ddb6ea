"""K2 against stock diffusers, on a tiny real pipeline in fp32; and its adapters against algebra."""

import json
import shutil
import time

import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_krea2_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file, save_file

from posttrain import k2, original, sampler
from posttrain.k2 import K2, Text
from posttrain.load import keeps_fp32
from prompts.errors import UserError
from tests import tiny

SIZES = [(32, 32), (32, 56)]
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("tiny") / "raw")


@pytest.fixture(scope="module")
def turbo_directory(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("tiny") / "turbo", distilled=True)


@pytest.fixture(scope="module")
def model(directory):
    return K2.load(directory)


@pytest.fixture
def fresh(directory):
    """For tests that change the model."""
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


def test_images_to_latents(model, stock):
    pictures = torch.randint(0, 256, (3, 32, 56, 3), dtype=torch.uint8)
    z = model.encode_images(pictures, batch=2)
    assert z.shape == (3, 28, 64) and z.dtype == torch.float32
    assert distance(z, model.encode_images(k2.to_pil(pictures))) < 1e-6
    with torch.no_grad():
        raw = stock.vae.encode(pictures.permute(0, 3, 1, 2).float()[:, :, None] / 127.5 - 1).latent_dist.mode()
    mean, std = (torch.tensor(stock.vae.config[key]).view(1, 16, 1, 1) for key in ("latents_mean", "latents_std"))
    assert distance(k2.unpack(z, 4, 7), (raw[:, :, 0] - mean) / std) < 1e-5
    with pytest.raises(UserError, match=r"multiples of 8"):
        model.encode_images(torch.zeros(1, 30, 32, 3, dtype=torch.uint8))


# checkpoints


def test_original_names_are_exact_inverses(directory):
    state = load_file(directory / "transformer" / WEIGHTS)
    names = original.to_original(state)
    assert {
        "first.weight",
        "blocks.0.attn.qknorm.qnorm.scale",
        "txtfusion.projector.weight",
        "last.modulation.lin",
    } <= set(names)
    assert names["blocks.0.mod.lin"].shape == (6 * 128,) and names["last.modulation.lin"].shape == (2, 128)
    back = original.from_original(names)
    assert back.keys() == state.keys() and all(torch.equal(back[key], state[key]) for key in state)
    prefixed = {original.PREFIX + key: value for key, value in names.items()}
    for version in (names, prefixed):
        theirs = convert_krea2_transformer_checkpoint_to_diffusers(dict(version))
        ours = original.from_original(version)
        assert theirs.keys() == ours.keys() and all(torch.equal(theirs[key], ours[key]) for key in ours)
    assert original.original_name("transformer_blocks.1.ff.up.lora_A.weight") == "blocks.1.mlp.up.lora_A.weight"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_single_file_loads_to_the_same_velocity(directory, tmp_path, dtype):
    file = tmp_path / "raw.safetensors"
    save_file(original.to_original(load_file(directory / "transformer" / WEIGHTS)), file)
    single, whole = K2.load(directory, file, dtype=dtype), K2.load(directory, dtype=dtype)
    x = latents(whole, 32, 32)
    v = [m.velocity(x, 0.5, m.text(["a red circle"]), 32, 32) for m in (single, whole)]
    assert distance(*v) < (1e-5 if dtype == torch.float32 else 0.05) * v[0].abs().max()
    for name, parameter in single.transformer.named_parameters():
        assert torch.equal(parameter, whole.transformer.get_parameter(name))
        assert parameter.dtype == (torch.float32 if keeps_fp32(name) else dtype), name
        assert parameter.dtype == whole.transformer.get_parameter(name).dtype


def edited(directory, tmp_path, edit):
    state = original.to_original(load_file(directory / "transformer" / WEIGHTS))
    edit(state)
    save_file(state, tmp_path / "edited.safetensors")
    return tmp_path / "edited.safetensors"


def drop_blocks(state):
    for key in [key for key in state if key.startswith("blocks.2.")]:
        del state[key]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop_blocks, r"13 missing \(blocks\.2\.mod\.lin, blocks\.2\.\S+, blocks\.2\.\S+, \.\.\.\)"),
        (lambda s: s.update(extra=torch.zeros(2)), r"1 unexpected \(extra\)"),
        (lambda s: s.update({"first.weight": torch.zeros(128, 32)}), r"1 of another shape \(first\.weight\)"),
        (
            lambda s: s.update({"blocks.0.mod.lin": torch.zeros(5)}),
            r"of another shape \(blocks\.0\.mod\.lin\)",
        ),
    ],
)
def test_single_file_with_wrong_keys(directory, tmp_path, edit, message):
    with pytest.raises(UserError, match=message) as error:
        K2.load(directory, edited(directory, tmp_path, edit))
    assert "edited.safetensors" in str(error.value) and "\n" not in str(error.value)


def test_not_a_single_file(directory, tmp_path):
    with pytest.raises(UserError, match="no such file"):
        K2.load(directory, tmp_path / "none.safetensors")
    (tmp_path / "raw.ckpt").write_bytes(b"x")
    with pytest.raises(UserError, match=r"only \.safetensors"):
        K2.load(directory, tmp_path / "raw.ckpt")
    whole = (directory / "transformer" / WEIGHTS).read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"cut\.safetensors: not a whole safetensors file"):
        K2.load(directory, tmp_path / "cut.safetensors")


def test_not_a_pipeline(directory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(UserError, match="no such directory"):
        K2.load("runs/none")  # shaped like a hub id, but its parent is here
    with pytest.raises(UserError, match="no such directory"):
        K2.load(tmp_path / "none")
    with pytest.raises(UserError, match=r"no model_index\.json"):
        K2.load(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {"_class_name": "FluxPipeline"}))
    with pytest.raises(UserError, match="holds a FluxPipeline"):
        K2.load(copy)
    (copy / "model_index.json").write_text("{")
    with pytest.raises(UserError, match="not a pipeline index"):
        K2.load(copy)


def test_broken_directories(directory, tmp_path):
    file = tmp_path / "copy" / "transformer" / WEIGHTS
    shutil.copytree(directory, tmp_path / "copy")
    state = load_file(file)

    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        K2.load(tmp_path / "copy")
    save_file({key: value for key, value in state.items() if not key.startswith("img_in")}, file)
    with pytest.raises(UserError, match="img_in"):
        K2.load(tmp_path / "copy")
    save_file(state | {"extra": torch.zeros(1)}, file)
    with pytest.raises(UserError, match="extra"):
        K2.load(tmp_path / "copy")
    save_file(state | {"img_in.weight": torch.zeros(128, 32)}, file)
    with pytest.raises(UserError, match=r"img_in\.weight"):
        K2.load(tmp_path / "copy")
    file.unlink()
    torch.save(state, file.with_suffix(".bin"))  # pickle is never read
    with pytest.raises(UserError, match="safetensors"):
        K2.load(tmp_path / "copy")


def test_random_weights():
    model = K2.random("cpu", torch.bfloat16, scale="tiny")
    assert model.dtype == torch.bfloat16 and model.pixel_multiple == 8
    assert all(
        p.dtype == (torch.float32 if keeps_fp32(n) else torch.bfloat16) for n, p in model.transformer.named_parameters()
    )
    text = Text.of([model.fuse(model.random_features(7)), model.fuse(model.random_features(9, seed=1))])
    assert len(model.encode_tokens([[1] * 40])[0]) == 40 - 34
    x = model.sample(text, latents(model, 32, 32, 2), 3, 32, 32)
    assert x.dtype == torch.float32 and x.isfinite().all() and 0.1 < x.std() < 10
    assert model.decode(x, 32, 32).shape == (2, 32, 32, 3)
    again = K2.random("cpu", torch.bfloat16, scale="tiny", text=False)
    assert again.text_encoder is None and torch.equal(again.transformer.img_in.weight, model.transformer.img_in.weight)
    assert again.config_fingerprint() == model.config_fingerprint()
    with pytest.raises(RuntimeError, match="random_features"):
        model.encode(["a"])


def test_random_weights_have_the_released_size():
    model = K2.random("meta", torch.bfloat16)
    assert sum(p.numel() for p in model.transformer.parameters()) == pytest.approx(12.82e9, rel=1e-3)
    assert model.pixel_multiple == 16 and model.mu(1024, 1024) == 0.90625 and model.latent_channels == 64
    fp32 = sum(p.numel() for p in model.transformer.parameters() if p.dtype == torch.float32)
    assert 0 < fp32 < 1e6
    assert model.text_encoder is not None
    assert sum(p.numel() for p in model.text_encoder.language_model.parameters()) == pytest.approx(4.0e9, rel=0.03)


# roles


def nudge(model, name, seed=0):
    """Give an adapter a B that does something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.role_named_parameters(name).items():
            if "lora_B" in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def probe(model, role):
    x = latents(model, 32, 32, 2)
    with model.role(role):
        return model.velocity(x, 0.5, model.text(tiny.PROMPTS[:1]), 32, 32)


def test_untrained_adapter_is_the_base(fresh):
    before = probe(fresh, None)
    fresh.add_role("policy", rank=4, alpha=8)
    assert len(fresh.role_parameters("policy")) == 2 * 8 * 3  # two factors, eight linears, three blocks
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in fresh.role_parameters("policy"))
    assert fresh.fused_text_is_constant()
    assert torch.equal(probe(fresh, "policy"), before) and torch.equal(probe(fresh, None), before)
    first = fresh.role_state_dict("policy")["transformer_blocks.0.attn.to_q.lora_A.weight"]
    assert 0 < first.abs().max() <= 128**-0.5


def test_only_the_trained_role_moves(fresh):
    base = probe(fresh, None)
    for seed, name in enumerate(("student", "fake")):
        fresh.add_role(name, rank=4, alpha=4, seed=seed)
        nudge(fresh, name, seed)
    fake, weights = probe(fresh, "fake"), {k: v.clone() for k, v in fresh.base_state_dict().items()}
    student = probe(fresh, "student")
    assert distance(student, base) > 1e-3 and distance(student, fake) > 1e-3

    optimizer = torch.optim.SGD(fresh.train_role("student"), lr=0.1)
    assert {p.requires_grad for p in fresh.role_parameters("fake")} == {False}
    x, text = latents(fresh, 32, 32, 2), fresh.text(tiny.PROMPTS[:1])
    with fresh.role("student"):
        fresh.velocity(x, 0.5, text, 32, 32).square().mean().backward()
        with fresh.role(None):  # nests, and switching leaves requires_grad alone
            assert torch.equal(fresh.velocity(x, 0.5, text, 32, 32), base)
        with torch.no_grad():
            assert torch.equal(fresh.velocity(x, 0.5, text, 32, 32), student)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in fresh.role_parameters("student"))
    assert sum(p.grad is not None for p in fresh.transformer.parameters()) == len(fresh.role_parameters("student"))
    optimizer.step()

    assert torch.equal(probe(fresh, None), base) and torch.equal(probe(fresh, "fake"), fake)
    assert distance(probe(fresh, "student"), student) > 1e-4
    assert all(torch.equal(value, weights[key]) for key, value in fresh.base_state_dict().items())


def test_checkpointed_gradients_belong_to_the_role_of_the_forward(fresh):
    """Backward recomputes the blocks, by then under another role."""
    fresh.add_role("policy", rank=4, alpha=8)
    nudge(fresh, "policy")
    parameters = fresh.train_role("policy")
    x, text = latents(fresh, 32, 32, 2), fresh.text(tiny.PROMPTS[:1])
    gradients = []
    for recompute in (0, 2, 3):
        fresh.blocks.recompute = recompute
        with fresh.role("policy"):
            v = fresh.velocity(x, 0.5, text, 32, 32)
        with fresh.role(None):
            loss = (v - fresh.velocity(x, 0.5, text, 32, 32)).square().mean()
            gradients.append(torch.autograd.grad(loss, parameters))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*gradients))
    assert all(g.abs().sum() > 0 for g in gradients[0])


@pytest.mark.parametrize("others", [False, True])
def test_merged_equals_adapter(fresh, others):
    fresh.add_role("policy", rank=4, alpha=8)
    nudge(fresh, "policy")
    if others:
        fresh.add_role("student", rank=2, alpha=2, targets=("to_q", "ff.down"))
        nudge(fresh, "student")
        student = probe(fresh, "student")
    adapted, names = probe(fresh, "policy"), set(tiny.pipeline().transformer.state_dict())
    assert set(fresh.base_state_dict()) == names
    fresh.merge_role("policy")
    assert distance(probe(fresh, None), adapted) < 1e-5 * adapted.abs().max()
    assert list(fresh.roles) == (["student"] if others else [])
    assert set(fresh.base_state_dict()) == names
    assert not any(p.requires_grad for p in fresh.transformer.parameters())
    if others:
        assert distance(probe(fresh, "student"), student) > 1e-3  # it now stands on the merged base
        assert len(fresh.role_parameters("student")) == 2 * 2 * 3
    else:
        assert set(fresh.transformer.state_dict()) == names
        fresh.add_role("policy", rank=2, alpha=2)
        assert torch.equal(probe(fresh, "policy"), probe(fresh, None))


def test_role_state_round_trip(fresh, model):
    fresh.add_role("policy", rank=4, alpha=8)
    nudge(fresh, "policy")
    state = {key: value.clone() for key, value in fresh.role_state_dict("policy").items()}
    moved = probe(fresh, "policy")
    fresh.add_role("other", rank=4, alpha=8, seed=5)
    fresh.load_role_state_dict("other", state)
    assert torch.equal(probe(fresh, "other"), moved)

    key = "transformer_blocks.1.ff.up.lora_B.weight"
    short = {k: v for k, v in state.items() if k != key}
    for wrong, message in [
        (short, rf"1 missing \({key}\)"),
        (state | {"x": torch.zeros(1)}, r"1 unexpected \(x\)"),
        (state | {key: torch.zeros(1, 1)}, r"1 of another shape \(transformer_blocks"),
        ({}, "48 missing"),
    ]:
        with pytest.raises(UserError, match=message):
            fresh.load_role_state_dict("other", {k: v + 1 for k, v in wrong.items()})
    assert torch.equal(probe(fresh, "other"), moved)


def test_roles_speak_to_the_user(fresh):
    with pytest.raises(UserError, match="'to_kv' is no linear of a K2 block"):
        fresh.add_role("policy", rank=4, alpha=8, targets=("to_q", "to_kv"))
    with pytest.raises(ValueError, match="no role 'policy'"), fresh.role("policy"):
        pass
    fresh.add_role("policy", rank=4, alpha=8)
    with pytest.raises(ValueError, match="exists already"):
        fresh.add_role("policy", rank=4, alpha=8)
    with fresh.role("policy"), pytest.raises(RuntimeError, match="cannot merge"):
        fresh.merge_role("policy")


def test_all_weights_but_the_cached_texts_are_a_role(fresh):
    fresh.add_full_role("policy")
    parameters = fresh.train_role("policy")
    assert fresh.fused_text_is_constant()
    frozen = sum(p.numel() for part in ("text_fusion", "txt_in") for p in getattr(fresh.transformer, part).parameters())
    assert sum(p.numel() for p in parameters) == sum(p.numel() for p in fresh.transformer.parameters()) - frozen
    probe(fresh, "policy").square().mean().backward()
    assert all(p.grad is not None for p in parameters)
    with pytest.raises(ValueError, match="no reference was kept"):
        probe(fresh, None)
    for wrong in (lambda: fresh.add_role("fake", rank=4, alpha=8), lambda: fresh.add_full_role("fake")):
        with pytest.raises(ValueError, match="'fake'"):
            wrong()
    fresh.transformer.txt_in.requires_grad_(True)
    with pytest.raises(RuntimeError, match="cannot be cached"):
        fresh.text(["a"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference_of_all_weights_is_what_they_were(directory, dtype):
    """To the last bit, in bf16 too, where the role's own weights are fp32. Merging brings their types back."""
    model = K2.load(directory, dtype=dtype)
    stored = {key: value.clone() for key, value in model.base_state_dict().items()}
    model.add_full_role("policy", reference=True)
    parameters = model.train_role("policy")
    assert all(p.dtype == torch.float32 for p in parameters) and model.dtype == dtype
    start = probe(model, "policy")
    assert torch.equal(start, probe(model, None))
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn_like(parameter) * 0.02)
    moved = probe(model, "policy")
    assert distance(moved, start) > 1e-2 and torch.equal(probe(model, None), start)
    shared = {id(p) for p in model.reference.parameters()} & {id(p) for p in model.transformer.parameters()}
    assert len(shared) == sum(key.startswith(("text_fusion.", "txt_in.")) for key in stored)

    state = {key: value.clone() for key, value in model.role_state_dict("policy").items()}
    with pytest.raises(UserError, match=r"weights 'policy': keys do not match this model: 1 unexpected \(x\)"):
        model.load_role_state_dict("policy", state | {"x": torch.zeros(1)})
    model.merge_role("policy")
    assert model.roles == {} and {key: v.dtype for key, v in model.base_state_dict().items()} == {
        key: value.dtype for key, value in stored.items()
    }
    tolerance = 1e-6 if dtype == torch.float32 else 0.05 * moved.abs().max()
    assert distance(probe(model, None), moved) <= tolerance


def test_adapters_are_fp32_on_a_bf16_base_and_the_same_everywhere(directory, fresh):
    low = K2.load(directory, dtype=torch.bfloat16)
    for m in (low, fresh):
        m.add_role("policy", rank=4, alpha=8, seed=3)
    assert all(p.dtype == torch.float32 for p in low.role_parameters("policy"))
    for key, value in low.role_state_dict("policy").items():
        assert torch.equal(value, fresh.role_state_dict("policy")[key])
    assert torch.equal(probe(low, "policy"), probe(low, None))
    nudge(low, "policy")
    parameters = low.train_role("policy")
    v = probe(low, "policy")
    assert v.dtype == torch.float32 and distance(v, probe(low, None)) > 1e-2
    v.square().mean().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.abs().sum() > 0 for p in parameters)


def test_switching_roles_is_cheap(fresh):
    fresh.add_role("policy", rank=4, alpha=8)
    start = time.perf_counter()
    for _ in range(100):
        with fresh.role("policy"), fresh.role(None):
            pass
    assert (time.perf_counter() - start) / 200 < 1e-3


def test_result_does_not_depend_on_the_batch(model):
    noise = latents(model, 32, 32, 4)
    assert torch.equal(noise[2:3], sampler.noise([sampler.seed_for(0, 2)], (16, 64)))
    text = model.text(tiny.PROMPTS[:1])
    together = model.sample(text, noise, 4, 32, 32)
    assert distance(together[2:3], model.sample(text, noise[2:3], 4, 32, 32)) < 1e-5
