"""What a stage hands to the next: small changes in bf16, exports of several stages, all weights after an adapter."""

from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from diffusers import Krea2Pipeline
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from posttrain import cli
from posttrain.config.sections import ModelConfig
from posttrain.errors import UserError
from posttrain.export.config import ExportConfig
from posttrain.export.export import export, load_checkpoint
from posttrain.grpo import train as grpo
from posttrain.model import sampler
from posttrain.model.k2 import K2, Text
from posttrain.stpo import train as stpo
from posttrain.training import checkpoint
from posttrain.training.policy import POLICY, add_policy, described, load_model, saved_tensors
from tests.helpers import runs, tiny

SIZE = (32, 48)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    PartialState(cpu=True)
    return tiny.save(tmp_path_factory.mktemp("tiny") / "raw")


def stage(folder: Path, config: ModelConfig, size: float, seed: int) -> Path:
    """A checkpoint of an adapter that changes each weight by `size` of it, in norm, standing on config.start."""
    k2 = load_model(config, "cpu")
    k2.add_role(POLICY, 4, 8.0, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for _, layer in k2._layers:
        a, b = layer.factor("A", POLICY), layer.factor("B", POLICY)
        b.data = torch.randn(b.shape, generator=generator)
        b.data *= size * layer.weight.float().norm() / (2 * (b @ a).norm())
    state = {"lora": described(k2), "model": vars(config), "origin": k2.origin, "method": "stpo"}
    return checkpoint.save(folder / "checkpoints", 1, saved_tensors(k2), state, 1)


def stages(folder: Path, model: Path, size: float, dtype: str = "bfloat16") -> list[Path]:
    """Two of them, the second on the first."""
    first = stage(folder / "a", ModelConfig(str(model), dtype=dtype), size, 1)
    return [first, stage(folder / "b", ModelConfig(str(model), dtype=dtype, start=str(first)), size, 2)]


@torch.no_grad()
def velocity(k2: K2) -> torch.Tensor:
    """In fp32 arithmetic, whatever its weights have been rounded to."""
    k2.transformer.to(torch.float32)
    k2.dtype = torch.float32
    x = sampler.noise(range(4), (k2.image_tokens(*SIZE), k2.latent_channels))
    features = k2.random_features(9)
    return torch.cat([k2.velocity(x, t, Text(k2.fuse(features)[None]), *SIZE) for t in (0.3, 0.6, 0.9)])


@pytest.mark.parametrize("size", [0.0017, 0.0005, 0.0002])
def test_a_start_keeps_the_change_of_velocity_in_bf16(model, tmp_path, size):
    """A merge, which is the contrast, keeps less the smaller it is."""
    _, second = stages(tmp_path, model, size)
    base = velocity(load_model(ModelConfig(str(model)), "cpu"))
    whole = load_model(ModelConfig(str(model), start=str(second)), "cpu")
    weights, factors = whole.base_state_dict(), whole.active_factors(None)
    assert {value.dtype for value in factors.values()} == {torch.float32}
    assert weights["transformer_blocks.0.attn.to_q.weight"].dtype == torch.bfloat16
    exact, merged = (load_model(ModelConfig(str(model), start=str(second)), "cpu") for _ in range(2))
    exact.transformer.to(torch.float32)
    exact.merge_stack()
    kept = merged.merge_stack(torch.bfloat16)
    wanted = velocity(exact) - base

    def share(k2: K2) -> float:
        return float(((velocity(k2) - base) * wanted).sum() / wanted.square().sum())

    assert share(whole) == pytest.approx(1, abs=0.01)
    of_weights = [one.share for (one,) in kept.values()]
    mean = sum(of_weights) / len(of_weights)
    assert mean < {0.0017: 0.95, 0.0005: 0.75, 0.0002: 0.5}[size]
    assert share(merged) < {0.0017: 0.95, 0.0005: 0.8, 0.0002: 0.6}[size]


def test_lora_exports_hold_what_is_evaluated(model, tmp_path):
    """Bit for bit, in the file and as stock diffusers has it; and it draws the same."""
    _, second = stages(tmp_path, model, 0.2, "float32")
    k2 = load_checkpoint(checkpoint.load(second))
    factors = k2.active_factors(POLICY)
    assert {len(value) for key, value in factors.items() if "lora_A" in key} == {8}
    export(ExportConfig(str(second), str(tmp_path / "a.safetensors"), "lora"))
    written = load_file(tmp_path / "a.safetensors")
    assert written.keys() == {f"transformer.{key}" for key in factors}
    assert all(torch.equal(value, written[f"transformer.{key}"]) for key, value in factors.items())
    pipe = Krea2Pipeline.from_pretrained(model)
    pipe.load_lora_weights(tmp_path / "a.safetensors")
    for name, layer in pipe.transformer.named_modules():
        if isinstance(layer, LoraLayer):
            assert torch.equal(layer.lora_A["default_0"].weight, factors[f"{name}.lora_A.weight"])
            assert torch.equal(layer.lora_B["default_0"].weight, factors[f"{name}.lora_B.weight"])
    pipe.set_progress_bar_config(disable=True)
    noise, text = sampler.noise([1], (k2.image_tokens(*SIZE), k2.latent_channels)), k2.text(tiny.PROMPTS[:1])
    drawn = {}
    for role in (POLICY, None):
        with k2.role(role):
            drawn[role] = k2.sample(text, noise, 3, *SIZE)
    stock = pipe(
        tiny.PROMPTS[0], height=SIZE[0], width=SIZE[1], num_inference_steps=3, guidance_scale=0.0, latents=noise,
        output_type="latent", max_sequence_length=64,
    ).images  # fmt: skip
    assert (stock - drawn[POLICY]).abs().max() < 1e-4 and (drawn[None] - drawn[POLICY]).abs().max() > 1e-2


def test_an_export_that_rounds_too_much_is_refused(model, tmp_path, capsys):
    """Of a tenth of a percent bf16 keeps about half, which is printed and on the card; float32 keeps it all."""
    _, second = stages(tmp_path, model, 0.0007)
    arguments = ["export", "--source", str(second), "--output"]
    for format, name in (("diffusers", "out"), ("original", "out.safetensors")):
        given = [*arguments, str(tmp_path / name), "--format", format]
        assert cli.main(given) == 2
        says = capsys.readouterr().err
        assert f"error: format: {format} merged in bfloat16: 0." in says and "less than 0.98 is refused" in says
        assert all(remedy in says for remedy in ("--dtype float32", "--format lora", "--allow_rounding true"))
        assert not (tmp_path / name).exists()
        assert cli.main([*given, "--allow_rounding", "true"]) == 0
        told = capsys.readouterr().out
        share = float(told.split("merged in bfloat16: ")[1].split()[0])
        card = tmp_path / ("out/README.md" if format == "diffusers" else "out.md")
        assert 0.3 < share < 0.8 and f"Weights were merged in bfloat16: {share:.3f} of what" in card.read_text()
        assert "torch_dtype=torch.float32" in card.read_text()

    assert cli.main([*arguments, str(tmp_path / "whole"), "--dtype", "float32"]) == 0
    told = capsys.readouterr().out
    assert "merged in float32: 1.000 of what" in told and f"loaded in bfloat16 it is {share:.3f}" in told
    k2 = load_checkpoint(checkpoint.load(second))
    factors, wanted = k2.active_factors(POLICY), {k: v.float() for k, v in k2.base_state_dict().items()}
    for key, value in factors.items():
        if "lora_A" in key:
            wanted[key.replace("lora_A.", "")] += factors[key.replace("lora_A", "lora_B")] @ value
    written = load_file(next((tmp_path / "whole/transformer").glob("*.safetensors")))
    assert all(value.dtype == torch.float32 and torch.equal(value, wanted[key]) for key, value in written.items())
    options = ["--format", "lora", "--dtype", "float32"]
    assert cli.main([*arguments, str(tmp_path / "b.safetensors"), *options]) == 2
    assert "dtype: a file of format lora is in float32 anyway" in capsys.readouterr().err


def test_all_weights_that_round_too_much_are_refused_too(model, tmp_path, capsys):
    """Each weight moves by .05 % of the weights' size: bf16 keeps some of it, float32 all."""
    config = ModelConfig(str(model), dtype="bfloat16")
    k2 = load_model(config, "cpu")
    k2.add_full_role(POLICY)
    generator = torch.Generator().manual_seed(0)
    for parameter in k2.role_parameters(POLICY):
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data += 5e-4 * parameter.data.norm() / parameter.numel() ** 0.5 * noise
    state = {"lora": None, "model": vars(config), "origin": k2.origin, "method": "stpo"}
    checkpoint.save(tmp_path / "run/checkpoints", 1, saved_tensors(k2), state, 1)
    arguments = ["export", "--source", str(tmp_path / "run"), "--output"]
    assert cli.main([*arguments, str(tmp_path / "out")]) == 2
    says = capsys.readouterr().err
    share = float(says.split("merged in bfloat16: ")[1].split()[0])
    assert 0.05 < share < 0.5 and "--dtype float32, which keeps all of it" in says and "--format lora" not in says
    assert cli.main([*arguments, str(tmp_path / "whole"), "--dtype", "float32"]) == 0
    assert "1.000 of what was trained is kept" in (told := capsys.readouterr().out)
    assert f"loaded in bfloat16 it is {share:.3f}" in told


def test_resumed_equals_uninterrupted_on_a_stack(model, tmp_path):
    (start, _), adapters = stages(tmp_path, model, 0.05, "float32"), []
    for name, halves in (("whole", [2]), ("halves", [1, 2])):
        (tmp_path / name).mkdir()
        config = runs.config(tmp_path / name, model)
        config.model.start = str(start)
        for i, config.steps in enumerate(halves):
            grpo.train(config, resume=i > 0)
        adapters.append(runs.latest(config.output).tensors["adapter"])
    assert all(torch.equal(value, adapters[1][key]) for key, value in adapters[0].items())
    assert any(value.any() for key, value in adapters[0].items() if "lora_B" in key)


def test_all_weights_after_an_adapter(model, tmp_path):
    """They begin as the policy before, which is their reference; what goes on from them has it once."""
    start = stage(tmp_path / "a", ModelConfig(str(model), dtype="float32"), 0.2, 1)
    policy, base = velocity(load_model(ModelConfig(str(model), start=str(start), dtype="float32"), "cpu")), None
    (tmp_path / "b").mkdir()
    config = runs.stpo_config(tmp_path / "b", model)
    config.model.start, config.lora, config.steps, config.optim.lr = str(start), None, 1, 1e-5
    stpo.train(config)
    (row,) = [row for row in runs.rows(config.output) if "loss" in row]
    assert row["loss"] == pytest.approx(0.693147, abs=1e-6)
    base = velocity(load_model(ModelConfig(str(model), dtype="float32"), "cpu"))
    change = (policy - base).norm()
    assert change > 1e-2 * base.norm()
    begun = load_model(ModelConfig(str(model), start=str(start), dtype="float32"), "cpu")
    add_policy(begun, None, 0, reference=True)
    for role in (POLICY, None):
        with begun.role(role):
            assert (velocity(begun) - policy).norm() < 1e-4 * change
    after = load_model(ModelConfig(str(model), start=config.output, dtype="float32"), "cpu")
    assert not after.has_stack and 0 < (velocity(after) - policy).norm() < 0.1 * change
    third = stage(tmp_path / "c", ModelConfig(str(model), start=config.output, dtype="float32"), 0.2, 3)
    export(ExportConfig(str(third), str(tmp_path / "out")))
    k2 = load_checkpoint(checkpoint.load(third))
    with k2.role(POLICY):
        assert (velocity(K2.load(tmp_path / "out")) - velocity(k2)).norm() < 1e-4 * change
    with pytest.raises(UserError, match="has no adapter, all weights were trained"):
        export(ExportConfig(str(third), str(tmp_path / "lora.safetensors"), "lora"))
