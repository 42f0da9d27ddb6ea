"""What a merge of two domains keeps of each, on K2-nano: by rule, and where the domains pull against each other.

    python -m posttrain.nano.bench.merge --output runs/bench-merge --seeds 0 1 2       # on two cores: half an hour
    python -m posttrain.nano.bench.merge --output runs/bench-merge --parents runs/a runs/b

Without --parents it trains them: a run for each domain and seed, by the rectified-flow loss on rendered scenes whose
prompts are silent about the style.

    words    scenes with a word, dark         counts   scenes that count, bordered
    dim      one shape, dark on black         bright   one shape, pastel on white

A share of each batch is scenes of other kinds in all styles (--rehearse), so that a run changes its own domain more
than all else. Then `posttrain merge` merges two runs by each rule of RULES and measures, with the runs' own held-out
prompts and rewards, what is kept of the gains. dim and bright have the same prompts: that conflict must be told.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import posttrain as pt
from posttrain.nano.bench import common
from posttrain.nano.world import oracles, scenes
from posttrain.nano.world.prompts import HELDOUT_WORDS, TRAIN_WORDS

RULES = {
    "1 : 1": (1.0, []),
    "0.5 : 0.5": (0.5, []),
    "ties": (1.0, ["--method", "ties", "--rank", "64"]),
}
"""Weight of both runs, and options of `posttrain merge`."""


@dataclass(frozen=True)
class Domain:
    """Scenes of one kind in one style."""

    kind: str
    style: str
    background: str | None = None

    def draw(self, rng: np.random.Generator, words: list[str]) -> tuple[scenes.Scene, dict[str, Any]]:
        """A scene, and the record of a prompt that is silent about the style."""
        scene = replace(scenes.random_scene(rng, words, self.kind), style=self.style)
        scene = scene if self.background is None else replace(scene, background=self.background)
        return scene, record(scene, rng, 0.0)


DOMAINS = {
    "words": Domain("text", "dark"),
    "counts": Domain("count", "bordered"),
    "dim": Domain("single", "dark", "black"),
    "bright": Domain("single", "pastel", "white"),
}
PAIRS = {"two domains": ("words", "counts", tuple(RULES)), "conflict": ("dim", "bright", ("1 : 1",))}
"""Two domains, and the rules to merge them by."""
WATCHED = 8
"""Prompts of a run's own evaluations; a merge measures it by more."""
DRAWS = 20
"""Prompts drawn for each one wanted, of which those that are alike count once."""


def record(scene: scenes.Scene, rng: np.random.Generator, detail: float) -> dict[str, Any]:
    described = scenes.describe(scene, rng, detail)
    return {"prompt": described.prompt, "requirements": described.requirements, "style": scene.style}


def in_style(images: Sequence[Any], prompts: Sequence[str], style: Sequence[str]) -> list[float]:
    """A reward: 1.0 for an image in the style that its domain has, else 0.0."""
    return [float(found == wanted) for found, wanted in zip(oracles.styles(images), style)]


# ---- the runs -------------------------------------------------------------------------------------------------


@dataclass
class DomainConfig(pt.MethodConfig):
    """A run on a domain's scenes."""

    domain: str = "words"
    batch: int = 24
    scenes: int = 384
    rehearse: float = 0.0


def train(config: DomainConfig) -> None:
    rng = np.random.default_rng(config.seed)
    own = [DOMAINS[config.domain].draw(rng, TRAIN_WORDS) for _ in range(config.scenes)]
    others = []
    # Of other kinds in all styles, also silent about them: so the style is learnt for this domain alone.
    kinds = [kind for kind in scenes.KINDS if kind != DOMAINS[config.domain].kind]
    for _ in range(config.scenes):
        scene = scenes.random_scene(rng, TRAIN_WORDS, str(rng.choice(kinds)))
        others.append((scene, record(scene, rng, float(rng.choice((0.0, 0.5, 1.0))))))
    rows = own + others
    with pt.open_method("domain", config) as run:
        k2 = run.k2
        latents = k2.encode_images([Image.fromarray(scenes.render(scene)) for scene, _ in rows])
        prompts = [row["prompt"] for _, row in rows]
        texts = list(map(k2.fuse, k2.encode(prompts, 64).features))
        elsewhere = round(config.rehearse * config.batch)
        for step in run.steps():
            # By the step's number, so that a resumed run draws the same batches.
            rng = np.random.default_rng([config.seed, step])
            chosen = [*rng.choice(len(own), config.batch - elsewhere, replace=False)]
            chosen += [*(len(own) + rng.choice(len(others), elsewhere, replace=False))]
            x0, text = latents[chosen], pt.Text.of([texts[i] for i in chosen])
            eps, other = run.noise(step, 0, count=config.batch), run.noise(step, 1, count=config.batch)
            # One number of a second noise is a standard normal for each image's time.
            t = pt.sampler.logit_normal(other[:, 0, 0], 0.0, 1.0, k2.mu(*config.size))
            with k2.role(pt.POLICY):
                v = k2.velocity(pt.sampler.noised(x0, eps, t), t, text, *config.size)
            loss = (v - pt.sampler.velocity_target(x0, eps)).square().mean()
            loss.backward()
            run.log(step, {"loss": loss.detach(), "grad_norm": run.stepper.step()})


def prompts_of(name: str, count: int) -> list[dict[str, Any]]:
    """Records of up to so many held-out prompts of a domain, no two alike. Single shapes have only 48 prompts."""
    # A seed of its own, so that the held-out prompts are the same for every run of the domain.
    rng, rows = np.random.default_rng(99), dict[str, dict[str, Any]]()
    for _ in range(DRAWS * count):
        _, row = DOMAINS[name].draw(rng, HELDOUT_WORDS)
        rows[row["prompt"]] = row
        if len(rows) == count:
            break
    return list(rows.values())


def settings(folder: Path, name: str, seed: int, steps: int, rehearse: float, images: int) -> DomainConfig:
    """A run into folder/NAME-SEED, whose held-out prompts are the same for all seeds."""
    heldout = folder / f"{name}.jsonl"
    heldout.write_text("\n".join(map(json.dumps, prompts_of(name, images))) + "\n")
    oracle = "posttrain.nano.world.oracles:rubric"
    return DomainConfig(
        output=str(folder / f"{name}-{seed}"),
        model=pt.ModelConfig(str(pt.NANO), dtype="float32"),
        prompts=pt.PromptsConfig(str(heldout), str(heldout), max_tokens=64),
        rewards=[
            pt.RewardSpec("oracle", oracle, heldout_only=True),
            pt.RewardSpec("style", f"{__spec__.name if __spec__ else __name__}:in_style", heldout_only=True),
        ],
        steps=steps,
        seed=seed,
        size=[64, 64],
        lora=pt.LoraConfig(rank=16, alpha=16.0),
        optim=pt.OptimConfig(lr=2e-3, warmup_steps=5),
        eval=pt.EvalConfig(every=0, prompts=WATCHED, steps=12, groups=0),
        checkpoint=pt.CheckpointConfig(every=0),
        track=pt.TrackConfig(tensorboard=False),
        domain=name,
        rehearse=rehearse,
    )


# ---- the merges -----------------------------------------------------------------------------------------------


def merged(jobs: common.Jobs, name: str, runs: Sequence[str], weight: float, options: Sequence[str]) -> dict[str, Any]:
    """merge.json of a merge of these runs, made if it is not there."""
    output = jobs.folder / name
    if not output.exists():
        parents = [f"{run}:{weight:g}" for run in runs]
        jobs(name, "posttrain.cli", ["merge", *parents, "--output", str(output), *options])
    return json.loads((output / "merge.json").read_text())


def row(title: str, rule: str, found: Sequence[dict[str, Any]]) -> list[str]:
    """A line of the table, over seeds: cosine and sign conflict of the changes, and what is kept of each gain."""
    overall = common.column(found, "overall")
    cosines = common.column(common.column(overall, "cosines"), "1-2")  # of the first parent's change and the second's
    conflicts = common.column(overall, "conflict")
    cells = [title, rule, common.mean_and_extent(cosines, ".2f"), common.mean_and_extent(conflicts, ".2f")]
    for place, gain in enumerate(found[0].get("kept", [])):
        values = [one["kept"][place] for one in found]
        kept = common.mean_and_extent(common.column(values, "kept"), ".2f")
        gains = common.mean_and_extent(common.column(values, "gain"), "+.2f")
        name = Path(gain["parent"]).name.rpartition("-")[0] or gain["parent"]
        cells.append(f"{name} {gain['reward']}: {kept} of {gains}")
    return cells


def main() -> None:
    parser = common.parser(__doc__, "merge")
    parser.add_argument("--parents", nargs=2, help="two run directories to merge, in place of the nano domains")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rehearse", type=float, default=0.5)
    parser.add_argument("--images", type=int, default=64)
    args = parser.parse_args()
    jobs = common.Jobs(args.output, args.jobs)
    rows, found = [], {}
    if args.parents:
        found["parents"] = ([args.parents], tuple(RULES))
    for title, (first, second, rules) in PAIRS.items() if not args.parents else ():
        pairs = []
        for seed in args.seeds:
            runs = []
            for name in (first, second):
                config = settings(args.output, name, seed, args.steps, args.rehearse, args.images)
                if not (Path(config.output) / "summary.json").exists():
                    train(config)
                runs.append(config.output)
            pairs.append(runs)
        found[title] = (pairs, rules)
    written = {}
    for title, (pairs, rules) in found.items():
        for rule in rules:
            weight, options = RULES[rule]
            every = []
            for seed, runs in enumerate(pairs):
                name = f"{title}-{list(RULES).index(rule)}-{seed}".replace(" ", "-")
                words = [*options, "--images", str(args.images), *args.options]
                every.append(merged(jobs, name, runs, weight, words))
            written[f"{title}, {rule}"] = [one.get("kept", []) for one in every]
            rows.append(row(title, rule, every))
    widest = max(map(len, rows))
    padded = [line + [""] * (widest - len(line)) for line in rows]
    head = ["runs", "rule", "cosine", "sign conflict", *["kept of the gain"] * (widest - 4)]
    common.write(args.output, written, common.markdown(head, padded))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
