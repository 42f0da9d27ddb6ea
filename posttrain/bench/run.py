"""`posttrain bench`: the speed of each method at true size, beside stock diffusers on the same work.

    posttrain bench --output runs/bench
    posttrain bench --plan recipes/nano/grpo.yaml --measured runs/bench/bench.json --gpus 2

Weights are random and nothing is downloaded. Steps run the methods' own code, from a run's loop (bench/steps.py).
Useful operations are counted from the forwards that were made (model/flops.py) and given as a share of a bf16 matmul
rate measured in the same run. Stock is diffusers' transformer on the same weights, uncompiled: the text of each sample
padded to 512 tokens and masked, gradient checkpointing in training, two forwards a step with guidance. One forward and
one training step of it are timed, and multiplied by the number of samples that the method's network saw. Shares and
ratios leave out decoding and the preparation of inputs; images a second and peak memory include everything.

Errors of the fast path and of options are relative L2 distances to the exact path (uncompiled blocks, native attention,
bf16 weights) with the same adapter: of velocities, of the adapter's gradient, of its change over five updates (8-bit
moments), and of text features and pixels (offloaded parts). For grpo, the error is also the distance of a ratio of
policies from 1 before an update.

Several processes (torchrun) count as one: their images together, the time of the slowest. Exit code 1 means that
something was compiled after the second step.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor

from posttrain.bench import errors
from posttrain.bench.config import DRAWING, BenchConfig
from posttrain.bench.markdown import table
from posttrain.bench.plan import plan, text_encoder_gib
from posttrain.bench.steps import Steps
from posttrain.bench.stock import Stock
from posttrain.config.types import changed
from posttrain.distributed.processes import Processes
from posttrain.errors import UserError
from posttrain.model import flops, fp8
from posttrain.model.blocks import graphs
from posttrain.model.k2 import K2
from posttrain.runs.run import environment
from posttrain.training.oom_retry import DoesNotFit
from posttrain.training.policy import apply_runtime_options

NOT_NETWORK = ("decode", "encode", "prepare")
"""Stages that are not work of the transformer."""
NANO = Path(__file__).parents[1] / "nano/weights/k2-nano"


class StageTimer:
    """Milliseconds of stages, from GPU events where there is a GPU."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._marks = [("", self._now())]

    def lap(self, name: str) -> None:
        """Ends the stage `name`, which began at the previous lap."""
        self._marks.append((name, self._now()))

    def milliseconds(self) -> dict[str, float]:
        if self._cuda:
            torch.cuda.synchronize()
        result: dict[str, float] = {}
        for (_, start), (name, end) in zip(self._marks, self._marks[1:]):
            passed = start.elapsed_time(end) if self._cuda else (end - start) * 1e3
            result[name] = result.get(name, 0.0) + passed
        return result

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        # kernels run asynchronously, so a host clock would measure only how fast they are launched
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Forwards:
    """Records the forwards of the network, so that operations can be counted after the clock has stopped."""

    def __init__(self, k2: K2, rank: int | None):
        """`rank` of the adapters; None: all weights are trained."""
        self.shape, self.rank, self.blocks = flops.Shape.of(k2), rank, k2.blocks
        self._seen: list[tuple[int, int, int, Tensor | None, int | None, bool, int]] = []
        k2.net.register_forward_hook(self._record)

    def _record(self, module: Any, inputs: tuple[Any, ...], v: Tensor) -> None:
        x, _, tokens, mask, *_ = inputs
        rank, gradient = self.rank if self.blocks.active else 0, torch.is_grad_enabled()
        self._seen.append((len(x), x.shape[1], tokens.shape[1], mask, rank, gradient, self.blocks.recomputed))

    def take(self) -> dict[str, int]:
        """Work since the last call: `flop`, useful operations; `again`, those that backward recomputed, which are not
        useful; `forwards` and `backwards`, samples without and with gradient; `recomputed`, blocks recomputed."""
        work = {"flop": 0, "again": 0, "forwards": 0, "backwards": 0, "recomputed": 0}
        for count, image, length, mask, rank, gradient, recomputed in self._seen:
            # padding and masked tokens are not useful, so each sample counts with its own length
            lengths = [length] * count if mask is None else mask.sum(1).tolist()
            for text in lengths:
                work["flop"] += flops.forward(self.shape, image, text, rank or 0)
                if gradient:
                    work["flop"] += flops.backward(self.shape, image, text, rank)
                    work["again"] += recomputed * flops.block(self.shape, image + text, rank or 0)
            work["backwards" if gradient else "forwards"] += count
            work["recomputed"] = max(work["recomputed"], recomputed)
        self._seen.clear()
        return work


def bench(config: BenchConfig) -> int:
    """Measures the methods of `config`, prints a table and writes it; or prints a plan. Returns the exit code."""
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
            if procs.main:  # after each row, so that a killed bench leaves the rows before
                path.mkdir(parents=True, exist_ok=True)
                (path / "bench.json").write_text(json.dumps(result, indent=1) + "\n")
                (path / "bench.md").write_text(table(result) + "\n")
    if procs.main:
        print(table(result))
    return int(any(row.get("recompilations") for row in result["rows"]))


def measured(
    config: BenchConfig, method: str, size: tuple[int, int], procs: Processes, matmul: float
) -> dict[str, Any]:
    """A row of the table; `matmul` is the matmul rate in TFLOP/s. If it does not fit into memory, it says so."""
    if method == "expander":
        config = changed(config, rank=0)  # expansions are drawn by the base model
    try:
        return _fresh_row(config, method, size, procs, matmul)
    except (torch.OutOfMemoryError, DoesNotFit) as error:
        # alone among several processes, one that ran out of memory could not tell the others to go on
        if procs.size > 1:
            raise UserError(f"batch: {method} does not fit into memory; lower it, or raise model.recompute") from error
        return {"failed": "out of memory"}
    finally:
        gc.collect()  # the model's references are gone: they were local to _fresh_row
        if procs.device.type == "cuda":
            torch.cuda.empty_cache()


def _fresh_row(
    config: BenchConfig, method: str, size: tuple[int, int], procs: Processes, matmul: float
) -> dict[str, Any]:
    with closing(Steps(_model(config, procs.device), config, size, procs)) as steps:
        return _row(steps, method, matmul)


def _row(steps: Steps, method: str, matmul: float) -> dict[str, Any]:
    k2, config, procs = steps.k2, steps.config, steps.procs
    cuda = procs.device.type == "cuda"
    stock = _stock(steps, method in DRAWING) if config.stock else None
    options = config.model
    compiled = cuda if options.compile is None else options.compile
    inexact = compiled or options.attention != "native" or bool(options.quantize or options.float8 or options.offload)
    # the exact path must be observed before any option is applied
    exact = errors.observed(steps) if inexact else {}
    initial_adapter = errors.adapter(steps) if inexact else []
    apply_runtime_options(k2, changed(options, compile=compiled), procs.device)
    fp8.train_in_float8(k2)
    gc.collect()
    adapter_parameters = _adapter_parameters(k2)
    weights = None
    if cuda:
        weights = (torch.cuda.memory_allocated(procs.device) - 4 * adapter_parameters) / 2**30  # adapters are fp32
    forwards = Forwards(k2, config.rank)
    graphs_before = graphs()
    warm = _timed_steps(steps, method, range(config.warmup), forwards)
    graphs_ready = graphs()
    if cuda:
        torch.cuda.reset_peak_memory_stats(procs.device)
    runs = _timed_steps(steps, method, range(config.warmup, config.warmup + steps.count(method)), forwards)
    row, network, work = _speed(runs, steps.images(method), matmul, mean=method == "grpo")
    warm_seconds = sum(sum(stages.values()) for stages, _ in warm) / 1e3
    usual_seconds = len(warm) * row["images"] / row["images_per_second"]
    row |= {
        "peak_gib": torch.cuda.max_memory_allocated(procs.device) / 2**30 if cuda else None,
        "weights_gib": weights,
        # again, because a loop may have added adapters
        "adapter_parameters": _adapter_parameters(k2),
        "block_bytes_a_token": k2.blocks.bytes_a_token,
        "compiled": compiled,
        "graphs": graphs_ready - graphs_before,
        "recompilations": graphs() - graphs_ready,
        "first_seconds": max(0.0, warm_seconds - usual_seconds),
        "error": {} if steps.ratio_error is None else {"ratio": steps.ratio_error},
        "shape": asdict(forwards.shape),
        "multiple": k2.pixel_multiple,
    }
    if inexact:
        errors.set_adapter(steps, initial_adapter)  # the steps have trained it since
        row["error"] |= errors.distances(errors.observed(steps), exact)
    row["error"] |= errors.of_updates(steps)
    if stock is not None:
        row["stock"] = _compare_stock(stock, work, network)
    return row


def _adapter_parameters(k2: K2) -> int:
    found = 0
    for name, role in k2.roles.items():
        if role is not None:  # None: all weights are trained, without an adapter
            found += sum(p.numel() for p in k2.role_parameters(name))
    return found


Run = tuple[dict[str, float], dict[str, int]]
"""Of one step: milliseconds of each stage, and the work of the network (`Forwards.take`)."""


def _timed_steps(steps: Steps, method: str, indices: Sequence[int], forwards: Forwards) -> list[Run]:
    """Runs steps on all processes; a stage takes as long as on the slowest."""
    runs = []
    for index in indices:
        steps.procs.all_gather(None)  # all begin together
        timer = StageTimer(steps.procs.device)
        steps.run(method, index, timer.lap)
        by_rank = steps.procs.all_gather(timer.milliseconds())
        stages = {name: max(part[name] for part in by_rank) for name in by_rank[0]}
        runs.append((stages, forwards.take()))
    return runs


def _speed(runs: list[Run], images: int, matmul: float, mean: bool) -> tuple[dict[str, Any], float, dict[str, float]]:
    """(the row's speeds, milliseconds of the network in a step, work of a step).

    Steps are summarised by their median, or with `mean` by the mean: grpo's window starts at a different place in each
    step, so that steps are not repetitions of the same work.
    """
    average: Callable[[list[float]], float] = fmean if mean else median
    total_ms, network_ms, rates = [], [], []
    for stages, done in runs:
        network = sum(ms for name, ms in stages.items() if name not in NOT_NETWORK)
        total_ms.append(sum(stages.values()))
        network_ms.append(network)
        rates.append(done["flop"] / network / 1e9)  # operations a millisecond / 1e9 are TFLOP/s
    stages = {name: average([stages[name] for stages, _ in runs]) for name in runs[0][0]}
    work = {name: average([done[name] for _, done in runs]) for name in runs[0][1]}
    rate = average(rates)
    row = {
        "images": images,
        "images_per_second": 1e3 * images / average(total_ms),
        "ms": stages,
        "tflops": rate,
        "share": rate / matmul,
        "share_recomputed": rate / matmul * (1 + work["again"] / work["flop"]),
        "recomputed": work["recomputed"] if work["backwards"] else None,
        "useful_tflop": work["flop"] / 1e12,
        "forwards": work["forwards"],
        "backwards": work["backwards"],
    }
    return row, average(network_ms), work


def _model(config: BenchConfig, device: torch.device) -> K2:
    """The model of the exact path: no option is applied."""
    low = device.type == "cuda" or config.model.quantize or config.model.float8
    dtype = torch.bfloat16 if low else torch.float32
    if config.scale == "nano":
        return K2.load(NANO, dtype=dtype, device=device)
    return K2.random(device, dtype, config.scale, text=config.encode)


def _stock(steps: Steps, drawing: bool) -> dict[str, Any]:
    """Milliseconds a sample of a stock forward and, unless the method only draws, of a stock training step."""
    cuda, batch = torch.cuda.is_available(), steps.config.batch
    stock = Stock(steps.k2, steps.size, batch, steps.config.text, steps.role)
    try:
        forward = _timed(steps, stock.forward) / batch
        if cuda:
            torch.cuda.reset_peak_memory_stats(steps.procs.device)
        result: dict[str, Any] = {"forward_ms": forward, "step_ms": None, "step_peak_gib": None}
        if not drawing:
            result["step_ms"] = _timed(steps, stock.step) / batch
            result["step_peak_gib"] = torch.cuda.max_memory_allocated(steps.procs.device) / 2**30 if cuda else None
    except torch.OutOfMemoryError:
        return {"failed": "out of memory"}
    return result


def _compare_stock(stock: dict[str, Any], work: dict[str, float], network: float) -> dict[str, Any]:
    """Adds how many times as long stock takes for the samples that the network saw in `network` milliseconds."""
    if "failed" in stock:
        return stock
    stock_ms = stock["forward_ms"] * work["forwards"] + (stock["step_ms"] or 0.0) * work["backwards"]
    ratio = stock_ms / network
    # with guidance stock makes two forwards a step; training has no guidance
    return stock | {"ratio": ratio, "ratio_guided": None if work["backwards"] else 2 * ratio}


def _timed(steps: Steps, function: Callable[[], None]) -> float:
    """Median milliseconds of a call; the first call only warms up."""
    times = []
    for index in range(1 + min(3, steps.config.repeats)):
        timer = StageTimer(steps.procs.device)
        function()
        timer.lap("")
        if index:
            times.append(timer.milliseconds()[""])
    return median(times)


def matmul_rate(device: torch.device) -> dict[str, Any]:
    """TFLOP/s of a square matrix product: 8192 wide in bf16 on a GPU, a small one in fp32 on a CPU."""
    cuda = device.type == "cuda"
    width, dtype, warm, count = (8192, torch.bfloat16, 20, 100) if cuda else (1024, torch.float32, 1, 5)
    a = torch.randn(width, width, device=device, dtype=dtype)
    b = torch.randn_like(a)
    out, timers = torch.empty_like(a), []
    for _ in range(warm + count):
        timers.append(StageTimer(device))
        torch.mm(a, b, out=out)
        timers[-1].lap("")
    # read only now: reading synchronises, and the GPU would wait between products
    times = [timer.milliseconds()[""] for timer in timers[warm:]]
    rate = 2 * width**3 / median(times) / 1e9
    return {"tflops": rate, "width": width, "dtype": str(dtype).removeprefix("torch.")}
