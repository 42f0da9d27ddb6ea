"""Adapters and other roles of a K2, against algebra, on a tiny real pipeline in fp32."""

import time

import pytest
import torch

from posttrain.k2 import K2
from prompts.errors import UserError
from tests import tiny
from tests.test_k2 import distance, latents


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("tiny") / "raw")


@pytest.fixture(scope="module")
def model(directory):
    return K2.load(directory)


@pytest.fixture
def fresh(directory):
    """For tests that change the model."""
    return K2.load(directory)


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
