"""Compiled blocks against uncompiled ones, under every role, and how many keep their activations.

torch's own compiler takes minutes on a CPU, so its tracing alone is used here: what is traced and when it is traced
again are the same.
"""

import functools

import pytest
import torch

from posttrain.config.sections import ModelConfig
from posttrain.errors import UserError
from posttrain.model import blocks
from posttrain.model.blocks import Blocks
from posttrain.model.k2 import K2, Text
from posttrain.model.roles import switched
from posttrain.training.policy import load_model

COMPILED = blocks._compiled


@pytest.fixture(scope="module")
def k2():
    traced = functools.cache(lambda function, device: torch.compile(function, backend="eager", fullgraph=True))
    made = K2.random("cpu", torch.float32, "tiny", text=False)
    for seed, name in enumerate(("policy", "fake")):
        made.add_role(name, 4, 4.0, seed=seed)
        for parameter in made.role_parameters(name):
            torch.nn.init.normal_(parameter, std=0.1)
    with pytest.MonkeyPatch.context() as patch, torch._dynamo.config.patch(recompile_limit=blocks.MAX_VARIANTS):
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


@pytest.mark.long
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
    # Those that are computed again keep their inputs: k + (28 - k) / 10 + 2 = 10 at k = 5.8.
    assert blocks.kept_blocks(10, 1, 28, 0.1) == 5
    assert blocks.kept_blocks(10, 0.1, 28, 0.1) == 28


class Ledger(blocks.Memory):
    """A GPU with `room` bytes for activations. What blocks keep for backward is counted as autograd saves it; the first
    to keep anything leaves something else behind, as compiling may."""

    def __init__(self, room):
        super().__init__(torch.device("cpu"))
        self.room, self.held, self.left_behind, self.asked = room, 0, 0, 0

    def pack(self, tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            self.held, self.left_behind = self.held + tensor.nbytes, 10**9
        return tensor

    def allocated(self):
        return self.held + self.left_behind

    def free(self, blocks):
        self.asked += 1
        return self.room - self.held


class LoraLinear(torch.nn.Module):
    """Keeps for backward what goes in and what GELU sees: twice the size of its input."""

    def __init__(self, width):
        super().__init__()
        self.lora_scale = torch.nn.Parameter(torch.randn(width))

    def forward(self, hidden, modulation, rope, mask):
        return torch.nn.functional.gelu(hidden * self.lora_scale)


def deep(room, count=6):
    torch.manual_seed(0)
    made = Blocks([])
    made.memory = Ledger(room)
    return made, [LoraLinear(8) for _ in range(count)]


def run(made, layers, tokens=5, hidden=None):
    """Gradients, and how many blocks were computed again."""
    hidden = torch.ones(2, tokens, 8) if hidden is None else hidden
    nothing = torch.zeros(0)
    with torch.autograd.graph.saved_tensors_hooks(made.memory.pack, lambda tensor: tensor):
        out = made(layers, hidden, nothing, (nothing, nothing), None)
    made.memory.held = 0
    if not out.requires_grad:
        return None, made.recomputed
    return torch.autograd.grad(out.square().sum(), [layer.lora_scale for layer in layers]), made.recomputed


# A block keeps 2 x 5 x 8 fp32 numbers twice, 640 bytes, and one that is computed again its input, 320. So k of six fit
# into k 640 + (6 - k) 320 + 2 x 640 bytes.
@pytest.mark.parametrize(("room", "kept"), [(10**6, 6), (320 * 12, 2), (320 * 13, 3), (320 * 10, 0), (0, 0)])
def test_as_many_blocks_keep_theirs_as_the_memory_holds(room, kept):
    expected, _ = run(*deep(10**9))
    made, layers = deep(room)
    with torch.no_grad():
        made(layers, torch.ones(2, 5, 8), torch.zeros(0), (torch.zeros(0),) * 2, None)
    assert made.memory.asked == 0  # what is only drawn keeps nothing and tells nothing
    first, _ = run(made, layers)
    assert made.bytes_a_token == 64 and made.memory.asked == 1
    second, again = run(made, layers)
    assert again == 6 - kept and made.memory.asked == 1
    for found in (first, second):
        assert all(torch.equal(a, b) for a, b in zip(found, expected))
    assert run(made, layers, tokens=7)[0] is not None and made.memory.asked == 2


def test_a_forward_with_nothing_to_train_does_not_count():
    made, layers = deep(0)
    for layer in layers:
        layer.requires_grad_(False)
    assert run(made, layers) == (None, 0) and made.memory.asked == 0
    for layer in layers:
        layer.lora_scale.requires_grad_(True)
    run(made, layers)
    assert made.memory.asked == 1 and run(made, layers)[1] == 6


def test_gradients_and_moments_to_come():
    """Two adapters of 8 numbers, one trained: 8 x 4 bytes of gradient until it is there, and 2 x 8 x 8 of moments."""
    layer = LoraLinear(8)
    layer.lora_other = torch.nn.Parameter(torch.ones(8), requires_grad=False)
    assert blocks.pending_bytes([layer]) == 32 + 128
    layer.lora_scale.grad = torch.zeros(8)
    assert blocks.pending_bytes([layer]) == 128


def test_a_recipe_says_how_blocks_run(model):
    for compiled, recompute in ((None, None), (True, 2), (False, 0)):
        config = ModelConfig(str(model), dtype="float32", compile=compiled, recompute=recompute)
        made = load_model(config, "cpu").blocks
        assert made.compiled is compiled and made.recompute == recompute
    for device, dtype, expected in (
        ("cuda", torch.bfloat16, True), ("cuda", torch.float32, False), ("cpu", torch.bfloat16, False),
    ):  # fmt: skip
        assert blocks.compiles_by_default(torch.device(device), dtype) is expected
    with pytest.raises(UserError, match=r"model\.attention: cudnn wants an NVIDIA GPU"):
        load_model(ModelConfig(str(model), dtype="float32", attention="cudnn"), "cpu")


@pytest.mark.long
def test_compiled_blocks_keep_no_copies_of_what_adapters_read(monkeypatch):
    """fp32 adapters read fp32 copies of inputs in bf16; without a limit compiled blocks keep 0.65 of what uncompiled
    ones do. torch's partition of a graph is the same without its compiler."""
    k2 = K2.random("cpu", torch.bfloat16, "tiny", text=False)
    k2.add_role("policy", 4, 4.0, seed=0)
    weights = {p.untyped_storage().data_ptr() for p in k2.transformer.parameters()}
    COMPILED(blocks._run, "cuda")  # sets the limit
    traced = torch.compile(blocks._run, backend="aot_eager_decomp_partition")
    monkeypatch.setattr(blocks, "_compiled", lambda function, device: traced)

    def kept(compiled):
        seen = {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            found = gradients(k2, "policy", 0, batch=2, lengths=(60,), compiled=compiled)
        return sum(seen.values()), found

    (uncompiled, expected), (compiled, found) = kept(False), kept(True)
    assert compiled < 0.55 * uncompiled
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-6)


def test_a_compiler_that_is_missing_is_named(monkeypatch):
    monkeypatch.setenv("PATH", "")
    for variable in ("CC", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    COMPILED.cache_clear()
    for device, name in (("cpu", r"g\+\+"), ("cuda", "gcc")):
        with pytest.raises(UserError, match=rf"model\.compile: needs {name}, which is not in the PATH; install it"):
            COMPILED(blocks._run, device)
