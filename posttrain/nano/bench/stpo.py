"""Preference optimisation of K2-nano in one command: does DPO drift, does STPO not, and what do users gain?

    python -m posttrain.nano.bench.stpo --output runs/bench-stpo --jobs 8

1. Makes the pairs of recipes/nano/pairs.yaml, more of them.
2. Trains long on them: Diffusion-DPO at each beta and STPO, all else as in recipes/nano/stpo_synthetic.yaml; and both
   once more at four times the learning rate, where DPO's images change most.
   drift.svg shows what becomes of them; drift.md has the end (mean of the last three evaluations).
3. Holds the end of STPO, DPO's best step (by the oracle, of all evaluations) and its end against K2-nano.
4. Goes on from that recipe's own number of steps with 500 choices by a hidden taste (choices.py), by
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

import numpy as np

from posttrain.nano.bench.jobs import Jobs
from posttrain.preferences.dataset import CARD
from posttrain.report.charts import panels_svg
from posttrain.runs.read import Point

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


def curve(run: Path) -> list[dict[str, float]]:
    """The evaluations of a run: their figures, and their step."""
    evaluations: list[dict[str, float]] = []
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "eval/oracle" in row:
            evaluated = {key[5:]: value for key, value in row.items() if key.startswith("eval/")}
            evaluations.append({"step": row["step"]} | evaluated)
    return evaluations


def spread(values: Sequence[float], sign: str = "") -> str:
    low, high = min(values), max(values)
    return f"{low:{sign}.3f}" if len(values) == 1 else f"{low:{sign}.3f} to {high:{sign}.3f}"


def table(rows: Mapping[str, Sequence[Mapping[str, float | None]]], names: Sequence[str]) -> str:
    """Markdown: a line for each key, the least and the greatest of its rows in each column."""
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for key, found in rows.items():
        cells = []
        for name in names:
            values = [value for row in found if (value := row.get(name)) is not None]
            cells.append(spread(values) if values else "-")
        lines.append(f"| {key} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def figure(curves: dict[str, list[list[dict[str, float]]]]) -> str:
    """One SVG of all CURVES, each run a line, each variant a colour."""

    series: dict[str, dict[str, list[list[Point]]]] = {name: {} for name in CURVES}
    for name, by_variant in series.items():
        for variant, runs in curves.items():
            by_variant[variant] = [[(int(row["step"]), row.get(name)) for row in run] for run in runs]
    return panels_svg(series, columns=3)


class Bench:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.output, self.jobs = args, args.output, Jobs(args.output, args.jobs)
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
        run = self.output / f"{name}-{seed}".replace(" ", "-").replace(",", "")
        words = ["--config", str(RECIPES / recipe), "--output", str(run), "--seed", str(seed), "--resume"]
        words += ["--pairs.train", str(pairs), "--pairs.cache", str(self.output / "cache")]
        self.jobs(run.name, "posttrain.cli", ["stpo", *words, *options, *self.args.options])
        return run

    def long(self, variant: str, seed: int) -> Path:
        options = [*VARIANTS[variant], "--steps", str(self.args.steps), "--eval.every", str(self.args.every)]
        options += ["--eval.best", "oracle", "--eval.stop.metric", "null", "--checkpoint.every", "0"]
        return self.train(variant, "stpo_synthetic.yaml", seed, self.pairs, options)

    def compare(self, name: str, first: str, other: Path) -> Row:
        """The row of the other one, and of the first under `first/...`."""
        path = self.output / f"{name}.json".replace(" ", "-").replace(",", "")
        if not path.exists():
            self.jobs(
                path.stem,
                "posttrain.nano.bench.compare",
                [first, str(other), "--output", str(path), "--prompts", str(self.args.prompts)],
            )
        base, row = json.loads(path.read_text())
        return row | {f"first/{key}": value for key, value in base.items()}

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
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--pairs", type=int, default=4800)
    parser.add_argument("--steps", type=int, default=500, help="of the long runs")
    parser.add_argument("--every", type=int, default=60, help="steps between their evaluations")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--prompts", type=int, default=500, help="held-out prompts of comparisons")
    parser.add_argument("options", nargs="*", help="further options for posttrain stpo, after --")
    args = parser.parse_args()
    bench = Bench(args)
    bench.make_pairs()
    bench.encode()
    with ThreadPoolExecutor(64) as pool:
        runs: dict[str, list[Future[Path]]] = {
            variant: [pool.submit(bench.long, variant, seed) for seed in args.seeds] for variant in args.variants
        }
        staged = [pool.submit(bench.taste, seed) for seed in args.seeds]
        curves = {variant: [curve(run.result()) for run in found] for variant, found in runs.items()}
        (args.output / "drift.svg").write_text(figure(curves))
        ends = {variant: list(map(_end, found)) for variant, found in curves.items()}
        ablations = [v for v in args.variants if v.startswith("dpo")]
        # DPO with the beta that suits it best: a comparison with a bad one would say nothing.
        best = max(ablations, key=lambda v: np.mean([_best(run)[1] for run in curves[v]]))
        comparisons = {}
        for name, variant, early in (("its end", best, False), ("its best step", best, True), ("its end", STPO, False)):
            futures = []
            for seed, run in zip(args.seeds, runs[variant]):
                path = run.result()
                chosen = path / "checkpoints" / "best" if early else path
                title = f"{variant} {'early' if early else 'end'} {seed}"
                futures.append(pool.submit(bench.compare, title, "base", chosen))
            comparisons[f"{variant}, {name}"] = futures
        against = {name: [future.result() for future in futures] for name, futures in comparisons.items()}
        stages = [future.result() for future in staged]
    against = {"K2-nano": _first(next(iter(against.values())))[:1]} | against
    names = ("wins", "oracle", "text", "artifact_free", "diversity", "high_energy")
    text = f"Long training\n\n{table(ends, CURVES)}\nAgainst K2-nano\n\n{table(against, names)}\n"
    names = ("wins/taste", "taste", "oracle", "artifact_free", "diversity")
    text += f"Stage 2 against stage 1\n\n{table({'stage 1': _first(stages), 'stage 2': stages}, names)}"
    (args.output / "drift.md").write_text(text)
    print(text)


def _end(run: list[dict[str, float]]) -> dict[str, float]:
    """The figures at the end of a run: means over its last evaluations, of which one alone is noisy."""
    return {name: float(np.mean([row[name] for row in run[-LAST:]])) for name in CURVES}


def _first(rows: list[Row]) -> list[Row]:
    """The rows that the others were compared with."""
    return [{key[6:]: value for key, value in row.items() if key.startswith("first/")} for row in rows]


def _best(run: list[dict[str, float]]) -> tuple[float, float]:
    """Step and oracle accuracy of a run's best evaluation."""
    return max(((row["step"], row["oracle"]) for row in run), key=lambda pair: pair[1])


if __name__ == "__main__":
    main()
