"""Compiled blocks against uncompiled ones, under every role, and how many keep their activations.

torch's own compiler takes minutes on a CPU, so its tracing alone is used here: what is traced and when it is traced
again are the same.
"""

import functools

import pytest
import torch

from posttrain import blocks
from posttrain.config import ModelConfig
from posttrain.k2 import K2, Text
from posttrain.policy import load_model
from posttrain.roles import switched
from prompts.errors import UserError


@pytest.fixture(scope="module")
def k2():
    traced = functools.cache(lambda: torch.compile(blocks._run, backend="eager", fullgraph=True))
    made = K2.random("cpu", torch.float32, "tiny", text=False)
    for seed, name in enumerate(("policy", "fake")):
        made.add_role(name, 4, 4.0, seed=seed)
        for parameter in made.role_parameters(name):
            torch.nn.init.normal_(parameter, std=0.1)
    with pytest.MonkeyPatch.context() as patch, torch._dynamo.config.patch(recompile_limit=blocks.WAYS):
        patch.setattr(blocks, "_compiled", traced)
        yield made


def velocity(k2, role, batch=3, lengths=(7,), compiled=True):
    """On inputs that depend on the arguments alone; the texts are dealt out to the batch."""
    k2.blocks.compiled = compiled
    side, generator = k2.pixel_multiple, torch.Generator().manual_seed(batch)
    x = torch.randn(batch, 6, k2.latent_channels, generator=generator)
    text = Text.of([k2.fuse(k2.random_features(lengths[i % len(lengths)], i)) for i in range(batch)])
    with k2.role(role):
        return k2.velocity(x, 0.5, text, 2 * side, 3 * side)


def gradients(k2, role, recompute, **inputs):
    k2.blocks.recompute = recompute
    parameters = k2.train_role(role)
    v = velocity(k2, role, **inputs)
    with switched(k2.blocks.active, []):  # another role is active when backward recomputes
        return torch.autograd.grad(v.square().mean(), parameters)


def test_each_role_is_its_own(k2):
    for role in ("policy", None, "fake", "policy", "fake", None):
        with torch.no_grad():
            expected = velocity(k2, role, compiled=False)
            assert torch.equal(velocity(k2, role), expected), role
            others = [velocity(k2, other) for other in {"policy", "fake", None} - {role}]
        assert all((other - expected).abs().max() > 1e-3 for other in others)


def test_nothing_is_compiled_again(k2):
    def everything(batch, lengths):
        with torch.no_grad():
            for role in ("policy", "fake", None):
                velocity(k2, role, batch, lengths)
        gradients(k2, "policy", 1, batch=batch, lengths=lengths)

    before = blocks.graphs()
    for _ in range(2):  # what the first left trainable, the second finds
        everything(4, (7,))
    everything(4, (7, 9))
    made = blocks.graphs()
    assert made > before
    everything(3, (11,))
    everything(5, (4, 5, 6))
    everything(1, (8,))
    assert blocks.graphs() == made


def test_a_single_sample_is_what_it_is_alone(k2):
    with torch.no_grad():
        alone = velocity(k2, "policy", 1)
        velocity(k2, "policy", 3)
        before = blocks.graphs()
        assert torch.allclose(
            velocity(k2, "policy", 1, (9,)), velocity(k2, "policy", 1, (9,), compiled=False), atol=1e-5
        )
        again = velocity(k2, "policy", 1)
    assert blocks.graphs() == before and again.shape == alone.shape and torch.allclose(again, alone, atol=1e-5)


@pytest.mark.parametrize("recompute", [0, 1, 2])
def test_gradients_are_the_same(k2, recompute):
    for role in ("policy", "fake"):
        expected = gradients(k2, role, 0, compiled=False)
        found = gradients(k2, role, recompute)
        assert all(torch.equal(a, b) for a, b in zip(expected, found))
        assert all(g.abs().sum() > 0 for g in found)


def test_what_fits_is_kept():
    """In 10 GiB, at 1 GiB a block and two more for the one that is computed again, 8 of 28 keep theirs."""
    assert blocks.kept_blocks(10, 1, 28) == 8
    assert blocks.kept_blocks(100, 1, 28) == 28
    assert blocks.kept_blocks(-3, 1, 28) == 0 and blocks.kept_blocks(2.9, 1, 28) == 0


def test_a_recipe_says_how_blocks_run(model):
    for compiled, recompute in ((False, None), (True, 2), (False, 0)):
        config = ModelConfig(str(model), dtype="float32", compile=compiled, recompute=recompute)
        made = load_model(config, "cpu").blocks
        assert made.compiled is compiled and made.recompute == recompute
    with pytest.raises(UserError, match=r"model\.attention: cudnn wants an NVIDIA GPU"):
        load_model(ModelConfig(str(model), dtype="float32", attention="cudnn"), "cpu")
