"""The options that save memory: fp8 base, 8-bit moments, offloaded parts. torchao's products run on a CPU as well."""

import dataclasses
import functools
import sys

import pytest
import torch

from posttrain import cli
from posttrain.config.sections import LoraConfig, ModelConfig, OptimConfig
from posttrain.config.types import ConfigError
from posttrain.errors import UserError
from posttrain.grpo import train as grpo
from posttrain.model import blocks, fp8
from posttrain.model.k2 import K2, Text
from posttrain.model.linears import LoraLinear
from posttrain.model.offload import Offloaded
from posttrain.nft import train as nft
from posttrain.training import checkpoint, optim
from posttrain.training.policy import POLICY, add_policy, load_model
from posttrain.training.stepper import Stepper
from tests.helpers import runs
from tests.helpers.settings import validate


@pytest.fixture(scope="module", autouse=True)
def traced():
    """torch's compiler takes minutes on a CPU: what it would compile runs as it is, or is only traced."""
    made = functools.cache(lambda function, device: torch.compile(function, backend="eager", fullgraph=True))
    with pytest.MonkeyPatch.context() as patch, torch._dynamo.config.patch(recompile_limit=blocks.MAX_VARIANTS):
        patch.setattr(blocks, "_compiled", made)
        yield


# fp8


def tiny(quantize_first: bool | None = None) -> K2:
    made = K2.random("cpu", torch.bfloat16, "tiny", text=False)
    if quantize_first is True:
        fp8.quantize(made, "cpu")
    for seed, name in enumerate((POLICY, "fake")):
        made.add_role(name, 4, 4.0, seed=seed)
        for i, parameter in enumerate(made.role_parameters(name)):
            torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(i))
    if quantize_first is False:
        fp8.quantize(made, "cpu")
    return made


def velocity(k2, role, **precision):
    x = torch.randn(3, 6, k2.latent_channels, generator=torch.Generator().manual_seed(0))
    text = Text(k2.fuse(k2.random_features(7))[None])
    with k2.role(role, **precision):
        return k2.velocity(x, 0.5, text, 2 * k2.pixel_multiple, 3 * k2.pixel_multiple)


def gradient(k2):
    parameters = k2.train_role(POLICY)
    return torch.cat([g.flatten() for g in torch.autograd.grad(velocity(k2, POLICY).square().mean(), parameters)])


def off(a, b):
    return float((a - b).norm() / b.norm())


def test_fp8_is_near_the_exact_base_under_every_role():
    exact, first, later = tiny(), tiny(quantize_first=True), tiny(quantize_first=False)
    with torch.no_grad():
        for role in (None, POLICY, "fake"):
            expected = velocity(exact, role)
            assert 1e-3 < off(velocity(first, role), expected) < 0.1  # e4m3 has 3 bits of mantissa: 1/16 at most
            assert torch.equal(velocity(first, role), velocity(later, role))
    assert all(p.dtype == torch.float32 for p in first.role_parameters(POLICY))
    found, expected = gradient(first), gradient(exact)
    assert found.abs().sum() > 0 and off(found, expected) < 0.15
    assert torch.equal(found, gradient(later))
    first.blocks.recompute = 1
    assert torch.equal(found, gradient(first))


def test_fp8_weights_take_a_byte():
    """Of each block's linears 128 x (128 + 64 + 64 + 128 + 128) + 3 x 128 x 384 weights; scales are fp32, one a row."""
    made = tiny(quantize_first=True)
    weights = [m.weight for m in made.transformer.modules() if isinstance(m, LoraLinear) and m.is_float8]
    assert len(weights) == 16
    assert sum(w.qdata.nbytes for w in weights) == 2 * (128 * 512 + 3 * 128 * 384)
    assert sum(w.scale.nbytes for w in weights) == 2 * 4 * (128 + 64 + 64 + 128 + 128 + 384 + 384 + 128)


def test_fp8_backward_is_that_of_the_weight_it_holds():
    linear = torch.nn.Linear(32, 16, bias=False, dtype=torch.bfloat16)
    held = fp8.Float8Linear(linear, fp8._quantizer(torch.device("cpu"))(linear.weight.detach()))
    x = torch.randn(2, 3, 32, dtype=torch.bfloat16, requires_grad=True)
    given = torch.randn(2, 3, 16, dtype=torch.bfloat16)
    (found,) = torch.autograd.grad(held(x), x, given)
    assert torch.equal(found, given @ held.weight.dequantize())


def test_fp8_compiled_is_fp8():
    made = tiny(quantize_first=True)
    expected = velocity(made, POLICY).detach(), gradient(made)
    made.blocks.compiled = True
    found = velocity(made, POLICY).detach(), gradient(made)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
    before = blocks.graphs()
    velocity(made, POLICY), gradient(made)
    assert blocks.graphs() == before


def test_what_fp8_cannot_do_is_said(tmp_path, model, monkeypatch):
    recipe = runs.config(tmp_path, model)
    recipe.model.quantize = "fp8"
    with pytest.raises(ConfigError, match=r"model\.quantize: fp8 multiplies in bfloat16, and model\.dtype is float32"):
        validate(recipe)
    recipe.model.dtype, recipe.lora = "bfloat16", None
    with pytest.raises(ConfigError, match=r"model\.quantize: .* lora is null"):
        validate(recipe)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(UserError, match=r"model\.quantize: fp8: NVIDIA A100 has none"):
        fp8._quantizer(torch.device("cuda"))
    monkeypatch.setitem(sys.modules, "torchao", None)
    for name in [name for name in sys.modules if name.startswith("torchao.")]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"model\.quantize: fp8 needs torchao .*pip install 'posttrain\[fp8\]'"):
        load_model(ModelConfig(str(model), quantize="fp8"), "cpu")
    with pytest.raises(UserError, match=r"optim\.kind: adamw8bit needs torchao .*pip install 'posttrain\[fp8\]'"):
        Stepper([torch.zeros(2, requires_grad=True)], OptimConfig(kind="adamw8bit"))


# 8-bit moments


def factors():
    """An adapter's: one large enough for 8 bits, one that is not."""
    return [
        torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).requires_grad_(),
        torch.ones(8, 8).requires_grad_(),
    ]


def update(stepper, steps):
    torch.manual_seed(stepper.updates)
    for _ in range(steps):
        for parameter in stepper.parameters:
            parameter.grad = torch.randn_like(parameter) + 0.5
        stepper.step()


@pytest.fixture
def eager():
    with torch.compiler.set_stance("force_eager"):
        yield


def test_8_bit_moments_resume_bit_for_bit(tmp_path, eager):
    config = OptimConfig(kind="adamw8bit", lr=1e-2, warmup_steps=4, weight_decay=0.01)
    stepper = Stepper(factors(), config)
    update(stepper, 3)
    tensors, state = optim.flatten_optimizer(stepper.optimizer)
    assert tensors["0.exp_avg.codes"].dtype == torch.uint8 and "1.exp_avg.codes" not in tensors
    held = {"optimizer": tensors, "weights": {str(i): p.detach() for i, p in enumerate(stepper.parameters)}}
    checkpoint.save(tmp_path, 3, held, {"optimizer": state}, keep=1)
    saved = checkpoint.load_latest(tmp_path)
    update(stepper, 3)

    assert saved is not None
    resumed = Stepper([saved.tensors["weights"][str(i)].requires_grad_() for i in range(2)], config)
    optim.restore_optimizer(resumed.optimizer, saved.tensors["optimizer"], saved.state["optimizer"])
    resumed.updates = 3
    update(resumed, 3)
    assert all(torch.equal(a, b) for a, b in zip(stepper.parameters, resumed.parameters))
    again, _ = optim.flatten_optimizer(resumed.optimizer)
    expected, _ = optim.flatten_optimizer(stepper.optimizer)
    assert again.keys() == expected.keys() and all(torch.equal(again[key], expected[key]) for key in again)

    with pytest.raises(UserError, match=r"optim\.kind: the checkpoint's is AdamW8bit and the recipe's AdamW;"):
        plain = Stepper(factors(), dataclasses.replace(config, kind="adamw"))
        optim.restore_optimizer(plain.optimizer, saved.tensors["optimizer"], saved.state["optimizer"])


def test_8_bit_moments_update_as_adamw_nearly_does(eager):
    moved = []
    for kind in ("adamw", "adamw8bit"):
        stepper = Stepper(factors(), OptimConfig(kind=kind, lr=1e-2))
        update(stepper, 5)
        moved.append([p.detach() - before.detach() for p, before in zip(stepper.parameters, factors())])
    assert 1e-4 < off(moved[1][0], moved[0][0]) < 0.05
    assert off(moved[1][1], moved[0][1]) < 1e-5  # too small a tensor, so in fp32


# offloaded parts


def test_an_offloaded_part_is_a_copy_while_it_is_used(model):
    k2 = load_model(ModelConfig(str(model), dtype="float32"), "cpu")
    tensors = [*k2.vae.parameters(), *k2.vae.buffers()]
    before, places = [t.detach().clone() for t in tensors], [t.data_ptr() for t in tensors]
    part = Offloaded(k2.vae, torch.device("cpu"))
    with pytest.raises(ZeroDivisionError), part.on_device():
        assert all(t.data_ptr() != place and torch.equal(t, b) for t, place, b in zip(tensors, places, before))
        tensors[0].data.zero_()
        _ = 1 / 0
    assert all(t.data_ptr() == place and torch.equal(t, b) for t, place, b in zip(tensors, places, before))


def test_offloading_is_what_encoding_and_decoding_go_through(model, monkeypatch):
    k2 = load_model(ModelConfig(str(model), dtype="float32", offload=["text_encoder", "vae"]), "cpu")
    assert not k2.offloaded  # a CPU has nowhere else to put them
    latents = torch.randn(1, 4, k2.latent_channels)
    expected = k2.encode(["a red circle"]).features[0], k2.decode(latents, *square(k2))
    for name, part in (("text_encoder", k2.text_encoder), ("vae", k2.vae)):
        k2.offloaded[name] = Offloaded(part, torch.device("cpu"))
    seen = []
    on_device = Offloaded.on_device
    monkeypatch.setattr(Offloaded, "on_device", lambda part: seen.append(part) or on_device(part))
    found = k2.encode(["a red circle"]).features[0], k2.decode(latents, *square(k2))
    assert seen == [k2.offloaded["text_encoder"], k2.offloaded["vae"]]
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


def square(k2):
    return 2 * k2.pixel_multiple, 2 * k2.pixel_multiple


# together


def test_a_run_with_all_of_them_resumes_and_exports(tmp_path, model, eager):
    recipe = runs.config(tmp_path, model)
    recipe.model.dtype, recipe.model.quantize, recipe.model.offload = "bfloat16", "fp8", ["text_encoder", "vae"]
    recipe.optim.kind, recipe.lora = "adamw8bit", LoraConfig(32, 32.0)  # 32 x 128: large enough for 8 bits
    recipe.loss.clip_low = recipe.loss.clip_high = 0.05
    grpo.train(recipe)
    whole = checkpoint.load_latest(tmp_path / "run/checkpoints")
    assert whole is not None and "0.exp_avg.codes" in whole.tensors["optimizer"]

    half = dataclasses.replace(recipe, output=str(tmp_path / "half"), steps=1)
    grpo.train(half)
    grpo.train(dataclasses.replace(half, steps=2), resume=True)
    resumed = checkpoint.load_latest(tmp_path / "half/checkpoints")
    assert resumed is not None and resumed.step == whole.step == 2
    for name in ("adapter", "optimizer"):
        assert all(torch.equal(value, resumed.tensors[name][key]) for key, value in whole.tensors[name].items())

    target = tmp_path / "tuned"
    assert cli.main(["export", "--source", recipe.output, "--output", str(target)]) == 0
    merged = K2.load(target, dtype=torch.bfloat16)
    exact = load_model(ModelConfig(str(model)), "cpu")
    add_policy(exact, recipe.lora, 0, reference=False)
    exact.load_role_state_dict(POLICY, whole.tensors["adapter"])
    exact.stack_role(POLICY)
    exact.merge_stack()
    state = merged.base_state_dict()
    assert all(torch.equal(value, state[key]) for key, value in exact.base_state_dict().items())


# rollouts in fp8


@torch.no_grad()
def test_copies_in_fp8_are_used_where_asked_for():
    """There they give what a base in fp8 gives; elsewhere nothing has changed, and no weights are added."""
    exact, both, quantized = tiny(), tiny(), tiny(quantize_first=False)
    fp8.add_copies(both, "cpu")
    assert both.transformer.state_dict().keys() == exact.transformer.state_dict().keys()
    for role in (POLICY, "fake", None):
        expected = velocity(exact, role)
        assert torch.equal(velocity(both, role), expected)
        found = velocity(both, role, fp8=True)
        assert torch.equal(found, velocity(quantized, role)) and 1e-3 < off(found, expected) < 0.1
        with both.role(role, fp8=True):
            assert both.active == role


@pytest.mark.parametrize("passes", [1, 2])
def test_grpo_with_rollouts_in_fp8(tmp_path, model, passes):
    """The ratio is exactly 1 in the first pass, though the drawn velocities were others; in a second it is not."""
    recipe = runs.config(tmp_path, model)
    recipe.model.dtype, recipe.rollout.quantize, recipe.optim.passes = "bfloat16", "fp8", passes
    grpo.train(recipe)
    for row in runs.training_rows(recipe.output):
        assert row["ratio_error"] == 0
        if passes == 1:
            assert row["ratio"] == 1 and 1e-4 < row["rollout_gap"] < 0.2
        else:
            assert row["ratio"] != 1


def test_nft_with_rollouts_in_fp8(tmp_path, model):
    """The images are nearly those of the exact policy, and what trains on them is exact."""
    drawn = {}
    for quantize in (None, "fp8"):
        recipe = runs.nft_config(tmp_path, model)
        recipe.model.dtype, recipe.rollout.quantize, recipe.steps = "bfloat16", quantize, 1
        recipe.output = str(tmp_path / f"run-{quantize}")
        nft.train(recipe)
        (row,) = runs.training_rows(recipe.output)
        drawn[quantize] = row["latent_norm"]
        assert row["old_error"] == 0 and row["grad_norm"] > 0
    assert 0 < abs(drawn["fp8"] / drawn[None] - 1) < 0.05


CANNOT = [
    ("model", "dtype", "float32", "multiplies in bfloat16, and model.dtype is float32"),
    ("model", "quantize", "fp8", "is what model.quantize does for training as well"),
    (None, "lora", None, "keeps a copy of weights that stay as they are"),
]


@pytest.mark.parametrize("made", [runs.config, runs.nft_config], ids=["grpo", "nft"])
@pytest.mark.parametrize(("section", "field", "value", "words"), CANNOT)
def test_what_fp8_rollouts_cannot_do_is_said(tmp_path, model, made, section, field, value, words):
    recipe = made(tmp_path, model)
    recipe.model.dtype, recipe.rollout.quantize = "bfloat16", "fp8"
    setattr(getattr(recipe, section) if section else recipe, field, value)
    with pytest.raises(ConfigError, match=rf"rollout\.quantize: fp8 {words}"):
        validate(recipe)


def test_fp8_rollouts_are_not_drawn_ahead(tmp_path, model):
    recipe = runs.config(tmp_path, model)
    recipe.model.dtype, recipe.rollout.quantize, recipe.rollout.ahead = "bfloat16", "fp8", 1
    words = "needs the policy that draws to be the one that trains; set rollout.ahead: 0"
    with pytest.raises(ConfigError, match=rf"rollout\.quantize: fp8 {words}"):
        validate(recipe)
