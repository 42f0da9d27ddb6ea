"""Exports of a trained adapter, read back by stock diffusers and by ourselves, against the adapter itself."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from diffusers import Krea2Pipeline
from peft.tuners.lora import LoraLayer
from PIL import Image
from safetensors.torch import load_file

from posttrain.config.sections import ModelConfig
from posttrain.errors import UserError
from posttrain.export.config import ExportConfig
from posttrain.export.export import export, load_checkpoint
from posttrain.grpo import train as grpo
from posttrain.model import sampler
from posttrain.model.k2 import K2
from posttrain.sample_config import SampleConfig
from posttrain.sample_images import sample
from posttrain.training import checkpoint
from tests.helpers import runs, tiny

HEIGHT, WIDTH = 32, 48
STEPS = 4
PROMPTS = tiny.PROMPTS[:2]
GUIDANCE = [0.0, 4.5]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    PartialState(cpu=True)
    return tiny.save(tmp_path_factory.mktemp("tiny") / "raw")


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    """A trained run whose adapter has alpha other than rank: rank 4, alpha 8, after one step of Adam."""
    config = runs.config(tmp_path_factory.mktemp("trained"), model)
    config.steps, config.optim.lr = 1, 0.02
    grpo.train(config)
    return Path(config.output)


@pytest.fixture(scope="module")
def adapted(run):
    """The base with the adapter as a role: what every export must equal."""
    return load_checkpoint(checkpoint.load(checkpoint.find(run)))


def noise(k2):
    return sampler.noise([1, 2], (k2.image_tokens(HEIGHT, WIDTH), k2.latent_channels))


def ours(k2, guidance, role=None):
    text, null = k2.text(PROMPTS), k2.text([""])
    with k2.role(role):
        return k2.sample(text, noise(k2), STEPS, HEIGHT, WIDTH, guidance, null)


@pytest.fixture(scope="module")
def expected(adapted):
    """Latents of the policy by guidance; they differ from the base's by far more than the tolerance."""
    latents = {guidance: ours(adapted, guidance, "policy") for guidance in GUIDANCE}
    for guidance in GUIDANCE:
        assert distance(latents[guidance], ours(adapted, guidance)) > 0.05
    return latents


def stock_latents(pipe, k2, guidance):
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        PROMPTS, height=HEIGHT, width=WIDTH, num_inference_steps=STEPS, guidance_scale=guidance,
        latents=noise(k2), output_type="latent", max_sequence_length=64,
    ).images  # fmt: skip


def distance(a, b):
    return (a - b).abs().max().item()


@pytest.fixture
def exported(run, tmp_path):
    def write(format: str) -> Path:
        output = tmp_path / "deep" / ("out" if format == "diffusers" else "out.safetensors")
        export(ExportConfig(str(run), str(output), format))  # type: ignore[arg-type]
        card = [] if output.is_dir() else ["out.md"]
        assert sorted(path.name for path in output.parent.iterdir()) == sorted([output.name, *card])
        return output

    return write


def test_diffusers_directory(exported, adapted, expected, model):
    output = exported("diffusers")
    pipe = Krea2Pipeline.from_pretrained(output)
    own = K2.load(output)
    for guidance in GUIDANCE:
        assert distance(stock_latents(pipe, adapted, guidance), expected[guidance]) < 1e-4
        assert distance(ours(own, guidance), expected[guidance]) < 1e-4
    files = {path.relative_to(output) for path in output.rglob("*") if path.is_file()}
    assert files == {path.relative_to(model) for path in model.rglob("*") if path.is_file()} | {Path("README.md")}
    unchanged = [path for path in files if path.suffix == ".safetensors" and path.parts[0] != "transformer"]
    assert len(unchanged) == 2  # text encoder and autoencoder
    for path in unchanged:
        before, after = load_file(model / path), load_file(output / path)
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("format", ["lora", "lora-original"])
def test_lora_file_in_stock_diffusers(exported, adapted, expected, model, caplog, format):
    output = exported(format)
    names = set(load_file(output))
    assert len(names) == 2 * 8 * 3  # two factors of eight linears in each of three blocks
    first = {
        "lora": "transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
        "lora-original": "diffusion_model.blocks.0.attn.wq.lora_A.weight",
    }[format]
    assert first in names

    pipe = Krea2Pipeline.from_pretrained(model)
    before = stock_latents(pipe, adapted, 0.0)
    loggers = [logging.getLogger(name) for name in ("diffusers", "peft", "transformers")]
    for logger in loggers:
        logger.addHandler(caplog.handler)
    pipe.load_lora_weights(output)
    for logger in loggers:
        logger.removeHandler(caplog.handler)
    assert not [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]

    # Every layer is bound, at strength 1, with the trained factors and alpha / rank = 2 in B.
    layers = {name: layer for name, layer in pipe.transformer.named_modules() if isinstance(layer, LoraLayer)}
    assert len(layers) == 24
    trained = adapted.role_state_dict("policy")
    for name, layer in layers.items():
        (adapter,) = layer.active_adapters
        assert layer.scaling[adapter] == 1 and not layer.merged
        assert torch.equal(layer.lora_A[adapter].weight, trained[f"{name}.lora_A.weight"])
        assert torch.equal(layer.lora_B[adapter].weight, 2 * trained[f"{name}.lora_B.weight"])
    for guidance in GUIDANCE:
        assert distance(stock_latents(pipe, adapted, guidance), expected[guidance]) < 1e-4
    pipe.unload_lora_weights()
    assert distance(stock_latents(pipe, adapted, 0.0), before) < 1e-6
    assert distance(before, expected[0.0]) > 0.05


def test_original_file(exported, expected, model):
    output = exported("original")
    assert {"first.weight", "blocks.2.mlp.down.weight", "last.modulation.lin"} <= set(load_file(output))
    k2 = K2.load(model, transformer_file=output)
    for guidance in GUIDANCE:
        assert distance(ours(k2, guidance), expected[guidance]) < 1e-4


def test_a_run_from_a_single_file_is_exported_on_it(exported, model, tmp_path):
    """The base of a run can be an original-format file: here the first run's, merged. The second starts from it."""
    base = exported("original")
    config = runs.config(tmp_path, model)
    config.model.transformer_file, config.steps, config.optim.lr = str(base), 1, 0.02
    grpo.train(config)
    policy = load_checkpoint(checkpoint.load(checkpoint.find(config.output)))
    export(ExportConfig(config.output, str(tmp_path / "second")))
    latents = stock_latents(Krea2Pipeline.from_pretrained(tmp_path / "second"), policy, 0.0)
    assert distance(latents, ours(policy, 0.0, "policy")) < 1e-4
    assert distance(latents, ours(policy, 0.0)) > 0.02


@pytest.fixture(scope="module")
def full(model, tmp_path_factory):
    """A run that trained all weights, and its policy's latents, which differ from the base's."""
    config = runs.config(tmp_path_factory.mktemp("full"), model)
    config.steps, config.lora, config.optim.lr = 1, None, 3e-3
    grpo.train(config)
    latents = ours(load_checkpoint(checkpoint.load(checkpoint.find(config.output))), 4.5, "policy")
    assert distance(latents, ours(K2.load(model), 4.5)) > 0.05
    return Path(config.output), latents


def test_all_weights_are_exported(full, model, tmp_path):
    run, latents = full
    export(ExportConfig(str(run), str(tmp_path / "out")))
    own = K2.load(tmp_path / "out")
    assert distance(stock_latents(Krea2Pipeline.from_pretrained(tmp_path / "out"), own, 4.5), latents) < 1e-4
    assert distance(ours(own, 4.5), latents) < 1e-4
    export(ExportConfig(str(run), str(tmp_path / "out.safetensors"), "original"))
    assert distance(ours(K2.load(model, transformer_file=tmp_path / "out.safetensors"), 4.5), latents) < 1e-4
    for format in ("lora", "lora-original"):
        with pytest.raises(UserError, match=r"format: .* has no adapter, all weights were trained; use diffusers"):
            export(ExportConfig(str(run), str(tmp_path / "lora.safetensors"), format))
    assert not (tmp_path / "lora.safetensors").exists()


def test_weights_that_have_not_moved_are_not_exported(full, model, tmp_path):
    saved, base = checkpoint.load(checkpoint.find(full[0])), K2.load(model).base_state_dict()
    weights = {key: base[key] for key in saved.tensors["weights"]}
    checkpoint.save(tmp_path / "checkpoints", 1, {"weights": weights}, saved.state, keep=1)
    with pytest.raises(UserError, match="what was trained changes no weight"):
        export(ExportConfig(str(tmp_path), str(tmp_path / "out")))


@pytest.mark.parametrize("kind", ["adapter", "weights"])
def test_samples_of_a_run_and_of_its_export_are_the_same(exported, run, full, model, tmp_path, kind):
    if kind == "weights":
        run, directory = full[0], tmp_path / "out"
        export(ExportConfig(str(run), str(directory)))
    else:
        directory = exported("diffusers")
    drawn = []
    for name, path, adapter in (("a", model, str(run)), ("b", directory, None), ("c", model, None)):
        config = SampleConfig(str(tmp_path / name), ModelConfig(str(path), dtype="float32"), prompt=PROMPTS[0])
        config.adapter, config.size, config.steps, config.images, config.micro_batch = adapter, [32, 48], 3, 3, 2
        sample(config)
        files = [tmp_path / name / f"{i:03d}.png" for i in range(3)]
        drawn.append(np.stack([np.asarray(Image.open(file), int) for file in files]))
    assert drawn[0].shape == (3, 32, 48, 3)
    assert np.abs(drawn[0] - drawn[1]).max() <= 1
    assert np.abs(drawn[0] - drawn[2]).max() > 3
    assert np.abs(drawn[0][0] - drawn[0][1]).max() > 3  # each picture has its own noise


@pytest.mark.parametrize("format", ["lora", "lora-original"])
def test_samples_of_a_lora_file_are_those_of_the_run(exported, run, model, tmp_path, format):
    drawn = []
    for name, adapter in (("run", run), ("file", exported(format))):
        config = SampleConfig(str(tmp_path / name), ModelConfig(str(model), dtype="float32"), prompt=PROMPTS[0])
        config.adapter, config.size, config.steps = str(adapter), [32, 48], 3
        sample(config)
        drawn.append(np.asarray(Image.open(tmp_path / name / "000.png"), int))
    assert np.abs(drawn[0] - drawn[1]).max() <= 1
    config.output, config.adapter = str(tmp_path / "none"), "none.safetensors"
    with pytest.raises(UserError, match=r"none.safetensors: no such file; give a run, one of its checkpoints or"):
        sample(config)


@pytest.mark.parametrize("format", ["diffusers", "lora", "original", "lora-original"])
def test_untrained_adapter_is_refused(adapted, run, tmp_path, format):
    saved = checkpoint.load(checkpoint.find(run))
    adapter = {k: torch.zeros_like(v) if "lora_B" in k else v for k, v in saved.tensors["adapter"].items()}
    checkpoint.save(tmp_path / "checkpoints", 1, {"adapter": adapter}, saved.state, keep=1)
    output = tmp_path / "out.safetensors"
    with pytest.raises(UserError, match=r"step-000001: the adapter is untrained \(every B factor is 0\)"):
        export(ExportConfig(str(tmp_path), str(output), format))  # type: ignore[arg-type]
    assert not output.exists()


def test_an_adapter_that_bf16_cannot_hold_is_refused(run, tmp_path):
    saved = checkpoint.load(checkpoint.find(run))
    adapter = {k: v * 1e-12 if "lora_B" in k else v for k, v in saved.tensors["adapter"].items()}
    state = saved.state | {"model": saved.state["model"] | {"dtype": "bfloat16"}}
    checkpoint.save(tmp_path / "checkpoints", 1, {"adapter": adapter}, state, keep=1)
    with pytest.raises(UserError, match=r"merged in torch\.bfloat16, the adapter changes no weight"):
        export(ExportConfig(str(tmp_path), str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_existing_output_is_refused(run, tmp_path):
    output = tmp_path / "out.safetensors"
    output.write_text("mine")
    for format in ("lora", "original"):
        with pytest.raises(UserError, match=r"output: .*out\.safetensors exists; choose another name"):
            export(ExportConfig(str(run), str(output), format))
    assert output.read_text() == "mine"


def test_an_older_checkpoint_can_be_named(run, tmp_path, capsys):
    export(ExportConfig(str(run / "checkpoints/step-000001"), str(tmp_path / "a.safetensors"), "lora"))
    assert "a.safetensors (lora) from" in capsys.readouterr().out
    with pytest.raises(UserError, match="holds no whole checkpoint"):
        export(ExportConfig(str(run / "checkpoints/step-000007"), str(tmp_path / "b.safetensors"), "lora"))
