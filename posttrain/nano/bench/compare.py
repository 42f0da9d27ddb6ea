"""Compares checkpoints image by image: held-out prompts, the same noise, no guidance.

    python -m posttrain.nano.bench.compare base runs/nano-stpo-synthetic --recipe recipes/nano/ablations/base.yaml

The first one (`base`: the model that the others were trained from) is what the others are held against. Each is a run
directory (the checkpoint that it hands on) or a checkpoint. The recipe's judges are the ensemble: of two images of
one prompt and noise that one wins whose mean score over them is higher; a tie is half a win. Its `heldout_only` rewards
are measured, and so is the hidden taste of judge_data.py (`taste`; its column of wins counts those that one prefers).
"""

from __future__ import annotations

import argparse
import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from posttrain.config.load import load_config
from posttrain.config.metric_names import DIVERSITY
from posttrain.config.sections import EvalConfig
from posttrain.distributed.processes import Processes
from posttrain.export.export import load_checkpoint
from posttrain.model.k2 import K2, to_pil
from posttrain.nano.bench import common
from posttrain.nano.world.choices import tasteful
from posttrain.training import checkpoint, image_metrics
from posttrain.training.evaluate import Evaluator, means
from posttrain.training.policy import POLICY, load_base
from prompts.records import PromptRecord, columns, read_prompts
from rewards.base import Reward, Scores, score_all
from rewards.load import load_rewards

HELDOUT = "prompts/nano/heldout.jsonl"


def drawn(
    k2: K2, role: str | None, records: list[PromptRecord], rewards: list[Reward], config: EvalConfig
) -> dict[str, Any]:
    """Scores of each image, the figures of them all, and the images."""
    evaluator = Evaluator(k2, records, [], config, (64, 64), 250, 64, Processes(), shown=len(records))
    with torch.no_grad(), k2.role(role):
        result = evaluator()
    # The evaluator is given no rewards: it returns their means, and wins need each image's scores.
    images = to_pil(torch.from_numpy(result.images))
    scores = asyncio.run(score_all(rewards, images, [r.prompt for r in records], columns(records)))
    taste = np.array(tasteful(images, []), float)  # None becomes nan
    energy = image_metrics.high_energy(result.images)
    return {"scores": scores, "taste": taste, "energy": energy, "figures": result.metrics, "images": result.images}


def wins(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Share of rows where the first is higher; a tie is half a win, and rows where one is missing do not count."""
    both = ~(np.isnan(ours) | np.isnan(theirs))
    return float(((ours > theirs)[both] + 0.5 * (ours == theirs)[both]).mean())


def ensemble(scores: Scores, other: Scores, judges: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Mean over the judges that scored both images; nan where none did."""
    rows = [k for k, name in enumerate(scores.names) if name in judges]
    # Only judges that scored both images: otherwise the two means would be over different judges.
    both = scores.valid_NK[:, rows] & other.valid_NK[:, rows]
    count = np.where(both.any(1), both.sum(1), np.nan)
    ours = np.where(both, scores.values_NK[:, rows], 0.0).sum(1) / count
    theirs = np.where(both, other.values_NK[:, rows], 0.0).sum(1) / count
    return ours, theirs


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="+", help="'base', run directories or checkpoints; the first is held against")
    parser.add_argument("--recipe", default="recipes/nano/ablations/base.yaml", help="a GRPO recipe with the rewards")
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--groups", type=int, default=40, help="prompts whose groups of 8 measure diversity")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--output", type=Path, help="write the rows as JSON, and the images beside it as .npz")
    args = parser.parse_args()
    if len(args.runs) < 2 or args.runs[1:].count("base"):
        parser.error("give one to hold against and at least one other, which is not 'base'")
    recipe, _ = load_config("grpo", ["--config", args.recipe])
    # A reward of groups has no score of a single image to compare.
    specs = [spec for spec in recipe.rewards if not spec.group]
    judges = [spec.name for spec in specs if not spec.heldout_only]
    rewards = load_rewards(specs, {})
    records = read_prompts(HELDOUT)[: args.prompts]
    config = EvalConfig(prompts=args.prompts, steps=args.steps, groups=args.groups, group_size=8)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = []
    for run in args.runs:
        # The base is what the second one began with, so its checkpoint says which.
        saved = checkpoint.load(checkpoint.find(args.runs[1] if run == "base" else run))
        k2 = load_base(saved, device) if run == "base" else load_checkpoint(saved, device)
        results.append(drawn(k2, None if run == "base" else POLICY, records, rewards, config))
    first, rows = results[0], []
    for run, one in zip(args.runs, results):
        ours, theirs = ensemble(one["scores"], first["scores"], judges)
        row = {"run": run, "wins": wins(ours, theirs), "wins/taste": wins(one["taste"], first["taste"])}
        row |= means(one["scores"]) | {"taste": float(np.nanmean(one["taste"]))}
        if args.groups:
            row["diversity"] = one["figures"][DIVERSITY] / first["figures"][DIVERSITY]
        rows.append(row | {"high_energy": one["energy"] / first["energy"]})
    if args.output:
        args.output.write_text(json.dumps(rows, indent=1) + "\n")
        np.savez_compressed(args.output.with_suffix(".npz"), images=np.stack([one["images"] for one in results]))
    names = list(rows[0])[1:]
    lines = []
    for row in rows:
        cells = ["-" if row[name] is None else f"{row[name]:.3f}" for name in names]
        lines.append([row["run"], *cells])
    print(common.markdown(["run", *names], lines))


if __name__ == "__main__":
    main()
