"""Models with random weights at true size, laid out as the released ones: what `make gpu` runs the commands on.

    python -m tests.gpu.parts DIRECTORY [tiny]

    k2/      Krea2Pipeline as released: 12.82 B transformer and 4 B text encoder in bf16, in shards
    turbo/   the same weights with is_distilled: true, by links
    judge/   Qwen3VLForConditionalGeneration of some 2 B
    chat/    Qwen3ForCausalLM of 3.6 B, of which expander-nano is a part and the rest adds nothing
    dinov3/  DINOv3 ViT-S/16

Tokenizers are those of the nano world, whose vocabulary is small: a prompt of prompts/k2 is some 62 tokens. `tiny`
writes the same classes at a size for two CPU cores, to rehearse the suite.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from posttrain.model.load import random_pipeline

NANO = Path("posttrain/nano/weights")
DONE = "whole.json"
"""Written last: a directory without it was not finished."""


def write(folder: Path, scale: str = "k2") -> Path:
    """Writes what is not there yet; returns the folder."""
    for name, make in {"k2": _k2, "judge": _judge, "chat": _chat, "dinov3": _dinov3}.items():
        place = folder / name
        if (place / DONE).is_file():
            continue
        shutil.rmtree(place, ignore_errors=True)
        began = time.monotonic()
        make(place, scale)
        (place / DONE).write_text(json.dumps({"scale": scale, "seconds": round(time.monotonic() - began, 1)}))
        torch.cuda.empty_cache()
    if not (folder / "turbo").exists():
        _turbo(folder / "k2", folder / "turbo")
    return folder


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _k2(place: Path, scale: str) -> None:
    pipe = random_pipeline(_device(), torch.bfloat16, "k2" if scale == "k2" else "tiny", True, 0)
    pipe.register_modules(tokenizer=AutoTokenizer.from_pretrained(NANO / "k2-nano/tokenizer"))
    rows = pipe.text_encoder.get_input_embeddings().num_embeddings
    pipe.save_pretrained(place, max_shard_size="5GB", safe_serialization=True)
    _fill_vocabulary(place / "tokenizer/tokenizer.json", rows)


def _fill_vocabulary(file: Path, rows: int) -> None:
    """Gives each row of the embedding a token: a tokenizer that lacks most of them is refused."""
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    taken = {*vocabulary.values(), *(token["id"] for token in tokenizer["added_tokens"])}
    for row in range(rows):
        if row not in taken:
            vocabulary[f"unused {row}"] = row
    file.write_text(json.dumps(tokenizer))


def _turbo(raw: Path, place: Path) -> None:
    """A distilled pipeline of the same weights: links, and an index that says so."""
    index = json.loads((raw / "model_index.json").read_text())
    place.mkdir()
    for part in raw.iterdir():
        if part.is_dir():
            (place / part.name).symlink_to(part.resolve(), target_is_directory=True)
    (place / "model_index.json").write_text(json.dumps(index | {"is_distilled": True}, indent=1))


def _build(make: Any, config: Any) -> Any:
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(_device()):
            return make(config)
    finally:
        torch.set_default_dtype(default)


def _with_tokenizer(model: Any, place: Path, tokenizer: Path) -> None:
    model.generation_config.do_sample = False
    model.save_pretrained(place, max_shard_size="5GB")
    for file in tokenizer.iterdir():
        if "token" in file.name or "preprocessor" in file.name or file.suffix == ".jinja":
            shutil.copy(file, place / file.name)


def _judge(place: Path, scale: str) -> None:
    if scale != "k2":
        shutil.copytree(NANO / "judge-nano", place)
        return
    config = json.loads((NANO / "judge-nano/config.json").read_text())
    config["text_config"] |= {
        "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 32768,
    }  # fmt: skip
    config["text_config"]["rope_parameters"] |= {"mrope_section": [24, 20, 20], "rope_theta": 5e6}
    config["vision_config"] |= {
        "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "patch_size": 16,
        "out_hidden_size": 2048, "num_position_embeddings": 2304,
    }  # fmt: skip
    _with_tokenizer(_build(Qwen3VLForConditionalGeneration, Qwen3VLConfig(**config)), place, NANO / "judge-nano")
    file = place / "preprocessor_config.json"  # as the released processor: images keep their size, in patches of 16
    own = json.loads(file.read_text()) | {"patch_size": 16}
    own["size"] = {"shortest_edge": 65536, "longest_edge": 16777216}
    file.write_text(json.dumps(own, indent=1))


def _chat(place: Path, scale: str) -> None:
    """expander-nano, for the size of K2's in a frame of 3.6 B that computes the same: what it writes can be drawn."""
    small: Any = AutoModelForCausalLM.from_pretrained(NANO / "expander-nano")
    config = small.config.to_dict()
    for key in ("layer_types", "transformers_version", "dtype"):
        config.pop(key, None)
    if scale == "k2":
        width, wide = config["hidden_size"], 2560
        config |= {"hidden_size": wide, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 80,
                   "num_key_value_heads": 80, "rms_norm_eps": config["rms_norm_eps"] * width / wide}  # fmt: skip
    model = _build(Qwen3ForCausalLM, Qwen3Config(**config))
    _embed(model, small)
    _with_tokenizer(model, place, NANO / "expander-nano")


@torch.no_grad()
def _embed(large: Any, small: Any) -> None:
    """Puts a model into the first units, heads and layers of a larger one; what is left adds nothing to the result."""
    values = small.state_dict()
    share = (small.config.hidden_size / large.config.hidden_size) ** 0.5
    for key, parameter in large.named_parameters():
        if key not in values:
            if key.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()
            continue
        value = values[key].to(parameter)
        # A norm over more units, of which only the first are not zero, divides by a smaller root mean square.
        value = value * share if key.endswith(("layernorm.weight", "model.norm.weight")) else value
        parameter.zero_()
        parameter[tuple(slice(n) for n in value.shape)] = value


def _dinov3(place: Path, scale: str) -> None:
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = DINOv3ViTConfig(num_register_tokens=4, **(small if scale != "k2" else {}))
    torch.manual_seed(0)
    DINOv3ViTModel(config).save_pretrained(place)


if __name__ == "__main__":
    print(write(Path(sys.argv[1]), *sys.argv[2:]))
