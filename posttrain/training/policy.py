"""The policy, which is the role that a run trains, its checkpoints, and the model that it starts from.

The policy is a LoRA adapter or all weights (`lora: null`). The reference of an adapter is the model without it; of all
weights, a frozen copy made when training begins. A run that starts from an earlier one (`model.start`) has that one's
policy as its reference. An earlier adapter stays an adapter, in fp32, active under every role (see model/roles.py), so
that nothing of it is rounded away. Earlier weights replace the base's, in the base's types. Every checkpoint names the
earlier runs that it was trained on top of (`origin.merged`), and loading it loads these again.

An adapter's file, of this project or another, counts as an earlier run too. With `model.start_as: continue` the last of
them is not put into the model: the policy begins with its factors, and the reference is what lies below.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain.config.sections import LoraConfig, ModelConfig, RuntimeConfig
from posttrain.errors import UserError
from posttrain.loading import is_hub_id
from posttrain.log import log
from posttrain.model import packed, sequence
from posttrain.model.adapters.targets import ON_REFERENCES, TARGETS, Lanes, text_targets
from posttrain.model.blocks import set_attention
from posttrain.model.files import DISTILLED_REMEDY
from posttrain.model.fingerprint import fingerprint
from posttrain.model.fp8 import check_training, quantize
from posttrain.model.k2 import K2
from posttrain.model.lora_file import (
    SUFFIX,
    B,
    add_adapter,
    begin_role,
    linear_shapes,
    read_adapter,
    role_for,
    shapes_at,
)
from posttrain.model.offload import place
from posttrain.model.roles import Kept
from posttrain.runs import startup
from posttrain.training import checkpoint
from posttrain.training.checkpoint import Checkpoint

POLICY = "policy"
FILE = "file"
"""In place of a method: an adapter's file."""


# ---- the base -------------------------------------------------------------------------------------------------


def load_model(model: ModelConfig, device: str | torch.device, saved: Checkpoint | None = None) -> K2:
    """The base to train and what `model.start` trained; or, to resume, base and earlier runs of `saved`.

    Raises UserError for a distilled checkpoint that the recipe does not ask for by name, for one that another base was
    trained to, and for a run to start from that is gone or has changed.
    """
    sequence.check(model.sequence_parallel)
    if model.float8:
        check_training(device)
    k2 = _load_base_or_saved(model, device, saved)
    k2.sequence_parallel = model.sequence_parallel
    return apply_runtime_options(k2, model, device)


def _load_base_or_saved(model: ModelConfig, device: str | torch.device, saved: Checkpoint | None) -> K2:
    if saved is not None:  # the reference must stay the one that the run began with
        for name, default in (("start", None), ("start_as", "merge")):
            if (before := saved.state["model"].get(name, default)) != getattr(model, name):
                raise UserError(f"model.{name}: was {before} when the run began; restore it, or start another run")
        k2 = _load_for(saved, asdict(model), first_device(model, device))
        # What it continued lies in its own factors, and is named all the same.
        k2.origin |= {key: value for key, value in _origin(saved).items() if key == "continued"}
        return k2
    stages: list[Checkpoint] = []
    begins_with: dict[str, Tensor] = {}
    if model.start is not None:  # what is wrong with it is said before the base is read
        first = load_stage(model.start, asdict(model))
        stages = [*earlier_of(first), first]
        refuse_on_references(first)
        # Distillation comes last, so training starts from a student only if the recipe asks for it.
        if any(map(is_student, stages)) and not model.allow_distilled:
            raise UserError(f"model.start: {first.path} is distilled (method tdm): {DISTILLED_REMEDY}")
        if model.start_as == "continue":
            begins_with = _factors_to_continue(first)
    k2 = read_base(asdict(model), first_device(model, device))
    if k2.is_distilled and not model.allow_distilled:
        raise UserError(f"{model.path}: model_index.json: is_distilled is true: {DISTILLED_REMEDY}")
    if stages:
        first = stages[-1]
        if _origin(first)["base"] not in (None, k2.origin["base"]):
            raise UserError(f"model.start: {first.path} was trained on another model than model.path ({model.path})")
        if begins_with:
            k2.begins_with = begins_with
            k2.origin["continued"] = _entry(stages.pop())
        for earlier in stages:
            _stack(k2, earlier)
    return k2


def load_stage(path: str, model: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint that a path means, or an adapter's file as if it were one, of method FILE. `model` is that of a
    recipe, whose layers a file has to fit. Raises UserError for anything else."""
    if not path.endswith(SUFFIX):
        return checkpoint.load(checkpoint.find(path))
    adapter = read_adapter(path, shapes_at(model["path"]))
    # The scales of its layers are in B already. What is not a LoRA has no rank, like a run that trained all weights.
    lora = None if adapter.changes else asdict(role_for(adapter.factors, path))
    state = {"method": FILE, "lora": lora, "kinds": adapter.others(), "model": dict(model)}
    return Checkpoint(Path(path).resolve(), 0, {} if lora is None else {"adapter": adapter.factors}, state)


def is_file(stage: Checkpoint) -> bool:
    """Whether it is an adapter's file and no checkpoint of a run."""
    return stage.state.get("method") == FILE


def _factors_to_continue(first: Checkpoint) -> dict[str, Tensor]:
    """Of its adapter alone, with its scale in B. Raises UserError if it has none."""
    if (lora := first.state["lora"]) is None:
        what = f"is {first.state['kinds']}" if is_file(first) else "has trained all weights"
        raise UserError(f"model.start_as: continue needs a LoRA, and {first.path} {what}; use merge")
    scale = lora["alpha"] / lora["rank"]
    return {key: value * scale if key.endswith(B) else value for key, value in first.tensors["adapter"].items()}


def load_base(saved: Checkpoint, device: str | torch.device = "cpu") -> K2:
    """The model that a checkpoint's run began with. Raises UserError if it is gone or another one."""
    check_base(saved)
    return _load_for(saved, saved.state["model"], device)


def check_base(saved: Checkpoint) -> None:
    """Raises UserError if the model that a checkpoint's run began with was a directory here and is gone."""
    path = saved.state["model"]["path"]
    if is_directory(saved) and not Path(path).exists():
        raise UserError(f"{path}: is gone, and {saved.path} was trained on it; put it back")


def is_directory(saved: Checkpoint) -> bool:
    """Whether the base was a directory when the run began. Older checkpoints do not say it, which is False here."""
    return _origin(saved).get("hub") is False


def _load_for(saved: Checkpoint, model: dict[str, Any], device: str | torch.device) -> K2:
    k2 = read_base(model, device)
    check_origin(saved, k2, model["path"])
    stack_earlier(k2, saved)
    return k2


def check_origin(saved: Checkpoint, k2: K2, path: str) -> None:
    """Raises UserError unless the model, which was loaded from this path, is the one that a checkpoint was trained
    on."""
    if _origin(saved)["base"] not in (None, k2.origin["base"]):
        raise UserError(f"{path}: is not the model that {saved.path} was trained on: its weights differ; restore it")


def stack_earlier(k2: K2, saved: Checkpoint) -> None:
    """Add to the base what the earlier runs of a checkpoint's own trained."""
    for earlier in earlier_of(saved):
        _stack(k2, earlier)


def stands_on(saved: Checkpoint, k2: K2) -> bool:
    """Whether a checkpoint was trained on the model as it is now: the same base and the same earlier runs."""
    origin = _origin(saved)
    return origin["base"] in (None, k2.origin["base"]) and origin["merged"] == k2.origin["merged"]


def earlier_of(saved: Checkpoint) -> list[Checkpoint]:
    """The checkpoints that this one stands on, in their order. Raises UserError if one is gone or changed."""
    found = []
    for entry in _origin(saved)["merged"]:
        path = Path(entry["path"])
        file = path.suffix == SUFFIX
        if not (path.is_file() if file else path.is_dir()):
            raise UserError(f"{path}: is gone, and {saved.path} was trained on top of it; put it back")
        # Loading a checkpoint compares all checksums with its manifest.
        found.append(load_stage(str(path), saved.state["model"]) if file else checkpoint.load(path))
        if digest_of(found[-1]) != entry["sha256"]:
            raise UserError(f"{path}: has changed since {saved.path} was trained on top of it; restore it")
    return found


def read_base(model: dict[str, Any], device: str | torch.device) -> K2:
    """The model that these settings name, with nothing on it and the fingerprint of its weights in `origin`."""
    startup.lap("inputs")
    # Checkpoints of earlier versions name no format.
    file, format = model["transformer_file"], model.get("transformer_format")
    k2 = K2.load(model["path"], file, getattr(torch, model["dtype"]), device, format)
    startup.lap("read")
    # A relative path looks like a hub id once its directory is gone.
    k2.origin = {"base": fingerprint(k2.base_state_dict()), "merged": [], "hub": is_hub_id(model["path"])}
    startup.lap("verify")
    return k2


def first_device(model: ModelConfig, device: str | torch.device) -> str | torch.device:
    """Where the model is read to."""
    # What does not fit into a GPU as it is goes there only when it is quantised, or in part.
    return "cpu" if model.quantize or model.offload else device


def apply_runtime_options(k2: K2, model: RuntimeConfig, device: str | torch.device) -> K2:
    """Quantises, places and compiles the model as the recipe says. None of this is part of a checkpoint."""
    if model.quantize:
        quantize(k2, device)
    net: Any = k2.transformer
    net.to(device)
    place(k2, model.offload, torch.device(device))
    k2.blocks.compiled, k2.blocks.recompute, k2.blocks.float8 = model.compile, model.recompute, model.float8
    if model.attention != "native":
        kernels = model.attention
        if k2.device.type != "cuda" or k2.dtype != torch.bfloat16:
            raise UserError(f"model.attention: {kernels} wants an NVIDIA GPU and model.dtype bfloat16; use native")
        if kernels == "packed" and not packed.available(k2.device, k2.dtype):
            raise UserError("model.attention: packed wants torch 2.10 and an Ampere GPU, or newer; use native")
        set_attention(k2.transformer, kernels)
        k2.blocks.packs = kernels == "packed"
    return k2


def is_student(saved: Checkpoint) -> bool:
    """Whether a checkpoint's policy is a distilled student: few steps, no guidance, Turbo's shift."""
    return saved.state.get("method") == "tdm"


def _stack(k2: K2, earlier: Checkpoint) -> None:
    add_saved_policy(k2, earlier)
    if POLICY in k2.roles:
        k2.stack_role(POLICY)  # from now on it is part of the base, under every role
    k2.origin["merged"].append(_entry(earlier))


def _entry(stage: Checkpoint) -> dict[str, str]:
    """How a checkpoint names another stage."""
    return {"path": _relative(stage.path), "sha256": digest_of(stage)}


def base_of(saved: Checkpoint) -> str | None:
    """Fingerprint of the base that a checkpoint was trained on; None where an older one does not say it."""
    return _origin(saved)["base"]


def _origin(saved: Checkpoint) -> dict[str, Any]:
    """Older checkpoints do not say what they were trained on, and had no earlier runs."""
    return saved.state.get("origin", {"base": None, "merged": []})


def _relative(path: Path) -> str:
    """From the working directory, as paths in recipes are, so that a project can be moved."""
    here = Path.cwd()  # paths outside of it stay absolute
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def digest_of(saved: Checkpoint) -> str:
    """A hash of what a checkpoint's run trained, or of an adapter's file."""
    if is_file(saved):
        with saved.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    manifest = json.loads((saved.path / "manifest.json").read_text())
    return manifest[f"{file_of(saved.state['lora'])}.safetensors"]["sha256"]


# ---- the policy -----------------------------------------------------------------------------------------------


def add_policy(k2: K2, lora: LoraConfig | None, seed: int, reference: bool, lanes: Lanes = "all") -> None:
    """The role as a run begins with it. With `reference`, the role None stays what the model is now."""
    if lora is None:
        k2.add_full_role(POLICY, reference)
    else:
        k2.add_role(POLICY, lora.rank, lora.alpha, TARGETS if lora.targets is None else lora.targets, seed, lanes)
        if k2.adapts_text:
            log.info(
                f"lora.targets: {', '.join(text_targets(lora.targets or []))} adapt how a prompt's text is fused, so it"
                " is fused in every forward and not once a prompt (docs/runs.md, What an adapter reaches)"
            )
    if k2.begins_with:
        begin_role(k2, POLICY, k2.begins_with)
        k2.begins_with = {}


def add_saved_policy(k2: K2, saved: Checkpoint, *grids: torch.dtype) -> dict[str, list[Kept]]:
    """The role as a checkpoint has it. With a student the model counts as distilled: its shift is Turbo's.

    What of an adapter's file is not a LoRA is merged into the weights; then there may be no role. Returned is how much
    of that each type of `grids` keeps, by weight.
    """
    if is_file(saved):
        adapter = read_adapter(saved.path, linear_shapes(k2.base_state_dict()))
        return add_adapter(k2, POLICY, adapter, saved.path, *grids)
    lora = saved.state["lora"]
    if lora is None:
        k2.add_full_role(POLICY)
    else:
        k2.add_role(POLICY, **lora)
    load_policy(k2, saved)
    if is_student(saved):
        k2.pipe.register_to_config(is_distilled=True)  # which chooses the shift of the schedule
    return {}


def add_stage(k2: K2, saved: Checkpoint) -> str | None:
    """Puts on a bare model what `load_stage` gives: a checkpoint with what it stands on, or an adapter's file. Returns
    the role to draw under, None where all of it is in the weights."""
    if not is_file(saved):
        stack_earlier(k2, saved)
    add_saved_policy(k2, saved)
    return POLICY if POLICY in k2.roles else None


def load_policy(k2: K2, saved: Checkpoint) -> None:
    """Put a checkpoint's values into the role. Raises UserError if it holds another kind of role."""
    own, other = described(k2), saved.state["lora"]
    if (own is None) != (other is None):
        kinds = {True: "all weights", False: "an adapter"}
        raise UserError(
            f"lora: {saved.path} has trained {kinds[other is None]} and this recipe trains {kinds[own is None]};"
            " restore lora, or start another run"
        )
    k2.load_role_state_dict(POLICY, saved.tensors[file_of(own)])


def scaled_factors(stages: Sequence[Checkpoint]) -> dict[str, Tensor]:
    """The factors of the adapters of some checkpoints as those of one, with the scales in B: their ranks side by side.

    Raises UserError if one of them trained all weights.
    """
    for stage in stages:
        if stage.state["lora"] is None:
            why = f"is {stage.state['kinds']}" if is_file(stage) else "has no adapter, all weights were trained"
            raise UserError(f"{stage.path} {why}")
        refuse_on_references(stage)
    factors: dict[str, list[Tensor]] = {}
    for stage in stages:
        # LoRA's effect is alpha / rank times B A.
        scale = stage.state["lora"]["alpha"] / stage.state["lora"]["rank"]
        for key, value in stage.tensors["adapter"].items():
            factors.setdefault(key, []).append(value * scale if key.endswith(B) else value)
    # Ranks side by side add up: [B1 B2] [A1; A2] = B1 A1 + B2 A2.
    return {key: torch.cat(parts, dim=1 if key.endswith(B) else 0) for key, parts in factors.items()}


def refuse_on_references(stage: Checkpoint) -> None:
    """Raises UserError for an adapter that acts on references alone, and so is no change of the whole model."""
    if (stage.state["lora"] or {}).get("lanes") == "references":
        raise UserError(f"{stage.path}: {ON_REFERENCES}")


def described(k2: K2) -> dict[str, Any] | None:
    """What a checkpoint's `lora` says: rank, alpha and targets; None for all weights."""
    role = k2.roles[POLICY]
    return None if role is None else asdict(role)


def file_of(lora: dict[str, Any] | None) -> str:
    """The stem of the file that holds the role in a checkpoint."""
    return "weights" if lora is None else "adapter"


def policy_state(k2: K2) -> dict[str, Tensor]:
    """Copies of the role's values on the CPU."""
    return checkpoint.on_host(k2.role_state_dict(POLICY))


def saved_tensors(k2: K2) -> dict[str, dict[str, Tensor]]:
    """The role as a file of a checkpoint."""
    return {file_of(described(k2)): policy_state(k2)}
