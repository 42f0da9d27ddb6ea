"""Finetunes K2-nano on images in a style that it draws badly, and measures that style and everything else.

    python -m posttrain.nano.bench.sft --output runs/bench-sft

For each seed another set of images (world/one_style.py) and another run of recipes/nano/sft.yaml. Then base and runs
draw the same held-out prompts with the same noise in 14 steps, without and with guidance. OUTPUT/table.md and
table.json:

| column | what it is |
|---|---|
| style | share of images that have the style, of prompts that ask for it |
| elsewhere | share of the requirements met, of prompts that ask for another style or none |
| change | of `elsewhere` from the base, with the standard error of the mean over prompts |
| free | share of all images that are free of artifacts |

and of each run its seconds, and CPU seconds with one thread. --shift gives the runs other training times. What is in
OUTPUT already is taken as it is, so the command may be given again, also with more seeds.
"""

from __future__ import annotations

import argparse
import json
import resource
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from posttrain.export.export import load_checkpoint
from posttrain.model import sampler
from posttrain.model.k2 import K2
from posttrain.nano.bench import common
from posttrain.nano.world import one_style as styled
from posttrain.nano.world import oracles
from posttrain.nano.world.statements import meets
from posttrain.training import checkpoint
from posttrain.training.policy import POLICY
from prompts.parse import read_lines

RECIPE, MODEL = "recipes/nano/sft.yaml", "posttrain/nano/weights/k2-nano"
SIDE, TOKENS, BATCH, STEPS = 64, 64, 50, 14
GUIDANCE = (0.0, 1.5)
NOISE = 3000
"""Added to a prompt's number, as the seed of its noise."""


def train(args: argparse.Namespace, jobs: common.Jobs, seed: int) -> dict[str, float]:
    """Makes a set and finetunes on it; returns the seconds of the run."""
    data, run, took = args.output / f"set-{seed}", args.output / f"run-{seed}", args.output / f"run-{seed}.json"
    if took.exists():
        return json.loads(took.read_text())
    styled.write(data, styled.STYLE, args.images, max(args.styled, 1), seed)
    # Of all children that have ended: the runs go one after the other, so the difference is this one's.
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    words = ["sft", "--config", args.recipe, "--resume", "--output", str(run), "--images.train", str(data / "images")]
    words += ["--images.cache", str(args.output / "cache"), "--heldout", str(data / "heldout.jsonl")]
    words += ["--seed", str(seed), "--shift", str(args.shift), *args.options]
    seconds = jobs(f"run-{seed}", "posttrain.cli", words, OMP_NUM_THREADS="1")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    took.write_text(json.dumps({"seconds": seconds, "cpu": cpu}))
    return {"seconds": seconds, "cpu": cpu}


@torch.no_grad()
def draw(k2: K2, role: str | None, prompts: Sequence[str], guidance: float) -> np.ndarray:
    """uint8 (N, 64, 64, 3); the noise is that of the prompt's number."""
    null, images = k2.text([""]), []
    shape = (k2.image_tokens(SIDE, SIDE), k2.latent_channels)
    with k2.role(role):
        for first in range(0, len(prompts), BATCH):
            part = prompts[first : first + BATCH]
            noise = sampler.noise(range(NOISE + first, NOISE + first + len(part)), shape)
            latents = k2.sample(k2.text(part, TOKENS), noise, STEPS, SIDE, SIDE, guidance, null)
            images.append(k2.decode(latents, SIDE, SIDE).numpy())
    return np.concatenate(images)


def measure(images: np.ndarray, records: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """By figure, of each image."""
    figures: dict[str, list[float]] = {"style": [], "elsewhere": [], "free": []}
    for percept, record in zip(oracles.perceive(list(images)), records):
        figures["free"].append(float(percept.clean))
        if styled.STYLED in record["tags"]:
            figures["style"].append(float(percept.scene.style == styled.STYLE))
        else:
            met = [meets(percept, requirement) for requirement in record["requirements"]]
            figures["elsewhere"].append(float(np.mean(met)))
    return figures


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        change = "" if row["change"] is None else f"{row['change']:+.3f} ± {row['error']:.3f}"
        times = "" if "cpu" not in row else f"{row['seconds']:.0f} ({row['cpu']:.0f})"
        style, elsewhere, free = f"{row['style']:.3f}", f"{row['elsewhere']:.3f}", f"{row['free']:.3f}"
        lines.append([row["model"], f"{row['guidance']:g}", style, elsewhere, change, free, times])
    return common.markdown(["", "guidance", "style", "elsewhere", "change", "free", "seconds (CPU)"], lines)


def compared(base: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """The mean change and its standard error over prompts, which both have drawn with the same noise."""
    change = np.array(other) - np.array(base)
    return float(change.mean()), float(change.std(ddof=1) / np.sqrt(len(change)))


def main() -> None:
    parser = common.parser(__doc__, "sft", RECIPE)
    parser.add_argument("--images", type=int, default=600, help="in a set")
    parser.add_argument("--styled", type=int, default=100, help="prompts for the style")
    parser.add_argument("--elsewhere", type=int, default=400, help="other prompts")
    parser.add_argument("--shift", type=float, default=0.0)
    args = parser.parse_args()
    jobs = common.Jobs(args.output)
    times = [train(args, jobs, seed) for seed in args.seeds]
    mixed = read_lines(args.output / f"set-{args.seeds[0]}" / "heldout.jsonl")
    records = [row for row in mixed if styled.STYLED in row["tags"]][: args.styled]
    records += styled.others(styled.STYLE)[: args.elsewhere]
    prompts = common.column(records, "prompt")
    rows: list[dict[str, Any]] = []
    bases: dict[float, dict[str, list[float]]] = {}
    changes: dict[float, list[np.ndarray]] = {guidance: [] for guidance in GUIDANCE}
    for seed in [None, *args.seeds]:
        name = "K2-nano" if seed is None else f"seed {seed}"
        for guidance in GUIDANCE:
            known = args.output / f"{name.replace(' ', '-')}-{guidance:g}.json"
            if not known.exists():
                if seed is None:
                    images = draw(K2.load(MODEL), None, prompts, guidance)
                else:
                    saved = checkpoint.load(checkpoint.find(args.output / f"run-{seed}"))
                    images = draw(load_checkpoint(saved), POLICY, prompts, guidance)
                known.write_text(json.dumps(measure(images, records)))
            figures = json.loads(known.read_text())
            if len(figures["free"]) != len(records):
                raise SystemExit(f"{known}: is of other prompts; remove it, or choose another --output")
            row: dict[str, Any] = {"model": name, "guidance": guidance, "change": None}
            for figure, values in figures.items():
                row[figure] = float(np.mean(values))
            if seed is None:
                bases[guidance] = figures
            else:
                row["change"], row["error"] = compared(bases[guidance]["elsewhere"], figures["elsewhere"])
                row |= times[args.seeds.index(seed)]
                changes[guidance].append(np.array(figures["elsewhere"]) - np.array(bases[guidance]["elsewhere"]))
            # After each, so that a bench that is stopped leaves the rows before.
            rows.append(row)
            common.write(args.output, rows, table(rows))
    for guidance, parts in changes.items():
        # The prompts are the same for all seeds, so the error is that of the mean over seeds.
        mean, error = compared(np.zeros(len(parts[0])).tolist(), np.mean(parts, axis=0).tolist())
        print(json.dumps({"guidance": guidance, "elsewhere, all seeds": round(mean, 4), "error": round(error, 4)}))


if __name__ == "__main__":
    main()
