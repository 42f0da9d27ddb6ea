"""What references do after `posttrain style` on K2-nano: strengths, mixing, styles never seen.

    python -m posttrain.nano.bench.style runs/nano-style --set runs/nano-referenced --output runs/bench-style

Every row draws the same held-out prompts from the same noise. `style` is the share of images in their reference's
style, of prompts whose style was trained on; `unseen` of the others; `content` the share of requirements met; `leak`
the share with an object of the reference that nobody asked for. A mix shows two references of different styles: `a` is
the share that the first's style has of all images in one of the two. The standard error of a share is about .05 with 90
prompts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from posttrain.config.sections import ModelConfig
from posttrain.model import sampler
from posttrain.model.k2 import K2
from posttrain.nano.world import many_styles as world
from posttrain.nano.world import oracles
from posttrain.references.draw import How
from posttrain.references.shown import Drawer, Named, of_records
from posttrain.sample_images import loaded
from posttrain.training.evaluate import SamplingSettings
from prompts.records import PromptRecord, columns, read_prompts

SIZE = (64, 64)
LEVELS = (0.1, 0.25, 0.5, 0.75, 1.0)


@dataclass
class Bench:
    k2: K2
    role: str | None
    records: Sequence[PromptRecord]
    named: Sequence[Sequence[Named]]
    settings: SamplingSettings

    def images(self, named: Sequence[Sequence[Named]], how: How = "attention") -> list[np.ndarray]:
        """One image of each prompt with these references, uint8 (64, 64, 3)."""
        k2, drawn = self.k2, []
        # Once for all prompts: references are encoded when the drawer is made.
        draw = Drawer.of(k2, named, SIZE, how=how)
        null = k2.text([""]) if self.settings.guidance else None
        shape = (k2.image_tokens(*SIZE), k2.latent_channels)
        with k2.role(self.role):
            for first in range(0, len(self.records), 30):
                rows = list(range(first, min(first + 30, len(self.records))))
                noise = sampler.noise([sampler.seed_for(77, row) for row in rows], shape)
                text = k2.text([self.records[row].prompt for row in rows], 64)
                latents = draw(rows, text, noise, self.settings, null)
                drawn += [*k2.decode(latents, *SIZE).cpu().numpy()]
        return drawn

    def at(self, strength: float) -> list[list[Named]]:
        """The references of the prompts, all with this strength."""
        named = []
        for own in self.named:
            named.append([Named(one.path, strength) for one in own])
        return named

    def figures(self, images: Sequence[np.ndarray]) -> dict[str, float]:
        prompts, own = [record.prompt for record in self.records], columns(self.records)
        found = {}
        for name, reward in (
            ("style", world.style), ("unseen", world.unseen), ("content", oracles.rubric), ("leak", world.leak),
            ("clean", oracles.artifact_free),
        ):  # fmt: skip
            # `style` and `unseen` have no score for each other's prompts.
            scores = [score for score in reward(images, prompts, **own) if score is not None]
            found[name] = float(np.mean(scores))
        return found

    def mix(self, strength: float, swapped: bool) -> float:
        """The first reference's part of the images that have one of the two styles. Only trained styles are mixed."""
        styles = [record.columns["style"] for record in self.records]
        rows = [i for i, record in enumerate(self.records) if record.tags == ["trained"]]
        others: dict[int, int] = {}
        named: list[Sequence[Named]] = [()] * len(self.records)
        for n, i in enumerate(rows):
            # The next prompt whose reference has another style, round the end.
            others[i] = next(j for j in rows[n + 1 :] + rows[:n] if styles[j] != styles[i])
            both = [Named(self.named[row][0].path, strength) for row in (i, others[i])]
            named[i] = both[::-1] if swapped else both
        seen = oracles.styles(self.images(named))
        first = second = 0
        for i in rows:
            first += seen[i] == styles[i]
            second += seen[i] == styles[others[i]]
        return first / max(1, first + second)


def measure(bench: Bench) -> dict[str, dict[str, float]]:
    rows: dict[str, dict[str, float]] = {}

    def add(name: str, figures: dict[str, float]) -> None:
        rows[name] = figures
        cells = [f"{key} {value:.3f}" for key, value in figures.items()]
        print(f"{name:24}" + "  ".join(cells), flush=True)

    add("no reference", bench.figures(bench.images([()] * len(bench.records))))
    for level in LEVELS:
        add(f"attention {level:g}", bench.figures(bench.images(bench.at(level))))
    for level in (0.5, 1.5):
        add(f"velocity {level:g}", bench.figures(bench.images(bench.at(level), "velocity")))
    by_level = [rows["no reference"]["style"], *(rows[f"attention {level:g}"]["style"] for level in LEVELS)]
    # 1 where more strength always means more of the style.
    add("sweep", {"spearman": float(np.corrcoef(stats.rankdata([0, *LEVELS]), stats.rankdata(by_level))[0, 1])})
    # Half of the effect each: strengths are squared, so their squares add up to one.
    half = 0.5**0.5
    for swapped in (False, True):
        add(f"equal mix{', swapped' if swapped else ''}", {"a": bench.mix(half, swapped)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", help="a run of posttrain style; none: the model alone")
    parser.add_argument("--set", type=Path, required=True, help="what posttrain.nano.world.many_styles wrote")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", default="posttrain/nano/weights/k2-nano")
    parser.add_argument("--prompts", type=int, default=90)
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--guidance", type=float, default=1.5)
    args = parser.parse_args()
    records = read_prompts(args.set / "heldout.jsonl", references=True)[: args.prompts]
    named = of_records(records, str(args.set / "heldout.jsonl"))
    k2, role = loaded(ModelConfig(args.model, dtype="float32"), None if args.run == "none" else args.run, True)
    rows = measure(Bench(k2, role, records, named, SamplingSettings(args.steps, args.guidance)))
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "figures.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
