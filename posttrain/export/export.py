"""Export: a checkpoint as files that other tools load, each checked after it was written.

    posttrain export --source runs/demo --output out/k2-tuned
    posttrain export --source runs/demo --output out/lora.safetensors --format lora
    posttrain export --source theirs.safetensors --model.path krea/Krea-2-Raw --output out/merged

The adapter's scale (alpha / rank) is baked into its B factors, so every loader applies it at strength 1. A pipeline or
a single file has no adapters: all stages are merged at once, in fp32, and what is left of their change in the type
that is written is measured. A student of posttrain tdm becomes a distilled pipeline: the stock one then runs it at
Turbo's shift. Each file is read back before it gets its name (verify.py), and comes with a model card (model_card.py).
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from posttrain.errors import UserError
from posttrain.export.config import ExportConfig
from posttrain.export.hub import check_push, push
from posttrain.export.model_card import LEAST_KEPT, Rounding, model_card
from posttrain.export.verify import check_lora, check_pipeline, check_weights
from posttrain.loading import quiet
from posttrain.model import key_names
from posttrain.model.k2 import K2
from posttrain.model.load import empty_transformer, keeps_fp32
from posttrain.model.roles import Kept
from posttrain.runs.files import apply_umask
from posttrain.runs.guard import check_new
from posttrain.training import checkpoint, policy
from posttrain.training.checkpoint import Checkpoint
from posttrain.training.policy import (
    POLICY,
    B,
    add_saved_policy,
    check_base,
    earlier_of,
    is_file,
    load_base,
    load_stage,
)

DIFFUSERS_PREFIX, ORIGINAL_PREFIX = "transformer.", "diffusion_model."
"""What LoRA files put before a module's name in the two key conventions."""


def export(config: ExportConfig) -> None:
    """Writes `config.output`. Raises UserError if it exists, or if what was trained would change nothing."""
    output = Path(config.output)
    card = None if config.format == "diffusers" else output.with_suffix(".md")
    check_new(output, card is not None)
    if config.push is not None:
        check_push(config.push)
    saved = load_stage(config.source, {} if config.model is None else asdict(config.model))

    def card_of(rounding: Rounding | None) -> str:
        return model_card(saved, output, config.format, config.license, rounding, config.push)

    rounding = write(saved, output, config.format, card_of, config.dtype, config.allow_rounding)
    if rounding is not None:
        print(f"posttrain: {rounding}")
    print(f"posttrain: wrote {output} ({config.format}) from {saved.path}")
    if config.push is not None:
        print(f"posttrain: pushed it to {push(output, card, config.push, config.private)}")


Card = Callable[[Rounding | None], str]
"""Makes the model card from the rounding of the merge; None where nothing was merged."""


def write(
    saved: Checkpoint, output: Path, format: str, card: Card | None = None, dtype: str | None = None,
    allow_rounding: bool = False,
) -> Rounding | None:  # fmt: skip
    """A checkpoint in one of the formats of ExportConfig, read back and compared; see there for `dtype` and
    `allow_rounding`. Returns what a merge has kept. Raises UserError if it would change nothing or loses too much in
    rounding, or if what was written is not what was meant."""
    adapter = saved.tensors.get("adapter")
    # B begins at 0 and A does not, so B tells whether anything was trained.
    if adapter is not None and not any(v.any() for k, v in adapter.items() if k.endswith(B)):
        raise UserError(f"{saved.path}: the adapter is untrained (every B factor is 0) and would do nothing")
    policy.refuse_on_references(saved)
    check_base(saved)
    if format.startswith("lora"):
        factors = scaled_factors(saved)
        if format == "lora-original":
            named = {ORIGINAL_PREFIX + key_names.original_name(key): value for key, value in factors.items()}
        else:
            named = {DIFFUSERS_PREFIX + key: value for key, value in factors.items()}
        model = empty_transformer(saved.state["model"]["path"]).state_dict()
        write_atomically(
            output, lambda path: save_file(named, path), lambda path: check_lora(output, path, model, factors),
            card and card(None),
        )  # fmt: skip
        return None
    k2 = load_base(saved)
    # Merging an adapter gives weights new memory, so these stay as they are; trained weights are copied into them.
    before = {k: v.clone() if adapter is None else v for k, v in k2.base_state_dict().items()}
    after, rounding = _merged(k2, saved, before, dtype)
    if rounding.share < LEAST_KEPT and not allow_rounding:
        exact = "--dtype float32, which keeps" if adapter is None else "--dtype float32 or --format lora, which keep"
        raise UserError(
            f"format: {format} {rounding}; less than {LEAST_KEPT:g} is refused: use {exact} all of it, or insist with"
            " --allow_rounding true"
        )
    model = empty_transformer(saved.state["model"]["path"]).state_dict()
    if format == "original":
        model, state, base = (key_names.to_original(part) for part in (model, after, before))
        state = {k: v.contiguous() for k, v in state.items()}  # save_file takes no other
        write_atomically(
            output, lambda path: save_file(state, path, metadata={"format": "pt"}),
            lambda path: check_weights(output, [path], model, state, base), card and card(rounding),
        )  # fmt: skip
    else:
        with quiet():
            write_atomically(
                output, lambda path: k2.pipe.save_pretrained(path, safe_serialization=True),
                lambda path: check_pipeline(output, path, model, after, before, k2.is_distilled),
                card and card(rounding),
            )  # fmt: skip
    return rounding


def _merged(
    k2: K2, saved: Checkpoint, before: Mapping[str, Tensor], dtype: str | None
) -> tuple[dict[str, Tensor], Rounding]:
    """The transformer's weights with what was trained, all stages added in fp32 and rounded once; and what is left of
    the change. `before` are its weights without. Raises UserError if none of them changes."""
    if dtype is not None:
        k2.transformer.to(getattr(torch, dtype))
    written = torch.float32 if dtype is not None else k2.dtype
    # Of two types, as whoever loads the export may do so in bfloat16.
    kept = add_saved_policy(k2, saved, written, torch.bfloat16)
    full = saved.state["lora"] is None and not is_file(saved)
    if full:
        kept |= _kept_of_full(k2, before, written)
    # An adapter joins the earlier ones, and all are merged with one rounding.
    if POLICY in k2.roles:
        k2.stack_role(POLICY)
    kept |= k2.merge_stack(written, torch.bfloat16)
    after = k2.base_state_dict()
    if all(torch.equal(before[k].to(v.dtype), v) for k, v in after.items()):
        what = "what was trained" if full else "the adapter"
        raise UserError(f"{saved.path}: merged in {written}, {what} changes no weight; train longer or in float32")
    # Inner products add up over layers, which shares do not.
    whole = whole_bf16 = Kept(0.0, 0.0, 0.0)
    for of_layer, of_layer_bf16 in kept.values():
        whole, whole_bf16 = whole + of_layer, whole_bf16 + of_layer_bf16
    # The layer that loses most is named, since the mean may hide it.
    least = min(kept, key=lambda layer: kept[layer][0].share)
    name = str(written).removeprefix("torch.")
    return after, Rounding(name, whole.share, least, kept[least][0].share, whole.size, whole_bf16.share)


def _kept_of_full(k2: K2, before: Mapping[str, Tensor], written: torch.dtype) -> dict[str, list[Kept]]:
    """What rounding to `written`, and to bfloat16, leaves of the change of weights that were all trained, by weight.

    Those that diffusers keeps in fp32 are left out: they are written as they are.
    """
    kept = {}
    for key, trained in k2.role_named_parameters(POLICY).items():
        if keeps_fp32(key):
            continue
        weight, value = before[key].float(), trained.detach().float()
        kept[key] = [Kept.of(weight, value - weight, value, grid) for grid in (written, torch.bfloat16)]
    return kept


def scaled_factors(saved: Checkpoint) -> dict[str, Tensor]:
    """The adapter's factors with its scale in B, and beside them, as further ranks, those of the adapters that it
    stands on, as they are active in a run: for the base that all began with.

    Raises UserError if one of them trained all weights.
    """
    try:
        return policy.scaled_factors([*earlier_of(saved), saved])
    except UserError as error:
        raise UserError(f"format: {error}; use diffusers or original") from None


def load_checkpoint(saved: Checkpoint, device: str | torch.device = "cpu") -> K2:
    """The model of a checkpoint with what was trained as the role `policy`."""
    k2 = load_base(saved, device)
    add_saved_policy(k2, saved)
    return k2


def write_atomically(
    output: Path, write: Callable[[Path], object], check: Callable[[Path], None], card: str | None
) -> None:
    """Atomic: writes to a temporary folder beside the target, checks, and renames."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".export-", dir=output.parent))
    except OSError as error:
        raise UserError(f"output: {output.parent} cannot be written: {error.strerror}; choose another") from error
    try:
        path = folder / output.name
        write(path)
        apply_umask(path)
        check(path)  # what fails here never gets the name that the user asked for
        if card is not None:
            # A directory holds its card; a file has it beside itself.
            beside = path / "README.md" if path.is_dir() else path.with_suffix(".md")
            beside.write_text(card, encoding="utf-8")
        os.rename(path, output)
        if card is not None and output.is_file():
            os.rename(path.with_suffix(".md"), output.with_suffix(".md"))
    except (OSError, SafetensorError) as error:
        # Only a full disk is the user's to fix; anything else is a bug or a broken disk.
        if not checkpoint.is_full(error):
            raise
        raise UserError(f"{output}: no space left; free some or choose another disk") from error
    finally:
        shutil.rmtree(folder)
