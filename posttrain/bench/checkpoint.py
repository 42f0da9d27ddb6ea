"""Measures updates and checkpoints with random weights: how long does saving delay training?

    python -m posttrain.bench.checkpoint --rank 64 --output /disk
    accelerate launch --config_file recipes/launch/fsdp2.yaml -m posttrain.bench.checkpoint --rank 0 --output /disk

Prints one line of JSON. An update (`update_s`) is forward and backward of a batch, the sum over processes, and AdamW
or Muon; of all weights its products may be in 8 bits. `pause_s` is the time that training waits for a checkpoint,
`total_s` the time until it is on disk, `beside_s` the slowest update meanwhile. `reserved` has the same times for
reserving memory before the first checkpoint. The checkpoints are removed afterwards. Without --output nothing is
written, and only `pause_s` is meaningful. All weights of K2 take 154 GB of memory and twice that of disk.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

import torch

from posttrain.config.sections import LoraConfig, OptimConfig
from posttrain.distributed.processes import Processes
from posttrain.model import parallelize, sampler
from posttrain.model.k2 import K2, Text
from posttrain.runs.run import peak_memory
from posttrain.training import checkpoint
from posttrain.training.loop import content, snapshot
from posttrain.training.policy import POLICY, add_policy
from posttrain.training.stepper import Stepper


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=("tiny", "k2"), default="k2")
    parser.add_argument("--rank", type=int, default=64, help="of the adapter; 0: all weights")
    parser.add_argument("--kind", choices=("adamw", "muon"), default="adamw", help="of the optimiser; muon: --rank 0")
    parser.add_argument("--float8", choices=("tensorwise", "rowwise"), help="model.float8, with --rank 0")
    parser.add_argument("--batch", type=int, default=8, help="images of a process in an update")
    parser.add_argument("--pixels", type=int, default=512, help="side of an image")
    parser.add_argument("--updates", type=int, default=5)
    parser.add_argument("--output", type=Path, help="directory for the checkpoints")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    procs = Processes(shardable=True)
    cuda = procs.device.type == "cuda"
    k2 = K2.random(procs.device, torch.bfloat16 if cuda or args.float8 else torch.float32, args.scale, text=False)
    k2.blocks.float8 = args.float8
    with parallelize.sharding(k2, procs):
        add_policy(k2, LoraConfig(args.rank, float(args.rank)) if args.rank else None, 0, reference=False)
    k2.train_role(POLICY)
    stepper = Stepper(k2.role_named_parameters(POLICY), OptimConfig(lr=1e-6, kind=args.kind))
    # 105 text tokens, as in the measurements of docs/performance.md.
    text, size = Text(k2.fuse(k2.random_features(105))[None]), (args.pixels, args.pixels)
    x = sampler.noise(range(args.batch), (k2.image_tokens(*size), k2.latent_channels)).to(procs.device)

    def update() -> float:
        began = time.perf_counter()
        with k2.role(POLICY):
            k2.velocity(x, torch.tensor(0.5), text, *size).square().mean().backward()
        procs.sum_gradients(stepper.parameters)
        stepper.step()  # reads the gradient's norm, so it waits for the GPU
        return time.perf_counter() - began

    updates = [update() for _ in range(args.updates)]
    writer, checkpoints = checkpoint.Writer(), []

    def until_done(began: float) -> dict[str, float]:
        slowest, done = 0.0, False
        while not done:
            slowest = max(slowest, update())
            # all must leave the loop together: an update sums gradients over processes
            done = procs.any(procs.main and writer.done)
        writer.check(wait=True)
        return {"total_s": time.perf_counter() - began, "beside_s": slowest}

    # The main process alone writes checkpoints, so it alone needs host memory for them.
    began = time.perf_counter()
    tensors, _ = content(k2, {POLICY: stepper})
    if procs.main:
        writer.reserve(tensors)
    reserved = until_done(began)
    for step in (1, 2):  # the second one reuses the first one's host memory
        began = time.perf_counter()
        tensors, state = snapshot(k2, {POLICY: stepper}, procs.main, writer.copies)
        if procs.main and args.output:
            writer.save(args.output / "checkpoints", step, tensors, state, keep=1)
        procs.all_gather(None)  # training goes on only when the slowest process has its copy
        pause = time.perf_counter() - began
        copied = 0
        for group in tensors.values():
            copied += sum(tensor.nbytes for tensor in group.values())
        checkpoints.append({"pause_s": pause, **until_done(began), "gb": copied / 1e9})
    if procs.main:
        if args.output:
            shutil.rmtree(args.output / "checkpoints")
        result = {"processes": procs.size, "engine": procs.engine, **vars(args), "output": str(args.output)}
        print(
            json.dumps(
                result | {"update_s": updates, "reserved": reserved, "checkpoints": checkpoints, **peak_memory()}
            )
        )


if __name__ == "__main__":
    main()
