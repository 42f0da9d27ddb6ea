"""Preference optimisation of K2-nano in one command: does DPO drift, does STPO not, and what do users gain?

    python -m posttrain.nano.bench.stpo --output runs/bench-stpo --jobs 8

1. Makes the pairs of recipes/nano/pairs.yaml, more of them.
2. Trains long on them: Diffusion-DPO at each beta and STPO, all else as in recipes/nano/stpo_synthetic.yaml; and both
   once more at four times the learning rate, where DPO's images change most.
   drift.svg shows what becomes of them; drift.md has the end (mean of the last three evaluations).
3. Holds the end of STPO, DPO's best step (by the oracle, of all evaluations) and its end against K2-nano.
4. Continues from that recipe's own number of steps with 500 choices by a hidden taste (choices.py), by
   recipes/nano/stpo_human.yaml, and holds the outcome against what it began with.

All of it for each seed; a line names the least and the greatest. Two GPUs take eight minutes with --jobs 24, two CPU
cores many hours.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Any

from posttrain.nano.bench import common
from posttrain.preferences.dataset import CARD
from posttrain.report.charts import panels_svg
from posttrain.runs.read import Point
from prompts.parse import read_lines

STPO = "stpo"
VARIANTS = {
    "dpo beta 100": ["--loss.kind", "dpo", "--loss.beta", "100"],
    "dpo beta 500": ["--loss.kind", "dpo", "--loss.beta", "500"],
    "dpo beta 2000": ["--loss.kind", "dpo", "--loss.beta", "2000"],
    "dpo beta 500, rate 2e-3": ["--loss.kind", "dpo", "--loss.beta", "500", "--optim.lr", "2e-3"],
    STPO: [],
    "stpo, rate 2e-3": ["--optim.lr", "2e-3"],
}
CURVES = ("pairs/winner", "pairs/loser", "pairs/accuracy", "image/high_energy_ratio", "oracle", "artifact_free")
Row = dict[str, float | None]
LAST = 3
"""Evaluations whose mean is the end of a run."""
BLOCKS = ["--block", "128", "--micro_batch", "128"]
"""Pairs drawn together, for a GPU."""
RECIPES = Path("recipes/nano")


def table(rows: Mapping[str, Sequence[Mapping[str, float | None]]], names: Sequence[str]) -> str:
    """Markdown: a line for each key, the least and the greatest of its rows in each column."""
    lines = []
    for key, rows_of_key in rows.items():
        cells = []
        for name in names:
            cells.append(_extent(common.known(rows_of_key, name)))
        lines.append([key, *cells])
    return common.markdown(["", *names], lines) + "\n"


def _extent(values: Sequence[float]) -> str:
    if not values:
        return "-"
    return common.extent(values) if len(values) > 1 else f"{values[0]:.3f}"


def figure(curves: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]) -> str:
    """One SVG of all CURVES, each run a line, each variant a colour."""
    series: dict[str, dict[str, list[list[Point]]]] = {}
    for name in CURVES:
        by_variant = series[name] = {}
        for variant, runs in curves.items():
            by_variant[variant] = []
            for run in runs:
                by_variant[variant].append([(row["step"], row.get(name)) for row in run])
    return panels_svg(series, columns=3)


class Bench:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.output, self.jobs = args, args.output, common.Jobs(args.output, args.jobs)
        self.pairs = args.output / "pairs"

    def make_pairs(self) -> None:
        if not (self.pairs / CARD).exists():
            recipe = ["--config", str(RECIPES / "pairs.yaml"), "--output", str(self.pairs)]
            self.jobs(
                "pairs", "posttrain.cli", ["pairs", *recipe, "--pairs", str(self.args.pairs), *BLOCKS, "--resume"]
            )

    def encode(self) -> None:
        """One step, so that the runs that begin together find the pairs encoded."""
        self.train("encoded", "stpo_synthetic.yaml", 0, self.pairs, ["--steps", "1", "--eval.prompts", "1"])

    def train(self, name: str, recipe: str, seed: int, pairs: Path, options: Sequence[str]) -> Path:
        """A run, which goes on if it is there."""
        run = self.output / _file_name(f"{name}-{seed}")
        words = ["--config", str(RECIPES / recipe), "--output", str(run), "--seed", str(seed), "--resume"]
        words += ["--pairs.train", str(pairs), "--pairs.cache", str(self.output / "cache")]
        self.jobs(run.name, "posttrain.cli", ["stpo", *words, *options, *self.args.options])
        return run

    def long(self, variant: str, seed: int) -> Path:
        options = [*VARIANTS[variant], "--steps", str(self.args.steps), "--eval.every", str(self.args.every)]
        # Never stopped early: drift is what is to be seen. The best step is kept, to be compared as well.
        options += ["--eval.best", "oracle", "--eval.stop.metric", "null", "--checkpoint.every", "0"]
        return self.train(variant, "stpo_synthetic.yaml", seed, self.pairs, options)

    def compare(self, name: str, first: str, other: Path) -> Row:
        """The row of the other one, and of the first under `first/...`."""
        path = self.output / _file_name(f"{name}.json")
        if not path.exists():
            self.jobs(
                path.stem,
                "posttrain.nano.bench.compare",
                [first, str(other), "--output", str(path), "--prompts", str(self.args.prompts)],
            )
        base, row = json.loads(path.read_text())
        for key, value in base.items():
            row[f"first/{key}"] = value
        return row

    def taste(self, seed: int) -> Row:
        """Stage 2 against stage 1."""
        first = self.train("stage1", "stpo_synthetic.yaml", seed, self.pairs, [])
        choices = self.output / f"choices-{seed}"
        if not (choices / CARD).exists():
            words = [str(first), "--output", str(choices), "--seed", str(seed)]
            self.jobs(choices.name, "posttrain.nano.world.choices", words)
        second = self.train("stage2", "stpo_human.yaml", seed, choices, ["--model.start", str(first)])
        return self.compare(f"stage2-{seed}-to-stage1", str(first), second)


def main() -> None:
    parser = common.parser(__doc__, "stpo")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--pairs", type=int, default=4800)
    parser.add_argument("--steps", type=int, default=500, help="of the long runs")
    parser.add_argument("--every", type=int, default=60, help="steps between their evaluations")
    parser.add_argument("--prompts", type=int, default=500, help="held-out prompts of comparisons")
    args = parser.parse_args()
    bench = Bench(args)
    # Alone: the runs after them would otherwise make and encode the same pairs at once.
    bench.make_pairs()
    bench.encode()
    # A thread for each run and stage, which waits for its turn in Jobs.
    with ThreadPoolExecutor(64) as pool:
        futures: dict[str, list[Future[Path]]] = {}
        for variant in args.variants:
            futures[variant] = [pool.submit(bench.long, variant, seed) for seed in args.seeds]
        # Begun before the runs are waited for, as they depend on none of them.
        staged = [pool.submit(bench.taste, seed) for seed in args.seeds]
        runs: dict[str, list[Path]] = {}
        curves: dict[str, list[list[dict[str, Any]]]] = {}
        for variant, of_seeds in futures.items():
            runs[variant], curves[variant] = [], []
            for future in of_seeds:
                run = future.result()
                runs[variant].append(run)
                curves[variant].append(common.evaluations(read_lines(run / "metrics.jsonl")))
        (args.output / "drift.svg").write_text(figure(curves))
        against = _against_base(bench, runs, curves)
        stages = [future.result() for future in staged]
    ends = {variant: list(map(_end, of_seeds)) for variant, of_seeds in curves.items()}
    # K2-nano's own row is the same in all comparisons, so one of them has it.
    against = {"K2-nano": _first(next(iter(against.values())))[:1]} | against
    names = ("wins", "oracle", "text", "artifact_free", "diversity", "high_energy")
    text = f"Long training\n\n{table(ends, CURVES)}\nAgainst K2-nano\n\n{table(against, names)}\n"
    names = ("wins/taste", "taste", "oracle", "artifact_free", "diversity")
    text += f"Stage 2 against stage 1\n\n{table({'stage 1': _first(stages), 'stage 2': stages}, names)}"
    (args.output / "drift.md").write_text(text)
    print(text)


def _against_base(
    bench: Bench, runs: Mapping[str, Sequence[Path]], curves: Mapping[str, Sequence[Sequence[dict[str, Any]]]]
) -> dict[str, list[Row]]:
    """The best DPO's end and best step, and STPO's end, each seed compared with K2-nano."""
    ablations = [variant for variant in runs if variant.startswith("dpo")]
    # DPO with the beta that suits it best: a comparison with a bad one would say nothing.
    best = max(ablations, key=lambda variant: sum(map(_best_oracle, curves[variant])))
    calls = []
    for variant, place in ((best, "end"), (best, "early"), (STPO, "end")):
        for seed, run in zip(bench.args.seeds, runs[variant]):
            checkpoint = run / "checkpoints" / "best" if place == "early" else run
            calls.append((f"{variant} {place} {seed}", "base", checkpoint))
    rows = common.side_by_side(bench.compare, calls)
    seeds = len(bench.args.seeds)
    return {
        f"{best}, its end": rows[:seeds],
        f"{best}, its best step": rows[seeds : 2 * seeds],
        f"{STPO}, its end": rows[2 * seeds :],
    }


def _end(curve: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The figures at the end of a run: means over its last evaluations, of which one alone is noisy."""
    return {name: fmean(common.column(curve[-LAST:], name)) for name in CURVES}


def _first(rows: list[Row]) -> list[Row]:
    """The rows that the others were compared with."""
    firsts = []
    for row in rows:
        firsts.append({key[6:]: value for key, value in row.items() if key.startswith("first/")})
    return firsts


def _best_oracle(curve: Sequence[Mapping[str, Any]]) -> float:
    return max(common.column(curve, "oracle"))


def _file_name(text: str) -> str:
    return text.replace(" ", "-").replace(",", "")


if __name__ == "__main__":
    main()
