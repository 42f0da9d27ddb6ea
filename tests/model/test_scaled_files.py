"""The transformer as one file in 8 bits: weights times their scales, or one line."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from posttrain import cli
from posttrain.config.sections import ModelConfig
from posttrain.errors import UserError
from posttrain.model import key_names
from posttrain.model.k2 import K2
from posttrain.training.policy import load_model

NETWORK = "transformer/diffusion_pytorch_model.safetensors"


def scaled(model, rows=False, names=("weight_scale", "comfy_quant", "input_scale"), kind=torch.float8_e4m3fn):
    """(the file's tensors in the original names, the values that they stand for)."""
    tensors, values = {}, {}
    for key, value in key_names.to_original(load_file(model / NETWORK)).items():
        tensors[key] = values[key] = value.contiguous()
        if value.ndim != 2 or not key.startswith("blocks."):
            continue
        largest = value.abs().amax(1) if rows else value.abs().max()
        scale = largest / torch.finfo(kind).max
        column = scale.reshape(-1, 1) if rows else scale
        tensors[key] = (value / column).to(kind)
        values[key] = tensors[key].float() * column
        stem = key.removesuffix("weight")
        tensors[stem + names[0]] = column
        if names[1:]:
            tensors[stem + names[1]] = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
            tensors[stem + names[2]] = torch.tensor(1.0)
    return tensors, values


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rows": True},
        {"names": ("scale_weight",), "kind": torch.float8_e5m2},
    ],
)
@pytest.mark.parametrize("prefix", ["", key_names.PREFIX])
def test_scaled_fp8_is_weight_times_scale(model, tmp_path, options, prefix):
    """Exactly in float32, and rounded once in bfloat16; the file's other tensors stay as they are."""
    tensors, values = scaled(model, **options)
    tensors["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)  # a mark of the format
    file = tmp_path / "scaled.safetensors"
    save_file({prefix + key: value for key, value in tensors.items()}, file)
    expected = key_names.from_original(values)
    for dtype in (torch.float32, torch.bfloat16):
        read = K2.load(model, file, dtype, transformer_format="fp8_scaled").base_state_dict()
        assert read.keys() == expected.keys()
        for key, value in read.items():
            assert torch.equal(value, expected[key].to(value.dtype)), key
        assert read["transformer_blocks.0.attn.to_q.weight"].dtype == dtype
    config = ModelConfig(str(model), str(file), "fp8_scaled", dtype="float32")
    assert torch.equal(load_model(config, "cpu").base_state_dict()["img_in.weight"], expected["img_in.weight"])
    plain = load_file(model / NETWORK)
    change = read["transformer_blocks.0.attn.to_q.weight"] - plain["transformer_blocks.0.attn.to_q.weight"]
    assert 0 < change.abs().max() < 0.1 * plain["transformer_blocks.0.attn.to_q.weight"].abs().max()


WQ = "blocks.0.attn.wq"


@pytest.mark.parametrize(
    ("format", "edit", "says"),
    [
        (None, {}, "weights have 8 bits and scales; to read them set model.transformer_format: fp8_scaled"),
        ("fp8_scaled", {f"{WQ}.weight_scale": None}, f"{WQ}.weight has no scale beside it, and fp8_scaled needs one"),
        ("fp8_scaled", {f"{WQ}.weight_scale": torch.ones(4, 4)}, r"has a scale of F32 \[4, 4\], and fp8_scaled"),
        ("fp8_scaled", {f"{WQ}.weight_scale": torch.ones(2, 64)}, r"has a scale of F32 \[2, 64\], and"),  # of blocks
        ("fp8_scaled", {f"{WQ}.weight_scale": torch.ones(1, dtype=torch.uint8)}, "weight_scale is stored as U8"),
        ("fp8_scaled", {f"{WQ}.comfy_quant": torch.tensor(list(b'{"format": "mxfp8"}'), dtype=torch.uint8)}, "mxfp8"),
        ("fp8_scaled", {f"{WQ}.weight_scale": torch.tensor(torch.nan)}, r"to_q\.weight holds numbers that are not fin"),
        ("fp8_scaled", {f"{WQ}.weight": torch.ones(128, 64, dtype=torch.uint8)}, "stored as U8 .*, which is not fp8_s"),
        ("fp8_scaled", {f"{WQ}.weight": torch.ones(128, 128, dtype=torch.int8)}, r"stored as I8 \(8 bits\)"),
    ],
)
def test_other_files_in_8_bits(model, tmp_path, format, edit, says):
    tensors = scaled(model)[0] | edit
    file = tmp_path / "scaled.safetensors"
    save_file({key: value for key, value in tensors.items() if value is not None}, file)
    with pytest.raises(UserError, match=says) as error:
        K2.load(model, file, transformer_format=format)
    assert str(error.value).startswith(str(file)) and "\n" not in str(error.value)


def test_a_plain_file_is_not_scaled(model, tmp_path, capsys):
    file = tmp_path / "plain.safetensors"
    save_file(key_names.to_original(load_file(model / NETWORK)), file)
    words = ["sample", f"--model.path={model}", "--model.transformer_format=fp8_scaled", "--prompt=a"]
    words += [f"--output={tmp_path / 'out'}"]
    assert cli.main([*words, f"--model.transformer_file={file}"]) == 2
    assert "none of its weights has 8 bits; leave model.transformer_format out" in capsys.readouterr().err
    assert cli.main(words) == 2
    assert "transformer_format: is about transformer_file, which is null" in capsys.readouterr().err
