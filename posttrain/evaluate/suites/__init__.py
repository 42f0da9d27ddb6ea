"""Public benchmarks as suites: their prompts and questions, read from the files that a user brings, the reward that
scores an image, and the figures that their authors report.

    suite = read("geneval2", "geneval2_data.jsonl")
    figures = suite.aggregate(rows)

No data comes with this package. docs/evaluate.md has each suite's source, licence and differences from its own scorer.
Never imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.errors import UserError
from posttrain.evaluate.suites import figures, files
from prompts.records import PromptRecord

__all__ = ["KINDS", "Suite", "read"]

Reader = Callable[[str], list[PromptRecord]]
Figures = Callable[[Sequence[PromptRecord], Sequence[dict[str, Any]]], dict[str, float | None]]

QUESTIONS = "rewards.image.Questions"
SUITES: dict[str, tuple[Reader, Figures, str, dict[str, Any], str]] = {
    "geneval2": (
        files.geneval2, figures.geneval2, QUESTIONS, {},
        "GenEval 2 (facebookresearch/GenEval2, CC BY-NC 4.0), scored by Soft-TIFA. Unlike the official scorer, P(yes)"
        " is a share of P(yes) + P(no), and the judge is yours.",
    ),
    "dpg": (
        files.dpg, figures.dpg, QUESTIONS, {"hard": True, "chain": True},
        "DPG-Bench (TencentQQGYLab/ELLA; look up the licence of its data there). Unlike the official scorer, the judge"
        " is yours instead of mPLUG, the file's first row counts, and categories have the answers about all images.",
    ),
    "unigenbench": (
        files.unigenbench, figures.unigenbench, QUESTIONS, {"hard": True},
        "UniGenBench++ (CodeGoat24/UniGenBench; look up the licence of its data there). Unlike the official scorer,"
        " each test point is a question of its own to your judge, with no written analysis before it.",
    ),
    "oneig": (
        files.oneig, figures.oneig, QUESTIONS, {"hard": True},
        "OneIG-Bench (OneIG-Bench/OneIG-Benchmark, data CC BY-NC 4.0), alignment only. Unlike the official scorer, the"
        " judge is yours instead of Qwen2.5-VL-7B, and black images are scored.",
    ),
    "longtext": (
        files.longtext, figures.longtext, "rewards.image.OCR", {},
        "LongText-Bench (X-Omni/LongText-Bench, Apache-2.0). Unlike the official scorer, the judge is yours instead of"
        " Qwen2.5-VL-7B, and it is asked for lines as JSON.",
    ),
    "compbench": (
        files.compbench, figures.compbench, QUESTIONS, {},
        "A JSON list of prompts with questions, such as those of T2I-CompBench (Karine-Huang/T2I-CompBench, MIT),"
        " scored by the product of its BLIP-VQA. Unlike there, the questions and the judge are yours.",
    ),
    "rubric": (
        files.rubric, figures.rubric, "rewards.image.Rubric", {},
        "Your own prompts and requirements, scored by P(yes) of each requirement.",
    ),
}  # fmt: skip
"""Reader, figures, class and arguments of the reward, and `Suite.about`."""

KINDS: tuple[str, ...] = tuple(SUITES)


@dataclass(frozen=True)
class Suite:
    kind: str
    records: list[PromptRecord]
    reward: dict[str, Any]
    """`function` of a RewardSpec without its judge."""
    about: str
    """Source, licence of the data, and differences from the official scorer."""

    def aggregate(self, rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
        """The suite's figures in [0, 1], by name; `answered` is the number of images that were scored, `prompts` that
        of prompts with such an image. None: no image was scored.

        Each row is of one scored image: `prompt` (index of its record), `score`, and the details of the suite's reward.
        An image that could not be scored has no row.
        """
        found = SUITES[self.kind][1](self.records, rows)
        prompts = {row["prompt"] for row in rows}
        return {**found, "answered": float(len(rows)), "prompts": float(len(prompts))}


def read(kind: str, path: str) -> Suite:
    """A suite from its public file. Raises UserError with file, line and field for what does not fit."""
    if kind not in SUITES:
        raise UserError(f"suite: kind: there is no {kind!r}; use one of {', '.join(KINDS)}")
    reader, _, reward, arguments, about = SUITES[kind]
    return Suite(kind, reader(path), {"class_path": reward, "init_args": dict(arguments)}, about)
