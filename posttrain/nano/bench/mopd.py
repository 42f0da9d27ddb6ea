"""Distils three experts of K2-nano into one student: what is kept of each, beside their merge and grpo on all prompts.

    python -m posttrain.nano.bench.mopd --seeds 0 1 2 --output runs/bench-mopd     # on two cores: two hours

The experts are runs of `posttrain grpo`, each on its own prompts: with text, that count, and others that name a style.
For each seed a student learns from all of them, and a run of grpo from all prompts and as many images. `posttrain merge
OUTPUT/expert-*` measures their exact merge. OUTPUT/table.md has the share of each expert's gain that is kept, with its
95 % interval, and requirements met over the 64 held-out prompts of each. Runs that are in OUTPUT are only read.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posttrain.nano.bench import common
from posttrain.nano.world.prompts import write_lines
from prompts.parse import read_lines

TAGS = ("text", "count", "style")
PROMPTS = Path("prompts/nano")
HELDOUT = 64
"""Prompts of each expert: a retention needs a gain above chance."""
EXPERT = [
    "--groups.prompts_per_step", "4", "--optim.lr", "1e-3", "--eval.every", "64", "--eval.steps", "16",
]  # fmt: skip
SHARED = ["--eval.every", "20", "--eval.steps", "16", "--eval.prompts", str(HELDOUT * len(TAGS))]
IMAGES = 16
FIGURES = ("oracle", "text", "artifact_free")


def tag_of(row: dict[str, Any]) -> str | None:
    """The expert of a prompt of prompts/nano; None if it has none."""
    if row["tags"][0] in TAGS:
        return row["tags"][0]
    return "style" if any(need.startswith("the style is ") for need in row["requirements"]) else None


def write_prompts(folder: Path) -> None:
    """TAG-train.jsonl and TAG-heldout.jsonl of each expert, and all-*.jsonl in turns; a prompt has its expert's tag."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("train", "heldout"):
        own: dict[str, list[dict[str, Any]]] = {tag: [] for tag in TAGS}
        for row in read_lines(PROMPTS / f"{name}.jsonl"):
            tag = tag_of(row)
            if tag is not None and (name == "train" or len(own[tag]) < HELDOUT):
                own[tag].append(row | {"tags": [tag]})
        # In turns, so that the first prompts of the file are of all experts; short lists end in None.
        mixed: list[dict[str, Any]] = []
        for turn in itertools.zip_longest(*own.values()):
            mixed += filter(None, turn)
        own["all"] = mixed
        for tag, found in own.items():
            write_lines(folder / f"{tag}-{name}.jsonl", found)


def run(jobs: common.Jobs, name: str, command: str, recipe: str, prompts: str, options: Sequence[str]) -> Path:
    words = [command, "--config", f"recipes/nano/{recipe}.yaml"]
    for part in ("train", "heldout"):
        words += [f"--prompts.{part}", str(jobs.folder / f"prompts/{prompts}-{part}.jsonl")]
    return jobs.run(name, [*words, *options])


def teachers(folder: Path) -> str:
    """The option --teachers."""
    experts = {}
    for tag in TAGS:
        experts[tag] = {"run": str(folder / f"expert-{tag}"), "tags": [tag], "reward": "oracle"}
    return json.dumps(experts)


def row_of(folder: Path) -> dict[str, Any]:
    summary = json.loads((folder / "summary.json").read_text())
    return {"run": folder.name, "images": summary["images"], "seconds": summary["seconds"], "after": summary["after"]}


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        after, kept = row["after"], []
        for tag in TAGS:
            name = f"retention/{tag}"
            share = after.get(name)
            interval = "" if share is None else f" ({after[f'{name}_low']:.2f} to {after[f'{name}_high']:.2f})"
            kept.append("-" if share is None else f"{share:.2f}{interval}")
        figures = [f"{after[figure]:.3f}" for figure in FIGURES]
        lines.append([row["run"], row["images"], f"{row['seconds']:.0f}", *kept, *figures])
    return common.markdown(["", "images", "seconds", *(f"{tag}: gain kept" for tag in TAGS), *FIGURES], lines)


def main() -> None:
    parser = common.parser(__doc__, "mopd")
    parser.add_argument("--expert_steps", type=int, default=128)
    parser.add_argument("--student_steps", type=int, default=60)
    args = parser.parse_args()
    write_prompts(args.output / "prompts")
    jobs = common.Jobs(args.output, args.jobs)
    expert = [*EXPERT, "--steps", str(args.expert_steps)]
    # All experts before any student, which needs every one of them.
    common.side_by_side(run, [(jobs, f"expert-{tag}", "grpo", "demo", tag, expert) for tag in TAGS])
    calls: list[tuple[Any, ...]] = []
    for seed in args.seeds:
        images = ["--images", str(IMAGES), "--micro_batch", str(IMAGES)]
        words = ["--teachers", teachers(args.output), "--seed", str(seed), *images, *SHARED, *args.options]
        calls.append((jobs, f"student-{seed}", "mopd", "mopd", "all", [*words, "--steps", str(args.student_steps)]))
        steps = args.student_steps * IMAGES * len(TAGS) // 32  # as many images: a step has four prompts of eight
        alike = ["--steps", str(steps), "--groups.prompts_per_step", "4", "--optim.lr", "1e-3", "--seed", str(seed)]
        calls.append((jobs, f"grpo-{seed}", "grpo", "demo", "all", [*alike, *SHARED]))
    rows = list(map(row_of, common.side_by_side(run, calls)))
    common.write(args.output, rows, table(rows))


if __name__ == "__main__":
    main()
