"""Whether a pipeline's stages fit the machine: processes, judges' servers and, estimated, GPU memory.

The estimate is that of bench_tiers.py, for prompts of TEXT tokens: of a training step with as few blocks computed again
as fit, or of drawing at most. A chat model, and what a reward in the training process takes, are not in it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posttrain.errors import UserError
from posttrain.pipeline.plan import TRAINING, Stage
from rewards.serve import ServerSpec, memory_share, missing

TEXT = 105
"""Text tokens of a prompt, as docs/performance.md measures with."""
ALONE = ("export", "expander data")
"""Commands of one process, whatever launches the others."""


def processes(launch: Sequence[str]) -> tuple[int, int]:
    """(processes, those of one machine) as torchrun or accelerate launch is told; 1 where nothing is said."""
    words = [part.replace("-", "_") for word in launch for part in word.split("=", 1)]
    told = {option.strip("_"): int(n) for option, n in itertools.pairwise(words) if n.isdecimal()}
    for name in ("nnodes", "num_machines", "num_processes", "nproc_per_node"):
        if told.get(name) == 0:
            raise UserError(f"launch: {name} is 0; give at least 1")
    machines = told.get("nnodes", told.get("num_machines", 1))
    if "num_processes" in told:
        return told["num_processes"], -(-told["num_processes"] // machines)
    return machines * told.get("nproc_per_node", 1), told.get("nproc_per_node", 1)


def check_processes(stage: Stage, count: int) -> None:
    """Raises UserError for work that does not divide by them, as the stage itself would once it runs."""
    if stage.command == "expander sft" and stage.config.batch % (stage.config.micro_batch * count):
        raise UserError(
            f"stage {stage.name}: batch: {stage.config.batch} is no multiple of micro_batch times {count} processes"
        )
    if stage.command == "expander gdpo":
        groups = stage.config.groups
        if groups.prompts_per_step % count:
            told = f"{groups.prompts_per_step} do not divide by {count} processes; use a multiple"
            raise UserError(f"stage {stage.name}: groups.prompts_per_step: {told}")
        if groups.prompts_per_step // count * groups.group_size % groups.micro_batch:
            told = f"{groups.micro_batch} is no divisor of a process's expansions"
            raise UserError(f"stage {stage.name}: groups.micro_batch: {told}")


def absent(stage: Stage) -> list[str]:
    """What the servers that the stage starts need and this machine does not have."""
    return [text for spec in servers(stage) for text in missing(spec)]


def servers(stage: Stage) -> list[ServerSpec]:
    """Those that the stage starts."""
    return [spec for spec in getattr(stage.config, "servers", []) if not spec.urls]


def memory(stage: Stage, stages: Sequence[Stage], gpu_gib: float, on_machine: int) -> tuple[str, bool] | None:
    """What it needs of a GPU, in words, and whether it has that; None for a stage that is none of K2's.

    `stages` are those of its pipeline, whose outputs it may read.
    """
    if stage.command in ALONE or stage.command == "expander sft":
        return None
    specs = servers(stage)
    taken = max(
        sum(memory_share(spec) for spec in specs if not spec.gpus or gpu in spec.gpus) for gpu in range(on_machine)
    )
    if taken + _reserve() >= 1:
        return f"no room: its servers take {taken:g} of a GPU that it works on; give them others by gpus", False
    room = (1 - taken - _reserve()) * gpu_gib
    where = f"of {gpu_gib:g}, {_reserve() * gpu_gib:g} of which stay free"
    where += f" and {taken * gpu_gib:g} are its servers'" if taken else ""
    if stage.command in TRAINING and stage.config.lora is None:
        return "not estimated, since all weights are trained; see docs/scaling.md", True
    if stage.command == "expander gdpo" and stage.config.renderer.urls:
        return "its chat model's, which is not estimated", True
    sizes, pictures = _forward(stage, stages)
    if not sizes:
        return "not estimated, since the size of its pictures is not known; give pairs.size", True
    gib, again = _estimate(stage, _base(stage, stages), sizes, pictures, room, _stack(stage, stages))
    told = "" if stage.command in TRAINING else "at most "
    told += f"about {gib:.0f} GiB {where}"
    told += f", with {again} blocks computed again" if again else ""
    told += ", and its chat model" if stage.command == "expander gdpo" else ""
    if gib > room:
        told += ": does not fit; lower micro_batch or sizes, or see docs/troubleshooting.md, Out of memory"
    return told, gib <= room


def _reserve() -> float:
    from posttrain.model.blocks import RESERVE  # torch comes with it

    return RESERVE


def _base(stage: Stage, stages: Sequence[Stage]) -> str:
    """The directory or hub id of the K2 that it runs: of what is not exported yet, the model that all began with."""
    if stage.command != "expander gdpo":
        return stage.config.model.path
    if "renderer.path" not in stage.reads:
        return stage.config.renderer.path
    return next((one.config.model.path for one in stages if one.command in ("pairs", *TRAINING)), "")


def _stack(stage: Stage, stages: Sequence[Stage]) -> int:
    """The ranks of the adapters that it stands on, of stages of this pipeline; all weights take them in."""
    maker = next((one for one in stages if one.name == stage.reads.get("model.start")), None)
    trains_all = stage.command in TRAINING and stage.config.lora is None
    if maker is None or maker.config.lora is None or trains_all:
        return 0
    return maker.config.lora.rank + _stack(maker, stages)


def _estimate(
    stage: Stage, path: str, sizes: list[list[int]], pictures: int, room: float, stack: int
) -> tuple[float, int]:
    """GiB, and how many blocks must compute their activations again for that; `stack`: see above."""
    from posttrain.bench import tiers

    config, training = stage.config, stage.command in TRAINING
    model = config.renderer if stage.command == "expander gdpo" else config.model
    parts = tiers.parts_in(path) if Path(path).is_dir() else tiers.parts_of("k2")
    block_bytes = tiers.BLOCK_BYTES * parts.width / tiers.parts_of("k2").width
    block_bytes *= tiers.UNCOMPILED if getattr(model, "compile", None) is False else 1
    options = [*(["offload"] if "text_encoder" in getattr(model, "offload", []) else [])]
    options += ["fp8"] if getattr(model, "quantize", None) else []
    options += ["adamw8bit"] if training and config.optim.kind == "adamw8bit" else []
    rank = config.lora.rank if training else 0
    height, width = max(sizes, key=lambda size: size[0] * size[1])
    tokens = pictures * ((height // 16) * (width // 16) + TEXT)
    adapters = 2 if stage.command == "tdm" else 1
    told = getattr(model, "recompute", None)
    tried = range(parts.blocks + 1) if told is None else [told]
    if not training:  # a block's activations are gone with it
        tried = [parts.blocks]
    needs = [
        (tiers.need(parts, options, adapters, rank, tokens, height * width, again, block_bytes, stack), again)
        for again in tried
    ]
    gib, again = next((need for need in needs if need[0] <= room), needs[-1])
    return gib, again if training else 0


def _forward(stage: Stage, stages: Sequence[Stage]) -> tuple[list[list[int]], int]:
    """Sizes of the pictures, empty if not known, and how many of them one forward takes."""
    config: Any = stage.config
    match stage.command:
        case "grpo":
            return config.sampling.sizes, config.groups.micro_batch
        case "stpo":
            made = [one.config.sizes for one in stages if one.name == stage.reads.get("pairs.train")]
            return [config.pairs.size] if config.pairs.size else [*itertools.chain(*made)], 2 * config.micro_batch
        case "expander gdpo":
            return [config.renderer.size], config.renderer.micro_batch
    return config.sizes, config.micro_batch
