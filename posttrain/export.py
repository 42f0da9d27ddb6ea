"""Export: a checkpoint as files that other tools load, each checked after it was written.

    posttrain export --source runs/demo --output out/k2-tuned
    posttrain export --source runs/demo --output out/lora.safetensors --format lora

The adapter's scale (alpha / rank) is baked into its B factors, so every loader applies it at strength 1.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from posttrain import checkpoint, original
from posttrain.checkpoint import Checkpoint
from posttrain.config import ExportConfig
from posttrain.k2 import K2
from posttrain.load import quiet
from posttrain.policy import POLICY, add_saved_policy, earlier_of, load_base
from prompts.errors import UserError

B = "lora_B.weight"
DIFFUSERS_PREFIX, ORIGINAL_PREFIX = "transformer.", "diffusion_model."
"""What LoRA files put before a module's name in the two key conventions."""


def export(config: ExportConfig) -> None:
    """Writes `config.output`. Raises UserError if it exists, or if what was trained would change nothing."""
    output = Path(config.output)
    if output.exists():
        raise UserError(f"output: {output} exists; choose another name")
    saved = checkpoint.load(checkpoint.find(config.source))
    adapter = saved.tensors.get("adapter")
    if adapter is not None and not any(v.any() for k, v in adapter.items() if k.endswith(B)):
        raise UserError(f"{saved.path}: the adapter is untrained (every B factor is 0) and would do nothing")
    factors = scaled_factors(saved) if config.format.startswith("lora") else {}
    if config.format == "lora":
        _whole(output, lambda path: save_file({DIFFUSERS_PREFIX + k: v for k, v in factors.items()}, path))
    elif config.format == "lora-original":
        named = {ORIGINAL_PREFIX + original.original_name(k): v for k, v in factors.items()}
        _whole(output, lambda path: save_file(named, path))
    else:
        k2 = load_base(saved)
        before = {k: v.clone() for k, v in k2.base_state_dict().items()}
        add_saved_policy(k2, saved)
        k2.merge_role(POLICY)
        after = k2.base_state_dict()
        if not any(not torch.equal(before[k], v) for k, v in after.items()):
            what = "what was trained" if saved.state["lora"] is None else "the adapter"
            raise UserError(f"{saved.path}: merged in {k2.dtype}, {what} changes no weight; train longer or in float32")
        if config.format == "original":
            state = {k: v.contiguous() for k, v in original.to_original(after).items()}
            _whole(output, lambda path: save_file(state, path))
        else:
            with quiet():
                _whole(output, lambda path: k2.pipe.save_pretrained(path, safe_serialization=True))
    print(f"posttrain: wrote {output} ({config.format}) from {saved.path}")


def scaled_factors(saved: Checkpoint) -> dict[str, Tensor]:
    """The adapter's factors with its scale in B, and beside them, as further ranks, those of the adapters that were
    merged into its base: for the base that all began with. Raises UserError if one of them trained all weights."""
    stages = [*earlier_of(saved), saved]
    for stage in stages:
        if stage.state["lora"] is None:
            raise UserError(f"format: {stage.path} has no adapter, all weights were trained; use diffusers or original")
    factors: dict[str, list[Tensor]] = {}
    for stage in stages:
        scale = stage.state["lora"]["alpha"] / stage.state["lora"]["rank"]
        for key, value in stage.tensors["adapter"].items():
            factors.setdefault(key, []).append(value * scale if key.endswith(B) else value)
    return {key: torch.cat(parts, dim=1 if key.endswith(B) else 0) for key, parts in factors.items()}


def load_checkpoint(saved: Checkpoint, device: str | torch.device = "cpu") -> K2:
    """The model of a checkpoint with what was trained as the role `policy`."""
    k2 = load_base(saved, device)
    add_saved_policy(k2, saved)
    return k2


def _whole(output: Path, write: Callable[[Path], object]) -> None:
    """Writes beside the target and renames, so that a half-written export is never found under its name."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".export-", dir=output.parent))
    except OSError as error:
        raise UserError(f"output: {output.parent} cannot be written: {error.strerror}; choose another") from error
    try:
        write(folder / output.name)
        os.rename(folder / output.name, output)
    except (OSError, SafetensorError) as error:
        if not checkpoint.is_full(error):
            raise
        raise UserError(f"{output}: no space left; free some or choose another disk") from error
    finally:
        shutil.rmtree(folder)
