"""Packed keys give what a mask gives: the kernel is torch's on a GPU, and said in Python elsewhere."""

import pytest
import torch
from torch.nn import functional as F

from posttrain.model import blocks, packed, references
from posttrain.model.blocks import set_attention
from posttrain.model.k2 import K2, Text

CUDA = torch.cuda.is_available()


def in_turn(query, key, value, begins, ends, most, of_keys, enable_gqa=False):
    """What `varlen_attn` computes, one sample at a time. Its kernel writes no gradients behind the last end."""
    for x in (key, value):
        if x.requires_grad:
            x.register_hook(lambda g: torch.cat([g[: ends[-1]], torch.full_like(g[ends[-1] :], torch.nan)]))
    out = []
    for i in range(len(begins) - 1):
        q = query[begins[i] : begins[i + 1]].transpose(0, 1)
        k, v = (x[ends[i] : ends[i + 1]].transpose(0, 1) for x in (key, value))
        out.append(F.scaled_dot_product_attention(q, k, v, enable_gqa=enable_gqa).transpose(0, 1))
    return torch.cat(out)


def test_places_of_real_tokens():
    mask = torch.tensor([[1, 0, 1], [1, 1, 1], [0, 1, 0]], dtype=torch.bool)
    places, ends = packed.packed(mask)
    assert ends.tolist() == [0, 2, 5, 6] and ends.dtype == torch.int32
    assert places.tolist() == [0, 2, 3, 4, 5, 7, 1, 6, 8]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("shared", [True, False], ids=["heads shared", "heads repeated"])
def test_packed_equals_masked(monkeypatch, compiled, shared):
    """Velocities and gradients, for texts of three lengths, of which the longest has no padding."""
    if compiled and not CUDA:
        pytest.skip("one loop over samples cannot be compiled for batches of any size")
    device, dtype = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
    k2 = K2.random(torch.device(device), dtype, "tiny", text=False)
    if not CUDA:
        monkeypatch.setattr(packed, "varlen_attn", in_turn)
        monkeypatch.setattr(packed, "_SHARED_HEADS", shared)
    k2.blocks.compiled = compiled
    set_attention(k2.transformer, "packed")
    text = Text.of([k2.fuse(k2.random_features(length)) for length in (9, 12, 10)])
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, k2.image_tokens(64, 64), k2.latent_channels, generator=generator).to(device)
    found = []
    for packs in (False, True):
        k2.blocks.packs = packs
        own = x.clone().requires_grad_()
        v = k2.velocity(own, torch.tensor([0.2, 0.5, 0.9], device=device), text, 64, 64)
        v.square().sum().backward()
        found.append((v.detach().float(), own.grad.float()))
    near = {"rtol": 2e-2, "atol": 2e-2} if CUDA else {"rtol": 1e-5, "atol": 1e-5}
    for masked, ours in zip(*found):
        torch.testing.assert_close(ours / masked.std(), masked / masked.std(), **near)


def test_one_sample_with_a_mask(monkeypatch):
    """As tdm has it: a single sample of a padded text, which is run as two after a larger batch."""
    k2 = K2.random(torch.device("cpu"), torch.float32, "tiny", text=False)
    monkeypatch.setattr(packed, "varlen_attn", in_turn)
    monkeypatch.setattr("posttrain.model.blocks._run_compiled", lambda *inputs: blocks._run(*inputs))
    set_attention(k2.transformer, "packed")
    text = Text.of([k2.fuse(k2.random_features(length)) for length in (9, 12)])
    x = torch.randn(2, k2.image_tokens(64, 64), k2.latent_channels, generator=torch.Generator().manual_seed(0))
    k2.blocks.compiled, k2.blocks.packs = True, True
    both = k2.velocity(x, 0.5, text, 64, 64)
    one = k2.velocity(x[:1], 0.5, text.first(1), 64, 64)
    torch.testing.assert_close(one, both[:1], rtol=1e-5, atol=1e-5)


def test_both_processors_are_one(monkeypatch):
    """References after packed keys: the processor is installed once, with torch's own choice of kernels."""
    k2 = K2.random(torch.device("cpu"), torch.float32, "tiny", text=False)
    set_attention(k2.transformer, "packed")
    first = k2.transformer.transformer_blocks[0].attn.processor
    references.install(k2.transformer)
    assert k2.transformer.transformer_blocks[0].attn.processor is first
    assert first._attention_backend == "native"
