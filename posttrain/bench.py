"""`posttrain bench`: how fast the methods are at true size, with stock diffusers on the same work beside them.

    posttrain bench --output runs/bench
    posttrain bench --plan recipes/nano/grpo.yaml --measured runs/bench/bench.json --gpus 2

Weights are random and nothing is downloaded. Steps are the methods' own (bench_steps.py). What of their work is useful
is counted from the forwards that they make (flops.py) and told as a share of a bf16 matmul rate measured in the same
run. Stock is diffusers' transformer on the same weights, uncompiled: every sample's text padded to 512 tokens and
masked, gradient checkpointing in training, and two forwards a step where it draws with guidance. One forward and one
training step of it are timed, and taken as often as the method made them, sample by sample. Decoding and the preparing
of random inputs are left out of shares and ratios, and are in images a second and peak memory, as is all else.

Errors of the fast path are relative L2 distances of velocities and of the adapter's gradient to those of uncompiled
blocks with native attention; and, of grpo, how far a ratio of policies was from 1 before an update.

Several processes (torchrun) are measured as one: their images together, the time of the slowest. Exit code 1 says that
something was compiled after the second step.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from posttrain import flops
from posttrain.bench_config import BenchConfig
from posttrain.bench_plan import plan, text_encoder_gib
from posttrain.bench_steps import Steps
from posttrain.bench_table import table
from posttrain.blocks import graphs, set_attention
from posttrain.k2 import K2, Text
from posttrain.policy import POLICY
from posttrain.processes import Processes
from posttrain.stock import Stock
from posttrain.track import environment
from prompts.errors import UserError

ASIDE = ("decode", "prepare")
"""Stages that are no work of the network."""
NANO = Path(__file__).parent / "nano/weights/k2-nano"


class Watch:
    """Milliseconds of stages, by the GPU's own events where there is one."""

    def __init__(self, device: torch.device):
        self._cuda, self._marks = device.type == "cuda", [("", self._now(device.type == "cuda"))]

    def lap(self, name: str) -> None:
        self._marks.append((name, self._now(self._cuda)))

    def milliseconds(self) -> dict[str, float]:
        if self._cuda:
            torch.cuda.synchronize()
        found: dict[str, float] = {}
        for (_, start), (name, end) in zip(self._marks, self._marks[1:]):
            passed = start.elapsed_time(end) if self._cuda else (end - start) * 1e3
            found[name] = found.get(name, 0.0) + passed
        return found

    @staticmethod
    def _now(cuda: bool) -> Any:
        if not cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Forwards:
    """What goes through the network, so that it can be counted after the clock has stopped."""

    def __init__(self, k2: K2, rank: int):
        self.shape, self.rank, self.blocks = flops.Shape.of(k2), rank, k2.blocks
        self._seen: list[tuple[int, int, int, Tensor | None, int, bool, int]] = []
        k2.net.register_forward_hook(self._see)

    def _see(self, module: Any, inputs: tuple[Any, ...], v: Tensor) -> None:
        x, _, tokens, mask, _ = inputs
        rank, gradient = self.rank if self.blocks.active else 0, torch.is_grad_enabled()
        self._seen.append((len(x), x.shape[1], tokens.shape[1], mask, rank, gradient, self.blocks.recomputed))

    def take(self) -> dict[str, int]:
        """Since the last time: useful operations, and those of what backward computed again, which are no part of them;
        samples forward without gradient, and forward and backward; and how many blocks were computed again."""
        found = {"flop": 0, "again": 0, "forwards": 0, "backwards": 0, "recomputed": 0}
        for count, image, length, mask, rank, gradient, recomputed in self._seen:
            lengths = [length] * count if mask is None else mask.sum(1).tolist()
            for text in lengths:
                found["flop"] += flops.forward(self.shape, image, text, rank)
                found["flop"] += flops.backward(self.shape, image, text, rank) if gradient else 0
                found["again"] += recomputed * flops.block(self.shape, image + text, rank) if gradient else 0
            found["backwards" if gradient else "forwards"] += count
            found["recomputed"] = max(found["recomputed"], recomputed)
        self._seen.clear()
        return found


def bench(config: BenchConfig) -> int:
    """Runs what `config` asks for, prints a table and writes it; or a plan."""
    if config.plan is not None:
        print(plan(config))
        return 0
    procs, path = Processes(), Path(config.output)
    cuda = procs.device.type == "cuda"
    sizes = config.sizes or [[512, 512] if config.scale == "k2" else [64, 64]]
    result: dict[str, Any] = {
        "settings": asdict(config),
        "environment": environment(),
        "device": torch.cuda.get_device_name(procs.device) if cuda else "CPU",
        "gpu_gib": torch.cuda.mem_get_info(procs.device)[1] / 2**30 if cuda else None,
        "processes": procs.size,
        "text_encoder_gib": text_encoder_gib(config.scale),
        "matmul": matmul_rate(procs.device),
        "rows": [],
    }
    for method in config.methods:
        for height, width in sizes:
            row = measured(config, method, (height, width), procs, result["matmul"]["tflops"])
            result["rows"].append({"method": method, "size": [height, width], **row})
            if procs.main:  # after each, so that one that is killed leaves the others
                path.mkdir(parents=True, exist_ok=True)
                (path / "bench.json").write_text(json.dumps(result, indent=1) + "\n")
                (path / "bench.md").write_text(table(result) + "\n")
    if procs.main:
        print(table(result))
    return int(any(row.get("recompilations") for row in result["rows"]))


def measured(
    config: BenchConfig, method: str, size: tuple[int, int], procs: Processes, matmul: float
) -> dict[str, Any]:
    """A row of the table; one that did not fit into memory says so and nothing else."""
    try:
        return _measured(config, method, size, procs, matmul)
    except torch.OutOfMemoryError as error:
        if procs.size > 1:
            raise UserError(f"batch: {method} does not fit into memory; lower it, or raise recompute") from error
        return {"failed": "out of memory"}
    finally:
        gc.collect()
        if procs.device.type == "cuda":
            torch.cuda.empty_cache()


def _measured(
    config: BenchConfig, method: str, size: tuple[int, int], procs: Processes, matmul: float
) -> dict[str, Any]:
    cuda = procs.device.type == "cuda"
    k2 = _model(config, procs.device)
    weights = torch.cuda.memory_allocated(procs.device) / 2**30 if cuda else None
    steps = Steps(k2, config, size, procs)
    forwards = Forwards(k2, config.rank)
    first, before = [], graphs()

    def once(index: int) -> tuple[dict[str, float], dict[str, int]]:
        procs.each(None)  # all begin together
        watch = Watch(procs.device)
        steps.run(method, index, watch.lap)
        every = procs.each(watch.milliseconds())
        return {name: max(part[name] for part in every) for name in every[0]}, forwards.take()

    for index in range(config.warmup):
        first.append(sum(once(index)[0].values()))
    compiled = graphs()
    if cuda:
        torch.cuda.reset_peak_memory_stats(procs.device)
    done = [once(config.warmup + index) for index in range(steps.count(method))]
    again = graphs() - compiled
    peak = torch.cuda.max_memory_allocated(procs.device) / 2**30 if cuda else None
    # A start of grpo's window is a different amount of work, so that there, means over all are told.
    middle: Callable[[list[float]], float] = (lambda v: sum(v) / len(v)) if method == "grpo" else median
    stages = {name: middle([stage[name] for stage, _ in done]) for name in done[0][0]}
    total = [sum(stage.values()) for stage, _ in done]
    network = [sum(ms for name, ms in stage.items() if name not in ASIDE) for stage, _ in done]
    rates = [work["flop"] / ms / 1e9 for (_, work), ms in zip(done, network)]
    work = {name: middle([w[name] for _, w in done]) for name in done[0][1]}
    row = {
        "images": steps.images(method),
        "images_per_second": 1e3 * steps.images(method) / middle(total),
        "ms": stages,
        "tflops": middle(rates),
        "share": middle(rates) / matmul,
        "share_recomputed": middle(rates) / matmul * (1 + work["again"] / work["flop"]),
        "recomputed": work["recomputed"] if work["backwards"] else None,
        "useful_tflop": work["flop"] / 1e12,
        "forwards": work["forwards"],
        "backwards": work["backwards"],
        "peak_gib": peak,
        "weights_gib": weights,
        "adapter_parameters": sum(p.numel() for n in k2.roles for p in k2.role_parameters(n)),
        "compiled": k2.blocks.compiled,
        "graphs": compiled - before,
        "recompilations": again,
        "first_seconds": max(0.0, sum(first) - len(first) * middle(total)) / 1e3,
        "error": {} if steps.ratio_error is None else {"ratio": steps.ratio_error},
        "shape": asdict(forwards.shape),
        "multiple": k2.pixel_multiple,
    }
    if k2.blocks.compiled or config.attention != "native":
        row["error"] |= _agreement(steps)
    if config.stock:
        row["stock"] = _beside(steps, work, middle(network))
    return row


def _model(config: BenchConfig, device: torch.device) -> K2:
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    if config.scale == "nano":
        k2 = K2.load(NANO, dtype=dtype, device=device)
    else:
        k2 = K2.random(device, dtype, config.scale, text=False)
    k2.blocks.compiled = cuda if config.compile is None else config.compile
    k2.blocks.recompute = config.recompute
    return k2


def _beside(steps: Steps, work: dict[str, float], network: float) -> dict[str, Any]:
    """Stock on the samples that this process's network saw in `network` milliseconds."""
    if steps.config.attention != "native":
        set_attention(steps.k2.transformer, "native")
    stock = Stock(steps.k2, steps.size, steps.config.batch, steps.config.text, steps.role)
    try:
        forward = _timed(steps, stock.forward) / steps.config.batch
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats(steps.procs.device)
        backward = _timed(steps, stock.step) / steps.config.batch if work["backwards"] else 0.0
    except torch.OutOfMemoryError:
        return {"failed": "out of memory"}
    peak = torch.cuda.max_memory_allocated(steps.procs.device) / 2**30 if torch.cuda.is_available() else None
    alike = (forward * work["forwards"] + backward * work["backwards"]) / network
    guided = None if work["backwards"] else 2 * alike
    return {
        "forward_ms": forward,
        "step_ms": backward or None,
        "step_peak_gib": peak if work["backwards"] else None,
        "ratio": alike,
        "ratio_guided": guided,
    }


def _timed(steps: Steps, function: Callable[[], None]) -> float:
    """Median milliseconds."""
    found = []
    for index in range(1 + min(3, steps.config.repeats)):
        watch = Watch(steps.procs.device)
        function()
        watch.lap("")
        if index:
            found.append(watch.milliseconds()[""])
    return median(found)


def _agreement(steps: Steps) -> dict[str, float]:
    """Relative L2 distance of velocities and gradients to those of uncompiled blocks with native attention."""
    k2, config, found = steps.k2, steps.config, []
    length, chosen = config.text, k2.blocks.compiled
    text = Text(k2.fuse(k2.random_features(length))[None])
    x = torch.randn(2, k2.image_tokens(*steps.size), k2.latent_channels, generator=torch.Generator().manual_seed(0))
    for compiled, kernels in ((False, "native"), (chosen, config.attention)):
        k2.blocks.compiled = compiled
        if config.attention != "native":
            set_attention(k2.transformer, kernels)
        with torch.no_grad(), k2.role(steps.role):
            parts = [k2.velocity(x.to(k2.device), 0.5, text, *steps.size)]
        if steps.role is not None:
            parameters = k2.train_role(POLICY)
            with k2.role(POLICY):
                k2.velocity(x.to(k2.device), 0.5, text, *steps.size).square().mean().backward()
            parts.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
            for parameter in parameters:
                parameter.requires_grad_(False).grad = None
        found.append(parts)
    return {name: float((b - a).norm() / a.norm()) for name, a, b in zip(("velocity", "gradient"), *found)}


def matmul_rate(device: torch.device) -> dict[str, Any]:
    """TFLOP/s of a square product, 8192 wide in bf16 on a GPU; a small one in fp32 on a CPU."""
    cuda = device.type == "cuda"
    width, dtype, warm, count = (8192, torch.bfloat16, 20, 100) if cuda else (1024, torch.float32, 1, 5)
    a, b = (torch.randn(width, width, device=device, dtype=dtype) for _ in range(2))
    out, found = torch.empty_like(a), []
    for index in range(warm + count):
        watch = Watch(device)
        torch.mm(a, b, out=out)
        watch.lap("")
        if index >= warm:
            found.append(watch)
    rate = 2 * width**3 / median(watch.milliseconds()[""] for watch in found) / 1e9
    return {"tflops": rate, "width": width, "dtype": str(dtype).removeprefix("torch.")}
