"""Adapters on any linear of K2: which layers, what they compute, and text that is fused under each role."""

import dataclasses

import pytest
import torch
from diffusers import Krea2Transformer2DModel
from torch import nn

from posttrain.errors import UserError
from posttrain.model import sampler
from posttrain.model.adapters.targets import OUTSIDE, TARGETS, is_known, text_targets
from posttrain.model.architecture import fuse
from posttrain.model.k2 import K2, Text
from posttrain.model.linears import LoraLinear
from posttrain.model.roles import Roles
from tests.helpers import tiny
from tests.model.test_k2 import distance, latents
from tests.model.test_k2_roles import nudge

EDGES = ("img_in", "time_embed", "time_mod_proj", "final_layer")
"""The parts outside the blocks that see no text."""
CASES = [EDGES, ("txt_in",), ("text_fusion.projector", "to_q"), ("text_fusion",), ("all",)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("tiny") / "raw")


@pytest.fixture
def fresh(directory):
    return K2.load(directory)


def probe(k2, role, prompts=tiny.PROMPTS[1:3]):
    """Of two prompts of different lengths, so that there is a mask."""
    x = latents(k2, 32, 32, 2)
    with k2.role(role):
        return k2.velocity(x, torch.tensor([0.3, 0.8]), k2.text(prompts), 32, 32)


def test_targets_of_the_released_size():
    """All 264 linears, as musubi-tuner's lora_krea2 counts them; and diffusers' recommended layers outside blocks."""
    with torch.device("meta"):
        k2 = Roles(Krea2Transformer2DModel())
    layers = {target: k2.layers_of([target]) for target in ("all", "blocks", *TARGETS, *OUTSIDE)}
    linears = [name for name, module in k2.transformer.named_modules() if isinstance(module, nn.Linear)]
    assert layers["all"] == linears and len(linears) == 264
    assert len(layers["blocks"]) == 8 * 28 and set(layers["blocks"]) == {n for t in TARGETS for n in layers[t]}
    assert {target: len(layers[target]) for target in OUTSIDE} == {
        "img_in": 1, "time_embed": 2, "time_mod_proj": 1, "final_layer": 1, "text_fusion": 33, "txt_in": 2
    }  # fmt: skip
    assert k2.layers_of(["txt_in.linear_2", "text_fusion.projector"]) == ["text_fusion.projector", "txt_in.linear_2"]
    assert all(len(layers[target]) == 28 for target in TARGETS)  # not those of the text fusion
    assert not is_known("transformer_blocks.0.attn.to_q") and text_targets(["to_q", "txt_in", "all"]) == [
        "txt_in",
        "all",
    ]


@pytest.mark.parametrize("target", ["img_in.weight", "txt_in.norm", "txt_in.linear_3", "rotary_emb", "text"])
def test_a_layer_that_is_none_is_refused(fresh, target):
    with pytest.raises(UserError, match=f"'{target}' is no linear of a K2 block, nor a layer outside them"):
        fresh.add_role("policy", 4, 8, [target])
    assert not fresh.roles and not any(isinstance(module, LoraLinear) for module in fresh.transformer.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("targets", CASES)
def test_an_untrained_adapter_is_the_reference_to_the_last_bit(directory, targets, dtype):
    k2 = K2.load(directory, dtype=dtype)
    before = probe(k2, None)
    k2.add_role("policy", 4, 8, targets)
    assert torch.equal(probe(k2, "policy"), probe(k2, None))
    # Biases are added after the product, and text is fused in a batch: the same within rounding.
    assert distance(probe(k2, None), before) < (1e-5 if dtype == torch.float32 else 0.02) * before.abs().max()


@pytest.mark.parametrize("targets", CASES)
def test_an_adapter_is_its_update_of_the_weights(fresh, targets):
    """Merged into plain linears, biases kept, it gives the same velocities, cached text or not."""
    fresh.add_role("policy", 4, 8, targets)
    nudge(fresh, "policy")
    plain, adapted = probe(fresh, None), probe(fresh, "policy")
    assert distance(plain, adapted) > 1e-2
    wanted = {key: value.clone() for key, value in fresh.base_state_dict().items()}
    for key, a in fresh.active_factors("policy").items():
        if "lora_A" in key:
            b = fresh.active_factors("policy")[key.replace("lora_A", "lora_B")]
            wanted[key.replace("lora_A.", "")] += b @ a
    fresh.stack_role("policy")
    assert fresh.fused_text_is_constant()
    assert distance(probe(fresh, None), adapted) < 1e-5 * adapted.abs().max()
    fresh.merge_stack()
    assert {type(module) for module in fresh.transformer.modules() if "Linear" in type(module).__name__} == {nn.Linear}
    assert fresh.transformer.state_dict().keys() == wanted.keys()
    assert all(torch.equal(value, wanted[key]) for key, value in fresh.transformer.state_dict().items())
    assert distance(probe(fresh, None), adapted) < 1e-5 * adapted.abs().max()


@pytest.mark.parametrize("recompute", [0, 3])
def test_every_factor_has_a_gradient_and_no_other_role_moves(fresh, recompute):
    fresh.blocks.recompute = recompute
    for seed, role in enumerate(("policy", "fake")):
        fresh.add_role(role, 4, 8, ["all"], seed)
        nudge(fresh, role, seed)
    base, fake = probe(fresh, None), probe(fresh, "fake")
    optimizer = torch.optim.SGD(fresh.train_role("policy"), lr=0.1)
    probe(fresh, "policy").square().mean().backward()
    factors = fresh.role_named_parameters("policy")
    assert len(factors) == 2 * len(fresh.layers_of(["all"])) == 2 * (24 + 5 + 33 + 2)
    without = [key for key, factor in factors.items() if factor.grad is None or not factor.grad.any()]
    assert not without
    optimizer.step()
    assert torch.equal(probe(fresh, None), base) and torch.equal(probe(fresh, "fake"), fake)


def test_gradients_of_the_text_layers_are_finite_differences(fresh):
    """Through masked text of two lengths."""
    fresh.add_role("policy", 2, 2, ["txt_in.linear_1", "text_fusion.projector", "time_embed.linear_2"])
    nudge(fresh, "policy")
    parameters = fresh.train_role("policy")

    def loss():
        return probe(fresh, "policy").square().mean()

    gradients = torch.autograd.grad(loss(), parameters)
    assert len(gradients) == 6
    for parameter, gradient in zip(parameters, gradients):
        # Along the gradient, where the slope is its norm.
        direction, values = gradient / gradient.norm(), []
        for step in (1e-2, -1e-2):
            with torch.no_grad():
                parameter.add_(direction, alpha=step)
                values.append(float(loss()))
                parameter.sub_(direction, alpha=step)
        assert (values[0] - values[1]) / 2e-2 == pytest.approx(float(gradient.norm()), rel=0.01)


def test_text_is_fused_once_for_a_whole_sample(fresh, monkeypatch):
    """And is what a forward of its own would fuse; guidance's too."""
    fresh.add_role("policy", 4, 8, ["txt_in"])
    nudge(fresh, "policy")
    text, null = fresh.text(tiny.PROMPTS[:2]), fresh.text([""])
    assert not text.is_fused and text.tokens.ndim == 4
    calls = []

    def counted(*args):
        calls.append(args)
        return fuse(*args)

    monkeypatch.setattr("posttrain.model.architecture.fuse", counted)
    noise = sampler.noise([1, 2], (fresh.image_tokens(32, 32), fresh.latent_channels))
    with fresh.role("policy"):
        drawn = fresh.sample(text, noise, 3, 32, 32, 1.5, null)
        assert len(calls) == 2
        x, times = noise, sampler.schedule(3, fresh.mu(32, 32)).tolist()
        for t, t_next in zip(times, times[1:]):
            with torch.no_grad():
                v = fresh.guided_velocity(x, t, text, null, 1.5, 32, 32)
            x = sampler.ode_step(x, v, t, t_next)
    assert len(calls) == 2 + 6 and torch.allclose(drawn, x, atol=1e-6)


def test_text_of_one_role_is_not_read_by_another(fresh):
    early = fresh.text(tiny.PROMPTS[:1])
    assert early.is_fused
    fresh.add_role("policy", 4, 8, ["txt_in"])
    x = latents(fresh, 32, 32, 2)
    with fresh.role("policy"):
        fused = fresh.fused(fresh.text(tiny.PROMPTS[:1]))
        fresh.velocity(x, 0.5, fused.first(1), 32, 32)
        with pytest.raises(RuntimeError, match="fused under None and is read under"):
            fresh.velocity(x, 0.5, early, 32, 32)
    with fresh.role(None), pytest.raises(RuntimeError, match=r"fused under \('policy',\) and is read under \(\)"):
        fresh.velocity(x, 0.5, fused, 32, 32)
    with pytest.raises(RuntimeError, match="cannot be cached"):
        fresh.fuse(fresh.encode(tiny.PROMPTS[:1]).features[0])
    with pytest.raises(dataclasses.FrozenInstanceError):
        fused.under = None


def test_an_earlier_stage_that_adapts_the_text_is_cached(fresh):
    """It is active under every role, so fused text is one again."""
    fresh.add_role("policy", 4, 8, ["all"])
    nudge(fresh, "policy")
    adapted = probe(fresh, "policy")
    fingerprints = [fresh.text_fingerprint()]
    fresh.stack_role("policy")
    fingerprints.append(fresh.text_fingerprint())
    fresh.add_role("policy", 4, 8)
    text = fresh.text(tiny.PROMPTS[1:3])
    assert text.is_fused and len({*fingerprints, K2(fresh.pipe).text_fingerprint()}) == 2
    assert distance(probe(fresh, "policy"), adapted) < 1e-5 * adapted.abs().max()


@pytest.mark.parametrize("copy", [True, False])
def test_all_weights_on_a_stage_that_adapts_the_text(fresh, copy):
    """What fuses text is not among them: the stage stays there, to the end."""
    fresh.add_role("policy", 4, 8, ["all"])
    nudge(fresh, "policy")
    adapted = probe(fresh, "policy")
    fresh.stack_role("policy")
    fresh.add_full_role("policy", reference=True)
    if copy:
        fresh.add_full_copy("fake")
    for role in (*fresh.roles, None):
        assert distance(probe(fresh, role), adapted) < 1e-4 * adapted.abs().max()
    layers = {name for name, module in fresh.transformer.named_modules() if isinstance(module, LoraLinear)}
    assert layers == {*fresh.layers_of(["text_fusion", "txt_in"])}
    if not copy:
        fresh.stack_role("policy")
        fresh.merge_stack()
        assert distance(probe(fresh, None), adapted) < 1e-4 * adapted.abs().max()


def test_a_small_change_of_a_layer_with_a_bias_is_kept_in_bf16():
    """A bias far above the change does not swallow it."""
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(256, 256, dtype=torch.bfloat16).requires_grad_(False)
    linear.bias.copy_(torch.randn(256, generator=generator))
    active: list[str] = []
    layer = LoraLinear(linear, active)
    a, b = (torch.randn(shape, generator=generator) for shape in ((8, 256), (256, 8)))
    b *= 0.0005 * linear.weight.float().norm() / (b @ a).norm()
    layer.add("one", a, b, 1.0)
    x = torch.randn(8, 512, 256, generator=generator).bfloat16()
    plain, change = layer(x), x.float() @ (b @ a).T
    active[:] = ["one"]
    kept = ((layer(x).float() - plain.float()) * change).sum() / change.square().sum()
    assert float(kept) == pytest.approx(1, abs=0.05)
    assert torch.equal(layer.plain()(x), linear(x)) and layer.plain().bias is linear.bias


def test_a_batch_of_texts_is_each_of_them(fresh):
    """Features of several lengths, padded and masked, fuse as they do alone."""
    fresh.add_role("policy", 4, 8, ["text_fusion"])
    nudge(fresh, "policy")
    features = fresh.encode(tiny.PROMPTS).features
    with fresh.role("policy"), torch.no_grad():
        together = fresh.fused(Text.of([fresh.text_tokens(one) for one in features]))
        for i, one in enumerate(features):
            alone = fresh.fused(Text.of([fresh.text_tokens(one)])).tokens[0]
            assert torch.allclose(together.tokens[i, : len(one)], alone, atol=1e-5)
    assert together.mask is not None and together.rows(torch.tensor([2, 0])).mask[0].sum() == len(features[2])
