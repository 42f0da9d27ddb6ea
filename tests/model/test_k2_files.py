"""What K2 is read from: pipelines, single files in the original's names, and what is wrong with them."""

import json
import shutil

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_krea2_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file, save_file

from posttrain.errors import UserError
from posttrain.model import key_names
from posttrain.model.k2 import K2, Text
from posttrain.model.load import keeps_fp32
from tests.helpers import tiny
from tests.model.test_k2 import distance, latents

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("tiny") / "raw")


@pytest.fixture(scope="module")
def model(directory):
    return K2.load(directory)


def test_original_names_are_exact_inverses(directory):
    state = load_file(directory / "transformer" / WEIGHTS)
    names = key_names.to_original(state)
    assert {
        "first.weight",
        "blocks.0.attn.qknorm.qnorm.scale",
        "txtfusion.projector.weight",
        "last.modulation.lin",
    } <= set(names)
    assert names["blocks.0.mod.lin"].shape == (6 * 128,) and names["last.modulation.lin"].shape == (2, 128)
    back = key_names.from_original(names)
    assert back.keys() == state.keys() and all(torch.equal(back[key], state[key]) for key in state)
    prefixed = {key_names.PREFIX + key: value for key, value in names.items()}
    for version in (names, prefixed):
        theirs = convert_krea2_transformer_checkpoint_to_diffusers(dict(version))
        ours = key_names.from_original(version)
        assert theirs.keys() == ours.keys() and all(torch.equal(theirs[key], ours[key]) for key in ours)
    assert key_names.original_name("transformer_blocks.1.ff.up.lora_A.weight") == "blocks.1.mlp.up.lora_A.weight"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_single_file_loads_to_the_same_velocity(directory, tmp_path, dtype):
    file = tmp_path / "raw.safetensors"
    save_file(key_names.to_original(load_file(directory / "transformer" / WEIGHTS)), file)
    single, whole = K2.load(directory, file, dtype=dtype), K2.load(directory, dtype=dtype)
    x = latents(whole, 32, 32)
    v = [m.velocity(x, 0.5, m.text(["a red circle"]), 32, 32) for m in (single, whole)]
    assert distance(*v) < (1e-5 if dtype == torch.float32 else 0.05) * v[0].abs().max()
    for name, parameter in single.transformer.named_parameters():
        assert torch.equal(parameter, whole.transformer.get_parameter(name))
        assert parameter.dtype == (torch.float32 if keeps_fp32(name) else dtype), name
        assert parameter.dtype == whole.transformer.get_parameter(name).dtype


def edited(directory, tmp_path, edit):
    state = key_names.to_original(load_file(directory / "transformer" / WEIGHTS))
    edit(state)
    save_file(state, tmp_path / "edited.safetensors")
    return tmp_path / "edited.safetensors"


def drop_blocks(state):
    for key in [key for key in state if key.startswith("blocks.2.")]:
        del state[key]


def eight_bits(state, kind=torch.float8_e4m3fn):
    state["blocks.0.attn.wq.weight"] = state["blocks.0.attn.wq.weight"].to(kind)


def scaled(state):
    """With a scale beside it; formats differ in what they mean by one."""
    eight_bits(state, torch.int8)
    state["blocks.0.attn.wq.weight_scale"] = torch.tensor(0.01)


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
        (lambda s: s["first.weight"].fill_(float("inf")), r"img_in\.weight holds numbers that are not finite"),
        (eight_bits, r"blocks\.0\.attn\.wq\.weight is stored as F8_E4M3 \(8 bits\), with 0 more: quantised"),
        (scaled, r"blocks\.0\.attn\.wq\.weight is stored as I8 \(8 bits\), with 0 more: quantised"),
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
