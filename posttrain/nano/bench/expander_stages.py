"""All stages of the expander on K2-nano: what thinking and mined prompts gain.

    python -m posttrain.nano.bench.expander_stages --seeds 0 1 2 --output runs/bench-expander-stages

For each seed: pairs; supervised training without and with thoughts; mining; and GDPO by three arms: from prompts in
turn, from mined prompts, and from mined prompts with thoughts. The share of informative groups is that of prompts whose
expansions, sampled anew by another seed, are neither easy nor hopeless nor flat: among mined prompts and among all
candidates. Writes table.json and table.md. `--steps 0` leaves out GDPO.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posttrain.nano.bench import common
from posttrain.nano.world.prompts import write_lines
from posttrain.resources import ROOT
from prompts.parse import read_lines

FIGURES = ("aesthetic", "rubric", "oracle", "diversity", "format", "thought/empty", "thought/tokens")
RECIPES = "recipes/nano/expander_"
ARMS = ("in turn", "mined", "mined thinking")
CANDIDATES = (ROOT / "prompts/nano/short.jsonl", ROOT / "prompts/nano/mixed.jsonl")
"""Those of recipes/nano/expander_mine.yaml."""
ANEW = 1000
"""The seed of what is sampled anew."""
SAMPLED = 64
"""Prompts of each kind that are scored anew."""


def run(jobs: common.Jobs, seed: int, steps: int, arms: Sequence[str], options: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a seed: one for mining, one for each arm."""
    folder = jobs.folder

    def command(name: str, *words: str, own_seed: int = seed) -> Path:
        output = folder / f"{name}-{seed}"
        verb, recipe, *more = words
        # A benchmark that is started again leaves out what is done.
        if not common.finished(output) and not (output / "expander_data.json").exists():
            more += ["--resume"] if (output / "recipe.yaml").exists() else []
            options = ["--config", f"{RECIPES}{recipe}.yaml", *more, "--seed", str(own_seed), "--output", str(output)]
            jobs(output.name, "posttrain.cli", ["expander", verb, *options])
        return output

    # One set of pairs for both starts, so that they differ in thinking alone.
    data = str(command("data", "data", "data"))
    starts = {"direct": command("sft", "sft", "sft", "--data", data)}
    if any("thinking" in arm for arm in arms):
        starts["thinking"] = command("sft-thinking", "sft", "sft_thinking", "--data", data)
    rows, mined = [], {}
    for name, start in starts.items():
        if any("mined" in arm for arm in arms):
            mined[name] = command(f"mined-{name}", "mine", "mine", "--model.path", str(start))
            rows.append({"arm": f"mining, {name}", "seed": seed, **_informative(command, name, start, mined[name])})
    for arm in arms if steps else ():
        name = "thinking" if "thinking" in arm else "direct"
        pool = ["--config", str(mined[name] / "pool.yaml")] if "mined" in arm else []
        heldout = ["--prompts.heldout", "prompts/nano/short_heldout.jsonl"]
        words = [*pool, *heldout, "--model.path", str(starts[name]), "--steps", str(steps), *options]
        output = command(f"gdpo-{arm.replace(' ', '-')}", "gdpo", "gdpo", *words)
        curve = json.loads((output / "evaluations.json").read_text())
        rows.append({"arm": arm, "seed": seed, "before": curve[0]["figures"], "after": curve[-1]["figures"]})
    return rows


def _informative(command: Any, name: str, start: Path, mined: Path) -> dict[str, float]:
    """Shares of prompts that are still kept when they are scored anew."""
    scored = read_lines(mined / "scores.jsonl")
    chosen = [row for row in read_lines(mined / "train.jsonl") if row["tags"][0].startswith("mined/")]
    known = {}
    for path in CANDIDATES:
        known |= {row["prompt"]: row for row in read_lines(path)}
    rng = random.Random(0)
    found = {}
    for kind, rows in (("mined", chosen), ("all", scored)):
        prompts = common.column(rows, "prompt")
        file = mined / f"{kind}.jsonl"
        sample = rng.sample(prompts, min(SAMPLED, len(prompts)))
        write_lines(file, map(known.__getitem__, sample))
        candidates = json.dumps([{"path": str(file), "failure": kind}])
        again = command(
            f"again-{kind}-{name}", "mine", "mine", "--model.path", str(start), "--candidates", candidates,
            "--traffic", "null", own_seed=ANEW,
        )  # fmt: skip
        # By the seed that chose the prompts all of them would be kept; by another it shows how many were luck.
        counts = json.loads((again / "mined.json").read_text())
        found[kind] = counts["verdicts"]["kept"] / counts["candidates"]
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line an arm, each figure before and after as a mean with the seeds' least and greatest."""
    lines, shares = [], []
    for arm, own in common.grouped(rows, "arm").items():
        if "before" in own[0]:
            for when in ("before", "after"):
                lines.append([f"{arm}, {when}", *common.cells(common.column(own, when), FIGURES)])
        else:
            shares.append([arm, *common.cells(own, ("mined", "all"))])
    parts = []
    if shares:
        parts.append(common.markdown(["informative groups", "mined", "all candidates"], shares))
    if lines:
        parts.append(common.markdown(["GDPO", *FIGURES], lines))
    return "\n\n".join(parts)


def main() -> None:
    parser = common.parser(__doc__, "expander gdpo")
    parser.add_argument("--steps", type=int, default=64, help="of GDPO; 0: none")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    args = parser.parse_args()
    jobs = common.Jobs(args.output, args.jobs)
    calls = [(jobs, seed, args.steps, args.arms, args.options) for seed in args.seeds]
    rows = list(itertools.chain(*common.side_by_side(run, calls)))
    common.write(args.output, rows, table(rows))


if __name__ == "__main__":
    main()
