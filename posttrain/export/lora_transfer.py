"""What a LoRA that was trained on Raw does on Turbo: the share of its reward gain that carries over.

    posttrain export --check runs/nano-grpo --turbo runs/nano-tdm

The same prompts and seeds are drawn four times: on Raw and on Turbo, each with and without the LoRA. A gain is the mean
over images of the difference that the LoRA makes to a reward. The share is the gain on Turbo over that on Raw; where
Raw's is not above two of its standard errors there is nothing to carry over, and the share is missing.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from posttrain.config.sections import EvalConfig, ModelConfig
from posttrain.distributed.processes import Processes
from posttrain.errors import UserError, counted
from posttrain.export.config import CarryoverConfig
from posttrain.export.export import scaled_factors
from posttrain.export.model_card import heldout_of, run_recipe, size_of
from posttrain.loading import is_hub_id, local, reading
from posttrain.model import files
from posttrain.model.k2 import K2, to_pil
from posttrain.model.load import empty_transformer
from posttrain.model.lora_file import add_lora, linear_shapes, read_lora, shapes_at
from posttrain.runs.files import replace_text
from posttrain.runs.guard import check_new
from posttrain.runs.progress import columns as aligned_columns
from posttrain.training import checkpoint, image_metrics, policy
from posttrain.training.checkpoint import Checkpoint
from posttrain.training.evaluate import Evaluator
from posttrain.training.loop import try_rewards
from prompts.records import PromptRecord, columns, read_prompts
from rewards.base import Reward, RewardSpec, Scores, score_all
from rewards.load import load_rewards
from rewards.serve import ServerSpec, serve

LORA = "lora"
FIGURES = ("off", "on", "gain", "error")
"""Of a reward on a model: mean without and with the LoRA, mean difference, and the standard error of that."""
CLEAR = 2.0
"""Standard errors that a gain on Raw must be above 0 to be one."""
DISTILLED = "model: {} is distilled; give the Raw checkpoint that the LoRA was trained on"
UNDISTILLED = "turbo: {}: model_index.json: is_distilled is not true; give a Turbo checkpoint"
UNLIKE = "turbo: {} has another architecture than the model that the LoRA is of"


def check(config: CarryoverConfig) -> int:
    """Prints the table and returns the exit code: 1 if the LoRA changes no image on Turbo."""
    output = None if config.output is None else Path(config.output)
    if output is not None:
        check_new(output)
    file = config.check.endswith(".safetensors")
    if file and not Path(config.check).is_file():
        raise UserError(f"check: {config.check}: no such file; give a run, one of its checkpoints or a LoRA")
    saved = None if file else checkpoint.load(checkpoint.find(config.check))
    if saved is not None and policy.is_student(saved):
        raise UserError(f"check: {saved.path} is a student of posttrain tdm; it is a turbo, not a LoRA of Raw")
    config = _completed(config, saved)
    assert config.model is not None and config.prompts is not None
    records = read_prompts(config.prompts)[: config.images]
    if len(records) < 2:  # an error of the mean needs two
        raise UserError(f"prompts: {config.prompts} holds {counted(len(records), 'prompt')}; give at least 2")
    try_rewards(config, records)
    student = _check_models(config, saved)
    with tempfile.TemporaryDirectory(prefix="posttrain-check-") as logs, serve(config.servers, Path(logs)) as urls:
        rewards = [reward for reward in load_rewards(config.rewards, urls) if not reward.spec.group]
        found = carry_over(config, saved, student, records, rewards)
    print(table(found))
    if output is not None:
        settings = {name: value for name, value in asdict(config).items() if name != "servers"}
        output.parent.mkdir(parents=True, exist_ok=True)
        replace_text(output, json.dumps({"settings": settings, **found}, indent=1) + "\n")
    if found["distance"]["turbo"] == 0:
        print("posttrain: the LoRA changes no image on Turbo")
    return int(found["distance"]["turbo"] == 0)


def carry_over(
    config: CarryoverConfig,
    saved: Checkpoint | None,
    student: Checkpoint | None,
    records: Sequence[PromptRecord],
    rewards: Sequence[Reward],
) -> dict[str, Any]:
    """By reward `raw` and `turbo` (each FIGURES) and `share`; and `distance`, the mean
    distance of an image with the LoRA to the one without, as image/diversity has it."""
    assert config.model is not None
    figures: dict[str, dict[str, dict[str, float | None]]] = {}
    distance: dict[str, float] = {}
    architecture = ""
    # Turbo first, whose few steps cost little: what is wrong with it is known before the many steps on Raw.
    for where, steps, guidance in (("turbo", config.turbo_steps, 0.0), ("raw", config.steps, config.guidance)):
        k2 = _load_turbo(config, student) if where == "turbo" else _load_raw(config, saved)
        if architecture and k2.config_fingerprint() != architecture:
            raise UserError(UNLIKE.format(config.turbo))
        architecture = k2.config_fingerprint()
        add_lora(k2, LORA, _factors(config, saved, linear_shapes(k2.base_state_dict())), config.check)
        off, on = _draw(k2, config, records, steps, guidance)
        distance[where] = float(image_metrics.distances(image_metrics.cells(off), image_metrics.cells(on)).mean())
        figures[where] = _gains(rewards, off, on, records)
        del k2  # before the other one is read, which is as large
    scores: dict[str, dict[str, Any]] = {}
    for name, raw in figures["raw"].items():
        turbo = figures["turbo"][name]
        scores[name] = {"raw": raw, "turbo": turbo, "share": share(raw, turbo)}
    return {"images": len(records), "rewards": scores, "distance": distance}


def table(found: dict[str, Any]) -> str:
    """The results as aligned text."""
    rows: list[tuple[str, ...]] = [("", "Raw", "with LoRA", "gain", "Turbo", "with LoRA", "gain", "carried over")]
    for name, values in found["rewards"].items():
        cells: list[str] = []
        for where in ("raw", "turbo"):
            off, on, gain, error = map(values[where].get, FIGURES)
            # All of them are missing where the reward scored too few images.
            cells += ["-"] * 3 if gain is None else [f"{off:.4f}", f"{on:.4f}", f"{gain:+.4f} ± {error:.4f}"]
        share = "no clear gain on Raw" if values["share"] is None else f"{100 * values['share']:.0f} %"
        rows.append((name, *cells, share))
    d = found["distance"]
    change = f"{100 * d['turbo'] / d['raw']:.0f} %" if d["raw"] else "-"
    rows.append(("image distance", "", "", f"{d['raw']:.4f}", "", "", f"{d['turbo']:.4f}", change))
    return aligned_columns(rows)


# ---- settings and models ---------------------------------------------------------------------------------------


def _completed(config: CarryoverConfig, saved: Checkpoint | None) -> CarryoverConfig:
    """With missing settings taken from the run's recipe. Raises UserError for a setting that neither has."""
    recipe = {} if saved is None else run_recipe(saved)  # a file has none
    model = config.model if saved is None or config.model is not None else ModelConfig(**saved.state["model"])
    prompts = config.prompts or heldout_of(recipe)
    rewards, servers = config.rewards, config.servers
    if not rewards:
        rewards = [RewardSpec(**spec) for spec in recipe.get("rewards", [])]
        servers = [ServerSpec(**spec) for spec in recipe.get("servers", [])]
    size = config.size or size_of(recipe)
    for field, value in (("model", model), ("prompts", prompts), ("rewards", rewards), ("size", size)):
        if not value:
            raise UserError(f"{field}: {config.check} has no recipe that states it; give it")
    return replace(config, model=model, prompts=prompts, rewards=rewards, servers=servers, size=size)


def _check_models(config: CarryoverConfig, saved: Checkpoint | None) -> Checkpoint | None:
    """Raises UserError for whatever of the LoRA, Raw and Turbo can be refused by their settings and headers, before
    weights are read. Returns Turbo's checkpoint where it is a run."""
    assert config.model is not None
    raw, path = config.model, Path(config.turbo)
    # With another path given, the base may be gone from where it was.
    if saved is not None and raw.path == saved.state["model"]["path"]:
        policy.check_base(saved)
    files.check_directory(raw.path, raw.transformer_file, raw.transformer_format)
    if files.is_distilled(raw.path):
        raise UserError(DISTILLED.format(raw.path))
    base, student, file = config.turbo, None, (None, None)
    if (path / "manifest.json").is_file() or (path / "checkpoints").is_dir():
        student = _student(config, saved)
        held = student.state["model"]
        base, file = held["path"], (held["transformer_file"], held.get("transformer_format"))
        policy.check_base(student)
    try:
        files.check_directory(base, *file)
    except UserError as error:
        raise UserError(f"turbo: {error}") from error
    if student is None and not is_hub_id(base) and not files.is_distilled(base):
        raise UserError(UNDISTILLED.format(base))
    ours, theirs = _architecture(raw.path), _architecture(base)
    # Only what both state: an index need not name the states of the text encoder.
    if any(name in theirs and theirs[name] != value for name, value in ours.items()):
        raise UserError(UNLIKE.format(config.turbo))
    _factors(config, saved, shapes_at(raw.path))
    return student


def _student(config: CarryoverConfig, saved: Checkpoint | None) -> Checkpoint:
    """The distilled model of a run."""
    try:
        student = checkpoint.load(checkpoint.find(config.turbo))
    except UserError as error:
        raise UserError(f"turbo: {error}") from error
    if not policy.is_student(student):
        raise UserError(f"turbo: {student.path} is no student of posttrain tdm; give a distilled model")
    if saved is not None and saved.path in [one.path for one in policy.earlier_of(student)]:
        raise UserError(
            f"turbo: {student.path} was distilled from {saved.path} already; give a Turbo that was distilled from"
            " the model below it"
        )
    return student


def _architecture(path: str) -> dict[str, Any]:
    """The transformer's settings, defaults included, and, if its index says so, which states of the text encoder it
    reads."""
    with reading(f"{path}/transformer/config.json", "the transformer's settings"):
        config = dict(empty_transformer(path).config)
    with reading(f"{path}/model_index.json", "settings"):
        index = json.loads((local(path, ("model_index.json",)) / "model_index.json").read_text())
    # Names with an underscore say where it lies and by which version it was written.
    described = {key: value for key, value in config.items() if not key.startswith("_")}
    taps = index.get("text_encoder_select_layers")
    if taps is not None:
        described["taps"] = list(taps)
    return described


def _factors(config: CarryoverConfig, saved: Checkpoint | None, shapes: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """Of the LoRA, for a model whose layers have these shapes."""
    if saved is None:
        return read_lora(config.check, shapes)
    for stage in (*policy.earlier_of(saved), saved):
        if stage.state["lora"] is None:
            raise UserError(f"check: {stage.path} trained all weights, so it is not a LoRA; give a run of an adapter")
    return scaled_factors(saved)


def _load_raw(config: CarryoverConfig, saved: Checkpoint | None) -> K2:
    """The base alone: the adapters of the runs that this run started from are part of the factors."""
    assert config.model is not None
    k2 = policy.read_base(asdict(config.model), _device())
    if k2.is_distilled:
        raise UserError(DISTILLED.format(config.model.path))
    if saved is not None:
        policy.check_origin(saved, k2, config.model.path)
    return k2


def _load_turbo(config: CarryoverConfig, student: Checkpoint | None) -> K2:
    assert config.model is not None
    if student is not None:
        k2 = policy.load_base(student, _device())
        policy.add_saved_policy(k2, student)
        k2.stack_role(policy.POLICY)
        return k2
    turbo = replace(config.model, path=config.turbo, transformer_file=None, transformer_format=None)
    k2 = policy.read_base(asdict(turbo), _device())
    if not k2.is_distilled:
        raise UserError(UNDISTILLED.format(config.turbo))
    return k2


def _device() -> torch.device:
    return Processes().device


# ---- measurement -----------------------------------------------------------------------------------------


def _draw(
    k2: K2, config: CarryoverConfig, records: Sequence[PromptRecord], steps: int, guidance: float
) -> tuple[np.ndarray, np.ndarray]:
    """Images without and with the LoRA, uint8 (N, H, W, 3)."""
    assert config.size is not None
    settings = EvalConfig(prompts=len(records), steps=steps, guidance=[guidance], seed=config.seed, groups=0)
    height, width = config.size
    procs = Processes().alone()
    draw = Evaluator(
        k2, records, [], settings, (height, width), config.micro_batch, config.max_tokens, procs, shown=len(records)
    )
    off = draw().images
    with k2.role(LORA):
        return off, draw().images


def _gains(
    rewards: Sequence[Reward], off: np.ndarray, on: np.ndarray, records: Sequence[PromptRecord]
) -> dict[str, dict[str, float | None]]:
    """Over the images that a reward could score both with and without the LoRA; None where there are too few."""
    prompts, reward_columns = [record.prompt for record in records], columns(list(records))

    # Each image stands alone: rewards that compare a group are left out before.
    def score(images: np.ndarray) -> Scores:
        return asyncio.run(score_all(rewards, to_pil(torch.from_numpy(images)), prompts, reward_columns))

    without, with_lora = score(off), score(on)
    found = {}
    for k, name in enumerate(without.names):
        valid = without.valid_NK[:, k] & with_lora.valid_NK[:, k]
        before, after = without.values_NK[valid, k], with_lora.values_NK[valid, k]
        found[name] = summary(before, after) if len(before) > 1 else dict.fromkeys(FIGURES)
    return found


def share(raw: Mapping[str, float | None], turbo: Mapping[str, float | None]) -> float | None:
    """The gain on Turbo over that on Raw; None where either is missing or Raw's is no clear one."""
    gain, error, other = raw["gain"], raw["error"], turbo["gain"]
    if gain is None or error is None or other is None or gain <= CLEAR * error:
        return None
    return other / gain


def summary(before: np.ndarray, after: np.ndarray) -> dict[str, float | None]:
    difference = after - before
    # The same prompts and noise on both sides, so the error is that of paired differences.
    error = difference.std(ddof=1) / np.sqrt(len(difference))
    return {
        "off": float(before.mean()),
        "on": float(after.mean()),
        "gain": float(difference.mean()),
        "error": float(error),
    }
