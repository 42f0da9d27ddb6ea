"""Formats bench.json as a Markdown table."""

from __future__ import annotations

from typing import Any

from posttrain.errors import counted


def table(result: dict[str, Any]) -> str:
    """`-` marks what was not measured."""
    settings, rate = result["settings"], result["matmul"]
    model, optim = settings["model"], settings["optim"] or {"kind": "each method's own"}
    memory = "" if result["gpu_gib"] is None else f" ({result['gpu_gib']:.0f} GiB)"
    heads = (
        "method", "size", "images/s", "ms a stage", "useful TFLOP/s", "share", "with recomputed", "blocks recomputed",
        "peak GiB", "x stock", "x stock, guided", "stock peak GiB", "compiled after step 2",
        "first steps, extra s", "error",
    )  # fmt: skip
    lines = [
        f"{result['processes']} x {result['device']}{memory}, torch {result['environment']['packages']['torch']};"
        f" matmul {rate['width']} cubed in {rate['dtype']}: {rate['tflops']:.4g} TFLOP/s; shares are of this rate.",
        f"Scale {settings['scale']}, batch {settings['batch']}, group {settings['group']}, text {settings['text']},"
        f" {_rank(settings['rank'])}, {counted(settings['steps'], 'step')}, window {settings['window']}, recompute"
        f" {'auto' if model['recompute'] is None else model['recompute']}, attention {model['attention']},"
        f" quantize {model['quantize']}, float8 {model.get('float8')}, optim {optim['kind']},"
        f" encode {settings['encode']}, offload {' and '.join(model['offload']) or 'nothing'}.",
        "",
        f"| {' | '.join(heads)} |",
        "|---" * len(heads) + "|",
    ]
    lines += [f"| {' | '.join(_cells(row))} |" for row in result["rows"]]
    return "\n".join(lines)


def _rank(rank: int | None) -> str:
    return "all weights" if rank is None else f"rank {rank}"


def _cells(row: dict[str, Any]) -> list[str]:
    height, width = row["size"]
    first = [row["method"], f"{height}x{width}"]
    if "failed" in row:
        return [*first, row["failed"], *["-"] * 12]  # one cell for each remaining column
    stock = row.get("stock") or {}  # absent with --stock false
    error = ", ".join(f"{name} {value:.1e}" for name, value in row["error"].items())
    return [
        *first,
        _number(row["images_per_second"]),
        ", ".join(f"{name} {ms:.4g}" for name, ms in row["ms"].items()),
        _number(row["tflops"]),
        _number(row["share"]),
        _number(row["share_recomputed"]),
        "-" if row["recomputed"] is None else f"{row['recomputed']:.0f}",
        _number(row["peak_gib"]),
        stock.get("failed") or _number(stock.get("ratio")),
        _number(stock.get("ratio_guided")),
        _number(stock.get("step_peak_gib")),
        str(row["recompilations"]) if row["compiled"] else "not compiled",
        _number(row["first_seconds"]),
        error or "-",
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
