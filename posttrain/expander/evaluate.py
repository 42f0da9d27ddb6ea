"""Evaluation of an expander on held-out short prompts: the same prompts, seeds and noise each time.

| figure | what it is |
|---|---|
| NAME | mean of a reward of the recipe, gated; held-out rewards over the pictures that were drawn |
| diversity | mean distance of two pictures of a prompt, in the features of the diversity reward |
| format, format/CAUSE, safe | shares of the expansions |
| text/length | mean tokens of an expansion |
| text/distinct1, text/distinct2 | share of different words (pairs of words) among all of a prompt's expansions |
| text/spread | mean distance of two expansions of a prompt, 1 - cosine of the base model's mean hidden states |
| text/verbatim | share of the expansions that keep all of the prompt's quoted text, of those whose prompt has some |

Means of a group's figure are over the prompts where there is one.

Processes share it: each writes whole batches of expansions, then draws and scores whole groups. Texts and numbers go to
all of them; images, of the prompts that are shown, to the main one.
"""

from __future__ import annotations

import functools
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
from posttrain.expander.gdpo_config import ExpanderEvalConfig
from posttrain.expander.score import Expansion, Scored, Scorer, joined
from posttrain.expander.text_metrics import distinct, quoted, verbatim
from posttrain.model import sampler
from posttrain.training.judge_check import SHOWN
from posttrain.validate_gdpo import DIVERSITY
from prompts.records import PromptRecord

BATCH = 64
"""Expansions that are written together."""
Write = Callable[[Sequence[PromptRecord], int, int], list[Expansion]]
"""Samples expansions, the given number of neighbours for each record; the first is of the given number of all."""
Embed = Callable[[Sequence[str]], Tensor]
"""Texts to (N, E) features."""


@dataclass
class ExpanderEvaluation:
    figures: dict[str, float | None]
    expansions: list[Expansion]
    scored: Scored
    """Its images are those of the first prompts, on the main process: as many as are shown or judges are tried on."""


class ExpanderEvaluator:
    """Held-out prompts with fixed noise; `write` is expected to sample alike each time it is called."""

    def __init__(
        self,
        records: Sequence[PromptRecord],
        config: ExpanderEvalConfig,
        scorer: Scorer,
        write: Write,
        embed: Embed,
        procs: Processes,
    ):
        self.records, self.config, self.scorer = list(records[: config.prompts]), config, scorer
        self.write, self.embed, self.procs = write, embed, procs
        self.seeds = [sampler.seed_for(config.seed, i) for i in range(len(self.records))]

    def __call__(self) -> ExpanderEvaluation:
        size, groups = self.config.group_size, self.procs.local_indices(len(self.records))
        expansions = self._write()
        places = [g * size + j for g in groups for j in range(size)]
        scored, spreads = None, []
        if places:  # there may be more processes than prompts
            mine = [expansions[place] for place in places]
            scored = self.scorer(mine, [self.seeds[place // size] for place in places], size, heldout=True)
            spreads = [spread(features) for features in self.embed([e.text for e in mine]).split(size)]
        every = self._joined(places, scored)
        figures = self._figures(expansions, every) | {"text/spread": _mean(self.procs.gather_in_order(spreads))}
        return ExpanderEvaluation(figures, expansions, every)

    def _write(self) -> list[Expansion]:
        """All expansions. Each process samples whole batches, since a batch's noise is drawn together."""
        size = self.config.group_size
        count = max(1, BATCH // size)
        firsts = range(0, len(self.records), count)
        mine = [firsts[i] for i in self.procs.local_indices(len(firsts))]
        written = [self.write(self.records[first : first + count], size, first * size) for first in mine]
        return list(itertools.chain(*self.procs.gather_in_order(written)))

    def _joined(self, places: Sequence[int], scored: Scored | None) -> Scored:
        """What all processes scored; the images of the first prompts go to the main one."""
        part, images = None, {}
        if scored is not None:
            last = max(self.config.shown, SHOWN) * self.config.group_size
            shown = [(place, image) for place, image in zip(places, scored.images_N) if place < last]
            images = {place: image for place, image in shown if image is not None}
            part = replace(scored, images_N=[], features=None)
        parts = [each for each in self.procs.all_gather((places, part)) if each[1] is not None]
        gathered = self.procs.gather(images) or []
        return joined(parts, functools.reduce(dict.__or__, gathered, {}))

    def _figures(self, expansions: Sequence[Expansion], scored: Scored) -> dict[str, float | None]:
        size = self.config.group_size
        found: dict[str, float | None] = {}
        for k, name in enumerate(scored.names):
            if name != DIVERSITY:
                values = scored.values_NK[scored.valid_NK[:, k], k]
                found[name] = float(values.mean()) if len(values) else None
        gate = scored.gate_N
        ks = scored.names.index(DIVERSITY)
        groups = [slice(i, i + size) for i in range(0, len(expansions), size)]
        distances = [
            scored.values_NK[group, ks][mine].mean()
            for group in groups
            if (mine := scored.valid_NK[group, ks] & (gate[group] > 0)).any()
        ]
        found[DIVERSITY] = _mean(distances)
        shares = scored.figures(size)
        found |= {name: shares[name] for name in shares if name.startswith(("format", "safe", "cut", "missing"))}
        texts = [e.text for e in expansions]
        kept = [verbatim(e.record.texts or quoted(e.record.prompt), e.text) for e in expansions]
        return found | {
            "text/length": _mean([e.tokens for e in expansions]),
            "text/distinct1": _mean([distinct(texts[group], 1) for group in groups]),
            "text/distinct2": _mean([distinct(texts[group], 2) for group in groups]),
            "text/verbatim": _mean(kept),
        }

    def save(self, folder: Path, step: int, evaluation: ExpanderEvaluation) -> None:
        """Pictures and texts of the prompts that the report shows: groups/step-000000/00-00.png and groups.json."""
        size = self.config.group_size
        directory = folder / f"step-{step:06d}"
        directory.mkdir(parents=True, exist_ok=True)
        table: list[dict[str, Any]] = []
        for g, record in enumerate(self.records[: self.config.shown]):
            rows: list[dict[str, Any]] = []
            for j in range(size):
                i = g * size + j
                image, name = evaluation.scored.images_N[i], f"{g:02d}-{j:02d}.png"
                if image is not None:
                    image.save(directory / name)
                faults = evaluation.scored.causes_N[i] + evaluation.scored.unsafe_N[i]
                rows.append(
                    {
                        "text": evaluation.expansions[i].text,
                        "file": name if image is not None else None,
                        "faults": faults,
                    }
                )
            table.append({"prompt": record.prompt, "expansions": rows})
        (directory / "groups.json").write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n")


def spread(features_NE: Tensor) -> float:
    """Mean of 1 - cosine over the pairs of a group, in [0, 2]."""
    n = len(features_NE)
    unit = torch.nn.functional.normalize(features_NE.double(), dim=-1)
    return float((n - unit.sum(0).square().sum() / n) / (n - 1))


def _mean(values: Sequence[float | bool | None]) -> float | None:
    there = [float(value) for value in values if value is not None]
    return float(np.mean(there)) if there else None
