"""Estimates what grows with the number of processes: bytes, requests and memory of a pipeline's stages.

    python -m posttrain.pipeline.ranks recipes/k2/pipeline_64.yaml

A model of the traffic from the recipes alone; nothing is loaded or run. A test compares it with the bytes that four
processes sent. `before` is commit 7d01825: every process got all images of an evaluation and of a turn of pairs, an
image was sent with each question about it, each process had its own 32 requests to a judge, and the main process
evaluated an expander alone. Bytes of a node are those that its processes receive. All images of pairs are assumed to
be kept, and images to compress by half, as PNG and as WebP; base64 adds a third.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.config.load import load_config
from posttrain.errors import UserError
from posttrain.pairs.make import BACKLOG
from posttrain.pipeline import fit, plan
from posttrain.training.evaluate import SHOWN
from posttrain.training.prompt_source import FUSED_BYTES
from prompts.records import read_prompts
from rewards.base import RewardSpec
from rewards.encode import SMALL
from rewards.judge import Judge

COMPRESSED = 0.5
"""Share of the raw bytes that an image has as PNG or lossless WebP; 0.4 to 0.6 for photographs."""
TEXT_BYTES = 500
"""Bytes of a request without an image."""
REQUIREMENTS = 4
"""Assumed number of requirements of a prompt that has none yet."""
WIDTH, TEXT = 6144, fit.TEXT_TOKENS
"""Width of K2's fused text, kept in bfloat16, and its tokens a prompt."""
OLD_CONCURRENCY, OLD_TEXTS = 32, 2048
"""In commit 7d01825: a judge's requests a process, and the fused texts that tdm kept on the GPU."""


@dataclass(frozen=True)
class Row:
    """One line of the table, in the unit that `what` names."""

    stage: str
    what: str
    before: float
    after: float


@dataclass(frozen=True)
class Images:
    """Bytes of one RGB image in several forms."""

    height: int
    width: int

    @property
    def raw(self) -> int:
        return 3 * self.height * self.width

    @property
    def latents(self) -> int:
        """In fp32: 64 channels of each token of 16 x 16 pixels."""
        return 4 * 64 * (self.height // 16) * (self.width // 16)

    @property
    def sent(self) -> float:
        """Bytes sent to a judge: an uncompressed PNG up to 512 x 512 pixels, WebP above; in base64."""
        small = self.height * self.width <= SMALL
        return self.raw * (1.0 if small else COMPRESSED) * 4 / 3


def evaluation_bytes(prompts: int, groups: int, group_size: int, compares: bool, ranks: int, image: Images) -> int:
    """Image bytes that an evaluation sends between processes, for one guidance or number of steps.

    Images that the report shows go to the main process. If a reward compares a group's images, they go to the process
    that scores the group.
    """
    # image i is drawn by process i % ranks, group g is scored by process g % ranks
    shown = sum(i % ranks != 0 for i in range(min(SHOWN, prompts)))
    moved = 0
    if compares:
        moved = sum(i % ranks != i // group_size % ranks for i in range(groups * group_size))
    return (shown + moved) * image.raw


def questions(rewards: Sequence[RewardSpec], requirements: float, texts: float) -> float:
    """Mean number of questions about an image, over all judges of a recipe."""
    counts = {"Rubric": requirements, "OCR": texts, "Aesthetic": 1.0, "Artifact": 1.0, "ImageJudge": 1.0}
    return sum(counts.get(_class_name(spec), 0.0) for spec in rewards)


def judge_bytes(images: float, asked: float, image: Images) -> tuple[float, float]:
    """(before, after) bytes sent to judges: an image with each of its `asked` questions, or with the first only."""
    once = images * (image.sent + (asked - 1) * TEXT_BYTES) if asked else 0.0
    return images * asked * (image.sent + TEXT_BYTES), once


def in_flight(judges: int, ranks: int) -> tuple[int, int]:
    """(before, after) concurrent requests of all processes."""
    # a judge's concurrency is divided between the processes, but each has at least one request
    after = max(1, Judge.concurrency // ranks) * ranks
    return judges * OLD_CONCURRENCY * ranks, judges * after


def rows(stage: plan.Stage, ranks: int, on_node: int, image: Images) -> Iterator[Row]:
    """What grows in one stage."""
    config, name = stage.config, stage.name
    if stage.command == "pairs":
        yield from _pairs(config, name, ranks, on_node, image)
    if stage.command in plan.TRAINING:
        yield from _evaluation(config, name, ranks, on_node, image)
    if stage.command in plan.GROUPS:
        count = config.groups.prompts_per_step * config.groups.group_size
        specs = [spec for spec in config.rewards if not spec.heldout_only]
        yield from _judges(specs, config.prompts.train, count, name, ranks, image)
    if stage.command == "tdm":
        text = 2 * WIDTH * TEXT  # bfloat16
        yield Row(name, "fused texts, GiB of each GPU", OLD_TEXTS * text / 2**30, 0.0)
        yield Row(name, "fused texts, GiB of each process's RAM", 0.0, FUSED_BYTES / 2**30)
    if stage.command == "expander gdpo":
        prompts, size = config.eval.prompts, config.eval.group_size
        yield Row(name, "an evaluation's images that one GPU draws", prompts * size, -(-prompts // ranks) * size)
        count = config.groups.prompts_per_step * config.groups.group_size
        specs = [spec for spec in config.rewards if not spec.heldout_only]
        for check in config.safety:
            if check.sees == "image":
                specs.append(RewardSpec(check.name, check.function))
        yield from _judges(specs, config.prompts.train, count, name, ranks, image)


def _pairs(config: Any, name: str, ranks: int, on_node: int, image: Images) -> Iterator[Row]:
    block = 2 * config.block  # a block is counted in pairs
    raw, compressed = block * image.raw, block * image.raw * COMPRESSED
    before, after = on_node * ranks * raw, (ranks - 1) * compressed
    yield Row(name, "a turn's images, GB to a node", before / 1e9, after / 1e9)
    own = 2 * len(config.sizes) * raw  # one turn is being drawn while the turn before is being scored
    before, after = ranks * raw, own + BACKLOG + compressed
    yield Row(name, "images in the main process's memory, GB", before / 1e9, after / 1e9)
    yield Row(name, "a turn's images that one process encodes as PNG", ranks * block, block)
    drawn = shares = 0.0
    for source in config.sources:
        drawn += source.share * (source.judged.group_size if source.judged else 2)
        shares += source.share
    mean = drawn / shares  # images drawn for a pair
    yield from _judges(config.rewards, config.prompts, ranks * config.block * mean, name, ranks, image, "a turn")


def _evaluation(config: Any, name: str, ranks: int, on_node: int, image: Images) -> Iterator[Row]:
    e = config.eval
    # an evaluation is repeated for each number of steps or each guidance
    passes = len(config.eval_draws())
    groups = min(e.groups, e.prompts)
    count = passes * (e.prompts + groups * e.group_size)
    compares = any(reward.group for reward in config.rewards)
    before = on_node * count * (image.raw + image.latents)
    after = passes * evaluation_bytes(e.prompts, groups, e.group_size, compares, ranks, image)
    yield Row(name, "an evaluation's images, GB to a node", before / 1e9, after / 1e9)
    yield Row(
        name, "an evaluation's images that one process measures", passes * e.prompts, passes * -(-e.prompts // ranks)
    )


def _judges(
    rewards: Sequence[RewardSpec], prompts: str, images: float, name: str, ranks: int, image: Images, of: str = "a step"
) -> Iterator[Row]:
    asked = questions(rewards, *_prompt_means(prompts))
    if not asked:
        return
    judges = sum(bool(questions([spec], 1, 1)) for spec in rewards)
    yield Row(name, f"requests to judges {of}", images * asked, images * asked)
    before, after = judge_bytes(images, asked, image)
    yield Row(name, f"sent to judges {of}, GB", before / 1e9, after / 1e9)
    yield Row(name, "requests under way at once", *in_flight(judges, ranks))


def _prompt_means(path: str) -> tuple[float, float]:
    """(mean requirements of a prompt, share of prompts that ask for text)."""
    try:
        records = read_prompts(path)
    except UserError:  # a pipeline may name prompts that lie on another machine
        return REQUIREMENTS, 0.0
    # Requirements that a prompt lacks are written by a model when they are needed.
    requirements = texts = 0
    for record in records:
        requirements += len(record.requirements or []) or REQUIREMENTS
        texts += bool(record.texts)
    return requirements / len(records), texts / len(records)


def _class_name(spec: RewardSpec) -> str:
    path = spec.function["class_path"] if isinstance(spec.function, dict) else str(spec.function)
    return path.replace(":", ".").rpartition(".")[2]


def table(path: str, sides: Sequence[int]) -> str:
    """A Markdown table with columns before and after for square images of each of `sides` pixels."""
    config, _ = load_config("run", ["--config", path])
    ranks, on_node = fit.processes(config.launch)
    head = f"| {ranks} processes, {on_node} a node | |"
    rule = "|---|---|"
    for side in sides:
        head += f" {side} px, before | after |"
        rule += "---:|---:|"
    lines = [head, rule]
    for stage in plan.resolve(config):
        by_side = [rows(stage, ranks, on_node, Images(side, side)) for side in sides]
        # the same row of the table at each side
        for same in zip(*by_side, strict=True):
            line = f"| {same[0].stage} | {same[0].what} |"
            for row in same:
                line += f" {_number(row.before)} | {_number(row.after)} |"
            lines.append(line)
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.2g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("pipeline", help="a recipe of posttrain run, whose `launch` says how many processes there are")
    parser.add_argument("--sides", type=int, nargs="+", default=[512, 1024], help="pixels of the images' sides")
    args = parser.parse_args()
    print(table(args.pipeline, args.sides))


if __name__ == "__main__":
    main()
