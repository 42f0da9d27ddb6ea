"""What grows with the number of processes: bytes, requests and memory of a pipeline's stages, before and after.

    python -m posttrain.pipeline.ranks recipes/k2/pipeline_64.yaml

A model of the traffic, from the recipes alone: nothing is loaded or run, and a test holds it against the bytes that
four processes sent. `before` is commit 7d01825: every process got all images of an evaluation and of a turn of pairs,
an image travelled with each question about it, each process had its own 32 requests of a judge, and the main process
evaluated an expander alone. Bytes of a node are what its processes receive. Images are taken to be all kept (pairs),
and to compress by half, as PNG and as WebP; base64 takes a third more.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain import cli
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
"""Of an image's raw bytes, as PNG or lossless WebP: photographs have 0.4 to 0.6."""
TEXT_BYTES = 500
"""Of a request without an image."""
REQUIREMENTS = 4
"""Of a prompt that has none yet."""
WIDTH, TEXT = 6144, fit.TEXT
"""Of K2's fused text, in bfloat16, and tokens of a prompt."""
OLD_CONCURRENCY, OLD_TEXTS = 32, 2048


@dataclass(frozen=True)
class Row:
    """One line of the table, in the unit that `what` names."""

    stage: str
    what: str
    before: float
    after: float


@dataclass(frozen=True)
class Images:
    """Bytes of an image."""

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
        """As a judge gets it: a stored PNG up to 512 x 512 pixels, WebP above."""
        return self.raw * (1.0 if self.height * self.width <= SMALL else COMPRESSED) * 4 / 3


def evaluation_bytes(prompts: int, groups: int, group_size: int, compares: bool, ranks: int, image: Images) -> int:
    """Of images, that an evaluation sends between processes, of one way to draw: those shown go to the main process;
    those of groups to the process that scores the group, if a reward compares its images."""
    shown = sum(i % ranks != 0 for i in range(min(SHOWN, prompts)))
    apart = sum(i % ranks != i // group_size % ranks for i in range(groups * group_size)) if compares else 0
    return (shown + apart) * image.raw


def questions(rewards: Sequence[RewardSpec], requirements: float, texts: float) -> float:
    """Questions that all judges of a recipe are asked about an image, on average."""
    counts = {"Rubric": requirements, "OCR": texts, "Aesthetic": 1.0, "Artifact": 1.0, "ImageJudge": 1.0}
    names = [_class(spec) for spec in rewards]
    return sum(counts.get(name, 0.0) for name in names)


def judge_bytes(images: float, asked: float, image: Images) -> tuple[float, float]:
    """Sent to judges for so many images with `asked` questions each: with each question, and once."""
    once = images * (image.sent + (asked - 1) * TEXT_BYTES) if asked else 0.0
    return images * asked * (image.sent + TEXT_BYTES), once


def in_flight(judges: int, ranks: int) -> tuple[int, int]:
    """Requests under way at once, of all processes."""
    after = max(1, Judge.concurrency // ranks) * ranks
    return judges * OLD_CONCURRENCY * ranks, judges * after


def rows(stage: plan.Stage, ranks: int, on_node: int, image: Images) -> Iterator[Row]:
    """What grows in one stage."""
    config, name = stage.config, stage.name
    if stage.command == "pairs":
        yield from _pairs(config, name, ranks, on_node, image)
    if stage.command in plan.TRAINING:
        yield from _evaluation(config, name, ranks, on_node, image, stage.command)
    if stage.command == "grpo":
        count = config.groups.prompts_per_step * config.groups.group_size
        specs = [spec for spec in config.rewards if not spec.heldout_only]
        yield from _judges(specs, config.prompts.train, count, name, ranks, image)
    if stage.command == "tdm":
        text = 2 * WIDTH * TEXT
        yield Row(name, "fused texts, GiB of each GPU", OLD_TEXTS * text / 2**30, 0.0)
        yield Row(name, "fused texts, GiB of each process's RAM", 0.0, FUSED_BYTES / 2**30)
    if stage.command == "expander gdpo":
        prompts, each = config.eval.prompts, config.eval.group_size
        yield Row(name, "an evaluation's images that one GPU draws", prompts * each, -(-prompts // ranks) * each)
        count = config.groups.prompts_per_step * config.groups.group_size
        trained = [spec for spec in config.rewards if not spec.heldout_only]
        specs = [*trained, *(RewardSpec(c.name, c.function) for c in config.safety if c.sees == "image")]
        yield from _judges(specs, config.prompts.train, count, name, ranks, image)


def _pairs(config: Any, name: str, ranks: int, on_node: int, image: Images) -> Iterator[Row]:
    block = 2 * config.block
    yield Row(name, "a turn's images, GB to a node", on_node * ranks * block * image.raw / 1e9,
              (ranks - 1) * block * image.raw * COMPRESSED / 1e9)  # fmt: skip
    own = 2 * len(config.sizes) * block * image.raw  # being drawn, and of the turn before, being scored
    yield Row(name, "images in the main process's memory, GB", ranks * block * image.raw / 1e9,
              (own + BACKLOG + block * image.raw * COMPRESSED) / 1e9)  # fmt: skip
    yield Row(name, "a turn's images that one process encodes as PNG", ranks * block, block)
    drawn = [source.judged.group_size if source.judged else 2 for source in config.sources]
    mean = sum(count * source.share for count, source in zip(drawn, config.sources))
    mean /= sum(source.share for source in config.sources)
    yield from _judges(config.rewards, config.prompts, ranks * config.block * mean, name, ranks, image, "a turn")


def _evaluation(config: Any, name: str, ranks: int, on_node: int, image: Images, command: str) -> Iterator[Row]:
    e = config.eval
    ways = len(config.student.steps) if command == "tdm" else len(e.guidance)
    groups = min(e.groups, e.prompts)
    count = ways * (e.prompts + groups * e.group_size)
    compares = any(reward.group for reward in config.rewards)
    before = on_node * count * (image.raw + image.latents)
    after = ways * evaluation_bytes(e.prompts, groups, e.group_size, compares, ranks, image)
    yield Row(name, "an evaluation's images, GB to a node", before / 1e9, after / 1e9)
    yield Row(name, "an evaluation's images that one process measures", ways * e.prompts, ways * -(-e.prompts // ranks))


def _judges(
    rewards: Sequence[RewardSpec], prompts: str, images: float, name: str, ranks: int, image: Images, of: str = "a step"
) -> Iterator[Row]:
    asked = questions(rewards, *_asked(prompts))
    if not asked:
        return
    judges = sum(bool(questions([spec], 1, 1)) for spec in rewards)
    yield Row(name, f"requests to judges {of}", images * asked, images * asked)
    before, after = judge_bytes(images, asked, image)
    yield Row(name, f"sent to judges {of}, GB", before / 1e9, after / 1e9)
    yield Row(name, "requests under way at once", *in_flight(judges, ranks))


def _asked(path: str) -> tuple[float, float]:
    """Requirements of a prompt, and the share of prompts that ask for text."""
    try:
        records = read_prompts(path)
    except UserError:
        return REQUIREMENTS, 0.0
    counts = [len(record.requirements or []) or REQUIREMENTS for record in records]
    return sum(counts) / len(records), sum(bool(record.texts) for record in records) / len(records)


def _class(spec: RewardSpec) -> str:
    path = spec.function if isinstance(spec.function, str) else spec.function["class_path"]
    return path.replace(":", ".").rpartition(".")[2]


def table(path: str, sides: Sequence[int]) -> str:
    """Markdown, with a column before and after for square images of each of `sides` pixels."""
    config, _ = cli.load_config("run", ["--config", path])
    ranks, on_node = fit.processes(config.launch)
    head = "".join(f" {side} px, before | after |" for side in sides)
    lines = [f"| {ranks} processes, {on_node} a node | |{head}", "|---|---|" + "---:|" * 2 * len(sides)]
    for stage in plan.resolve(config):
        by_side = [list(rows(stage, ranks, on_node, Images(side, side))) for side in sides]
        for same in zip(*by_side, strict=True):
            cells = "".join(f" {_number(row.before)} | {_number(row.after)} |" for row in same)
            lines.append(f"| {same[0].stage} | {same[0].what} |{cells}")
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
