"""Checks whether a pipeline's stages fit the machine: processes, judge servers and estimated GPU memory.

Memory is estimated by bench/tiers.py for prompts of TEXT_TOKENS tokens. For training it recomputes as few blocks as
possible; for drawing it is an upper bound. Chat models and rewards that run in the training process are not counted.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posttrain.errors import UserError, counted
from posttrain.pipeline.plan import TRAINING, Stage
from rewards.serve import ServerSpec, memory_share, missing

TEXT_TOKENS = 105
"""Text tokens of a prompt, the length that docs/performance.md measures with."""
SINGLE_PROCESS = ("export", "expander data", "merge")
"""Commands that always run in one process, whatever launches the others."""


def processes(launch: Sequence[str]) -> tuple[int, int]:
    """(all processes, processes of one machine) from the options of torchrun or accelerate launch; 1 by default."""
    words = []
    for word in launch:
        words += word.replace("-", "_").split("=", 1)  # --nproc-per-node 8, --nproc_per_node=8
    counts: dict[str, int] = {}
    for option, value in itertools.pairwise(words):
        if value.isdecimal():
            counts[option.strip("_")] = int(value)
    for name in ("nnodes", "num_machines", "num_processes", "nproc_per_node"):
        if counts.get(name) == 0:
            raise UserError(f"launch: {name} is 0; give at least 1")
    machines = counts.get("nnodes", counts.get("num_machines", 1))
    if "num_processes" in counts:
        # accelerate states the total, torchrun the number per machine
        return counts["num_processes"], -(-counts["num_processes"] // machines)
    return machines * counts.get("nproc_per_node", 1), counts.get("nproc_per_node", 1)


def check_processes(stage: Stage, count: int) -> None:
    """Raises UserError if the work does not divide by `count` processes; the stage itself would fail only later."""
    config = stage.config
    if stage.command == "grpo" and config.rollout.gpus >= count:
        gpus = config.rollout.gpus
        raise UserError(
            f"stage {stage.name}: rollout.gpus: is {gpus} of {counted(count, 'process')}, which leaves none to train"
        )
    if stage.command == "expander sft" and config.batch % (config.micro_batch * count):
        raise UserError(
            f"stage {stage.name}: batch: {config.batch} is not a multiple of micro_batch times {count} processes"
        )
    if stage.command == "expander gdpo":
        groups = config.groups
        where = f"stage {stage.name}: groups"
        if groups.prompts_per_step % count:
            raise UserError(
                f"{where}.prompts_per_step: {groups.prompts_per_step} is not divisible by {count} processes;"
                " use a multiple"
            )
        per_process = groups.prompts_per_step // count * groups.group_size
        if per_process % groups.micro_batch:
            raise UserError(
                f"{where}.micro_batch: {groups.micro_batch} does not divide the {per_process} expansions of a process"
            )


def missing_requirements(stage: Stage) -> list[str]:
    """What the stage's servers need and this machine does not have, as messages."""
    messages = []
    for spec in started_servers(stage):
        messages += missing(spec)
    return messages


def started_servers(stage: Stage) -> list[ServerSpec]:
    """The servers that the stage starts itself; those with urls run elsewhere."""
    return [spec for spec in getattr(stage.config, "servers", []) if not spec.urls]


def memory(stage: Stage, stages: Sequence[Stage], gpu_gib: float, on_machine: int) -> tuple[str, bool] | None:
    """(the stage's need of one GPU in words, whether it fits); None for a stage that does not run K2.

    `stages` are all stages of the pipeline, whose outputs this one may read.
    """
    if stage.command in SINGLE_PROCESS or stage.command == "expander sft":
        return None
    from posttrain.model.blocks import RESERVE  # here, because it imports torch and dry runs should start fast

    taken = taken_by_servers(stage, on_machine)
    if taken + RESERVE >= 1:
        return f"no room: its servers take {taken:g} of a GPU that it trains on; set their gpus to others", False
    room = (1 - taken - RESERVE) * gpu_gib
    available = f"of {gpu_gib:g}, {RESERVE * gpu_gib:g} of which stay free"
    if taken:
        available += f" and {taken * gpu_gib:g} belong to its servers"
    training = stage.command in TRAINING
    if training and stage.config.lora is None:
        return "not estimated because all weights are trained; see docs/scaling.md", True
    if stage.command == "expander gdpo" and stage.config.renderer.urls:
        return "the chat model only, which is not estimated", True
    sizes, images = _forward(stage, stages)
    if not sizes:
        return "not estimated because the size of its images is not known; set pairs.size", True
    gib, recomputed = _estimate(stage, base_of(stage, stages), sizes, images, room, stacked_ranks(stage, stages))
    text = "" if training else "at most "
    text += f"about {gib:.0f} GiB {available}"
    if recomputed:
        text += f", with {counted(recomputed, 'block')} recomputed"
    if stage.command == "expander gdpo":
        text += ", plus its chat model"
    if gib > room:
        text += ": does not fit; lower micro_batch or sizes, or see docs/troubleshooting.md, Out of memory"
    return text, gib <= room


def taken_by_servers(stage: Stage, on_machine: int) -> float:
    """The largest share of a training GPU's memory, in [0, 1], that the stage's own servers take."""
    shares = []
    for gpu in range(on_machine):
        # a server without `gpus` may land on any GPU
        here = [spec for spec in started_servers(stage) if not spec.gpus or gpu in spec.gpus]
        shares.append(sum(map(memory_share, here)))
    # Processes keep in step, so the GPU with the least room decides for all.
    return max(shares)


def base_of(stage: Stage, stages: Sequence[Stage]) -> str:
    """The directory or hub id of the stage's K2. An export that does not exist yet has the sizes of its base model."""
    if stage.command != "expander gdpo":
        return stage.config.model.path
    if "renderer.path" not in stage.reads:
        return stage.config.renderer.path
    # All stages of a pipeline train the same K2, so the first one's has the sizes of the export.
    for other in stages:
        if other.command in ("pairs", *TRAINING):
            return other.config.model.path
    return ""


def stage_named(name: str | None, stages: Sequence[Stage]) -> Stage | None:
    return next((stage for stage in stages if stage.name == name), None)


def stacked_ranks(stage: Stage, stages: Sequence[Stage]) -> int:
    """The sum of the ranks of earlier stages' adapters that this stage keeps in memory."""
    maker = stage_named(stage.reads.get("model.start"), stages)
    # training all weights merges earlier adapters, so none stays in memory
    trains_all = stage.command in TRAINING and stage.config.lora is None
    if maker is None or trains_all:
        return 0
    return own_ranks(maker, stages)


def own_ranks(stage: Stage, stages: Sequence[Stage]) -> int:
    """The ranks of a stage's adapter and of those that it stands on; 0 where all weights are trained."""
    if stage.command in TRAINING:
        return 0 if stage.config.lora is None else stage.config.lora.rank + stacked_ranks(stage, stages)
    # A merge: what its parents share is counted more than once, and parents from elsewhere not at all.
    parents = [stage_named(name, stages) for name in stage.reads.values()]
    return stage.config.rank or sum(own_ranks(parent, stages) for parent in parents if parent is not None)


def parts_at(path: str) -> Any:
    """The sizes of a model's parts. One of the hub, which may not be on this machine, has K2's."""
    from posttrain.bench import tiers

    return tiers.parts_in(path) if Path(path).is_dir() else tiers.parts_of("k2")


def _estimate(
    stage: Stage, path: str, sizes: list[list[int]], images: int, room: float, stack: int
) -> tuple[float, int]:
    """(GiB, number of blocks that must recompute their activations to need no more)."""
    from posttrain.bench import tiers

    config = stage.config
    parts = parts_at(path)
    largest = max(sizes, key=lambda size: size[0] * size[1])
    if stage.command in TRAINING:
        # BLOCK_BYTES was measured on compiled blocks of K2; activations grow in proportion to the width
        block_bytes = tiers.BLOCK_BYTES * parts.width / tiers.parts_of("k2").width
        return tiers.training_need(parts, config, largest, TEXT_TOKENS, room, stack, block_bytes)
    height, width = largest
    tokens = images * ((height // tiers.MULTIPLE) * (width // tiers.MULTIPLE) + TEXT_TOKENS)
    # without backward no block keeps activations
    return tiers.need(parts, tiers.options_of(config), 1, 0, tokens, height * width, parts.blocks, stack=stack), 0


def _forward(stage: Stage, stages: Sequence[Stage]) -> tuple[list[list[int]], int]:
    """(sizes of the images, empty if not known; images in one forward)."""
    config: Any = stage.config
    if stage.command == "expander gdpo":
        return [config.renderer.size], config.renderer.micro_batch
    if stage.command not in TRAINING:
        return config.sizes, config.micro_batch
    sizes = config.image_sizes()
    if not sizes:  # those of the images that an earlier stage draws
        maker = stage_named(stage.reads.get("pairs.train"), stages)
        sizes = maker.config.sizes if maker else []
    return sizes, config.images_at_once()
