"""Muon against AdamW: all weights of K2-nano fitted by flow matching to images that it has not seen the like of.

    python -m posttrain.nano.bench.muon_adamw --output runs/bench-optimizers
    python -m posttrain.nano.bench.muon_adamw --output runs/bench-scratch --scratch

The images are scenes of the nano world with their brightness inverted, with right captions; with --scratch the
network's weights are random at first. Each optimiser runs at each of its rates with the first seed, and at the best of
them, by the last held-out loss, with all seeds. A seed decides the order of the images, the times and the noise, so
both optimisers see the same batches. The held-out loss is over fixed times and noise. Runs in --output are kept.

| column | what it is |
|---|---|
| loss | held-out loss after the last step |
| steps | steps to AdamW's last loss of the same seed, by lines between evaluations, as a share of its steps |
| spike | greatest gradient norm over the median of the 64 before it, after the first 16 |
| RMS | of Muon's update, in units of the rate: least and greatest of the run |
| bytes | the optimiser's state, as a share of AdamW's |
| ema, pma | change of the held-out loss by a moving average, and by the mean of five weights of the same window |
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from posttrain.config import clipping
from posttrain.config.optimizer import OptimConfig
from posttrain.model import sampler
from posttrain.model.k2 import K2, Text
from posttrain.nano.bench import common
from posttrain.nano.world import scenes
from posttrain.resources import ROOT
from posttrain.training import pma
from posttrain.training.policy import POLICY
from posttrain.training.stepper import Stepper

NANO = ROOT / "posttrain/nano/weights/k2-nano"
Kind = Literal["adamw", "muon"]
RATES: dict[Kind, list[float]] = {"adamw": [2.5e-4, 5e-4, 1e-3], "muon": [5e-4, 1e-3, 2e-3]}
IMAGES, HELDOUT, SIZE = 480, 96, (scenes.SIZE, scenes.SIZE)
WARMUP, MEAN, STD = 10, 0.0, 1.0
LAST, EVERY = 5, 6
"""Weights that the mean is of, and steps between them; a moving average of the same window has this decay:"""
DECAY = (LAST * EVERY - 1) / (LAST * EVERY + 1)


@dataclass
class Data:
    """Images as the network sees them."""

    latents: Tensor
    """(n, N, C)"""
    fused: list[Tensor]
    """(L_i, C) of each caption."""


def data(k2: K2, count: int, seed: int) -> Data:
    rng = np.random.default_rng(seed)
    images, captions = [], []
    for _ in range(count):
        scene = scenes.random_scene(rng)
        # Inverted, which K2-nano has never drawn, so that there is something to learn.
        images.append(255 - scenes.render(scene))
        captions.append(scenes.describe(scene, rng).prompt)
    latents = k2.encode_images(torch.from_numpy(np.stack(images)))
    # Fused once, though all weights are trained: the layers that fuse text are not part of the role.
    return Data(latents, list(map(k2.fuse, k2.encode(captions).features)))


def loss_of(k2: K2, rows: Sequence[int], source: Data, seeds: Sequence[int]) -> Tensor:
    """(B,) of these images, each at the time and noise of its seed."""
    x0 = source.latents[list(rows)]
    # One stream of seeds for times and another for noise, so that the two are independent.
    normal = sampler.noise([sampler.seed_for(seed, 0) for seed in seeds], (1,))[:, 0]
    t = sampler.logit_normal(normal, MEAN, STD, k2.mu(*SIZE))
    noise = sampler.noise([sampler.seed_for(seed, 1) for seed in seeds], x0.shape[1:])
    text = Text.of([source.fused[row] for row in rows])
    with k2.role(POLICY):
        v = k2.velocity(sampler.noised(x0, noise, t), t, text, *SIZE)
    return (v - sampler.velocity_target(x0, noise)).square().flatten(1).mean(1)


@torch.no_grad()
def heldout_loss(k2: K2, heldout: Data) -> float:
    total = 0.0
    for first in range(0, HELDOUT, 24):
        rows = range(first, min(first + 24, HELDOUT))
        seeds = [sampler.seed_for(99, row) for row in rows]
        total += float(loss_of(k2, rows, heldout, seeds).sum())
    return total / HELDOUT


def batches(seed: int, size: int) -> Iterator[list[int]]:
    """Rows of each step: a permutation of the images for each epoch."""
    epoch = 0
    while True:
        order = np.random.default_rng([seed, epoch]).permutation(IMAGES)
        # Whole batches alone: the few images left over come elsewhere in the next epoch's order.
        for first in range(0, IMAGES - size + 1, size):
            yield order[first : first + size].tolist()
        epoch += 1


def fit(args: argparse.Namespace, kind: Kind, rate: float, seed: int) -> dict[str, Any]:
    """One run: its held-out losses by step, gradient norms, and what the optimiser took and did."""
    k2 = K2.load(NANO)
    train, heldout = data(k2, IMAGES, 1), data(k2, HELDOUT, 2)
    k2.add_full_role(POLICY)
    if args.scratch:
        randomise(k2, seed)
    k2.train_role(POLICY)
    stepper = Stepper(k2.role_named_parameters(POLICY), OptimConfig(kind=kind, lr=rate, warmup_steps=WARMUP, ema=DECAY))
    losses, norms, roots, kept = [(0, heldout_loss(k2, heldout))], [], [], []
    began, seconds, order = time.perf_counter(), 0.0, batches(seed, args.batch)
    for step in range(1, args.steps + 1):
        rows = next(order)
        seeds = [sampler.seed_for(seed, step, i) for i in range(len(rows))]
        loss_of(k2, rows, train, seeds).mean().backward()
        before = time.perf_counter()
        norms.append(stepper.step())
        seconds += time.perf_counter() - before
        roots.append(stepper.metrics().get("update_rms"))
        # Counted from the end, so that the last step's weights are among them.
        if step > args.steps - LAST * EVERY and (args.steps - step) % EVERY == 0:
            kept.append([parameter.detach().clone() for parameter in stepper.parameters])
        if step % args.every == 0 or step == args.steps:
            losses.append((step, heldout_loss(k2, heldout)))
            print(f"{kind} {rate:g} seed {seed}: step {step}, loss {losses[-1][1]:.4f}", flush=True)
    with stepper.averaged():
        ema = heldout_loss(k2, heldout)
    # `kept` is by step and then by parameter, and the mean of a parameter is over steps.
    with torch.no_grad():
        for parameter, values in zip(stepper.parameters, zip(*kept)):
            parameter.copy_(pma.mean_of(values))
    size = 0
    for state in stepper.optimizer.state.values():
        size += sum(value.nbytes for value in state.values())
    return {
        "kind": kind, "rate": rate, "seed": seed, "losses": losses, "norms": norms, "update_rms": roots,
        "spike": spike(norms), "ema": ema, "pma": heldout_loss(k2, heldout), "spiked": stepper.spiked,
        "bytes": size, "optimizer_seconds": seconds / args.steps,
        "seconds": (time.perf_counter() - began) / args.steps,
    }  # fmt: skip


@torch.no_grad()
def randomise(k2: K2, seed: int) -> None:
    """Matrices as nn.Linear draws them, the last of each branch a tenth; vectors stay as they are."""
    generator = torch.Generator().manual_seed(seed)
    # The last matrix of each branch is small, so that at first a block changes its input little.
    for name, parameter in k2.role_named_parameters(POLICY).items():
        if parameter.ndim == 2 and not name.endswith("scale_shift_table"):
            scale = 0.1 if name.endswith(("0.weight", "down.weight")) else 1.0
            uniform = torch.rand(parameter.shape, generator=generator) * 2 - 1
            parameter.copy_(uniform * scale / parameter.shape[1] ** 0.5)


def spike(norms: Sequence[float]) -> float:
    """The greatest norm over the usual one before it."""
    ratios = []
    # The same window as the clipping's, so that it is what clipping would have seen.
    for i in range(clipping.LEAST, len(norms)):
        ratios.append(norms[i] / median(norms[max(0, i - clipping.WINDOW) : i]))
    return max(ratios)


def steps_to(losses: Sequence[Sequence[float]], target: float) -> float | None:
    """When the held-out loss is first at the target, by a line between evaluations; None: never."""
    for (before, high), (after, low) in zip(losses, losses[1:]):
        if low <= target:
            return before + (after - before) * (high - target) / (high - low)
    return None


def made(args: argparse.Namespace, kind: Kind, rate: float, seed: int) -> dict[str, Any]:
    """A run from its file, or made now."""
    file = args.output / f"{kind}-{rate:g}-{seed}.json"
    if not file.exists():
        args.output.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(fit(args, kind, rate, seed)))
    return json.loads(file.read_text())


def compared(own: dict[str, Any], adamw: dict[str, Any]) -> dict[str, Any]:
    """Figures of a run beside AdamW's of the same seed."""
    last, step = own["losses"][-1][1], steps_to(own["losses"], adamw["losses"][-1][1])
    found = [value for value in own["update_rms"] if value is not None]  # AdamW reports none
    return {
        "kind": own["kind"], "rate": own["rate"], "seed": own["seed"], "loss": last,
        # A share of all steps: .8 means that it came there in four fifths of AdamW's time.
        "steps": None if step is None else step / adamw["losses"][-1][0], "spike": own["spike"],
        "spiked": own["spiked"], "rms": [min(found), max(found)] if found else None,
        "bytes": own["bytes"] / adamw["bytes"], "seconds": own["seconds"],
        "optimizer_seconds": own["optimizer_seconds"], "ema": own["ema"] - last, "pma": own["pma"] - last,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--every", type=int, default=10, help="steps between held-out losses")
    parser.add_argument("--scratch", action="store_true", help="begin with random weights")
    parser.add_argument("--kinds", nargs="+", choices=tuple(RATES), default=list(RATES), help="for a part of the runs")
    parser.add_argument("--output", type=Path, required=True, help="directory for the runs and the table")
    args = parser.parse_args()
    best: dict[Kind, float] = {}
    sweep = []
    for kind in args.kinds:
        lasts: dict[float, float] = {}
        for rate in RATES[kind]:
            lasts[rate] = made(args, kind, rate, args.seeds[0])["losses"][-1][1]
            sweep.append([kind, f"{rate:g}", f"{lasts[rate]:.4f}"])
        best[kind] = min(lasts, key=lasts.__getitem__)
        for seed in args.seeds:
            made(args, kind, best[kind], seed)
    text = common.markdown(["optimiser", "rate", "loss, first seed"], sweep)
    if len(args.kinds) < 2:
        print(text)
        return
    rows = []
    for seed in args.seeds:
        adamw = made(args, "adamw", best["adamw"], seed)
        rows += [compared(made(args, kind, best[kind], seed), adamw) for kind in RATES]
    lines = []
    for row in rows:
        lines.append([
            row["kind"], f"{row['rate']:g}", row["seed"], f"{row['loss']:.4f}",
            "-" if row["steps"] is None else f"{row['steps']:.2f}", f"{row['spike']:.2f}",
            "-" if row["rms"] is None else " to ".join(f"{value:.3f}" for value in row["rms"]),
            f"{row['bytes']:.3f}", f"{row['ema']:+.4f}", f"{row['pma']:+.4f}", f"{row['seconds']:.2f}",
            f"{row['optimizer_seconds']:.2f}",
        ])  # fmt: skip
    head = [
        "optimiser", "rate", "seed", "loss", "steps", "spike", "RMS", "bytes", "ema", "pma", "s a step",
        "of which update",
    ]  # fmt: skip
    common.write(args.output, rows, f"{text}\n\n{common.markdown(head, lines)}")


if __name__ == "__main__":
    main()
