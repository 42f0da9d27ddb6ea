"""A checkpoint of a small adapter on K2, as a run leaves it: what exports and a later stage start from."""

from dataclasses import asdict
from pathlib import Path

import torch

from posttrain.config.sections import LoraConfig, ModelConfig
from posttrain.model.load import empty_transformer
from posttrain.model.roles import TARGETS
from posttrain.training import checkpoint

CHANGE = 5e-4
"""|dW| as a share of |W|: that of a short stage of preferences."""


def write_trained(folder: Path, base: Path) -> Path:
    """A run directory with one checkpoint, whose adapter has rank 64 on all linears of the blocks."""
    if (folder / "checkpoints").is_dir():
        return folder
    lora = LoraConfig(rank=64, alpha=64)
    generator = torch.Generator().manual_seed(0)
    factors = {}
    for key, weight in empty_transformer(base).state_dict().items():
        name = key.removesuffix(".weight")
        if not name.startswith("transformer_blocks.") or not name.endswith(TARGETS):
            continue
        out, inside = weight.shape
        # A has rows of unit length, so |BA| = |B|; an untrained linear has |W| = sqrt(out / 3).
        factors[f"{name}.lora_A.weight"] = torch.randn(64, inside, generator=generator) / inside**0.5
        factors[f"{name}.lora_B.weight"] = torch.randn(out, 64, generator=generator) * CHANGE * (1 / 192) ** 0.5
    state = {
        "method": "stpo",
        "model": asdict(ModelConfig(path=str(base))),
        "origin": {"base": None, "merged": []},
        "lora": {"rank": lora.rank, "alpha": lora.alpha, "targets": list(TARGETS)},
    }
    checkpoint.save(folder / "checkpoints", 1, {"adapter": factors}, state, keep=1)
    return folder
