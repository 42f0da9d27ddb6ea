"""Files of other trainers, a test for each form: the weights that its own tool would run with, by its published formula
or by the tool itself where it is installed (PEFT), to 1e-6.

| tool | names | forms |
|---|---|---|
| diffusers' trainer, PEFT | `transformer.`, `base_model.model.` | LoRA, DoRA (lora_magnitude_vector), LoKr, LoHa |
| ai-toolkit | `diffusion_model.` and the original names | LoRA, LoKr, DoRA (magnitude) |
| SimpleTuner, LyCORIS | `lycoris_`, joined by underscores | LoKr, LoHa, whole differences, with dora_scale or not |
| OneTrainer | `transformer.`, lora_down and lora_up with alpha | LoRA, DoRA on outputs or inputs (dora_scale) |
| musubi-tuner, kohya | `lora_unet_` and the original names joined | LoRA, LoKr (lokr_factor), LoHa |
"""

import json
import math

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file

from posttrain.errors import UserError
from posttrain.model import key_names
from posttrain.model.k2 import K2
from posttrain.model.lora_file import add_adapter, linear_shapes, read_adapter, read_lora
from tests.helpers import tiny

LAYERS = ("transformer_blocks.0.attn.to_q", "transformer_blocks.2.ff.up", "txt_in.linear_1", "img_in")
"""Square, wide, with a bias and from few inputs; one each of the blocks' two parts and of the text's side."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("tiny") / "raw")


@pytest.fixture
def k2(directory):
    return K2.load(directory)


@pytest.fixture
def random():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator) * 0.3


def original(layer):
    return key_names.original_name(f"{layer}.").removesuffix(".")


NAMES = {
    "diffusers": lambda layer: f"transformer.{layer}",
    "peft": lambda layer: f"base_model.model.{layer}",
    "original": lambda layer: f"diffusion_model.{original(layer)}",
    "kohya": lambda layer: f"lora_unet_{original(layer)}".replace(".", "_"),
    "lycoris": lambda layer: f"lycoris_{layer}".replace(".", "_"),
    "lycoris original": lambda layer: f"lycoris_{original(layer)}".replace(".", "_"),
    "onetrainer": lambda layer: f"lora_transformer_{layer}".replace(".", "_"),
}


def read(k2, folder, tensors, header=None, config=None):
    """Merges the file into the model, as `posttrain sample --adapter` does."""
    folder.mkdir(exist_ok=True)
    file = folder / "adapter_model.safetensors"
    save_file({key: value.clone().contiguous() for key, value in tensors.items()}, file, header)
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    adapter = read_adapter(file, linear_shapes(k2.base_state_dict()))
    add_adapter(k2, "adapter", adapter, file)
    if "adapter" in k2.roles:
        k2.stack_role("adapter")
        k2.merge_stack()
    return adapter


def weights(k2, layers=LAYERS):
    return {layer: k2.transformer.get_submodule(layer).weight.detach().double().clone() for layer in layers}


def assert_weights(k2, before, expected):
    """(out, in) in float64 by layer; everything else is as it was."""
    for layer, weight in expected.items():
        now = k2.transformer.get_submodule(layer).weight.double()
        assert (now - before[layer]).norm() > 1e-2 * before[layer].norm(), layer
        assert (now - weight).abs().max() < 1e-6, layer


def dora(weight, update, magnitude, over):
    """Of outputs (over 1) or inputs (over 0)."""
    changed = weight + update
    return magnitude * changed / changed.norm(dim=over, keepdim=True)


def factors(random, layer_weight, rank=4):
    outputs, inputs = layer_weight.shape
    return random(rank, inputs), random(outputs, rank)


# ---- LoRA -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("alpha", [None, 2.0])
@pytest.mark.parametrize("suffixes", [("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")])
def test_lora_under_every_name(k2, tmp_path, random, names, alpha, suffixes):
    """Of the blocks, the text's side and the edges, with ranks of their own; without alpha at scale 1."""
    before, tensors, expected = weights(k2), {}, {}
    for rank, layer in enumerate(LAYERS, 2):
        a, b = factors(random, before[layer], rank)
        name = NAMES[names](layer)
        tensors |= {f"{name}.{suffixes[0]}": a, f"{name}.{suffixes[1]}": b}
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
        expected[layer] = before[layer] + (1 if alpha is None else alpha / rank) * (b.double() @ a.double())
    adapter = read(k2, tmp_path / "a", tensors)
    assert not adapter.changes
    assert_weights(k2, before, expected)


@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True}, {"rank_pattern": {"to_q": 2}, "alpha_pattern": {"up": 3}}]
)
def test_peft_itself_lora(directory, k2, tmp_path, settings):
    config = LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **settings)
    adapter = _peft_itself(directory, k2, tmp_path, config)
    assert adapter.factors and not adapter.changes


# ---- DoRA -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"alpha_pattern": {"img_in": 3}}])
def test_peft_itself_dora(directory, k2, tmp_path, settings):
    config = LoraConfig(r=4, lora_alpha=6, use_dora=True, init_lora_weights=False, **settings)
    adapter = _peft_itself(directory, k2, tmp_path, config)
    assert {change.kind for change in adapter.changes.values()} == {"DoRA"} and not adapter.factors


@pytest.mark.parametrize("names", ["diffusers", "onetrainer", "lycoris", "original"])
@pytest.mark.parametrize("over", [1, 0])
def test_dora_scale_of_outputs_and_inputs(k2, tmp_path, random, names, over):
    """LyCORIS, SimpleTuner and OneTrainer: (out, 1) with wd_on_output, (1, in) without."""
    before, tensors, expected = weights(k2), {}, {}
    for layer, weight in before.items():
        a, b = factors(random, weight)
        name = NAMES[names](layer)
        magnitude = weight.norm(dim=over, keepdim=True).float() * (1 + 0.2 * random(1))
        tensors |= {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b, f"{name}.alpha": torch.tensor(2.0)}
        tensors[f"{name}.dora_scale"] = magnitude
        expected[layer] = dora(weight, 0.5 * b.double() @ a.double(), magnitude.double(), over)
    read(k2, tmp_path / "a", tensors)
    assert_weights(k2, before, expected)


@pytest.mark.parametrize("key", ["magnitude", "lora_magnitude_vector", "lora_magnitude_vector.weight"])
def test_magnitudes_as_vectors(k2, tmp_path, random, key):
    """ai-toolkit and PEFT, of outputs."""
    before, tensors, expected = weights(k2), {}, {}
    for layer, weight in before.items():
        a, b = factors(random, weight)
        name = NAMES["original"](layer)
        magnitude = weight.norm(dim=1).float() * (1 + 0.2 * random(weight.shape[0]))
        tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b, f"{name}.{key}": magnitude}
        expected[layer] = dora(weight, b.double() @ a.double(), magnitude.double()[:, None], 1)
    read(k2, tmp_path / "a", tensors)
    assert_weights(k2, before, expected)


# ---- LoKr, LoHa, whole differences -------------------------------------------------------------------------------


def splits(weight, factor=4):
    """Of LyCORIS: (out_l, out_k), (in_m, in_n), where the first are the smaller."""
    outputs, inputs = weight.shape
    return (factor, outputs // factor), (factor, inputs // factor)


@pytest.mark.parametrize(("names", "form"), [
    ("original", "w2 in factors"), ("original", "whole"), ("lycoris", "w2 in factors"), ("lycoris", "both in factors"),
    ("lycoris original", "whole"), ("kohya", "musubi in factors"), ("kohya", "musubi whole"),
    ("lycoris", "w1 in factors"),
])  # fmt: skip
def test_lokr(k2, tmp_path, random, names, form):
    """alpha over the rank of the factors; nothing where there are none, whatever alpha says (ai-toolkit writes 1e10
    then), but in musubi-tuner's own, which divides alpha by the larger side of w2."""
    before, tensors, expected = weights(k2), {}, {}
    for layer, weight in before.items():
        (l, k), (m, n) = splits(weight)
        name, rank, alpha, scale = NAMES[names](layer), 2, 3.0, 1.5
        parts = {"lokr_w1": random(l, m), "lokr_w2_a": random(k, rank), "lokr_w2_b": random(rank, n)}
        w1, w2 = parts["lokr_w1"], parts["lokr_w2_a"] @ parts["lokr_w2_b"]
        if form in ("both in factors", "w1 in factors"):
            del parts["lokr_w1"]
            parts |= {"lokr_w1_a": random(l, rank), "lokr_w1_b": random(rank, m)}
            w1 = parts["lokr_w1_a"] @ parts["lokr_w1_b"]
        if form in ("whole", "musubi whole", "w1 in factors"):
            del parts["lokr_w2_a"], parts["lokr_w2_b"]
            w2 = parts["lokr_w2"] = random(k, n)
        if form == "whole":
            alpha, scale = 1e10, 1.0
        if form == "musubi whole":
            scale = alpha / max(k, n)
        tensors |= {f"{name}.{part}": value for part, value in parts.items()}
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
        expected[layer] = weight + scale * torch.kron(w1.double(), w2.double())
    if form.startswith("musubi"):
        tensors["lokr_factor"] = torch.tensor(4)
    adapter = read(k2, tmp_path / "a", tensors)
    assert {change.kind for change in adapter.changes.values()} == {"LoKr"}
    assert_weights(k2, before, expected)


@pytest.mark.parametrize("names", ["lycoris", "kohya", "original"])
@pytest.mark.parametrize("magnitude", [False, True])
def test_loha_with_and_without_dora(k2, tmp_path, random, names, magnitude):
    before, tensors, expected = weights(k2), {}, {}
    for layer, weight in before.items():
        (outputs, inputs), name, rank = weight.shape, NAMES[names](layer), 3
        parts = {"hada_w1_a": random(outputs, rank), "hada_w1_b": random(rank, inputs)}
        parts |= {"hada_w2_a": random(outputs, rank), "hada_w2_b": random(rank, inputs)}
        tensors |= {f"{name}.{part}": value for part, value in parts.items()} | {f"{name}.alpha": torch.tensor(1.5)}
        w1a, w1b, w2a, w2b = (value.double() for value in parts.values())
        update = 0.5 * (w1a @ w1b) * (w2a @ w2b)
        expected[layer] = weight + update
        if magnitude:
            scale = tensors[f"{name}.dora_scale"] = weight.norm(dim=1, keepdim=True).float() * 1.2
            expected[layer] = dora(weight, update, scale.double(), 1)
    read(k2, tmp_path / "a", tensors)
    assert_weights(k2, before, expected)


@pytest.mark.parametrize("names", ["lycoris", "original", "diffusers"])
def test_whole_differences_and_biases(k2, tmp_path, random, names):
    """LyCORIS' full, and ComfyUI's diff and diff_b; a bias also beside a LoRA, and alone."""
    before, tensors, expected = weights(k2), {}, {}
    for layer, weight in before.items():
        tensors[f"{NAMES[names](layer)}.diff"] = random(*weight.shape)
        expected[layer] = weight + tensors[f"{NAMES[names](layer)}.diff"].double()
    biases = {
        layer: k2.transformer.get_submodule(layer).bias.detach().clone()
        for layer in ("txt_in.linear_1", "time_mod_proj")
    }
    changes = {layer: random(len(bias)) for layer, bias in biases.items()}
    tensors |= {f"{NAMES[names](layer)}.diff_b": change for layer, change in changes.items()}
    read(k2, tmp_path / "a", tensors)
    assert_weights(k2, before, expected)
    for layer, bias in biases.items():
        assert torch.equal(k2.transformer.get_submodule(layer).bias, bias + changes[layer])


def test_the_projector_alone(k2, tmp_path, random):
    """A file of one vector, as explorers of the tapped states write it."""
    vector, before = random(1, 3), weights(k2, ["text_fusion.projector"])
    read(k2, tmp_path / "a", {"diffusion_model.txtfusion.projector.diff": vector})
    assert_weights(k2, before, {"text_fusion.projector": before["text_fusion.projector"] + vector.double()})


@pytest.mark.parametrize("config", [
    LoKrConfig(r=2, alpha=3, decompose_factor=4, init_weights=False),
    LoKrConfig(r=2, alpha=3, decompose_factor=4, decompose_both=True, init_weights=False),
    LoKrConfig(r=100, alpha=30, decompose_factor=4, init_weights=False),
    LoHaConfig(r=3, alpha=6, init_weights=False, alpha_pattern={"up": 2}),
])  # fmt: skip
def test_peft_itself_lokr_and_loha(directory, k2, tmp_path, config):
    """Its alpha over r counts for whole factors too."""
    adapter = _peft_itself(directory, k2, tmp_path, config)
    kind = "LoKr" if isinstance(config, LoKrConfig) else "LoHa"
    assert {change.kind for change in adapter.changes.values()} == {kind} and not adapter.factors


def _peft_itself(directory, k2, folder, config):
    """A file of PEFT's own on K2's transformer, against the weights that PEFT merges."""
    folder = folder / "peft"
    config.target_modules = r".*(0\.attn\.to_q|2\.ff\.up|txt_in\.linear_1|img_in)"
    torch.manual_seed(1)
    model = get_peft_model(K2.load(directory).transformer, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
            elif parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    tensors = {key: value.detach() for key, value in get_peft_model_state_dict(model).items()}
    adapted = sorted({key.split("base_model.model.")[1].rsplit(".lo", 1)[0].rsplit(".hada", 1)[0] for key in tensors})
    model.save_pretrained(folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    merged = model.merge_and_unload()
    assert {*LAYERS} < {*adapted}  # and the same linears of the text fusion
    before = weights(k2, adapted)
    adapter = read(k2, folder, tensors, config=settings)
    expected = {layer: merged.get_submodule(layer).weight.double() for layer in adapted}
    assert_weights(k2, before, expected)
    return adapter


# ---- what holds for all ------------------------------------------------------------------------------------------


def test_a_file_of_lora_and_others(k2, tmp_path, random):
    """LoRA stays factors; the rest is merged, in the type of the weights, and how much of it is kept is known."""
    a, b = factors(random, weights(k2)[LAYERS[0]])
    tensors = {f"transformer.{LAYERS[0]}.lora_A.weight": a, f"transformer.{LAYERS[0]}.lora_B.weight": b}
    tensors[f"transformer.{LAYERS[1]}.diff"] = random(*weights(k2)[LAYERS[1]].shape) * 1e-4
    save_file(tensors, tmp_path / "a.safetensors")
    k2.transformer.to(torch.bfloat16)
    shapes = linear_shapes(k2.base_state_dict())
    before = k2.transformer.get_submodule(LAYERS[1]).weight.detach().clone()
    adapter = read_adapter(tmp_path / "a.safetensors", shapes)
    assert adapter.others() == "whole differences" and len(adapter.factors) == 2
    kept = add_adapter(k2, "adapter", adapter, "a", torch.float32, torch.bfloat16)
    assert kept.keys() == {LAYERS[1]} and [*k2.roles] == ["adapter"]
    exact, rounded = (one.share for one in kept[LAYERS[1]])
    assert exact == pytest.approx(1, abs=1e-3) and 0 < rounded < 0.98
    now = k2.transformer.get_submodule(LAYERS[1]).weight
    assert now.dtype == torch.bfloat16
    assert torch.equal(now, (before.float() + tensors[f"transformer.{LAYERS[1]}.diff"]).bfloat16())
    with pytest.raises(
        UserError, match=r"a\.safetensors: holds whole differences \(transformer_blocks\.2\.ff\.up\), which is no"
    ):
        read_lora(tmp_path / "a.safetensors", shapes)


TO_Q = f"transformer.{LAYERS[0]}"
KRON = {f"{TO_Q}.lokr_w1": torch.ones(4, 4), f"{TO_Q}.lokr_w2": torch.ones(32, 32)}
PLAIN = {f"{TO_Q}.lora_A.weight": torch.ones(2, 128), f"{TO_Q}.lora_B.weight": torch.ones(128, 2)}


@pytest.mark.parametrize(("tensors", "config", "says"), [
    (KRON | {f"{TO_Q}.lokr_w2": torch.ones(32, 31)}, None, r"\[4, 4\], lokr_w2 \[32, 31\] do not make a change"),
    (KRON | PLAIN, None, r"to_q is adapted in two ways \("),
    ({f"{TO_Q}.lokr_w1_a": torch.ones(4, 2), f"{TO_Q}.lokr_w2": torch.ones(32, 32)}, None, r"for .*\(lokr_w1_b\)"),
    ({f"{TO_Q}.hada_w1_a": torch.ones(128, 2)}, None, r"\(hada_w1_b, hada_w2_a, hada_w2_b\)"),
    ({f"{TO_Q}.dora_scale": torch.ones(128, 1)}, None, r"a factor is missing for .*to_q \(lora_A and lora_B\)"),
    (PLAIN | {f"{TO_Q}.dora_scale": torch.ones(2, 64)}, None, r"its magnitude of \[2, 64\] does not fit a la"),
    (KRON | {f"{TO_Q}.alpha": torch.ones(2)}, None, r"alpha has 2 numbers"),
    ({f"{TO_Q}.diff": torch.ones(128, 128), f"{TO_Q}.alpha": torch.ones(1)}, None, "has an alpha beside a whole diff"),
    ({f"{TO_Q}.diff": torch.ones(128)}, None, r"diff \[128\] do not make a change of a layer of \[128, 128\]"),
    ({f"{TO_Q}.diff": torch.full((128, 128), math.nan)}, None, r"diff holds .* not finite"),
    ({f"{TO_Q}.diff": torch.zeros(128, 128)}, None, "changes no weight, so it does nothing"),
    ({f"{TO_Q}.diff_b": torch.ones(128)}, None, r"changes the bias of transformer_.*to_q, which has none"),
    ({"diffusion_model.first.diff_b": torch.ones(64)}, None, r"its diff_b of \[64\] does not fit a layer of \[128"),
    (KRON, {"peft_type": "LORA", "r": 4}, 'peft_type is "LORA": the file holds LoKr'),
    ({f"{TO_Q}.oft_blocks": torch.ones(4, 2, 2)}, None, r"none of its 1 key binds to a layer .*oft_blocks"),
    (PLAIN | {f"{TO_Q}.lokr_t2": torch.ones(2, 2, 3, 3)}, None, r"1 of its 3 keys would bind to no layer .*lokr_t2"),
])  # fmt: skip
def test_what_is_refused(k2, tmp_path, tensors, config, says):
    before = {key: value.clone() for key, value in k2.base_state_dict().items()}
    with pytest.raises(UserError, match=says) as error:
        read(k2, tmp_path / "a", tensors, config=config)
    assert str(error.value).startswith(str(tmp_path)) and "\n" not in str(error.value)
    assert not k2.roles and all(torch.equal(value, before[key]) for key, value in k2.base_state_dict().items())


def test_lora_of_rank_and_alpha_and_kohya_without(k2, tmp_path, random):
    """METHODS check 51: rank 32, alpha 64 is a scale of 2; kohya without alpha 1."""
    for alpha, scale in ((torch.tensor(64.0), 2), (None, 1)):
        a, b = factors(random, weights(k2)[LAYERS[0]], 32)
        name = NAMES["kohya"](LAYERS[0])
        tensors = {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b}
        save_file(tensors | ({} if alpha is None else {f"{name}.alpha": alpha}), tmp_path / "a.safetensors")
        read = read_lora(tmp_path / "a.safetensors", linear_shapes(k2.base_state_dict()))
        update = read[f"{LAYERS[0]}.lora_B.weight"] @ read[f"{LAYERS[0]}.lora_A.weight"]
        assert torch.allclose(update, scale * b @ a, rtol=1e-6)
