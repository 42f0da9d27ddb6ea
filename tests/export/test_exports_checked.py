"""Exports read back before they get their name, and the original format."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import Krea2Pipeline, Krea2Transformer2DModel
from diffusers.loaders.single_file_utils import convert_krea2_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file, save_file
from torch import nn

from posttrain.errors import UserError
from posttrain.export import export
from posttrain.export.config import ExportConfig
from posttrain.export.export import load_checkpoint
from posttrain.export.verify import check_weights
from posttrain.grpo import train as grpo
from posttrain.model import key_names
from posttrain.model.k2 import K2
from posttrain.model.load import keeps_fp32
from posttrain.model.sampler import noise, schedule
from posttrain.sample_config import SampleConfig
from posttrain.sample_images import sample
from posttrain.training import checkpoint
from tests.helpers import runs, tiny

NANO = runs.ROOT / "posttrain/nano/weights/k2-nano"
SIZE = (32, 32)


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    return runs.trained(tmp_path_factory.mktemp("trained"), model)


@pytest.fixture(scope="module")
def student(run, tmp_path_factory):
    """A run of posttrain tdm as its checkpoints say it: the same adapter, as a student of eight steps."""
    saved = runs.latest(run)
    state = saved.state | {"method": "tdm", "student": {"steps": [8], "mu": 1.15}}
    state["history"] = saved.state["history"] | {"teacher": {"brightness": 0.25}}
    folder = tmp_path_factory.mktemp("student")
    checkpoint.save(folder / "checkpoints", 3, {"adapter": saved.tensors["adapter"]}, state, keep=1)
    return folder


def write(source: Path, output: Path, format: str = "diffusers", **options) -> Path:
    export.export(ExportConfig(str(source), str(output), format, **options))  # type: ignore[arg-type]
    return output


def stock(pipe: Any, k2: K2, steps: int) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    x = noise([1], (k2.image_tokens(*SIZE), k2.latent_channels))
    return pipe(
        tiny.PROMPTS[0], height=32, width=32, num_inference_steps=steps, guidance_scale=0.0, latents=x,
        output_type="latent", max_sequence_length=64,
    ).images  # fmt: skip


# ---- a student ------------------------------------------------------------------------------------------------


def test_a_student_is_exported_as_turbo(student, run, model, tmp_path):
    """The stock pipeline draws the student's own trajectory: eight steps, guidance 0, shift 1.15."""
    k2 = load_checkpoint(runs.latest(student))
    assert k2.is_distilled and k2.mu(32, 32) == 1.15
    x, text = noise([1], (k2.image_tokens(*SIZE), k2.latent_channels)), k2.text([tiny.PROMPTS[0]])
    times = schedule(8, 1.15)
    with k2.role("policy"), torch.no_grad():
        for t, t_next in zip(times, times[1:]):
            x = x + (t_next - t) * k2.velocity(x, t, text, *SIZE)

    directory = write(student, tmp_path / "turbo")
    assert json.loads((directory / "model_index.json").read_text())["is_distilled"] is True
    assert (stock(Krea2Pipeline.from_pretrained(directory), k2, 8) - x).abs().max() < 1e-4
    single = write(student, tmp_path / "turbo.safetensors", "original")
    transformer = Krea2Transformer2DModel.from_single_file(
        str(single), config=str(model), subfolder="transformer", torch_dtype=torch.float32
    )
    pipe = Krea2Pipeline.from_pretrained(model, transformer=transformer, is_distilled=True)
    assert (stock(pipe, k2, 8) - x).abs().max() < 1e-4
    lora = write(student, tmp_path / "lora.safetensors", "lora")
    pipe = Krea2Pipeline.from_pretrained(model, is_distilled=True)
    pipe.load_lora_weights(str(lora))
    assert (stock(pipe, k2, 8) - x).abs().max() < 1e-4
    raw = write(run, tmp_path / "raw")
    assert json.loads((raw / "model_index.json").read_text())["is_distilled"] is False
    assert (stock(Krea2Pipeline.from_pretrained(raw), k2, 8) - x).abs().max() > 0.05  # another shift

    text = (directory / "README.md").read_text()
    assert "8 steps, guidance 0, shift mu 1.15" in text and "num_inference_steps=8,\n    guidance_scale=0,\n" in text
    after = runs.latest(student).state["history"]["after"]["brightness"]
    assert f"| {after:.4f} | 0.2500 |" in text and "| | before | step 1 | teacher |\n| --- | --- | --- | --- |" in text
    assert "distilled" in yaml.safe_load(text.split("---")[1])["tags"]
    assert "is_distilled=True" in (tmp_path / "turbo.md").read_text()


def test_a_sample_of_a_student_takes_its_steps(student, model, tmp_path, capsys):
    config = runs.config(tmp_path, model)
    sample(SampleConfig(str(tmp_path / "a"), config.model, "a red circle", adapter=str(student), size=[32, 32]))
    assert "(8 steps, guidance 0)" in capsys.readouterr().out


@pytest.mark.parametrize("how", ["path", "start"])
def test_training_a_distilled_model_must_be_asked_for(student, model, tmp_path, how):
    (tmp_path / "again").mkdir()
    config = runs.config(tmp_path, model)
    config.steps = 1
    if how == "path":
        config.model.path = str(write(student, tmp_path / "turbo"))
        says = r"turbo: model_index\.json: is_distilled is true: train the Raw .* model\.allow_distilled: true"
    else:
        config.model.start = str(student)
        says = r"model\.start: .* is distilled \(method tdm\): train the Raw .* model\.allow_distilled: true"
    with pytest.raises(UserError, match=says):
        grpo.train(config)
    assert not Path(config.output).exists()
    config.model.allow_distilled = True
    grpo.train(config)
    if how == "start":  # what stands on a student is one too
        again = runs.config(tmp_path / "again", model)
        again.model.start = config.output
        with pytest.raises(UserError, match=r"model\.start: .* is distilled"):
            grpo.train(again)
    assert load_checkpoint(runs.latest(config.output)).is_distilled
    index = json.loads((write(Path(config.output), tmp_path / "out") / "model_index.json").read_text())
    assert index["is_distilled"] is True


# ---- the original format --------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["tiny", "nano"])
def pipeline(request, model):
    return model if request.param == "tiny" else NANO


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_import_and_export_are_inverse_bit_for_bit(pipeline, dtype, tmp_path):
    k2 = K2.load(pipeline, dtype=dtype)
    state = k2.base_state_dict()
    names = {key: value.contiguous() for key, value in key_names.to_original(state).items()}
    save_file(names, tmp_path / "a.safetensors")
    again = K2.load(pipeline, tmp_path / "a.safetensors", dtype=dtype).base_state_dict()
    assert again.keys() == state.keys()
    assert all(again[k].dtype == v.dtype and torch.equal(again[k], v) for k, v in state.items())
    save_file({k: v.contiguous() for k, v in key_names.to_original(again).items()}, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    # A file that is bf16 throughout keeps its values; what diffusers keeps in fp32 is fp32 from then on.
    low = {key: value.bfloat16() for key, value in names.items()}
    save_file(low, tmp_path / "low.safetensors")
    back = key_names.to_original(K2.load(pipeline, tmp_path / "low.safetensors", dtype=dtype).base_state_dict())
    assert all(torch.equal(back[key].bfloat16(), value) for key, value in low.items())
    wide = {key for key, value in back.items() if value.dtype == torch.float32}
    kept = {key for key in back if keeps_fp32(key_names.diffusers_name(key))}
    assert wide == (set(back) if dtype == torch.float32 else kept)


class Official(nn.Module):
    """The module tree of the official repository by its names, for a strict load; it computes nothing."""

    def __init__(self, config):
        super().__init__()
        c, t = config["num_attention_heads"] * config["attention_head_dim"], config["text_hidden_dim"]
        kv = config["num_key_value_heads"] * config["attention_head_dim"]
        wide, embed = config["intermediate_size"], config["timestep_embed_dim"]
        self.first = nn.Linear(config["in_channels"], c)
        self.blocks = nn.ModuleList(
            [_block(c, kv, config["attention_head_dim"], wide, True) for _ in range(config["num_layers"])]
        )
        self.tmlp = nn.Sequential(nn.Linear(embed, c), nn.GELU(), nn.Linear(c, c))
        head = t // config["text_num_attention_heads"]
        text = [_block(t, t, head, config["text_intermediate_size"], False) for _ in range(4)]
        self.txtfusion = _tree(
            layerwise_blocks=nn.ModuleList(text[:2]), refiner_blocks=nn.ModuleList(text[2:]),
            projector=nn.Linear(config["num_text_layers"], 1, bias=False),
        )  # fmt: skip
        self.txtmlp = nn.Sequential(_scale(t), nn.Linear(t, c), nn.GELU(), nn.Linear(c, c))
        out = nn.Linear(c, config["in_channels"])
        self.last = _tree(norm=_scale(c), linear=out, modulation=_tree(lin=nn.Parameter(torch.zeros(2, c))))
        self.tproj = nn.Sequential(nn.GELU(), nn.Linear(c, 6 * c))


def _tree(**children) -> nn.Module:
    made = nn.Module()
    for name, child in children.items():
        setattr(made, name, child)
    return made


def _scale(features: int) -> nn.Module:
    return _tree(scale=nn.Parameter(torch.zeros(features)))


def _block(features: int, kv: int, head: int, wide: int, modulated: bool) -> nn.Module:
    def linear(inputs: int, outputs: int) -> nn.Linear:
        return nn.Linear(inputs, outputs, bias=False)

    attention = _tree(
        wq=linear(features, features), wk=linear(features, kv), wv=linear(features, kv),
        gate=linear(features, features), wo=linear(features, features),
        qknorm=_tree(qnorm=_scale(head), knorm=_scale(head)),
    )  # fmt: skip
    mlp = _tree(gate=linear(features, wide), up=linear(features, wide), down=linear(wide, features))
    block = _tree(attn=attention, mlp=mlp, prenorm=_scale(features), postnorm=_scale(features))
    if modulated:
        block.mod = _tree(lin=nn.Parameter(torch.zeros(6 * features)))
    return block


def test_strict_loaders_take_the_file(pipeline, tmp_path):
    """The official module tree, and what diffusers' own converter makes of the file."""
    k2 = K2.load(pipeline)
    file = tmp_path / "a.safetensors"
    save_file({k: v.contiguous() for k, v in key_names.to_original(k2.base_state_dict()).items()}, file)
    Official(k2.transformer.config).load_state_dict(load_file(file), strict=True)
    fresh: Any = Krea2Transformer2DModel.from_config(k2.transformer.config)
    fresh.load_state_dict(convert_krea2_transformer_checkpoint_to_diffusers(load_file(file)), strict=True)
    loaded = Krea2Transformer2DModel.from_single_file(
        str(file), config=str(pipeline), subfolder="transformer", torch_dtype=torch.float32
    )
    for made in (fresh, loaded):
        assert all(torch.equal(made.state_dict()[key], value) for key, value in k2.base_state_dict().items())


def test_a_file_of_another_model_is_refused(model, tmp_path):
    save_file(key_names.to_original(K2.load(NANO).base_state_dict()), tmp_path / "nano.safetensors")
    with pytest.raises(
        UserError, match=r"nano\.safetensors: keys do not match this model: .* of another shape"
    ) as error:
        K2.load(model, tmp_path / "nano.safetensors")
    assert "\n" not in str(error.value)


# ---- read back ------------------------------------------------------------------------------------------------


def spoiled(monkeypatch, spoil):
    """Files are written with something wrong in them."""
    monkeypatch.setattr(export, "save_file", lambda state, path, **more: save_file(spoil(dict(state)), path, **more))


def without_first(state):
    del state[sorted(state)[0]]
    return state


def misshapen(state):
    key = sorted(state)[0]
    return state | {key: state[key].flatten()[:-1].clone()}


def zeroed(state):
    return {key: torch.zeros_like(value) for key, value in state.items()}


@pytest.mark.parametrize(
    ("format", "spoil", "says"),
    [
        ("original", without_first, r"keys do not match this model: 1 missing"),
        ("original", misshapen, r"1 of another shape \(blocks\.0\.attn\.gate\.weight\)"),
        ("original", zeroed, r"\d+ tensors? differed when read again"),
        ("original", lambda s: s | {"extra": torch.zeros(1)}, r"1 unexpected \(extra\)"),
        ("lora", without_first, r"a factor is missing for .*; give a whole LoRA"),
        ("lora-original", misshapen, r"factors of .* do not fit a layer"),
        ("lora-original", zeroed, r"\d+ factors? differed when read again"),
        ("lora", lambda s: s | {"transformer.x.lora_A.weight": torch.zeros(1, 1)}, r"bind to no layer .*\.x\.lora_A"),
    ],
)
def test_a_file_that_was_written_wrong_is_removed(run, tmp_path, monkeypatch, format, spoil, says):
    spoiled(monkeypatch, spoil)
    with pytest.raises(UserError, match=says) as error:
        write(run, tmp_path / "out/a.safetensors", format)
    assert str(tmp_path / "out/a.safetensors") in str(error.value) and not list((tmp_path / "out").iterdir())


def test_a_file_with_the_base_in_it_is_removed(run, model, tmp_path, monkeypatch):
    base = key_names.to_original(K2.load(model).base_state_dict())
    spoiled(monkeypatch, lambda state: {key: base[key].contiguous() for key in state})
    with pytest.raises(UserError, match=r"tensors? differed when read again"):
        write(run, tmp_path / "a.safetensors", "original")
    # Had training come to the base itself, the file would be right and say nothing new.
    save_file({key: value.contiguous() for key, value in base.items()}, tmp_path / "base.safetensors")
    with pytest.raises(UserError, match="every weight is still the base's: what was trained is not in it"):
        check_weights(Path("x"), [tmp_path / "base.safetensors"], base, base, base)


def test_weights_that_are_not_finite_are_not_exported(run, model, tmp_path):
    saved = runs.latest(run)
    adapter = {
        key: value * float("inf") if "lora_B" in key else value for key, value in saved.tensors["adapter"].items()
    }
    checkpoint.save(tmp_path / "checkpoints", 1, {"adapter": adapter}, saved.state, keep=1)
    with pytest.raises(UserError, match="not finite"):
        write(tmp_path, tmp_path / "a.safetensors", "original")
    assert not list(tmp_path.glob("a*"))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda folder: shutil.rmtree(folder / "vae"), "vae: has no weights as safetensors"),
        (lambda folder: _edit(folder / "model_index.json", is_distilled=True), "is_distilled is not false"),
        (lambda folder: _zero(folder / "transformer/diffusion_pytorch_model.safetensors"), "differed when read again"),
        (lambda folder: _cut(folder / "text_encoder/model.safetensors"), "not a whole safetensors file"),
    ],
)
def test_a_directory_that_was_written_wrong_is_removed(run, tmp_path, monkeypatch, spoil, says):
    save = Krea2Pipeline.save_pretrained

    def save_pretrained(self, path, **options):
        save(self, path, **options)
        spoil(Path(path))

    monkeypatch.setattr(Krea2Pipeline, "save_pretrained", save_pretrained)
    with pytest.raises(UserError, match=says):
        write(run, tmp_path / "out/turbo")
    assert not list((tmp_path / "out").iterdir())


def _edit(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def _zero(file: Path) -> None:
    save_file(zeroed(load_file(file)), file, metadata={"format": "pt"})


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:1000])
