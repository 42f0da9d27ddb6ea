"""The difference of two whole models as a LoRA, such as Turbo minus Raw, with what it leaves out.

    posttrain extract TURBO --from RAW --rank 64 --output turbo.safetensors
    posttrain extract TURBO --from RAW --error 0.3 --output turbo.safetensors

Each linear's difference, in fp32, has an SVD of its own (algebra.low_rank). Both models are read one tensor at a time.
What is printed: the error of each layer, worst first; the share of the difference's energy that lies outside the LoRA's
layers; and the figure that counts, over 64 states (x, t, prompt) that the target passes through as it draws:

    |v_base+LoRA - v_target| / |v_target - v_base|
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from posttrain.distributed.processes import Processes
from posttrain.errors import UserError, counted
from posttrain.export.export import DIFFUSERS_PREFIX, load_checkpoint, write_atomically
from posttrain.export.verify import check_lora
from posttrain.log import log
from posttrain.merge import algebra, weights
from posttrain.merge.config import SUFFIX, ExtractConfig
from posttrain.merge.parents import WHOLE
from posttrain.merge.report import WORST
from posttrain.merge.weights import Weights
from posttrain.model import sampler
from posttrain.model.adapters.low_rank import Truncated, error_of
from posttrain.model.adapters.targets import is_block_linear
from posttrain.model.k2 import K2
from posttrain.model.lora_file import A, B, add_lora, linear_shapes
from posttrain.runs.files import replace_text, replacing
from posttrain.runs.guard import check_new
from posttrain.training import checkpoint
from posttrain.training.policy import POLICY
from prompts.records import read_prompts

STEPS = 8
"""Of the trajectories whose states are compared: Turbo's."""
PROMPTS = (
    "a fox in the snow at night with a lantern",
    "a portrait of an old fisherman, soft window light",
    "a poster with the word OPEN in large letters",
    "three red apples on a blue plate",
    "a city street in the rain, seen from above",
    "a watercolour of a lighthouse on a cliff",
    "an isometric drawing of a small kitchen",
    "a mountain lake at dawn, wide shot",
)


@dataclass
class Found:
    """A difference as a LoRA."""

    factors: dict[str, Tensor] = field(default_factory=dict)
    """By diffusers' names, with the scale in B, in the type that is written."""
    layers: dict[str, Truncated] = field(default_factory=dict)
    """The same by layer, with what each leaves out."""
    rest: dict[str, Tensor] = field(default_factory=dict)
    """The target's values of what differs elsewhere."""
    outside: float = 0.0
    """Squared norm of the difference elsewhere."""

    def share_outside(self) -> float:
        """Of the difference's energy, in [0, 1]."""
        inside = sum(layer.norm**2 for layer in self.layers.values())
        return self.outside / (inside + self.outside)


def extract(config: ExtractConfig) -> None:
    """Writes `config.output`. Raises UserError for models of another architecture, and for two that are the same."""
    output = Path(config.output)
    card = output.with_suffix(".json")
    check_new(output)
    check_new(card)
    if config.rest:
        check_new(Path(config.rest))
    prompts = _prompts(config) if config.measure else []
    like = weights.expected(config.base)
    base, target = weights.of_pipeline(config.base, like), _target(config, like)
    found = difference(base, target, like, config, Processes().device)
    if not found.layers:
        raise UserError(f"target: {config.target} equals {config.base} in all layers that a LoRA could hold")
    named = {DIFFUSERS_PREFIX + key: value for key, value in found.factors.items()}
    write_atomically(
        output, lambda path: save_file(named, path), lambda path: check_lora(output, path, like, found.factors), None
    )
    if config.rest:
        with replacing(Path(config.rest)) as temporary:
            save_file(found.rest, temporary)
    facts: dict[str, Any] = {"target": config.target, "from": config.base}
    facts |= {"error": error_of(found.layers.values()), "outside": found.share_outside(), "layers": _rows(found)}
    _print(config, found)
    if config.measure:
        facts["velocity"] = velocity_error(config, found, prompts)
        print(_velocities(facts["velocity"], bool(found.rest)))
    replace_text(card, json.dumps(facts, indent=1) + "\n")


def _prompts(config: ExtractConfig) -> list[str]:
    if config.prompts is None:
        return list(PROMPTS)
    records = read_prompts(config.prompts)[: len(PROMPTS)]
    if len(records) < len(PROMPTS):
        raise UserError(f"prompts: {config.prompts} has {counted(len(records), 'prompt')}; give {len(PROMPTS)} or more")
    return [record.prompt for record in records]


def _target(config: ExtractConfig, like: Mapping[str, Tensor]) -> Weights:
    path = config.target
    if path.endswith(SUFFIX):
        if not Path(path).is_file():
            raise UserError(f"target: {path}: no such file; give a model's directory, or its transformer as one file")
        return weights.of_file(path, like)
    if not _is_run(path):
        return weights.of_pipeline(path, like)
    saved = checkpoint.load(checkpoint.find(path))
    if saved.state["lora"] is not None:
        raise UserError(f"target: {path} trained an adapter: posttrain export --format lora writes it as it is")
    return Weights([saved.path / WHOLE], path)


def _is_run(path: str) -> bool:
    return (Path(path) / "manifest.json").is_file() or (Path(path) / "checkpoints").is_dir()


# ---- the difference -------------------------------------------------------------------------------------------


def difference(
    base: Weights, target: Weights, like: Mapping[str, Tensor], config: ExtractConfig, device: torch.device
) -> Found:
    """Layer by layer; a tensor that `target` has not is the base's."""
    found, linears = Found(), linear_shapes(like)
    for name in like:
        if name not in target:
            continue
        value = target[name]
        change = value.to(device).float() - base[name].to(device).float()
        if not bool(change.any()):
            continue
        layer = name.removesuffix(".weight")
        wanted = layer in linears and (config.layers == "all" or is_block_linear(layer))
        if not wanted or name == layer:  # a vector, a bias, or a linear that the LoRA leaves out
            found.outside += float(change.square().sum(dtype=torch.float64))
            found.rest[name] = value.clone()
            continue
        low = algebra.low_rank(change, config.rank, config.error)
        dtype = value.dtype if config.dtype is None else getattr(torch, config.dtype)
        b, a = low.b.to(dtype).cpu().contiguous(), low.a.to(dtype).cpu().contiguous()
        found.factors |= {f"{layer}.{A}": a, f"{layer}.{B}": b}
        # Of the factors as they are written: rounding them to bfloat16 is a part of the error.
        left = change - b.to(device).float() @ a.to(device).float()
        found.layers[layer] = Truncated(b, a, float(left.norm()), low.norm)
    return found


def _rows(found: Found) -> dict[str, dict[str, float]]:
    """By layer, worst first."""
    names = sorted(found.layers, key=lambda name: -found.layers[name].error)
    rows = {}
    for name in names:
        layer = found.layers[name]
        rows[name] = {"rank": len(layer.a), "error": layer.error, "norm": layer.norm}
    return rows


def _print(config: ExtractConfig, found: Found) -> None:
    rows = _rows(found)
    ranks = [row["rank"] for row in rows.values()]
    spread = f"rank {max(ranks)}" if min(ranks) == max(ranks) else f"ranks {min(ranks)} to {max(ranks)}"
    print(f"posttrain: wrote {config.output}: {counted(len(rows), 'layer')}, {spread}")
    worst = [f"{rows[name]['error']:.3f} in {name}" for name in list(rows)[:WORST]]
    print(f"error: {error_of(found.layers.values()):.3f} of the difference in these layers; worst: {', '.join(worst)}")
    share = found.share_outside()
    kept = f"written to {config.rest}" if config.rest else "not in the LoRA; --rest FILE writes it"
    print(
        f"outside them: {100 * share:.2g} % of the difference's energy, in {counted(len(found.rest), 'tensor')}: {kept}"
    )
    if config.error is not None:
        over = [name for name, row in rows.items() if row["error"] > config.error]
        if over:
            count = counted(len(over), "layer")
            log.warning(f"an error above {config.error:g} at rank {algebra.CAP}: {count}, such as {over[0]}")


# ---- the figure that counts -----------------------------------------------------------------------------------


def velocity_error(config: ExtractConfig, found: Found, prompts: Sequence[str]) -> dict[str, float]:
    """|v - v_target| / |v_target - v_base| over the states: `lora` of the base with the LoRA, `rest` with the values of
    `found.rest` besides. One model is in memory at a time."""
    device, (height, width) = Processes().device, config.size
    k2, role = _load_target(config, device)
    shape = (k2.image_tokens(height, width), k2.latent_channels)
    seeds = [sampler.seed_for(config.seed, i) for i in range(len(prompts))]
    times = sampler.schedule(STEPS, k2.mu(height, width))
    # The target's own trajectories: how the LoRA does where the target goes counts, not at states that it never meets.
    states: list[Tensor] = [sampler.noise(seeds, shape).to(device)]
    with torch.no_grad(), k2.role(role):
        text, wanted = k2.text(prompts), []
        for t, after in itertools.pairwise(times):
            wanted.append(k2.velocity(states[-1], t, text, height, width))
            states.append(sampler.ode_step(states[-1], wanted[-1], t, after))
    del k2, text  # before the base is read, which is as large

    def distance(k2: K2, role: str | None) -> float:
        total = 0.0
        with torch.no_grad(), k2.role(role):
            # Fused anew for each model, since the layers that fuse the text may differ too.
            text = k2.text(prompts)
            for x, t, v in zip(states, times, wanted):
                total += float((k2.velocity(x, t, text, height, width) - v).square().sum(dtype=torch.float64))
        return total**0.5

    k2 = weights.load(config.base, None, config.model_dtype, device)
    whole = distance(k2, None)
    role = _apply(k2, found, config)
    errors = {"lora": distance(k2, role) / whole}
    # Views of the weights, so that copying into them changes the model.
    own = k2.base_state_dict()
    for name, value in found.rest.items():
        own[name].copy_(value)
    return errors | {"rest": distance(k2, role) / whole, "states": len(wanted) * len(prompts)}


def _load_target(config: ExtractConfig, device: torch.device) -> tuple[K2, str | None]:
    if _is_run(config.target):
        return load_checkpoint(checkpoint.load(checkpoint.find(config.target)), device), POLICY
    if config.target.endswith(SUFFIX):
        return weights.load(config.base, config.target, config.model_dtype, device), None
    return weights.load(config.target, None, config.model_dtype, device), None


def _apply(k2: K2, found: Found, config: ExtractConfig) -> str | None:
    """The role that has the LoRA. One that may reach the text fusion is merged into the base, and rounded with that:
    otherwise the text of all roles would have to be fused anew."""
    if config.layers == "blocks":
        add_lora(k2, POLICY, found.factors, config.output)
        return POLICY
    own = k2.base_state_dict()
    for layer, low in found.layers.items():
        weight = own[f"{layer}.weight"]
        change = low.b.to(weight.device).float() @ low.a.to(weight.device).float()
        weight.copy_(weight.float() + change)
    return None


def _velocities(errors: Mapping[str, float], rest: bool) -> str:
    text = f"velocity: {errors['lora']:.3f} of the models' difference is left, over {errors['states']:.0f} states"
    return f"{text}; {errors['rest']:.3f} with the tensors outside" if rest else text
