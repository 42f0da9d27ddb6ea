"""The difference of two models as a LoRA: its errors, what it leaves out, and stock diffusers with it."""

import json

import pytest
import torch
from diffusers import Krea2Pipeline
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from posttrain import cli
from posttrain.config.sections import ModelConfig
from posttrain.export.config import ExportConfig
from posttrain.export.export import export
from posttrain.model import sampler
from posttrain.model.adapters.targets import is_block_linear
from posttrain.model.k2 import K2
from posttrain.model.lora_file import add_lora, linear_shapes, read_lora
from posttrain.training import checkpoint
from posttrain.training.policy import POLICY, load_model, saved_tensors
from tests.helpers import tiny

SIZE = (32, 48)
PROMPTS = (
    "a fox in the snow at night with a lantern",
    "a portrait of an old fisherman, soft window light",
    "a poster with the word OPEN in large letters",
    "three red apples on a blue plate",
    "a city street in the rain, seen from above",
    "a watercolour of a lighthouse on a cliff",
    "an isometric drawing of a small kitchen",
    "a mountain lake at dawn, wide shot",
)


@pytest.fixture(scope="module")
def turbo(model, tmp_path_factory):
    """A distilled pipeline whose weights all differ from the base's: linears by rank 6 and a little noise."""
    pipe = tiny.pipeline(distilled=True)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in pipe.transformer.parameters():
            change = torch.randn(parameter.shape, generator=generator) * 0.1
            if parameter.ndim == 2:
                low = torch.randn(parameter.shape[0], 6, generator=generator)
                change = 0.2 * change + low @ torch.randn(6, parameter.shape[1], generator=generator) / 6
            parameter += 0.3 * change * parameter.std().nan_to_num(0.1)
    path = tmp_path_factory.mktemp("turbo") / "turbo"
    pipe.save_pretrained(path, safe_serialization=True)
    return path


def extract(target, base, output, *words) -> dict:
    given = ["--size", "[32, 48]", "--model_dtype", "float32", *map(str, words)]
    code = cli.main(["extract", str(target), "--from", str(base), "--output", str(output), *given])
    assert code == 0
    return json.loads(output.with_suffix(".json").read_text())


def differences(model, turbo) -> dict[str, torch.Tensor]:
    base, target = (K2.load(path).base_state_dict() for path in (model, turbo))
    return {key: target[key].double() - value.double() for key, value in base.items()}


def test_errors_and_what_lies_outside(model, turbo, tmp_path, capsys):
    """Each layer's error is that of the best approximation, measured on the file; the energy elsewhere adds up to 1."""
    output = tmp_path / "lora.safetensors"
    found = extract(turbo, model, output, "--rank", 4)
    factors, changes = load_file(output), differences(model, turbo)
    layers = [key.removesuffix(".weight") for key in changes if is_block_linear(key.removesuffix(".weight"))]
    assert {*found["layers"]} == {*layers} and len(factors) == 2 * len(layers)
    inside = 0.0
    for layer in layers:
        change = changes[f"{layer}.weight"]
        b, a = (factors[f"transformer.{layer}.lora_{name}.weight"].double() for name in "BA")
        error = float((change - b @ a).norm() / change.norm())
        sigma = torch.linalg.svdvals(change)
        assert found["layers"][layer]["error"] == pytest.approx(error, rel=1e-5)
        assert error == pytest.approx(float(sigma[4:].norm() / sigma.norm()), rel=1e-4)
        inside += float(change.square().sum())
    assert [row["error"] for row in found["layers"].values()] == sorted(
        (row["error"] for row in found["layers"].values()), reverse=True
    )
    total = sum(float(change.square().sum()) for change in changes.values())
    assert found["outside"] == pytest.approx(1 - inside / total, rel=1e-5) and found["outside"] > 0.01
    told = capsys.readouterr().out
    worst = next(iter(found["layers"]))
    assert f"worst: {found['layers'][worst]['error']:.3f} in {worst}" in told and "--rest FILE writes it" in told
    assert f"{len(changes) - len(layers)} tensors" in told


def test_velocity_error_is_that_of_the_velocities(model, turbo, tmp_path):
    """The higher the rank the nearer; with the other tensors too, at full rank, nothing is left."""
    errors = []
    for rank in (1, 6, 128):
        rest = tmp_path / f"rest-{rank}.safetensors"
        found = extract(turbo, model, tmp_path / f"{rank}.safetensors", "--rank", rank, "--rest", rest)
        errors.append(found["velocity"])
    assert [error["states"] for error in errors] == [64, 64, 64]
    assert 1 > errors[0]["rest"] > errors[1]["rest"] > 100 * errors[2]["rest"] and errors[2]["rest"] < 1e-3
    assert errors[2]["lora"] > 10 * errors[2]["rest"]  # what lies outside counts here

    # By hand: states of the target's own trajectories.
    base, target = K2.load(model), K2.load(turbo)
    text = target.text([*PROMPTS])
    times = sampler.schedule(8, target.mu(*SIZE))
    x = sampler.noise([sampler.seed_for(1234, i) for i in range(8)], (target.image_tokens(*SIZE), 64))
    own, weights, factors = base.text([*PROMPTS]), base.base_state_dict(), load_file(tmp_path / "6.safetensors")
    adapted = K2.load(model)
    for key, value in adapted.base_state_dict().items():
        name = f"transformer.{key.removesuffix('.weight')}.lora_"
        if f"{name}A.weight" in factors:
            value += factors[f"{name}B.weight"] @ factors[f"{name}A.weight"]
            assert not torch.equal(value, weights[key])
    left = whole = 0.0
    with torch.no_grad():
        for t, after in zip(times, times[1:]):
            v = target.velocity(x, t, text, *SIZE)
            whole += float((base.velocity(x, t, own, *SIZE) - v).square().sum())
            left += float((adapted.velocity(x, t, own, *SIZE) - v).square().sum())
            x = sampler.ode_step(x, v, t, after)
    assert errors[1]["lora"] == pytest.approx((left / whole) ** 0.5, rel=1e-3)


def latents(pipe: Krea2Pipeline, k2: K2, steps: int = 3) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    noise = sampler.noise([1], (k2.image_tokens(*SIZE), k2.latent_channels))
    return pipe(
        tiny.PROMPTS[0], height=SIZE[0], width=SIZE[1], num_inference_steps=steps, guidance_scale=0.0, latents=noise,
        output_type="latent", max_sequence_length=64,
    ).images  # fmt: skip


def test_stock_diffusers_with_all_of_it_is_the_target(model, turbo, tmp_path):
    """Every linear at full rank, and the rest by load_state_dict: the base then draws what the target draws."""
    output, rest = tmp_path / "lora.safetensors", tmp_path / "rest.safetensors"
    found = extract(
        turbo, model, output, "--rank", 512, "--layers", "all", "--rest", rest, "--measure", "false"
    )  # fmt: skip
    assert "velocity" not in found and found["error"] < 1e-5
    k2, target = K2.load(turbo), Krea2Pipeline.from_pretrained(turbo)
    pipe = Krea2Pipeline.from_pretrained(model, is_distilled=True)
    before = (latents(pipe, k2) - latents(target, k2)).abs().max()
    pipe.load_lora_weights(output)
    layers = [name for name, layer in pipe.transformer.named_modules() if isinstance(layer, LoraLayer)]
    assert {*layers} == {*found["layers"]} and any("text_fusion" in name for name in layers)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    others = load_file(rest)
    assert not pipe.transformer.load_state_dict(others, strict=False).unexpected_keys
    assert {*others} & {f"{name}.weight" for name in layers} == set()
    assert before > 0.05 and (latents(pipe, k2) - latents(target, k2)).abs().max() < 1e-3 * before


def test_ranks_of_their_own_at_strength_one(model, turbo, tmp_path):
    """With --error layers have other ranks. Stock diffusers and our own role then do the same."""
    output = tmp_path / "lora.safetensors"
    found = extract(turbo, model, output, "--error", 0.3, "--measure", "false")
    ranks = {name: row["rank"] for name, row in found["layers"].items()}
    assert len({*ranks.values()}) > 1 and all(row["error"] <= 0.3 for row in found["layers"].values())
    pipe = Krea2Pipeline.from_pretrained(model)
    base = latents(pipe, K2.load(model))
    pipe.load_lora_weights(output)
    for name, layer in pipe.transformer.named_modules():
        if isinstance(layer, LoraLayer):
            assert layer.scaling == {"default_0": 1.0} and layer.r["default_0"] == ranks[name]
    stock = latents(pipe, K2.load(model))
    words = ["sample", "--model.path", str(model), "--model.dtype", "float32", "--adapter", str(output)]
    words += ["--prompt", "x", "--size", "[32, 48]", "--steps", "1", "--output", str(tmp_path / "drawn")]
    assert cli.main(words) == 0
    k2 = K2.load(model)
    add_lora(k2, POLICY, read_lora(output, linear_shapes(k2.base_state_dict())), output)
    noise = sampler.noise([1], (k2.image_tokens(*SIZE), k2.latent_channels))
    with k2.role(POLICY):
        ours = k2.sample(k2.text(tiny.PROMPTS[:1]), noise, 3, *SIZE)
    assert (stock - ours).abs().max() < 1e-4 and (stock - base).abs().max() > 1e-2


def test_other_targets(model, turbo, tmp_path, capsys):
    """A run that trained all weights, and a transformer in one file, have the difference of the same weights."""
    k2 = load_model(ModelConfig(str(model), dtype="float32"), "cpu")
    k2.add_full_role(POLICY)
    generator = torch.Generator().manual_seed(6)
    for parameter in k2.role_parameters(POLICY):
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator) * parameter.std().nan_to_num(0.1)
    model_config = vars(ModelConfig(str(model), dtype="float32"))
    state = {"lora": None, "model": model_config, "origin": k2.origin, "method": "stpo"}
    run = checkpoint.save(tmp_path / "run/checkpoints", 1, saved_tensors(k2), state, 1)
    single = tmp_path / "single.safetensors"
    export(ExportConfig(str(run), str(single), "original"))
    found = []
    for name, target in (("a", run.parents[1]), ("b", single)):
        found.append(extract(target, model, tmp_path / f"{name}.safetensors", "--rank", 8, "--dtype", "bfloat16"))
        assert {value.dtype for value in load_file(tmp_path / f"{name}.safetensors").values()} == {torch.bfloat16}
    assert found[0]["layers"] == found[1]["layers"] and found[0]["error"] > 0.5  # noise is not of low rank
    assert found[0]["velocity"]["lora"] == pytest.approx(found[1]["velocity"]["lora"], rel=1e-4)
