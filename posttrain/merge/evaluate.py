"""What a merge keeps of each run's gain, on that run's own held-out prompts.

The base, the run and the merge draw the same prompts from the same noise, in the steps and with the guidance of the
run's evaluations, and the run's rewards score them. Of a reward, base, run and merge are an image's scores, and

    kept = mean(merge - base) / mean(run - base)

over the images that all three have a score of, as mopd measures its students (mopd/retention.py). It is missing where
the run's own gain is not clear. What is drawn is what was written: the files of the merge are read back.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from posttrain.config.sections import EvalConfig
from posttrain.config.types import changed
from posttrain.distributed.processes import Processes
from posttrain.errors import UserError
from posttrain.export.export import load_checkpoint
from posttrain.export.lora_transfer import summary
from posttrain.export.model_card import heldout_of, run_recipe, size_of
from posttrain.log import log
from posttrain.merge import weights
from posttrain.merge.config import MergeConfig
from posttrain.merge.parents import Family, Parent
from posttrain.model import machine
from posttrain.model.files import Base
from posttrain.model.k2 import K2
from posttrain.mopd.retention import retention as of_gain
from posttrain.references.shown import Drawer, Named, of_records
from posttrain.runs.progress import columns
from posttrain.training import checkpoint
from posttrain.training.checkpoint import Checkpoint
from posttrain.training.evaluate import Evaluator
from posttrain.training.loop import try_rewards
from posttrain.training.policy import POLICY, load_base
from prompts.records import PromptRecord, read_prompts
from rewards.base import RewardSpec
from rewards.load import load_rewards
from rewards.serve import ServerSpec, serve


@dataclass
class HeldOut:
    """What a run among the parents is measured by, from its recipe."""

    parent: Parent
    records: list[PromptRecord]
    named: list[list[Named]]
    """The references of each prompt."""
    rewards: list[RewardSpec]
    """Those that see one image at a time."""
    servers: list[ServerSpec]
    eval: EvalConfig
    size: list[int]
    """[height, width]"""
    max_tokens: int


def heldout(family: Family, config: MergeConfig) -> list[HeldOut]:
    """Of the runs among the parents; says which parents have none. Raises UserError for prompts or rewards of a recipe
    that cannot be had, and where the model does not fit into memory."""
    found = []
    for parent in family.parents:
        recipe = {} if parent.saved is None else run_recipe(parent.saved)
        if missing := _missing(recipe):
            log.info(f"{parent.name} {missing}, so what is kept of its gain is not measured")
            continue
        try:
            found.append(_of_recipe(parent, recipe, config))
        except UserError as error:
            raise UserError(f"parents: the recipe of {parent.name}: {error}") from error
    if found:
        # The base stands for all three models, which are as large.
        model = family.model
        machine.check([Base("model", model.path, model.dtype, model.transformer_file, model.transformer_format)], {})
    return found


def _missing(recipe: Mapping[str, Any]) -> str:
    """Why there is nothing to measure; empty if there is."""
    if not recipe:
        return "has no recipe of a run"
    if heldout_of(recipe) is None:
        return "names no held-out prompts in its recipe"
    # Groups are not drawn.
    if all(spec.get("group") for spec in recipe.get("rewards", [])):
        return "names no reward that sees one image at a time"
    return ""


def _of_recipe(parent: Parent, recipe: Mapping[str, Any], config: MergeConfig) -> HeldOut:
    rewards: list[RewardSpec] = []
    for spec in recipe["rewards"]:
        if not spec.get("group"):
            rewards.append(RewardSpec(**spec))
    size, path = config.size or size_of(recipe), heldout_of(recipe)
    if size is None:
        raise UserError("it does not say the size of its images; give it as --size")
    assert path is not None
    settings = EvalConfig(**recipe.get("eval", {}))
    records = read_prompts(path, references=True)[: config.images or settings.prompts]
    named = of_records(records, path)
    # Only the first guidance, since what is compared are images of one setting.
    settings = changed(settings, prompts=len(records), groups=0, guidance=settings.guidance[:1])
    # Of stpo the section of the prompts is that of the pairs, of sft and style that of the images.
    section = recipe.get("prompts") or recipe.get("pairs") or recipe.get("images") or {}
    servers = [ServerSpec(**spec) for spec in recipe.get("servers", [])]
    own = HeldOut(parent, records, named, rewards, servers, settings, size, section.get("max_tokens", 512))
    try_rewards(own, records)
    return own


# ---- measurement ----------------------------------------------------------------------------------------------

Loaded = tuple[K2, str | None]
"""A model, and the role to draw as."""


def retention(
    family: Family, config: MergeConfig, sets: Sequence[HeldOut], output: Path, makes_adapter: bool
) -> list[dict[str, Any]]:
    """A row for each run and reward: `base`, `run` and `merge` (means), `gain`, `error`, `kept`, `interval` and
    `loses`."""
    device = Processes().device

    # Functions, so that each model is read only when it is drawn with, and freed after it.
    def base() -> Loaded:
        # As a checkpoint that trained nothing on what the parents share.
        state = {"model": vars(family.model), "origin": family.origin()}
        return load_base(Checkpoint(output, 0, {}, state), device), None

    def merged() -> Loaded:
        if makes_adapter:
            return load_checkpoint(checkpoint.load(checkpoint.find(output)), device), POLICY
        return weights.load(str(output), None, family.model.dtype, device), None

    rows = []
    for own in sets:
        saved = own.parent.saved
        assert saved is not None

        # A default, since the name `saved` is bound anew in each turn of the loop.
        def run(saved: Checkpoint = saved) -> Loaded:
            return load_checkpoint(saved, device), POLICY

        prefix = "posttrain-merge-"
        with tempfile.TemporaryDirectory(prefix=prefix) as logs, serve(own.servers, Path(logs)) as urls:
            # One after the other, since each loads a model, and only one fits into memory.
            by_base = _scores(own, base, urls, config.micro_batch)
            by_run = _scores(own, run, urls, config.micro_batch)
            by_merge = _scores(own, merged, urls, config.micro_batch)
        for reward in own.rewards:
            row = kept(by_base[reward.name], by_run[reward.name], by_merge[reward.name])
            row |= {"loses": row["kept"] is not None and row["kept"] < config.keep}
            rows.append({"parent": own.parent.name, "reward": reward.name, "images": len(own.records), **row})
    return rows


def _scores(
    own: HeldOut, load: Callable[[], Loaded], urls: Mapping[str, Sequence[str]], batch: int
) -> dict[str, np.ndarray]:
    """Of each reward the score of each image, NaN where it has none."""
    k2, role = load()
    rewards, procs = load_rewards(own.rewards, urls), Processes().alone()
    height, width = own.size
    draw = Drawer.of(k2, own.named, (height, width)) if any(own.named) else None
    evaluator = Evaluator(k2, own.records, rewards, own.eval, (height, width), batch, own.max_tokens, procs, draw=draw)
    with k2.role(role), torch.no_grad():
        images = evaluator().per_image_scores
    found = {}
    for reward in rewards:
        name = reward.spec.name
        values = [image[name]["score"] if name in image else np.nan for image in images]
        found[name] = np.array(values, float)
    return found


def kept(base: np.ndarray, run: np.ndarray, merge: np.ndarray) -> dict[str, Any]:
    """From an image's scores by each model: the means, the run's gain with its standard error, the share `kept` of it,
    and a 95 % bootstrap interval of that. What cannot be said is None."""
    # Pairs only: an image that one of the three could not be scored on says nothing of a difference.
    valid = np.isfinite(base) & np.isfinite(run) & np.isfinite(merge)
    base, run, merge = base[valid], run[valid], merge[valid]
    row: dict[str, Any] = dict.fromkeys(("base", "run", "merge", "gain", "error", "kept", "interval"))
    if len(base) < 2:
        return row
    own = summary(base, run)
    row |= {"base": own["off"], "run": own["on"], "merge": float(merge.mean())}
    row |= {"gain": own["gain"], "error": own["error"]}
    found = of_gain(base, run, merge, seed=0)
    if found is not None:
        row |= {"kept": found.value, "interval": [found.low, found.high]}
    return row


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as aligned text."""
    cells: list[Sequence[str]] = [("run", "reward", "base", "run", "merge", "gain of the run", "kept", "95 %", "")]
    for row in rows:
        names = [row["parent"], row["reward"]]
        if row["base"] is None:
            cells.append([*names, *["-"] * 5, "too few scores", ""])
            continue
        means = [f"{row['base']:.3f}", f"{row['run']:.3f}", f"{row['merge']:.3f}"]
        gain = f"{row['gain']:+.3f} ± {row['error']:.3f}"
        last = ["-", "no clear gain", ""]
        if row["kept"] is not None:
            low, high = row["interval"]
            last = [f"{row['kept']:.2f}", f"{low:.2f} to {high:.2f}", "loses" if row["loses"] else ""]
        cells.append([*names, *means, gain, *last])
    return columns(cells)
