"""Measures what style references cost a step of sampling, with random weights: cached and carried along, beside none.

    python -m posttrain.bench.references --output runs/bench-references            # K2 on a GPU, three minutes
    python -m posttrain.bench.references --scale nano --size 64 --reference 64 --output runs/bench-references

A step is one forward of a batch under an adapter. `cached` reads the references' keys and values, which one pass before
the first step computes (`cache`), as sampling does; `joint` takes the references along in every forward, as training
does. `by operations` is the ratio that counting predicts (model/flops.py). Writes references.json and prints a table.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch

from posttrain.bench.run import NANO, StageTimer, matmul_rate
from posttrain.config.sections import LoraConfig, RuntimeConfig
from posttrain.distributed.processes import Processes
from posttrain.model import flops, sampler
from posttrain.model.k2 import K2, Text
from posttrain.model.references import References
from posttrain.runs.run import environment
from posttrain.training.policy import POLICY, add_policy, apply_runtime_options

TEXT = 105
"""Tokens of the prompt."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=("tiny", "nano", "k2"), default="k2")
    parser.add_argument("--size", type=int, default=1024, help="side of an image in pixels")
    parser.add_argument("--reference", type=int, default=512, help="side of a reference in pixels")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 4], help="references of an image")
    parser.add_argument("--batch", type=int, default=1, help="images in a forward")
    parser.add_argument("--rank", type=int, default=64, help="of the adapter")
    parser.add_argument("--repeats", type=int, default=10, help="forwards that are timed, of which the median counts")
    parser.add_argument("--output", type=Path, required=True, help="directory for references.json, created")
    return parser.parse_args()


def model(scale: Literal["tiny", "nano", "k2"], rank: int, procs: Processes) -> K2:
    """K2 with random weights, or K2-nano, under a fresh adapter; compiled on a GPU."""
    cuda = procs.device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    if scale == "nano":
        k2 = K2.load(NANO, dtype=dtype, device=procs.device)
    else:
        k2 = K2.random(procs.device, dtype, scale, text=False)
    add_policy(k2, LoraConfig(rank, float(rank)), 0, reference=False)
    apply_runtime_options(k2, RuntimeConfig(compile=cuda), procs.device)
    return k2


@torch.no_grad()
def rows(
    k2: K2, size: int, reference: int, counts: list[int], batch: int, rank: int, repeats: int
) -> list[dict[str, Any]]:
    """One row without references, and one for each count and way: milliseconds, and as a ratio to the first row."""
    text = Text(k2.fuse(k2.random_features(TEXT))[None])
    x, t = noise(k2, batch, size), torch.tensor(0.5)
    shape = flops.Shape.of(k2)
    image, own = k2.image_tokens(size, size), k2.image_tokens(reference, reference)
    plain = flops.forward(shape, image, TEXT, rank)

    def timed(function: Callable[[], Any]) -> float:
        times = []
        for index in range(repeats + 2):
            timer = StageTimer(k2.device)
            function()
            timer.lap("")
            if index > 1:  # the first calls compile
                times.append(timer.milliseconds()[""])
        return median(times)

    with k2.role(POLICY):
        none = timed(lambda: k2.velocity(x, t, text, size, size))
        found = [{"references": 0, "way": "none", "ms": none, "ratio": 1.0, "by_operations": 1.0}]
        for count in counts:
            latents = tuple(noise(k2, 1, reference, seed) for seed in range(1, count + 1))
            shown = References(latents, (k2.grid(reference, reference),) * count)
            cached = k2.cached(shown)
            for way, given in (("cached", cached), ("joint", shown)):
                ms = timed(lambda given=given: k2.velocity(x, t, text, size, size, shown=given))
                work = flops.forward_with_references(shape, image, TEXT, [own] * count, way == "cached", rank)
                row = {"references": count, "way": way, "ms": ms, "ratio": ms / none, "by_operations": work / plain}
                if way == "cached":
                    row["cache_ms"] = timed(lambda shown=shown: k2.cached(shown))
                found.append(row)
    return found


def noise(k2: K2, count: int, side: int, seed: int = 0) -> torch.Tensor:
    """(count, N, C) latents of square images."""
    seeds = [sampler.seed_for(seed, i) for i in range(count)]
    return sampler.noise(seeds, (k2.image_tokens(side, side), k2.latent_channels)).to(k2.device)


def table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['device']}, torch {result['environment']['packages']['torch']}, matmul"
        f" {result['matmul']['tflops']:.4g} TFLOP/s in {result['matmul']['dtype']}; images of {result['size']} px,"
        f" references of {result['reference']} px, batch {result['batch']}.",
        "",
        "| references | | ms a step | x none | by operations | ms of the cache, once |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        cache = f"{row['cache_ms']:.1f}" if "cache_ms" in row else ""
        cells = [
            row["references"],
            row["way"],
            f"{row['ms']:.1f}",
            f"{row['ratio']:.3f}",
            f"{row['by_operations']:.3f}",
        ]
        lines.append("| " + " | ".join(map(str, [*cells, cache])).rstrip() + " |")
    return "\n".join(lines)


def main() -> None:
    args = arguments()
    procs = Processes()
    cuda = procs.device.type == "cuda"
    result: dict[str, Any] = {
        **vars(args),
        "output": str(args.output),
        "environment": environment(),
        "device": torch.cuda.get_device_name(procs.device) if cuda else "CPU",
        "matmul": matmul_rate(procs.device),
    }
    k2 = model(args.scale, args.rank, procs)
    result["rows"] = rows(k2, args.size, args.reference, args.counts, args.batch, args.rank, args.repeats)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "references.json").write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
