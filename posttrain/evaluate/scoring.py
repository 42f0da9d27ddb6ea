"""Scores of a subject's images by all rewards, kept in OUTPUT/scores/NAME.json so that no image is asked about twice.

A reward that is changed in the recipe scores anew, and all do where an image is another file; a score that failed is
asked for again; one that does not apply is kept as null. Missing is never 0.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from posttrain.config import metric_names
from posttrain.distributed.processes import Processes
from posttrain.errors import UserError, counted
from posttrain.evaluate.config import EvaluateConfig
from posttrain.evaluate.subjects import Images
from posttrain.image_reader import read_image
from posttrain.log import log
from posttrain.runs.files import replace_text
from posttrain.training import image_metrics
from posttrain.training.evaluate import plain
from prompts.records import PromptRecord, columns
from rewards.base import Reward, Scores, score_all

PER_CALL = 8
"""Micro-batches of images in one call of the rewards."""
LOOKS = {
    "image/brightness": image_metrics.brightness,
    "image/saturation": image_metrics.saturation,
    "image/high_frequency": image_metrics.high_frequency,
}


class Scored:
    """What the rewards say of a subject: `rows` by reward and image, and looks by image."""

    def __init__(self, images: Images, rewards: Sequence[Reward], config: EvaluateConfig):
        self.images, self.rewards, self.config = images, rewards, config
        self.file = Path(config.output) / "scores" / f"{images.subject.folder}.json"
        self.digests = {reward.spec.name: digest(reward) for reward in rewards}
        saved = json.loads(self.file.read_text()) if self.file.is_file() else {}
        self.rows: dict[str, dict[str, dict[str, Any] | None]] = {}
        for name, own in self.digests.items():
            kept = saved.get(name) or {}
            # Scores of a reward that has changed would be compared with those of another.
            self.rows[name] = kept["rows"] if kept.get("digest") == own else {}
        self.looks: dict[str, dict[str, Any]] = saved.get("looks") or {}

    def score(self, records: Sequence[PromptRecord], procs: Processes) -> None:
        """Asks for what is missing, some prompts at a time."""
        self._forget_other_files()
        # Whole prompts, never a part of one's images: some rewards compare the images of a prompt.
        count = max(1, PER_CALL * self.config.micro_batch // self.config.images)
        own_columns = columns(records)
        for first in range(0, len(records), count):
            part = range(first, min(first + count, len(records)))
            due = [i for i in part if self._is_due(i)]
            # All processes know the same scores, so they skip a part together and none waits in the exchange below.
            if not due:
                continue
            own = [due[place] for place in procs.local_indices(len(due))]
            answered = self._ask(own, records, own_columns) if own else {}
            for part_of in procs.all_gather(answered):
                for name, rows in part_of.items():
                    (self.looks if name == "looks" else self.rows[name]).update(rows)
            # After each part, so that an evaluation that is stopped keeps the answers that it has paid for.
            if procs.main:
                self._write()
        for name, failed in self.missing().items():
            if failed and procs.main:
                log.warning(
                    f"{self.images.subject.name}: {name} failed for {counted(failed, 'image')}; give the command again"
                )

    def _forget_other_files(self) -> None:
        """What is kept of images that were replaced since."""
        for (i, j), path in self.images.paths.items():
            key = f"{i}-{j}"
            if self.looks.get(key, {}).get("file") != file_digest(path):
                self.looks.pop(key, None)
                for rows in self.rows.values():
                    rows.pop(key, None)

    def _is_due(self, prompt: int) -> bool:
        """Whether something is not known of one of its images."""
        for image in range(self.config.images):
            key = f"{prompt}-{image}"
            if key not in self.looks:
                return True
            for rows in self.rows.values():
                if _is_unknown(rows, key):
                    return True
        return False

    def _ask(
        self, own: Sequence[int], records: Sequence[PromptRecord], own_columns: Mapping[str, Any]
    ) -> dict[str, Any]:
        """By reward and "looks": what is said of each image of these prompts."""
        jobs = list(itertools.product(own, range(self.config.images)))
        keys, images, prompts = [], [], []
        for i, j in jobs:
            keys.append(f"{i}-{j}")
            images.append(read(self.images.paths[i, j]))
            prompts.append(records[i].prompt)
        rows: dict[str, Sequence[Any]] = {}
        for name, column in own_columns.items():
            rows[name] = [column[i] for i, _ in jobs]
        # Those that have answered for all of these are not asked again.
        due = []
        for reward in self.rewards:
            known = self.rows[reward.spec.name]
            if any(_is_unknown(known, key) for key in keys):
                due.append(reward)
        found: dict[str, Any] = {}
        if due:
            scores = asyncio.run(score_all(due, images, prompts, rows, self.config.images))
            for k, name in enumerate(scores.names):
                found[name] = {key: _row(scores, n, k) for n, key in enumerate(keys)}
        found["looks"] = {}
        for job, key, image in zip(jobs, keys, images):
            # Whatever else is known of this file is forgotten when its digest changes.
            looks: dict[str, Any] = {"file": file_digest(self.images.paths[job])}
            pixels = np.asarray(image)[None]
            for name, measure in LOOKS.items():
                looks[name] = float(measure(pixels))
            found["looks"][key] = looks
        return found

    def _write(self) -> None:
        saved: dict[str, Any] = {"looks": self.looks}
        for name, rows in self.rows.items():
            saved[name] = {"digest": self.digests[name], "rows": rows}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        replace_text(self.file, json.dumps(saved) + "\n")

    def missing(self) -> dict[str, int]:
        """By reward, images whose score failed."""
        counts = {}
        for name, rows in self.rows.items():
            counts[name] = sum(map(_has_failed, rows.values()))
        return counts

    def by_prompt(self, name: str) -> np.ndarray:
        """(P,) mean score of each prompt's images, NaN where none has one."""
        return self._means(lambda key: (self.rows[name].get(key) or {}).get("score"))

    def look(self, name: str) -> np.ndarray:
        return self._means(lambda key: self.looks.get(key, {}).get(name))

    def _means(self, value: Any) -> np.ndarray:
        means = np.full(len(self.images.records), np.nan)
        for i in range(len(means)):
            values = [value(f"{i}-{j}") for j in range(self.config.images)]
            known = [v for v in values if v is not None]
            # Images without a score are left out; as 0 they would pull the mean down.
            if known:
                means[i] = np.mean(known)
        return means

    def diversity(self) -> np.ndarray:
        """(P,) of each prompt's images; NaN for one image."""
        found = np.full(len(self.images.records), np.nan)
        if self.config.images == 1:
            return found
        for i in range(len(found)):
            cells = []
            for j in range(self.config.images):
                # One by one, since images in a folder may have different sizes; their cells are of one shape.
                pixels = np.asarray(read(self.images.paths[i, j]))
                cells.append(image_metrics.cells(pixels[None])[0])
            found[i] = image_metrics.diversity_of_cells(np.stack(cells), self.config.images)
        return found


def figures(scored: Scored, rewards: Sequence[Reward]) -> dict[str, np.ndarray]:
    """By name: (P,) of each reward, of the looks, and the diversity where there is one."""
    found = {}
    for reward in rewards:
        found[reward.spec.name] = scored.by_prompt(reward.spec.name)
    for name in LOOKS:
        found[name] = scored.look(name)
    if scored.config.images > 1:
        found[metric_names.DIVERSITY] = scored.diversity()
    return found


def read(path: Path) -> Image.Image:
    try:
        return read_image(path)
    except ValueError as error:
        raise UserError(f"{path}: {error}; draw it again, or replace it") from error


def file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def digest(reward: Reward) -> str:
    """Of what decides a reward's scores in the recipe."""
    spec = reward.spec
    told = asdict(spec) if spec.given is None else {"name": spec.name}
    own = {name: told.get(name) for name in ("function", "scale", "offset", "group")}
    return hashlib.sha256(json.dumps(own, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _is_unknown(rows: Mapping[str, dict[str, Any] | None], key: str) -> bool:
    return key not in rows or _has_failed(rows[key])


def _has_failed(row: Mapping[str, Any] | None) -> bool:
    # None is a reward that does not apply to this prompt: a final answer, which is not asked for again.
    return row is not None and bool(row.get("failed"))


def _row(scores: Scores, n: int, k: int) -> dict[str, Any] | None:
    if scores.failed_NK[n, k]:
        return {"score": None, "failed": True}
    if not scores.valid_NK[n, k]:
        return None
    # Details may be of any type that a reward returns; the file has JSON.
    return plain(scores.details[scores.names[k]][n] or {}) | {"score": float(scores.values_NK[n, k])}
