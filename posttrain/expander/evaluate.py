"""Evaluates an expander on held-out short prompts, with the same prompts, seeds and noise each time.

| figure | what it is |
|---|---|
| NAME | mean of a reward of the recipe, gated; for heldout_only rewards, over the images that were drawn |
| diversity | mean distance of two images of a prompt, in the features of the diversity reward |
| format, format/CAUSE, safe | shares of the expansions |
| text/length | mean number of tokens of an expansion |
| text/distinct1, text/distinct2 | share of different words (pairs of words) among all of a prompt's expansions |
| text/spread | mean distance of two expansions of a prompt, 1 - cosine of the base model's mean hidden states |
| text/verbatim | share of the expansions that keep all quoted text, among prompts that quote text |
| thought/tokens, thought/empty | of an expander that thinks: mean tokens of a thought, share of answers without one |

A figure of groups is the mean over the prompts for which it is defined.

Processes share the work: each writes whole batches of expansions, then draws and scores whole groups. Texts and numbers
go to all processes, images of the prompts that are shown to the main one.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from posttrain.distributed.processes import Processes
from posttrain.expander import thinking
from posttrain.expander.gdpo_config import DIVERSITY, ExpanderEvalConfig
from posttrain.expander.score import Expansion, Scored, Scorer, merge
from posttrain.expander.text_metrics import distinct, quoted, verbatim
from posttrain.model import sampler
from posttrain.training.judge_check import SHOWN
from prompts.records import PromptRecord

BATCH = 64
"""Expansions that are generated together."""
Write = Callable[[Sequence[PromptRecord], int, int], list[Expansion]]
"""(records, n, first) -> n expansions for each record; `first` is the index of the first among all expansions."""
Embed = Callable[[Sequence[str]], Tensor]
"""Texts to (N, E) features."""


@dataclass
class ExpanderEvaluation:
    figures: dict[str, float | None]
    expansions: list[Expansion]
    scored: Scored
    """Holds images only on the main process, and only of the first prompts: those that are shown or judges try."""


class ExpanderEvaluator:
    """Evaluates held-out prompts with fixed noise; `write` must sample the same way at each call."""

    def __init__(
        self,
        records: Sequence[PromptRecord],
        config: ExpanderEvalConfig,
        scorer: Scorer,
        write: Write,
        embed: Embed,
        procs: Processes,
        thinks: bool = False,
    ):
        self.records, self.config, self.scorer = list(records[: config.prompts]), config, scorer
        self.write, self.embed, self.procs, self.thinks = write, embed, procs, thinks
        # One noise for a prompt, the same in each evaluation.
        self.seeds = [sampler.seed_for(config.seed, i) for i in range(len(self.records))]

    def __call__(self) -> ExpanderEvaluation:
        size = self.config.group_size
        expansions = self._write()
        # This process's expansions, in whole groups.
        indices: list[int] = []
        own: list[Expansion] = []
        seeds: list[int] = []
        for g in self.procs.local_indices(len(self.records)):
            group = range(g * size, (g + 1) * size)
            indices += group
            own += expansions[group.start : group.stop]
            seeds += [self.seeds[g]] * size  # a group shares its noise
        scored, spreads = None, []
        if own:  # there may be more processes than prompts
            scored = self.scorer(own, seeds, size, heldout=True)
            features = self.embed([e.text for e in own])
            spreads = list(map(spread, features.split(size)))
        merged = self._merge(indices, scored)
        figures = self._figures(expansions, merged) | {"text/spread": _mean(self.procs.gather_in_order(spreads))}
        return ExpanderEvaluation(figures, expansions, merged)

    def _write(self) -> list[Expansion]:
        """All expansions. Each process samples whole batches, since one generator draws a whole batch."""
        size = self.config.group_size
        count = max(1, BATCH // size)
        firsts = range(0, len(self.records), count)
        written = []
        for i in self.procs.local_indices(len(firsts)):
            first = firsts[i]
            written.append(self.write(self.records[first : first + count], size, first * size))
        return list(itertools.chain(*self.procs.gather_in_order(written)))

    def _merge(self, indices: Sequence[int], scored: Scored | None) -> Scored:
        """The scores of all processes; the images of the first prompts go to the main process."""
        part, images = None, {}
        if scored is not None:
            end = max(self.config.shown, SHOWN) * self.config.group_size
            for i, image in zip(indices, scored.images_N):
                if i < end and image is not None:
                    images[i] = image
            # Images are large, so they travel only to the main process.
            part = replace(scored, images_N=[], features=None)
        parts = [pair for pair in self.procs.all_gather((indices, part)) if pair[1] is not None]
        all_images: dict[int, Any] = {}
        for gathered in self.procs.gather(images) or []:
            all_images |= gathered
        return merge(parts, all_images)

    def _figures(self, expansions: Sequence[Expansion], scored: Scored) -> dict[str, float | None]:
        size = self.config.group_size
        result: dict[str, float | None] = {}
        for k, name in enumerate(scored.names):
            if name != DIVERSITY:
                values = scored.values_NK[scored.valid_NK[:, k], k]
                result[name] = float(values.mean()) if len(values) else None
        k = scored.names.index(DIVERSITY)
        # A gated expansion has diversity 0 as a penalty, which is not a distance.
        measured_N = scored.valid_NK[:, k] & (scored.gate_N > 0)
        texts, lengths, kept = [], [], []
        for e in expansions:
            texts.append(e.text)
            lengths.append(e.tokens)
            kept.append(verbatim(e.record.texts or quoted(e.record.prompt), e.text))
        # Groups first and then their mean, so that a prompt with a gated expansion counts as much as any other.
        distances, distinct1, distinct2 = [], [], []
        for first in range(0, len(expansions), size):
            group = slice(first, first + size)
            values = scored.values_NK[group, k][measured_N[group]]
            distances.append(values.mean() if len(values) else None)
            distinct1.append(distinct(texts[group], 1))
            distinct2.append(distinct(texts[group], 2))
        result[DIVERSITY] = _mean(distances)
        for name, share in scored.figures(size).items():
            if name.startswith(("format", "safe", "cut", "missing")):
                result[name] = share
        if self.thinks:
            result |= thinking.figures([e.thought for e in expansions], [e.thought_tokens for e in expansions])
        return result | {
            "text/length": _mean(lengths),
            "text/distinct1": _mean(distinct1),
            "text/distinct2": _mean(distinct2),
            "text/verbatim": _mean(kept),
        }

    def save(self, folder: Path, step: int, evaluation: ExpanderEvaluation) -> None:
        """Writes the images and texts that the report shows: groups/step-000000/00-00.png and groups.json."""
        size = self.config.group_size
        directory = folder / f"step-{step:06d}"
        directory.mkdir(parents=True, exist_ok=True)
        table: list[dict[str, Any]] = []
        for g, record in enumerate(self.records[: self.config.shown]):
            rows: list[dict[str, Any]] = []
            for j in range(size):
                i, file = g * size + j, None
                if (image := evaluation.scored.images_N[i]) is not None:
                    file = f"{g:02d}-{j:02d}.png"
                    image.save(directory / file)
                faults = evaluation.scored.causes_N[i] + evaluation.scored.unsafe_N[i]
                expansion = evaluation.expansions[i]
                thought = {"thought": expansion.thought} if expansion.thought else {}
                rows.append({"text": expansion.text, "file": file, "faults": faults, **thought})
            table.append({"prompt": record.prompt, "expansions": rows})
        (directory / "groups.json").write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n")


def spread(features_NE: Tensor) -> float:
    """Mean of 1 - cosine over the pairs of a group, in [0, 2]."""
    n = len(features_NE)
    unit = torch.nn.functional.normalize(features_NE.double(), dim=-1)
    # The sum of all n^2 cosines is |sum of unit vectors|^2; n of them are of a vector with itself.
    return float((n - unit.sum(0).square().sum() / n) / (n - 1))


def _mean(values: Sequence[float | bool | None]) -> float | None:
    known = [float(value) for value in values if value is not None]
    return float(np.mean(known)) if known else None
