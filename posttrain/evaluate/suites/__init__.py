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

ABOUT = {
    "geneval2": "GenEval 2 (facebookresearch/GenEval2, CC BY-NC 4.0), scored by Soft-TIFA. Unlike the official scorer,"
    " P(yes) is a share of P(yes) + P(no), and the judge is yours.",
    "dpg": "DPG-Bench (TencentQQGYLab/ELLA; look up the licence of its data there). Unlike the official scorer, the"
    " judge is yours instead of mPLUG, the first row of the file counts, and categories have the answers of all images.",
    "unigenbench": "UniGenBench++ (CodeGoat24/UniGenBench; look up the licence of its data there). Unlike the official"
    " scorer, each test point is a question of its own to your judge, with no written analysis before it.",
    "oneig": "OneIG-Bench (OneIG-Bench/OneIG-Benchmark, data CC BY-NC 4.0), alignment only. Unlike the official scorer,"
    " the judge is yours instead of Qwen2.5-VL-7B, and black images are scored.",
    "longtext": "LongText-Bench (X-Omni/LongText-Bench, Apache-2.0). Unlike the official scorer, the judge is yours"
    " instead of Qwen2.5-VL-7B, and it is asked for lines as JSON.",
    "compbench": "A JSON list of prompts with questions, such as those of T2I-CompBench (Karine-Huang/T2I-CompBench,"
    " MIT), scored by the product of BLIP-VQA. Unlike there, questions are yours and no product is rounded.",
    "rubric": "Your own prompts and requirements, scored by P(yes) of each requirement.",
}
"""Source, licence of the data, and differences from the official scorer."""

QUESTIONS = "rewards.image.Questions"
REWARDS: dict[str, dict[str, Any]] = {
    "geneval2": {"class_path": QUESTIONS, "init_args": {}},
    "dpg": {"class_path": QUESTIONS, "init_args": {"hard": True, "chain": True}},
    "unigenbench": {"class_path": QUESTIONS, "init_args": {"hard": True}},
    "oneig": {"class_path": QUESTIONS, "init_args": {"hard": True}},
    "longtext": {"class_path": "rewards.image.OCR", "init_args": {}},
    "compbench": {"class_path": QUESTIONS, "init_args": {}},
    "rubric": {"class_path": "rewards.image.Rubric", "init_args": {}},
}

Reader = Callable[[str], list[PromptRecord]]
Figures = Callable[[Sequence[PromptRecord], Sequence[dict[str, Any]]], dict[str, float | None]]

SUITES: dict[str, tuple[Reader, Figures]] = {
    "geneval2": (files.geneval2, figures.geneval2),
    "dpg": (files.dpg, figures.dpg),
    "unigenbench": (files.unigenbench, figures.unigenbench),
    "oneig": (files.oneig, figures.oneig),
    "longtext": (files.longtext, figures.longtext),
    "compbench": (files.compbench, figures.compbench),
    "rubric": (files.rubric, figures.rubric),
}

KINDS: tuple[str, ...] = tuple(SUITES)


@dataclass(frozen=True)
class Suite:
    kind: str
    records: list[PromptRecord]
    reward: dict[str, Any] | None
    """`function` of a RewardSpec without its judge."""
    about: str

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
    return Suite(kind, SUITES[kind][0](path), REWARDS[kind], ABOUT[kind])
