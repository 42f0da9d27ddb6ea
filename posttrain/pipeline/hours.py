"""Time, disk and cost of a pipeline's stages, for its dry run: estimates from a measurement (bench/estimate.py).

What was not measured has no estimate, and says so. GPUs of a stage are those that its processes use and those that its
own servers name; a server that runs elsewhere is not counted.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from posttrain.bench import measurement
from posttrain.bench.measurement import Measurement
from posttrain.errors import UserError
from posttrain.pipeline.config import PipelineConfig
from posttrain.pipeline.fit import (
    SINGLE_PROCESS,
    base_of,
    own_ranks,
    parts_at,
    processes,
    stacked_ranks,
    stage_named,
    started_servers,
    taken_by_servers,
)
from posttrain.pipeline.plan import TRAINING, Stage
from posttrain.runs.progress import columns

GB = 1e9


@dataclass
class Need:
    """What a stage takes."""

    gpus: int
    seconds: float | None = None
    """None: not estimated, for the reason in `notes`."""
    disk: float | None = None
    """Bytes that stay after the stage; None: not estimated."""
    notes: list[str] = field(default_factory=list)


def describe(config: PipelineConfig, stages: Sequence[Stage]) -> str:
    """A table of the stages and of all together, with notes. Raises UserError if `config.measured` cannot be read."""
    found = measurement.load(config.measured or measurement.DEFAULT)
    for stage in stages:
        path = _base_dir(stage, stages)
        # Seconds of one model say nothing about another's.
        if path is not None and not found.is_of(json.loads((path / "transformer/config.json").read_text())):
            return (
                f"Time and disk: not estimated, because {found.card} was measured with another model than {path};"
                " measure with posttrain bench, and give its bench.json as --measured"
            )
    needs = {stage.name: need_of(config, stage, stages, found) for stage in stages}
    what = "Time and cost" if config.price else "Time"
    lines = [
        f"{what}, estimated from {found.card} measured on {found.date}, without judges and the start of their servers;"
        " disk, counted:",
        columns(_rows(config, needs)),
    ]
    for name, need in needs.items():
        for note in need.notes:
            lines.append(f"{name}: {note}")
    return "\n".join(lines)


def _rows(config: PipelineConfig, needs: dict[str, Need]) -> list[tuple[str, ...]]:
    head = ["stage", "hours", "GPUs", "GPU hours", "disk GB"]
    if config.price:
        head.append("cost")
    rows = [tuple(head)]
    hours = gpu_hours = disk = 0.0
    missing = 0
    for name, need in needs.items():
        disk += need.disk or 0.0
        if need.seconds is None:
            missing += 1
            rows.append(_row(config, name, None, str(need.gpus), None, need.disk))
            continue
        own = need.seconds / 3600
        rows.append(_row(config, name, own, str(need.gpus), own * need.gpus, need.disk))
        hours += own
        gpu_hours += own * need.gpus
    label = f"all but {missing}" if missing else "all"
    return [*rows, _row(config, label, hours, "", gpu_hours, disk)]


def _row(
    config: PipelineConfig, name: str, hours: float | None, gpus: str, gpu_hours: float | None, disk: float | None
) -> tuple[str, ...]:
    cells = [name, _number(hours), gpus, _number(gpu_hours), _number(None if disk is None else disk / GB)]
    if config.price:
        cells.append(_number(None if gpu_hours is None else gpu_hours * config.price))
    return tuple(cells)


def _number(value: float | None) -> str:
    """`-` where there is no estimate."""
    return "-" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def need_of(config: PipelineConfig, stage: Stage, stages: Sequence[Stage], found: Measurement) -> Need:
    """What one stage takes."""
    count, on_machine = processes(config.launch) if stage.command not in SINGLE_PROCESS else (1, 1)
    result, serving = Need(gpus=count), set[int]()
    for server in started_servers(stage):
        # The first GPUs are those of the stage's processes, which are counted already.
        serving |= {gpu for gpu in server.gpus if gpu >= on_machine}
    result.gpus += len(serving)
    try:
        result.seconds, result.notes = _seconds(config, stage, stages, found, count)
    except UserError as error:
        result.notes = [f"no time: {error}"]
    result.disk, note = _disk(stage, stages)
    result.notes += [note] if note else []
    return result


# ---- time -------------------------------------------------------------------------------------------------------


def _seconds(
    config: PipelineConfig, stage: Stage, stages: Sequence[Stage], found: Measurement, count: int
) -> tuple[float, list[str]]:
    """(seconds, notes); raises UserError for what was not measured."""
    from posttrain.bench import estimate  # here, because it imports torch and dry runs should start fast

    gpus, settings = estimate.GPUs(count, None, _own_gib(config, stage)), stage.config
    stack = stacked_ranks(stage, stages)
    if stage.command in TRAINING:
        time = estimate.of_training(_sized(stage, stages), found, gpus, stack)
        return time.seconds, time.notes
    if stage.command == "pairs":
        time = estimate.of_pairs(settings, found, gpus, stack)
        return time.seconds, time.notes
    if stage.command == "export":
        seconds = found.command("export").get(settings.format)
        if seconds is None:
            raise UserError(f"an export as {settings.format} was not measured on {found.card}")
        return seconds, []
    samples = 0.0
    if stage.command == "expander sft":
        samples = settings.batch / count
    elif stage.command == "expander gdpo":
        samples = settings.groups.prompts_per_step * settings.groups.group_size / count
    time = estimate.of_command(stage.command, samples, getattr(settings, "steps", 0), found)
    if time is None:
        raise UserError(f"{stage.command} was not measured on {found.card}")
    return time.seconds, time.notes


def _own_gib(config: PipelineConfig, stage: Stage) -> float | None:
    """GiB of a GPU that the stage's own servers leave to it; None: no GPU is named."""
    if config.gpu_gib is None:
        return None
    return config.gpu_gib * max(0.0, 1 - taken_by_servers(stage, processes(config.launch)[1]))


def _sized(stage: Stage, stages: Sequence[Stage]) -> Any:
    """The settings, with the size of the images that an earlier stage draws where they name none."""
    from posttrain.config.types import changed

    maker = stage_named(stage.reads.get("pairs.train"), stages)
    if maker is None or stage.config.image_sizes():
        return stage.config
    # The largest: they are trained as they are.
    size = max(maker.config.sizes, key=lambda size: size[0] * size[1])
    return changed(stage.config, pairs=changed(stage.config.pairs, size=size))


# ---- disk -------------------------------------------------------------------------------------------------------


def _disk(stage: Stage, stages: Sequence[Stage]) -> tuple[float | None, str]:
    """(bytes that stay, a note or ""); None where they are not counted."""
    if stage.command in TRAINING:
        return _checkpoints(stage, stages)
    if stage.command == "pairs":
        pixels = fmean(height * width for height, width in stage.config.sizes)
        # Two images a pair, three bytes a pixel.
        return stage.config.pairs * 2 * 3 * pixels, "disk is that of uncompressed images; PNG takes less"
    if stage.command == "export":
        return _export(stage, stages)
    return None, f"disk of {stage.command} is not counted"


def _checkpoints(stage: Stage, stages: Sequence[Stage]) -> tuple[float | None, str]:
    from posttrain.bench import tiers

    config = stage.config
    if config.lora is None:
        return None, "disk is not counted because all weights are trained; see docs/scaling.md"
    weights = config.lora.rank * parts_at(base_of(stage, stages)).adapter
    # Bytes a weight: 4 of itself, in float32, and those of AdamW's two moments.
    moments = 2 if config.optim.kind == "adamw8bit" else 8
    average = config.optim.average
    # An average is a copy of the policy alone.
    each = weights * (config.adapters * (4 + moments) + (4 if config.optim.ema or average else 0))
    kept = min(config.checkpoint.keep, 1 + (config.steps // config.checkpoint.every if config.checkpoint.every else 0))
    kept += 1 if config.eval.best else 0
    total, maker = float(kept * each), stage_named(stage.reads.get("pairs.train"), stages)
    if average:  # each checkpoint needs its own files, at most as many as there are steps for
        total += 4 * weights * min(kept * average.last, config.steps // average.every)
    if maker is not None:  # the cache of latents, two images in float32 a pair
        sizes = maker.config.sizes
        tokens = fmean((height // tiers.MULTIPLE) * (width // tiers.MULTIPLE) for height, width in sizes)
        total += maker.config.pairs * 2 * tokens * LATENT_CHANNELS * 4
    return total, ""


LATENT_CHANNELS = 64
"""Of an image token of K2."""


def _export(stage: Stage, stages: Sequence[Stage]) -> tuple[float | None, str]:
    maker = stage_named(stage.reads.get("source"), stages)
    if maker is None:
        return None, "disk of an export is counted only where an earlier stage makes its source"
    if maker.command not in TRAINING:
        return None, "disk of an export of a merge is not counted"
    parts = parts_at(base_of(maker, stages))
    if stage.config.format.startswith("lora"):
        return 4.0 * parts.adapter * own_ranks(maker, stages), ""
    bytes_a_weight = 4 if "float32" in (stage.config.dtype, maker.config.model.dtype) else 2
    weights = bytes_a_weight * (parts.block_weights + parts.other_weights)
    # diffusers' directory has the other parts too, in the model's type
    return float(weights + (2 * (parts.text_encoder + parts.vae) if stage.config.format == "diffusers" else 0)), ""


# ---- the model --------------------------------------------------------------------------------------------------


def _base_dir(stage: Stage, stages: Sequence[Stage]) -> Path | None:
    """The directory of the stage's K2; None if it runs none, or one of the hub, which has K2's size."""
    if stage.command not in ("pairs", *TRAINING, "expander gdpo"):
        return None
    path = Path(base_of(stage, stages))
    return path if path.is_dir() else None
