"""Exports are read back before they get their name: complete, for this model, with the trained change in them.

An export that loads and does nothing costs the most, so each file is opened again: a missing key, a wrong shape or
value, or weights that are still the base's end the export with a UserError, and nothing is left behind.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from posttrain.errors import UserError, counted
from posttrain.model.files import check_directory
from posttrain.model.load import check_names
from posttrain.model.lora_file import B, linear_shapes, read_lora

AGAIN = "the export was removed; free space, or look for what else writes there, and export again"


def check_weights(
    where: Path,
    files: Sequence[Path],
    shapes: Mapping[str, Tensor],
    written: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
) -> None:
    """The files hold the keys and shapes of `shapes`, the values of `written`, and not those of `base` throughout.

    One tensor at a time, so that no second copy of the model is made. `where` is what messages call the export.
    """
    read: dict[str, Tensor] = {}
    changed = moved = 0
    wrong = ""
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for key in sorted(opened.keys()):
                value = opened.get_tensor(key)
                # Shapes alone are kept, without memory.
                read[key] = torch.empty(value.shape, device="meta")
                if not bool(value.isfinite().all()):
                    raise UserError(f"{where}: {key} holds values that are not finite; export an earlier checkpoint")
                if key not in written or not _same(value, written[key]):
                    changed, wrong = changed + 1, wrong or key
                moved += key in base and not _same(value, base[key])
    check_names(f"{where} as it was written", shapes, read, AGAIN)
    if changed:
        raise UserError(f"{where}: {counted(changed, 'tensor')} differed when read again ({wrong}); {AGAIN}")
    if not moved:
        raise UserError(f"{where}: every weight is still the base's: what was trained is not in it; {AGAIN}")


def check_lora(where: Path, file: Path, model: Mapping[str, Tensor], factors: Mapping[str, Tensor]) -> None:
    """Every key of the file binds to a layer of the model, whose state dict may lie on the meta device; what it holds
    are these factors, and they do something."""
    read = read_lora(file, linear_shapes(model), where)
    check_names(f"{where} as it was written", factors, read, AGAIN)
    # read_lora gives fp32, with the scale in B as it was written.
    if wrong := [key for key, value in factors.items() if not torch.equal(value.float(), read[key])]:
        raise UserError(f"{where}: {counted(len(wrong), 'factor')} differed when read again ({wrong[0]}); {AGAIN}")
    if not any(value.any() for key, value in read.items() if key.endswith(B)):
        raise UserError(f"{where}: every B factor is 0, so it would do nothing; {AGAIN}")


def check_pipeline(
    where: Path,
    folder: Path,
    shapes: Mapping[str, Tensor],
    written: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    distilled: bool,
) -> None:
    """A Krea2Pipeline directory with whole files, the flag that sets its schedule, and these weights."""
    check_directory(str(folder))
    index = json.loads((folder / "model_index.json").read_text())
    if bool(index.get("is_distilled")) != distilled:
        raise UserError(f"{where}: model_index.json: is_distilled is not {str(distilled).lower()}; {AGAIN}")
    for name, value in index.items():
        # diffusers' form of a part: [library, class], both null where the pipeline was saved without it.
        if isinstance(value, list) and isinstance(value[0], str) and not (folder / name).is_dir():
            raise UserError(f"{where}: {name} is missing; {AGAIN}")
    check_weights(where, sorted((folder / "transformer").glob("*.safetensors")), shapes, written, base)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b.cpu())
