"""Compares distilled K2-nano students with their teacher on the held-out prompts, and the memory that distilling takes.

    python -m posttrain.nano.bench.tdm runs/nano-tdm-0 runs/nano-tdm-1 runs/nano-tdm-2 --output runs/bench-tdm

    python -m posttrain.nano.bench.tdm --train 8 8,4 --seeds 0 1 2 --jobs 6 --output runs/bench-tdm

The second trains the students first, by `posttrain tdm` in processes of their own, --jobs at a time and on all GPUs in
turn: for 8 steps, and for 8 and 4, of three seeds each, into OUTPUT/8-0, OUTPUT/8-4-0, ... Runs that are there already
go on or are taken as they are, so the command may be given again with more of them.

A student is a run directory, a checkpoint or an exported pipeline. Those that were trained for the same steps are seeds
of one and are put in one row, with their least and greatest figure. OUTPUT/table.md, and table.json with the figures of
each seed, have of 500 held-out prompts with the index of the prompt as seed:

| column | what it is |
|---|---|
| forwards | of the transformer, for one image |
| oracle, text, artifact-free | share of requirements met, of words read, of images free of artifacts |
| diversity | of groups of images of one prompt, as a share of the guided teacher's |
| distance | Frechet distance of features of judge-nano's image tower to other images of the guided teacher |

The features are means over an image; the distance is divided by their total variance, and those other images are of
the same prompts with other noise, so that the teacher's own row is the floor: two draws of one distribution.

Memory is the peak on a GPU of a step of TDM and of one of flow matching with the same adapter and batch, at the size of
K2-nano, or with --memory-scale k2 of random weights at K2's true size.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from posttrain.config.sections import LoraConfig, ModelConfig, PromptsConfig
from posttrain.distributed.processes import Processes
from posttrain.export.export import load_checkpoint
from posttrain.model import sampler
from posttrain.model.architecture import blocks
from posttrain.model.k2 import K2, Text, to_pil
from posttrain.nano.bench import common
from posttrain.nano.build import evaluate
from posttrain.nano.world import prompts
from posttrain.runs.progress import grid_image
from posttrain.tdm import train as tdm
from posttrain.tdm.config import TDMConfig
from posttrain.tdm.rollout import MU, roll_out
from posttrain.training import checkpoint, image_metrics
from posttrain.training.evaluate import SamplingSettings
from posttrain.training.policy import POLICY, add_policy, load_base
from posttrain.training.stepper import Stepper
from rewards.vlm import VLM

RECIPE = "recipes/nano/tdm.yaml"
MODEL, JUDGE = "posttrain/nano/weights/k2-nano", "posttrain/nano/weights/judge-nano"
SIZE = (64, 64)
OTHER = 1_000_000
"""Added to the seeds of the images that distances are to."""
FIGURES = ("oracle", "text", "artifact-free", "diversity", "distance")


@dataclass
class Drawn:
    images: np.ndarray
    """uint8 (N, 64, 64, 3), one of each prompt."""
    groups: np.ndarray
    """uint8 (G * size, 64, 64, 3), groups of one prompt."""


class Bench:
    """Draws and measures."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.records = prompts.read("heldout")[: args.prompts]
        self.judge = VLM.load(JUDGE, device=args.device)
        # Spawned: a fork of a process that has CUDA or threads of torch may hang.
        self.pool = multiprocessing.get_context("spawn").Pool(os.cpu_count(), torch.set_num_threads, (1,))

    @torch.no_grad()
    def draw(self, k2: K2, way: SamplingSettings, seed: int = 0) -> Drawn:
        """Under the role that is active."""
        features = k2.encode(common.column(self.records, "prompt"), 64, batch=64).features
        fused, null = list(map(k2.text_tokens, features)), k2.text([""])
        count, size = min(self.args.groups, len(fused)), self.args.group_size
        # One image of each prompt, then groups of the first prompts, whose seeds are far from those.
        groups = range(seed + OTHER // 2, seed + OTHER // 2 + size * count)
        seeds = [*range(seed, seed + len(fused)), *groups]
        rows = [*range(len(fused)), *np.repeat(range(count), size).tolist()]
        parts = []
        for first in range(0, len(rows), self.args.batch):
            part = slice(first, first + self.args.batch)
            noise = sampler.noise(seeds[part], (k2.image_tokens(*SIZE), k2.latent_channels))
            text = Text.of([fused[row] for row in rows[part]])
            latents = k2.sample(text, noise, way.steps, *SIZE, way.guidance, null, way.mu)
            parts.append(k2.decode(latents, *SIZE, batch=self.args.batch).cpu().numpy())
        images = np.concatenate(parts)
        return Drawn(images[: len(fused)], images[len(fused) :])

    def measure(self, drawn: Drawn, reference: np.ndarray) -> dict[str, float]:
        figures = evaluate.figures(self.pool, drawn.images, self.records)
        return {
            "oracle": figures["accuracy"],
            "text": figures["text"],
            "artifact-free": figures["clean"],
            "diversity": image_metrics.diversity(drawn.groups, self.args.group_size),
            "distance": frechet(self.features(drawn.images), reference),
        }

    @torch.no_grad()
    def features(self, images: np.ndarray) -> np.ndarray:
        """(N, D) of judge-nano's image tower, mean over the tokens of an image."""
        visual = self.judge.model.model.visual
        features = []
        for part in np.array_split(images, max(1, len(images) // 250)):
            inputs = self.judge.inputs(to_pil(torch.from_numpy(part)), ["?"] * len(part))
            pixels, grids = inputs["pixel_values"], inputs["image_grid_thw"]
            tokens = visual(pixels.to(self.judge.device), grid_thw=grids.to(self.judge.device)).pooler_output
            features.append(tokens.unflatten(0, (len(part), -1)).mean(1).double().cpu().numpy())
        return np.concatenate(features)


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Squared Frechet distance of two Gaussians with the means and covariances of features (N, D), to b's variance."""
    mean_a, mean_b, cov_a, cov_b = a.mean(0), b.mean(0), np.cov(a.T), np.cov(b.T)
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    # The trace of the root of cov_a cov_b, as that of a symmetric matrix with the same eigenvalues. Rounding makes some
    # of them a little negative.
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    distance = np.square(mean_a - mean_b).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross
    return float(distance / np.trace(cov_b))


def train(args: argparse.Namespace) -> list[Path]:
    """Run directories of the students that --train and --seeds name, trained."""
    jobs = common.Jobs(args.output, args.jobs)

    def run(steps: str, seed: int) -> Path:
        own = ["--student.steps", f"[{steps}]", "--seed", str(seed), "--resume"]
        return jobs.run(f"{steps.replace(',', '-')}-{seed}", ["tdm", "--config", RECIPE, *args.options, *own])

    return common.side_by_side(run, itertools.product(args.train, args.seeds))


def load(path: Path, device: str) -> tuple[K2, str | None, str]:
    """A student, the role that it is (a run's policy, or all of an exported pipeline), and the name of its row."""
    if (path / "model_index.json").exists():
        return K2.load(path, device=device), None, "student"
    saved = checkpoint.load(checkpoint.find(path))
    trained_for = " and ".join(map(str, saved.state["student"]["steps"]))
    return load_checkpoint(saved, device), POLICY, f"student for {trained_for}"


def teacher(args: argparse.Namespace) -> K2:
    """What the first student was distilled from, if it is a run and so says it."""
    if not args.students or (args.students[0] / "model_index.json").exists():
        return K2.load(args.model, device=args.device)
    return load_base(checkpoint.load(checkpoint.find(args.students[0])), args.device)


def table(rows: dict[str, tuple[int, list[dict[str, float]]]], teacher: dict[str, float]) -> str:
    """Markdown; `rows` are by name forwards and the figures of each seed."""
    lines = []
    for name, (forwards, seeds) in rows.items():
        cells = []
        for figure in FIGURES:
            values = np.array(common.column(seeds, figure))
            if figure == "diversity":
                values = values / teacher["diversity"]
            cells.append(common.mean_and_extent(values.tolist()))
        lines.append([name, forwards, *cells])
    return common.markdown(["", "forwards", *FIGURES], lines)


# ---- memory ---------------------------------------------------------------------------------------------------


def memory(args: argparse.Namespace) -> dict[str, float]:
    """Peak GiB of a step of flow matching and of one of TDM, each on a fresh model; and their ratio."""
    peaks = {}
    for name, step in (("flow matching", flow_matching_step), ("TDM", tdm_step)):
        torch.cuda.empty_cache()
        if args.memory_scale == "k2":
            k2, size = K2.random(args.device, torch.bfloat16, "k2", text=False), (512, 512)
            features = [k2.random_features(100 + i % 5, i) for i in range(args.memory_batch)]
            null = k2.random_features(6)
        else:
            k2, size = K2.load(MODEL, device=args.device), SIZE
            prompts_of_batch = [f"{i} red stars" for i in range(args.memory_batch)]
            *features, null = k2.encode([*prompts_of_batch, ""]).features
        # All or none, and not what fits: the peak would depend on the GPU.
        k2.blocks.recompute = len(blocks(k2.transformer)) if args.memory_checkpointing else 0
        fused = list(map(k2.fuse, features))
        config = TDMConfig(output="none", model=ModelConfig(""), prompts=PromptsConfig("", ""), batch=args.memory_batch)
        config.micro_batch, config.sizes, config.lora = args.memory_batch, [list(size)], LoraConfig(64, 64.0)
        torch.cuda.reset_peak_memory_stats()
        step(k2, config, fused, Text(k2.fuse(null)[None]), size)
        peaks[name] = torch.cuda.max_memory_allocated() / 2**30
        # The next model must not be measured beside this one.
        del k2, fused, features, null
    return peaks | {"ratio": peaks["TDM"] / peaks["flow matching"]}


def flow_matching_step(k2: K2, config: TDMConfig, fused: Sequence[Tensor], null: Text, size: tuple[int, int]) -> None:
    """Two updates: the second has the optimizer's state beside it."""
    add_policy(k2, config.lora, 0, reference=False)
    stepper = Stepper(k2.train_role(POLICY), config.optim)
    shape = (k2.image_tokens(*size), k2.latent_channels)
    for update in range(2):
        x0 = sampler.noise(range(update, update + len(fused)), shape).to(k2.device)
        noise = sampler.noise(range(OTHER, OTHER + len(fused)), shape).to(k2.device)
        t = torch.rand(len(fused), device=k2.device)
        with k2.role(POLICY):
            v = k2.velocity(sampler.noised(x0, noise, t), t, Text.of(fused), *size)
            (v - sampler.velocity_target(x0, noise)).square().mean().backward()
        stepper.step()


def tdm_step(k2: K2, config: TDMConfig, fused: Sequence[Tensor], null: Text, size: tuple[int, int]) -> None:
    tdm.add_roles(k2, config)
    student, fake = tdm.steppers(k2, config)
    procs = Processes()
    # As above, the second step has the optimisers' states beside it.
    for step in range(2):
        keys = [(0, step, i) for i in range(len(fused))]
        batches = roll_out(k2, config.student, fused, keys, size, config.micro_batch, 2)
        tdm.update_fake(k2, config, batches, 0, fake, procs)
        tdm.update_student(k2, config, batches, null, student, procs)


# ---- the command ----------------------------------------------------------------------------------------------


def compare(args: argparse.Namespace) -> str:
    bench = Bench(args)
    base = teacher(args)
    guided = SamplingSettings(28, args.guidance)
    # Other noise than that of the rows, so that the teacher's own row is not 0 but what two draws differ by.
    reference = bench.features(bench.draw(base, guided, OTHER).images)
    rows: dict[str, tuple[int, list[dict[str, float]]]] = {}
    ways = {f"teacher, 28 steps, guidance {args.guidance:g}": guided}
    ways |= {f"teacher, 8 steps, guidance {args.guidance:g}": SamplingSettings(8, args.guidance)}
    ways |= {"teacher, 8 steps, no guidance": SamplingSettings(8)}

    def add(name: str, k2: K2, way: SamplingSettings, seed: str = "") -> None:
        drawn = bench.draw(k2, way)
        grid_image(drawn.images[:40], 5, 8).save(args.output / f"{name.replace(', ', '-').replace(' ', '_')}{seed}.png")
        # Guidance takes a second forward, of the empty prompt, in each step.
        _, found = rows.setdefault(name, (way.steps * (2 if way.guidance else 1), []))
        found.append(bench.measure(drawn, reference))

    for name, way in ways.items():
        add(name, base, way)
    for i, path in enumerate(args.students):
        k2, role, name = load(path, args.device)
        for steps in args.steps:
            with k2.role(role):
                add(f"{name}, {steps} steps", k2, SamplingSettings(steps, 0.0, MU), f"-{i}")
    bench.pool.close()
    (args.output / "table.json").write_text(json.dumps(rows, indent=1) + "\n")
    return table(rows, next(iter(rows.values()))[1][0])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("students", nargs="*", type=Path, help="run directories, checkpoints or exported pipelines")
    parser.add_argument("--output", type=Path, required=True, help="directory for runs, tables and image grids")
    parser.add_argument("--train", nargs="*", default=[], help="students to train first: 8, or 8,4 for one of both")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of those")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--model", default=MODEL, help="the teacher, where the students are exports")
    parser.add_argument("--guidance", type=float, default=1.5, help="the teacher's")
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 4], help="the students'")
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--groups", type=int, default=60, help="prompts with a group of images")
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--batch", type=int, default=500, help="images in one forward")
    parser.add_argument("--memory-batch", type=int, default=128)
    parser.add_argument("--memory-scale", choices=["nano", "k2"], default="nano")
    parser.add_argument("--memory-checkpointing", action="store_true", help="recompute blocks in both backward passes")
    parser.add_argument("--memory-only", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--options", nargs=argparse.REMAINDER, default=[], help="the rest: further options for posttrain tdm"
    )
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    args.students += train(args) if args.train else []
    text = "" if args.memory_only else compare(args)
    if args.device == "cuda":
        peaks = memory(args)
        ratio = peaks.pop("ratio")
        listed = ", ".join(f"{name} {value:.3f} GiB" for name, value in peaks.items())
        text += f"\n\nPeak memory at batch {args.memory_batch} ({args.memory_scale}): {listed}; {ratio:.3f} x"
    else:
        text += "\n\nPeak memory: not measured, it takes a GPU"
    text = text.strip()
    (args.output / "table.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
