"""Adapters and other roles of a K2, against algebra, on a tiny real pipeline in fp32."""

import dataclasses
import time

import pytest
import torch
from torch import nn

from posttrain.errors import UserError
from posttrain.model import roles
from posttrain.model.k2 import K2
from posttrain.model.linears import LoraLinear
from posttrain.model.roles import Kept
from tests.helpers import tiny
from tests.model.test_k2 import distance, latents


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


WAYS = [("cpu", False), *([("cuda", False), ("cuda", True)] if torch.cuda.is_available() else [])]
"""Devices, and whether what runs there is compiled."""


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
def test_a_stacked_role_is_part_of_the_reference(fresh, others):
    """Unchanged, and under every other role; its factors lie side by side with theirs."""
    fresh.add_role("policy", rank=4, alpha=8)
    nudge(fresh, "policy")
    if others:
        fresh.add_role("student", rank=2, alpha=2, targets=("to_q", "ff.down"))
        nudge(fresh, "student")
        student = probe(fresh, "student")
    adapted, names = probe(fresh, "policy"), set(tiny.pipeline().transformer.state_dict())
    assert set(fresh.base_state_dict()) == names
    factors, weights = fresh.active_factors("policy"), {k: v.clone() for k, v in fresh.base_state_dict().items()}
    fresh.stack_role("policy")
    assert torch.equal(probe(fresh, None), adapted)
    assert all(torch.equal(value, factors[key]) for key, value in fresh.active_factors(None).items())
    assert list(fresh.roles) == (["student"] if others else []) and fresh.active is None
    assert all(torch.equal(value, weights[key]) for key, value in fresh.base_state_dict().items())
    assert not any(p.requires_grad for p in fresh.transformer.parameters())
    if others:
        assert distance(probe(fresh, "student"), student) > 1e-3  # it now stands on the stack
        assert len(fresh.role_parameters("student")) == 2 * 2 * 3
        nudge(fresh, "student")
        both = probe(fresh, "student")
        fresh.stack_role("student")
        ranks = {key: len(value) for key, value in fresh.active_factors(None).items() if "lora_A" in key}
        assert {key.split(".lora")[0].split(".", 2)[2] for key, rank in ranks.items() if rank == 6} == {
            "attn.to_q",
            "ff.down",
        }
        assert set(ranks.values()) == {4, 6} and torch.equal(probe(fresh, None), both)
    else:
        fresh.add_role("policy", rank=2, alpha=2)
        assert distance(probe(fresh, "policy"), adapted) < 1e-6 * adapted.abs().max()


def test_merging_the_stack_is_one_sum(fresh):
    """In fp32, of all stages; plain linears are left."""
    for seed, rank in enumerate((4, 2)):
        fresh.add_role("policy", rank=rank, alpha=8, seed=seed)
        nudge(fresh, "policy", seed)
        with pytest.raises(RuntimeError, match="cannot merge the stack under"):
            fresh.merge_stack()
        fresh.stack_role("policy")
    stacked, factors = probe(fresh, None), fresh.active_factors(None)
    wanted = {key: value.clone() for key, value in fresh.base_state_dict().items()}
    for key, value in factors.items():
        if "lora_A" in key:
            wanted[key.replace("lora_A.", "")] += factors[key.replace("lora_A", "lora_B")] @ value
    kept = fresh.merge_stack(torch.float32)
    assert {type(module) for module in fresh.transformer.modules() if "Linear" in type(module).__name__} == {nn.Linear}
    assert fresh.transformer.state_dict().keys() == wanted.keys() and not fresh.has_stack
    assert all(torch.equal(value, wanted[key]) for key, value in fresh.transformer.state_dict().items())
    assert distance(probe(fresh, None), stacked) < 1e-5 * stacked.abs().max()
    assert len(kept) == 24 and all(one.share == pytest.approx(1, abs=1e-4) for (one,) in kept.values())


def test_kept_of_a_change_by_hand():
    """In bf16 numbers from 1 to 2 are 1/128 apart: of +1/128 all is kept, of +1/1024 nothing, of +3/512 4/3."""
    weight = torch.tensor([1.0, 1.25, 1.5, 1.0])
    change = torch.tensor([1 / 128, 1 / 1024, 3 / 512, 0.0])
    kept = Kept.of(weight, change, weight + change, torch.bfloat16)
    wanted = 1 / 128**2 + 1 / 1024**2 + (3 / 512) ** 2
    assert kept.wanted == pytest.approx(wanted)
    assert kept.share == pytest.approx((1 / 128**2 + 3 / 512 / 128) / wanted)
    assert kept.size == pytest.approx((wanted / (1 + 1.25**2 + 1.5**2 + 1)) ** 0.5)
    whole = kept + Kept(0.0, wanted, 0.0)  # a layer that keeps nothing
    assert whole.share == pytest.approx(kept.share / 2) and Kept(0.0, 0.0, 1.0).share == 1


def test_kept_is_the_same_in_parts(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn((7, 9), generator=generator).bfloat16()
    change = torch.randn((7, 9), generator=generator) * 0.01
    whole = Kept.of(weight, change, weight.float() + change, torch.bfloat16)
    monkeypatch.setattr(roles, "PART", 8)  # the last part is of seven
    parts = Kept.of(weight, change, weight.float() + change, torch.bfloat16)
    assert dataclasses.astuple(parts) == pytest.approx(dataclasses.astuple(whole), rel=1e-5)


@pytest.mark.parametrize("size", [0.0017, 0.0002])
@pytest.mark.parametrize(("device", "compiled"), WAYS)
def test_a_small_change_is_kept_in_bf16(size, device, compiled):
    """Of outputs W x that are rounded to bf16 before an adapter's part is added, most drop it; and of weights too."""
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(256, 256, bias=False, dtype=torch.bfloat16, device=device).requires_grad_(False)
    active: list[str] = []
    layer = adapted = LoraLinear(linear, active)
    if compiled:
        adapted = torch.compile(layer)
    a, b = (torch.randn(shape, generator=generator).to(device) for shape in ((8, 256), (256, 8)))
    b *= size * linear.weight.float().norm() / (b @ a).norm()
    layer.add("one", a[:4], b[:, :4], 1.0)
    layer.add("two", a[4:], b[:, 4:] / 2, 2.0)
    x = torch.randn(8, 512, 256, generator=generator).bfloat16().to(device)
    plain, change = adapted(x), x.float() @ (b @ a).T
    active[:] = ["one", "two"]

    def share(y):
        return float(((y.float() - plain.float()) * change).sum() / change.square().sum())

    assert share(adapted(x)) == pytest.approx(1, abs=0.01)
    low, high = {0.0017: (0.6, 0.9), 0.0002: (0.0, 0.3)}[size]
    assert low < share(plain + change.bfloat16()) < high
    merged = (linear.weight.float() + b @ a).bfloat16()
    assert low < share(nn.functional.linear(x, merged)) < high + 0.2
    layer.add("one", a[:4], 0 * b[:, :4], 1.0)
    active[:] = ["one"]
    assert torch.equal(adapted(x), plain)


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
    with fresh.role("policy"), pytest.raises(RuntimeError, match="cannot stack"):
        fresh.stack_role("policy")


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
    """To the last bit, in bf16 too, where the role's own weights are fp32. Stacking brings their types back."""
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
    model.stack_role("policy")
    assert model.roles == {} and {key: v.dtype for key, v in model.base_state_dict().items()} == {
        key: value.dtype for key, value in stored.items()
    }
    tolerance = 1e-6 if dtype == torch.float32 else 0.05 * moved.abs().max()
    assert distance(probe(model, None), moved) <= tolerance


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_weights_take_the_stack_in(directory, dtype, deferred):
    """In fp32, so that nothing of it is lost; copy and reference begin as the same, bit for bit."""
    model = K2.load(directory, dtype=dtype)
    model.add_role("policy", rank=4, alpha=8)
    nudge(model, "policy")
    model.stack_role("policy")
    factors, weights = model.active_factors(None), {k: v.float() for k, v in model.base_state_dict().items()}
    stacked = probe(model, None)
    model.deferred = deferred
    model.add_full_role("policy", reference=True)
    model.add_full_copy("fake")
    for name in ("policy", "fake") if deferred else ():  # as parallelize.py and zero.py do
        for parameter in model.role_parameters(name):
            parameter.data = model.master(parameter)
    assert not model.has_stack and not any(".lora_" in key for key in model.transformer.state_dict())
    for key, value in model.role_state_dict("policy").items():
        layer = key.removesuffix(".weight")
        change = 0
        if f"{layer}.lora_A.weight" in factors:
            change = factors[f"{layer}.lora_B.weight"] @ factors[f"{layer}.lora_A.weight"]
        assert value.dtype == torch.float32 and torch.equal(value, weights[key] + change)
    begun = probe(model, "policy")
    assert torch.equal(begun, probe(model, None)) and torch.equal(begun, probe(model, "fake"))
    assert distance(begun, stacked) < (1e-5 if dtype == torch.float32 else 0.05) * stacked.abs().max()


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
