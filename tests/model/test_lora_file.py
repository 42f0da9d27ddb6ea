"""LoRA files of many trainers: the update that each means, or one line."""

import json
import math

import pytest
import torch
from diffusers import Krea2Pipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from posttrain.errors import UserError
from posttrain.model import key_names
from posttrain.model.k2 import K2
from posttrain.model.lora_file import A, B, add_lora, linear_shapes, read_lora

FIRST, SECOND = "transformer_blocks.0.attn.to_q", "transformer_blocks.1.ff.up"
SHAPES = {FIRST: (6, 5), SECOND: (7, 5)}
RANK = 4
HEADER = "lora_adapter_metadata"


def original(layer):
    return key_names.original_name(f"{layer}.").removesuffix(".")


def factors():
    """By layer (A, B)."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for layer, (outputs, inputs) in SHAPES.items():
        a, b = torch.randn(RANK, inputs, generator=generator), torch.randn(outputs, RANK, generator=generator)
        found[layer] = (a, b)
    return found


def named(prefix="transformer.", rename=str, a=A, b=B, alpha=None):
    """A LoRA's tensors under a trainer's names."""
    tensors = {}
    for layer, (factor_a, factor_b) in factors().items():
        name = f"{prefix}{rename(layer)}"
        tensors |= {f"{name}.{a}": factor_a, f"{name}.{b}": factor_b}
        if alpha is not None:
            tensors[f"{name}.alpha"] = alpha
    return tensors


def underscored(layer):
    return original(layer).replace(".", "_")


def written(folder, tensors, header=None, config=None, name="adapter_model.safetensors"):
    save_file({key: value.clone().contiguous() for key, value in tensors.items()}, folder / name, metadata=header)
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder / name


def scale_in(file):
    """(scale, scale) of the two layers, each exact to 1e-6."""
    read = read_lora(file, SHAPES)
    assert read.keys() == {f"{layer}.{factor}" for layer in SHAPES for factor in (A, B)}
    scales = []
    for layer, (a, b) in factors().items():
        update, plain = read[f"{layer}.{B}"] @ read[f"{layer}.{A}"], b @ a
        scale = float((update * plain).sum() / plain.square().sum())
        assert torch.allclose(update, scale * plain, rtol=1e-6, atol=1e-6)
        scales.append(round(scale, 5))
    return tuple(scales)


DOWN_UP = {"a": "lora_down.weight", "b": "lora_up.weight"}


@pytest.mark.parametrize(
    ("tensors", "scale"),
    [
        (named(), 1),
        (named(""), 1),
        (named("diffusion_model.", original), 1),
        (named("model.diffusion_model.", original), 1),
        (named("base_model.model."), 1),
        (named("base_model.model.transformer."), 1),
        (named("pipe.dit.", original, "lora_A.default.weight", "lora_B.default.weight"), 1),
        (named("transformer._orig_mod."), 1),
        (named("module."), 1),
        (named("lora_unet_", underscored, **DOWN_UP, alpha=torch.tensor(2.0)), 0.5),
        (named("lora_unet_", underscored, **DOWN_UP, alpha=torch.tensor(2)), 0.5),  # of an integer type
        (named("lora_transformer_", underscored, **DOWN_UP, alpha=torch.tensor(8.0)), 2),
        (named("lora_transformer_", lambda layer: layer.replace(".", "_"), **DOWN_UP), 1),
        (named("diffusion_model.", original, alpha=torch.tensor([2.0])), 0.5),
    ],
)
def test_names_of_trainers(tmp_path, tensors, scale):
    assert scale_in(written(tmp_path, tensors)) == (scale, scale)


def peft(**settings):
    return {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "init_lora_weights": True, **settings}


def diffusers_header(**settings):
    return {HEADER: json.dumps({f"transformer.{key}": value for key, value in peft(**settings).items()})}


KOHYA = {"ss_network_alpha": "2", "ss_network_dim": "4"}


@pytest.mark.parametrize(
    ("tensors", "header", "config", "scales"),
    [
        (named(), diffusers_header(), None, (2, 2)),
        (named(), diffusers_header(use_rslora=True), None, (4, 4)),
        (named(), diffusers_header(alpha_pattern={"attn.to_q": 16}), None, (4, 2)),
        (named(), diffusers_header(alpha_pattern={r"transformer_blocks\.\d+\.ff\.up": 1}), None, (2, 0.25)),
        (named(), diffusers_header(r=32, rank_pattern={"to_q": RANK, "^transformer_blocks.1.ff.up": RANK}), None,
         (2, 2)),
        (named(), {HEADER: json.dumps(peft())}, None, (2, 2)),
        (named(), {HEADER: json.dumps({"text_encoder.r": 2, "text_encoder.lora_alpha": 1})}, None, (1, 1)),
        (named(), {"format": "pt"}, None, (1, 1)),
        (named("base_model.model."), None, peft(lora_alpha=16), (4, 4)),
        (named("base_model.model."), None, peft(lora_alpha=16, use_rslora=True), (8, 8)),
        (named("base_model.model.", original), None, peft(alpha_pattern={"attn.wq": 16}), (4, 2)),
        (named("diffusion_model.", original), KOHYA, None, (0.5, 0.5)),
        (named("diffusion_model.", original), KOHYA | {"ss_network_alpha": "None"}, None, (1, 1)),
        (named("lora_unet_", underscored, **DOWN_UP, alpha=torch.tensor(2.0)),
         KOHYA | {"ss_network_alpha": "Dynamic", "ss_network_dim": "Dynamic"}, None, (0.5, 0.5)),
        (named(alpha=torch.tensor(8.0)), diffusers_header(), peft(), (2, 2)),  # all agree
        (named(alpha=torch.tensor(8.0)) | {"transformer.transformer_blocks.0.attn.to_q.alpha": torch.tensor(8.02)},
         diffusers_header(), None, (2.005, 2)),  # rounding: the tensor counts
    ],
)  # fmt: skip
def test_scales_that_are_stated(tmp_path, tensors, header, config, scales):
    assert scale_in(written(tmp_path, tensors, header, config)) == scales


def test_ranks_of_layers_beside_one_of_the_header(tmp_path):
    """kohya's header has one rank and alpha for all layers: alpha tensors decide where ranks differ from it."""
    tensors = named("lora_unet_", underscored, **DOWN_UP, alpha=torch.tensor(2.0))
    name = f"lora_unet_{underscored(SECOND)}"
    tensors |= {f"{name}.lora_down.weight": torch.ones(2, 5), f"{name}.lora_up.weight": torch.ones(7, 2)}
    file = written(tmp_path, tensors, KOHYA)
    read = read_lora(file, SHAPES)
    (a, b), first = factors()[FIRST], read[f"{FIRST}.{B}"] @ read[f"{FIRST}.{A}"]
    assert torch.allclose(first, 2 / 4 * b @ a)
    assert torch.allclose(read[f"{SECOND}.{B}"] @ read[f"{SECOND}.{A}"], 2 / 2 * 2 * torch.ones(7, 5))
    # One rank for all that is not the header's, as after a resize: the tensors again.
    assert scale_in(written(tmp_path, named(alpha=torch.tensor(2.0)), KOHYA | {"ss_network_dim": "8"})) == (0.5, 0.5)
    # Without alpha tensors there is only the header, and it is about another LoRA.
    bare = {key: value for key, value in tensors.items() if not key.endswith("alpha")}
    with pytest.raises(UserError, match="has rank 2, and its header says 4 beside ss_network_alpha"):
        read_lora(written(tmp_path, bare, KOHYA), SHAPES)


def test_an_adapter_config_is_about_its_own_file(tmp_path):
    """PEFT's file, or the only one; one LoRA of several in a folder is not about any config there."""
    file = written(tmp_path, named(), None, peft(), name="mine.safetensors")
    assert scale_in(file) == (2, 2)
    other = written(tmp_path, named(), name="other.safetensors")
    assert scale_in(file) == scale_in(other) == (1, 1)
    assert scale_in(written(tmp_path, named())) == (2, 2)


TO_Q = "transformer.transformer_blocks.0.attn.to_q"


@pytest.mark.parametrize(
    ("tensors", "header", "config", "says"),
    [
        (named(alpha=torch.tensor(2.0)), diffusers_header(), None,
         r"its alpha tensor gives a scale \(alpha / rank\) of 0\.5, and lora_adapter_metadata in its header of 2"),
        (named(), diffusers_header(), peft(lora_alpha=4), r"header gives .* of 2, and adapter_config\.json of 1"),
        (named(), KOHYA, peft(), r"ss_network_alpha in its header gives .* of 0\.5, and adapter_config\.json of 2"),
        (named(alpha=torch.tensor(4.0)), KOHYA, None, r"of 1, and ss_network_alpha in its header of 0\.5"),
        (named(), diffusers_header(use_rslora=True), peft(), r"of 4, and adapter_config\.json of 2"),
        (named(), diffusers_header(r=8), None, "to_q has rank 4, and lora_adapter_metadata in its header says 8"),
        (named(), diffusers_header(rank_pattern={"up": 2}), None, r"up has rank 4, and .* says 2"),
        (named(), None, {"lora_alpha": 4}, "has rank 4, and adapter_config.json says 8"),  # PEFT's default
        (named(), KOHYA | {"ss_network_dim": "8"}, None, "has rank 4, and its header says 8 beside ss_network_alpha"),
        (named(), KOHYA | {"ss_network_alpha": "two"}, None, "ss_network_alpha in its header is 'two', not a number"),
        (named(), {HEADER: "{"}, None, "lora_adapter_metadata in its header is not JSON"),
        (named(), {HEADER: "[]"}, None, "lora_adapter_metadata in its header is not an object"),
        (named(), None, peft(lora_alpha="8"), 'lora_alpha is "8": it must be a number'),
        (named(), None, peft(lora_alpha=math.inf), "gives a scale of inf"),
        (named(), None, peft(alpha_pattern={"(": 1}), "alpha_pattern is .*: missing"),
        (named(), None, peft(alpha_pattern=[1]), "alpha_pattern is .*: it must map"),
        (named(), None, peft(use_dora=True), "use_dora is true: no layer of the file has a magnitude"),
        (named(), None, peft(init_lora_weights="pissa_niter_4"), "init_lora_weights is .*: it is for changed base"),
        (named(), None, peft(peft_type="LOHA"), 'peft_type is "LOHA": the file holds LoRA; give the settings'),
        (named() | {f"{TO_Q}.dora_scale": torch.ones(6, 1)}, None, None, r"DoRA \(transf.*to_q\), which is not a LoRA"),
        (named() | {f"{TO_Q}.lora_magnitude_vector": torch.ones(6)}, None, None, r"model\.start, posttrain sample"),
        (named() | {f"{TO_Q}.lora_B.bias": torch.ones(6)}, None, None, r"1 of its 5 keys .*lora_B\.bias"),
        (named() | {f"{TO_Q[:-1]}qkv.{A}": torch.ones(4, 5)}, None, None, r"1 of its 5 keys .*to_qkv"),
        ({f"lycoris_{underscored(FIRST)}.lokr_w1": torch.ones(2, 2)}, None, None,
         r"missing for lycoris_blocks_0_attn_wq \(lokr_w2_a, lokr_w2_b\)"),
        (named() | {f"diffusion_model.blocks.0.attn.wq.{A}": torch.ones(4, 5)}, None, None, "is there twice"),
        ({key: value.to(torch.float8_e4m3fn) for key, value in named().items()}, None, None, r"F8_E4M3 \(8 bits\)"),
        ({key: (value * 20).to(torch.int8) for key, value in named().items()}, None, None, r"I8 \(8 bits\), with 3"),
        (named() | {f"{TO_Q}.{B}": torch.full((6, 4), math.nan)}, None, None, r"lora_B\.weight holds .* not finite"),
        (named() | {f"{TO_Q}.alpha": torch.ones(4)}, None, None, r"to_q\.alpha has 4 numbers"),
        (named(alpha=torch.tensor(math.inf)), None, None, "alpha holds numbers that are not finite"),
        (named() | {f"{TO_Q}.{A}": torch.ones(5)}, None, None, r"factors of \[5\] and \[6, 4\] do not fit"),
        (named() | {f"{TO_Q}.{A}": torch.ones(0, 5), f"{TO_Q}.{B}": torch.ones(6, 0)}, None, None, r"of \[0, 5\] and"),
    ],
)  # fmt: skip
def test_what_is_refused(tmp_path, tensors, header, config, says):
    file = written(tmp_path, tensors, header, config)
    with pytest.raises(UserError, match=says) as error:
        read_lora(file, SHAPES)
    assert str(error.value).startswith(str(file)) and "\n" not in str(error.value)


def test_joined_names_mean_one_layer_each(model):
    """Underscores could make one name of two."""
    shapes = linear_shapes(K2.load(model).base_state_dict())
    for rename in (lambda layer: layer, original):
        assert len({rename(layer).replace(".", "_") for layer in shapes}) == len(shapes) > 40


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"alpha_pattern": {"attn.to_q": 2, "ff.up": 64}}])
def test_a_file_of_diffusers_is_read_as_stock_reads_it(model, tmp_path, settings):
    """Rank 8 and alpha 32, which only the header says: the weights of the stock pipeline, merged."""
    ours, stock = K2.load(model), Krea2Pipeline.from_pretrained(model)
    torch.manual_seed(1)
    targets = r"transformer_blocks\..*\.(to_q|to_out\.0|up)"
    settings = {"r": 8, "lora_alpha": 32, "target_modules": targets, "init_lora_weights": False} | settings
    stock.transformer.add_adapter(LoraConfig(**settings))
    state = {key: value.detach().clone() for key, value in get_peft_model_state_dict(stock.transformer).items()}
    header = {"transformer_lora_adapter_metadata": stock.transformer.peft_config["default"].to_dict()}
    stock.save_lora_weights(tmp_path, transformer_lora_layers=state, weight_name="lora.safetensors", **header)
    stock = Krea2Pipeline.from_pretrained(model)
    stock.load_lora_weights(tmp_path / "lora.safetensors")
    stock.fuse_lora()
    stock.unload_lora_weights()
    file = tmp_path / "lora.safetensors"
    add_lora(ours, "lora", read_lora(file, linear_shapes(ours.base_state_dict())), file)
    before = ours.transformer.transformer_blocks[0].attn.to_q.weight.detach().clone()
    ours.stack_role("lora")
    ours.merge_stack()
    for key, value in ours.base_state_dict().items():
        assert torch.allclose(value, stock.transformer.get_parameter(key), atol=1e-5), key
    assert not torch.allclose(ours.transformer.transformer_blocks[0].attn.to_q.weight, before, atol=1e-3)
