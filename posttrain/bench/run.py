"""`posttrain bench`: how fast the methods are at true size, with stock diffusers on the same work beside them.

    posttrain bench --output runs/bench
    posttrain bench --plan recipes/nano/grpo.yaml --measured runs/bench/bench.json --gpus 2

Weights are random and nothing is downloaded. Steps are the methods' own, taken from a run's loop (bench_steps.py). What
of their work is useful is counted from the forwards that they make (flops.py) and told as a share of a bf16 matmul rate
measured in the same run. Stock is diffusers' transformer on the same weights, uncompiled: every sample's text padded to
512 tokens and masked, gradient checkpointing in training, and two forwards a step where it draws with guidance. One
forward and one training step of it are timed, and taken as often as the method made them, sample by sample. Decoding
and the preparing of inputs are left out of shares and ratios, and are in images a second and peak memory, as is all
else.

Errors of the fast path and of options are relative L2 distances to the exact path (uncompiled blocks, native attention,
bf16 weights) with the same adapter: of velocities, of the adapter's gradient, of its change over five updates (8-bit
moments), of text features and pixels (offloaded parts). And, of grpo, how far a ratio of policies was from 1 before an
update.

Several processes (torchrun) are measured as one: their images together, the time of the slowest. Exit code 1 says that
something was compiled after the second step.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from posttrain.bench import errors
from posttrain.bench.config import DRAWING, BenchConfig
from posttrain.bench.plan import plan, text_encoder_gib
from posttrain.bench.steps import Steps
from posttrain.bench.stock import Stock
from posttrain.bench.table import table
from posttrain.config.sections import ModelConfig
from posttrain.distributed.processes import Processes
from posttrain.errors import UserError
from posttrain.model import flops
from posttrain.model.blocks import graphs
from posttrain.model.k2 import K2
from posttrain.runs.run import environment
from posttrain.training.oom_retry import DoesNotFit
from posttrain.training.policy import apply_runtime_options

ASIDE = ("decode", "encode", "prepare")
"""Stages that are no work of the network."""
NANO = Path(__file__).parents[1] / "nano/weights/k2-nano"


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
    except (torch.OutOfMemoryError, DoesNotFit) as error:
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
    config = replace(config, rank=0) if method == "expander" else config  # it draws with the base
    k2 = _model(config, procs.device)
    with closing(Steps(k2, config, size, procs)) as steps:
        return _row_of(steps, method, matmul)


def _row_of(steps: Steps, method: str, matmul: float) -> dict[str, Any]:
    k2, config, procs, drawing = steps.k2, steps.config, steps.procs, method in DRAWING
    cuda = procs.device.type == "cuda"
    stock = _stock(steps, drawing) if config.stock else None
    compiled = cuda if config.compile is None else config.compile
    inexact = compiled or config.attention != "native" or config.quantize is not None or bool(config.offload)
    exact = errors.observed(steps) if inexact else {}
    begun = errors.adapter(steps) if inexact else []
    options = ModelConfig("", compile=compiled, recompute=config.recompute, attention=config.attention)
    apply_runtime_options(k2, replace(options, quantize=config.quantize, offload=config.offload), procs.device)
    gc.collect()
    adapters = sum(p.numel() for n in k2.roles for p in k2.role_parameters(n))
    weights = (torch.cuda.memory_allocated(procs.device) - 4 * adapters) / 2**30 if cuda else None
    forwards = Forwards(k2, config.rank)
    first, before = [], graphs()

    def once(index: int) -> tuple[dict[str, float], dict[str, int]]:
        procs.all_gather(None)  # all begin together
        watch = Watch(procs.device)
        steps.run(method, index, watch.lap)
        every = procs.all_gather(watch.milliseconds())
        return {name: max(part[name] for part in every) for name in every[0]}, forwards.take()

    for index in range(config.warmup):
        first.append(sum(once(index)[0].values()))
    ready = graphs()
    if cuda:
        torch.cuda.reset_peak_memory_stats(procs.device)
    done = [once(config.warmup + index) for index in range(steps.count(method))]
    again = graphs() - ready
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
        "block_bytes_a_token": k2.blocks.bytes_a_token,
        "compiled": compiled,
        "graphs": ready - before,
        "recompilations": again,
        "first_seconds": max(0.0, sum(first) - len(first) * middle(total)) / 1e3,
        "error": {} if steps.ratio_error is None else {"ratio": steps.ratio_error},
        "shape": asdict(forwards.shape),
        "multiple": k2.pixel_multiple,
    }
    if inexact:
        errors.set_adapter(steps, begun)  # which the steps have trained since
        row["error"] |= errors.distances(errors.observed(steps), exact)
    row["error"] |= errors.of_updates(steps)
    if stock is not None:
        row["stock"] = _beside(stock, work, middle(network))
    return row


def _model(config: BenchConfig, device: torch.device) -> K2:
    """Without any option, as the exact path is."""
    dtype = torch.bfloat16 if device.type == "cuda" or config.quantize else torch.float32
    if config.scale == "nano":
        return K2.load(NANO, dtype=dtype, device=device)
    return K2.random(device, dtype, config.scale, text=config.encode)


def _stock(steps: Steps, drawing: bool) -> dict[str, Any]:
    """Stock's milliseconds a sample, of a forward and, of a method that trains, of a training step."""
    cuda, batch = torch.cuda.is_available(), steps.config.batch
    stock = Stock(steps.k2, steps.size, batch, steps.config.text, steps.role)
    try:
        forward = _timed(steps, stock.forward) / batch
        if cuda:
            torch.cuda.reset_peak_memory_stats(steps.procs.device)
        found: dict[str, Any] = {"forward_ms": forward, "step_ms": None, "step_peak_gib": None}
        if not drawing:
            found["step_ms"] = _timed(steps, stock.step) / batch
            found["step_peak_gib"] = torch.cuda.max_memory_allocated(steps.procs.device) / 2**30 if cuda else None
    except torch.OutOfMemoryError:
        found = {"failed": "out of memory"}
    return found


def _beside(stock: dict[str, Any], work: dict[str, float], network: float) -> dict[str, Any]:
    """Stock on the samples that this process's network saw in `network` milliseconds."""
    if "failed" in stock:
        return stock
    alike = (stock["forward_ms"] * work["forwards"] + (stock["step_ms"] or 0.0) * work["backwards"]) / network
    return stock | {"ratio": alike, "ratio_guided": None if work["backwards"] else 2 * alike}


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
