"""Exports of an adapter on every linear of the model, read by stock diffusers: text is fused there without a cache."""

from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from diffusers import Krea2Pipeline
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from posttrain.export.config import ExportConfig
from posttrain.export.export import export, load_checkpoint
from posttrain.grpo import train as grpo
from posttrain.model.k2 import K2
from posttrain.model.lora_file import add_lora, linear_shapes, read_lora
from posttrain.training import checkpoint
from tests.export.test_export import GUIDANCE, distance, ours, stock_latents
from tests.helpers import runs, tiny

LINEARS = 3 * 8 + 5 + 4 * 8 + 1 + 2
"""Of the tiny model: three blocks, the edges (img_in, time_embed twice, time_mod_proj, final_layer), the fusion's four
blocks and its projector, txt_in twice."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    PartialState(cpu=True)
    return tiny.save(tmp_path_factory.mktemp("tiny") / "raw")


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    """One step of Adam on every linear, rank 4, alpha 8, from a stage that adapts the edges and txt_in at rank 2."""
    folder, output = tmp_path_factory.mktemp("trained"), None
    for name, targets, rank in (("a", ["to_q", "img_in", "final_layer", "txt_in"], 2), ("b", ["all"], 4)):
        (folder / name).mkdir()
        config = runs.config(folder / name, model)
        config.steps, config.optim.lr, config.model.start = 1, 0.02, output
        config.lora.targets, config.lora.rank = targets, rank
        grpo.train(config)
        output = config.output
    assert output is not None
    return Path(output)


@pytest.fixture(scope="module")
def adapted(run):
    return load_checkpoint(checkpoint.load(checkpoint.find(run)))


@pytest.fixture(scope="module")
def expected(adapted):
    latents = {guidance: ours(adapted, guidance, "policy") for guidance in GUIDANCE}
    assert all(distance(latents[guidance], ours(adapted, guidance)) > 0.05 for guidance in GUIDANCE)
    return latents


@pytest.mark.parametrize("format", ["diffusers", "original"])
def test_merged(run, adapted, expected, model, tmp_path, format):
    output = tmp_path / ("out" if format == "diffusers" else "out.safetensors")
    export(ExportConfig(str(run), str(output), format))
    k2 = K2.load(output) if format == "diffusers" else K2.load(model, transformer_file=output)
    for guidance in GUIDANCE:
        assert distance(ours(k2, guidance), expected[guidance]) < 1e-4
        assert distance(stock_latents(k2.pipe, adapted, guidance), expected[guidance]) < 1e-4
    before = base(model)
    changed = [key for key, value in k2.base_state_dict().items() if not torch.equal(value, before[key])]
    assert len(changed) == LINEARS


def base(model):
    return K2.load(model).base_state_dict()


@pytest.mark.parametrize("format", ["lora", "lora-original"])
def test_lora_file_in_stock_diffusers(run, adapted, expected, model, tmp_path, format):
    output = tmp_path / "out.safetensors"
    export(ExportConfig(str(run), str(output), format))
    names = set(load_file(output))
    original = {f"diffusion_model.{name}.lora_A.weight" for name in (
        "first", "last.linear", "tmlp.0", "tmlp.2", "tproj.1", "txtmlp.1", "txtmlp.3", "txtfusion.projector",
        "txtfusion.layerwise_blocks.1.attn.gate", "txtfusion.refiner_blocks.0.mlp.down",
    )}  # fmt: skip
    assert len(names) == 2 * LINEARS and (format == "lora" or original < names)
    pipe = Krea2Pipeline.from_pretrained(model)
    before = stock_latents(pipe, adapted, 0.0)
    pipe.load_lora_weights(output)
    layers = [module for module in pipe.transformer.modules() if isinstance(module, LoraLayer)]
    assert len(layers) == LINEARS
    for guidance in GUIDANCE:
        assert distance(stock_latents(pipe, adapted, guidance), expected[guidance]) < 1e-4
    assert distance(before, expected[0.0]) > 0.05


def test_the_lora_is_read_back_as_a_role(run, expected, model, tmp_path):
    """As by `sample --adapter FILE` and `export --check FILE`: every layer bound, ranks of 4 and 6."""
    output = tmp_path / "out.safetensors"
    export(ExportConfig(str(run), str(output), "lora"))
    k2 = K2.load(model)
    add_lora(k2, "lora", read_lora(output, linear_shapes(k2.base_state_dict())), output)
    assert k2.roles["lora"].rank == 6 and len(k2.role_named_parameters("lora")) == 2 * LINEARS and k2.adapts_text
    for guidance in GUIDANCE:
        assert distance(ours(k2, guidance, "lora"), expected[guidance]) < 1e-4
