"""What people answered, as data to train on and as a report of how far they agree.

posttrain annotations --pairs pairs/a --store choices.jsonl --output pairs/human
posttrain annotations --images runs/a --store marks.jsonl --output faults/human

A pair's `chosen` is what the majority preferred and `share` how large that majority is: one vote a person, a tie half a
vote for each image. Pairs that they leave undecided are left out.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

from posttrain.annotate import agreement, marked_images
from posttrain.annotate.answers import read
from posttrain.annotate.config import AnnotationsConfig
from posttrain.errors import UserError, counted
from posttrain.log import log
from posttrain.preferences.dataset import Preference, Skipped, read_preferences
from posttrain.preferences.writer import PreferenceWriter
from posttrain.runs.progress import reading


def write(config: AnnotationsConfig) -> None:
    """The command `posttrain annotations`: print the report and, with an output, write what people answered."""
    stored = read(Path(config.store))
    if (config.images is None) != (stored.schedule.mode == "preference"):
        right = "--pairs" if stored.schedule.mode == "preference" else "--images"
        raise UserError(f"{config.store}: holds answers of mode {stored.schedule.mode}; give {right}")
    if config.images is not None:
        marked_images.write(stored, config.images, config.store, config.output)
        return
    assert config.pairs is not None
    pairs = Pairs(config.pairs, config.max_bad)
    pairs.require(stored.items(), config.store)
    figures = agreement.report(stored.choices, pairs.margins)
    print("\n".join(agreement.report_lines(figures)))
    if config.output is None:
        return
    votes = {pair: share for pair, share in agreement.votes(stored.choices).items() if share != 0.5}
    if not votes:
        raise UserError(f"{config.store}: decides no pair, so there is nothing to write; choose first")
    with PreferenceWriter(config.output, card={"agreement": figures}) as writer:
        for pair in pairs.margins:  # in the set's order, whoever answered first
            if pair in votes:
                writer.add(preferred(pairs[pair], votes[pair]))
    print(
        f"posttrain: wrote {config.output} ({counted(len(votes), 'pair')}, {figures['undecided']} undecided left out)"
    )


def preferred(pair: Preference, share: float) -> Preference:
    """The pair as people see it: `share` of them, not 0.5, preferred its `chosen`. It has no margin: no judge's."""
    swapped: dict[str, Any] = {}
    if share < 0.5:
        for suffix in ("", "_policy", "_on_policy"):
            swapped[f"chosen{suffix}"] = getattr(pair, f"rejected{suffix}")
            swapped[f"rejected{suffix}"] = getattr(pair, f"chosen{suffix}")
    # `replace` hashes the images again in their new order, so a swapped pair has another id.
    return replace(pair, **swapped, source="human", share=max(share, 1 - share), margin=None)


class Pairs:
    """A preference set by id. Reads every image once at the start, so that a bad one is named before anyone waits."""

    def __init__(self, path: str, max_bad: float):
        """Raises UserError, with the rows, if more than a share of max_bad is bad; else warns of those left out."""
        self._set = read_preferences(path, max_bad=max_bad)
        self._mutex = threading.Lock()
        self._rows: dict[str, int] = {}
        self.path = path
        self.prompts: dict[str, str] = {}
        self.margins: dict[str, float | None] = {}
        self.references: dict[str, int] = {}
        """How many each has, for those that have any."""
        tally = self._set.tally()
        # 1024-pixel images take a tenth of a second a pair.
        for i in reading(range(len(self._set)), "pairs"):
            pair = self._set[i]
            if isinstance(pair, Skipped):
                tally.add(pair)
            elif pair.id not in self._rows:
                self._rows[pair.id], self.prompts[pair.id], self.margins[pair.id] = i, pair.prompt, pair.margin
                if pair.references:
                    self.references[pair.id] = len(pair.references)
        if tally.bad or tally.ties:
            counts = f"{counted(len(tally.bad), 'bad row')} and {counted(tally.ties, 'tie')}"
            reasons = f": {tally.first()}" if tally.bad else ""
            log.warning(f"{path}: left out are {counts}{reasons}")

    def __getitem__(self, pair: str) -> Preference:
        """Raises UserError if it cannot be read any more."""
        with self._mutex:  # requests come in several threads, and a table keeps the row group that it read last
            row = self._set[self._rows[pair]]
        if isinstance(row, Skipped):
            raise UserError(f"{row.where}: {row.reason}; restore {self.path} as it was at the start")
        if row.id != pair:
            raise UserError(f"{self.path}: row {self._rows[pair]} has changed; restore it as it was at the start")
        return row

    def require(self, ids: set[str], store: str) -> None:
        """Raise UserError if the store knows pairs that this set does not have."""
        if missing := sorted(ids - self._rows.keys()):
            raise UserError(
                f"{store}: {len(missing)} of the {counted(len(ids), 'pair')} in it cannot be found in {self.path}"
                f" (such as {missing[0]}); give the pairs that it was started with"
            )
