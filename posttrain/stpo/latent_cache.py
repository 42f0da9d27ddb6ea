"""Latents and fused text of a set of pairs, encoded once and kept on disk (training/shard_cache.py).

A shard also says why some of its rows are no pairs. Reading opens the file of a row, and holds no latents in memory.

Legend: B pairs of a micro-batch, N image tokens, L text tokens, C channels.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from posttrain.distributed.processes import Processes
from posttrain.errors import UserError, counted
from posttrain.log import log
from posttrain.model import sampler
from posttrain.model.k2 import K2, Text
from posttrain.model.references import KAPPA, MOST, References
from posttrain.preferences.dataset import Preference, Preferences
from posttrain.preferences.sources import Skipped, Tally
from posttrain.references.draw import check_strengths
from posttrain.references.shown import LONGEST, scaled
from posttrain.runs import startup
from posttrain.stpo.config import PairSetConfig
from posttrain.stpo.losses import label
from posttrain.training.shard_cache import Shards, facts_of, warn_of_cut

VERSION = 3  # 1: images were read without their orientation and transparency; 2: without references

Grids = tuple[tuple[int, int], ...]
"""(rows, columns) of tokens of each reference."""


@dataclass
class EncodedPair:
    chosen: Tensor
    """(N, C) latents in fp32."""
    rejected: Tensor
    text: Tensor
    """What `K2.text_tokens` gives, in the network's type."""
    label: float
    size: tuple[int, int]
    references: list[Tensor]
    """(N_i, C) latents of each, in fp32."""


@dataclass
class Batch:
    """Pairs of one size, noised, for one forward."""

    x_w: Tensor
    """(B, N, C) latents at t."""
    x_l: Tensor
    target_w: Tensor
    """(B, N, C) the target velocity."""
    target_l: Tensor
    t: Tensor
    """(B,)"""
    text: Text
    """Of both images, 2 B."""
    label: Tensor
    """(B,) how sure the preference is, see `losses.label`."""
    size: tuple[int, int]
    jobs: list[int]
    """Which of the pairs that were asked for, in their order."""
    shown: References | None
    """The references of both images."""


@dataclass
class Job:
    """A pair to noise."""

    pair: int
    n: float
    """Standard normal, which its time is made of."""
    seed: int
    """Of its noise."""
    dropped: bool
    """Its prompt is the empty one."""


class EncodedPairs:
    """The pairs of a set, each read when it is asked for; numbers count pairs, not rows."""

    def __init__(self, shards: Shards, heldout: float, tally: Tally):
        self.folder, self.fingerprint = shards.folder, shards.folder.name
        self.tally, self._shards = tally, shards
        self.cuts: list[int] = []
        """Tokens that did not fit, of each prompt of which some did not."""
        self.shown: list[tuple[Grids, tuple[float, ...]]] = []
        """Of each pair the grids of its references, and their strengths."""
        rows, texts, sizes, labels, prompts = [], [], [], [], []
        for made in shards.made():
            for row, text, height, width, share, digest, grids, strengths in made["pairs"]:
                rows.append(row)
                texts.append(text)
                sizes.append((height, width))
                labels.append(share)
                prompts.append(digest)
                # JSON has made lists of tuples.
                self.shown.append((tuple(map(tuple, grids)), tuple(strengths)))
            self.cuts += made["cuts"]
            for values in made["skipped"]:
                tally.add(Skipped(*values))
        # Arrays: of a large set lists would take many times the memory.
        self._row, self._text = np.array(rows, np.int32), np.array(texts, np.int32)
        self.size, self.label = np.array(sizes, np.int32).reshape(-1, 2), np.array(labels, np.float32)
        prompt = np.array(prompts, np.int64)
        # Whole prompts are held out: images of one prompt are alike. Hashes are in no order of the set.
        hashes = np.unique(prompt)
        is_heldout = np.isin(prompt, hashes[: max(1, round(heldout * len(hashes)))])
        self.heldout, self.train = np.flatnonzero(is_heldout), np.flatnonzero(~is_heldout)

    def __getitem__(self, i: int) -> EncodedPair:
        row, (height, width) = self._row[i], self.size[i].tolist()
        read = functools.partial(self._shards.read, row)
        chosen, rejected, text = read(f"{row}.chosen"), read(f"{row}.rejected"), read(f"text.{self._text[i]}")
        references = [read(f"{row}.reference.{j}") for j in range(len(self.shown[i][0]))]
        return EncodedPair(chosen, rejected, text, float(self.label[i]), (height, width), references)


def encode_pairs(k2: K2, preferences: Preferences, config: PairSetConfig, procs: Processes) -> EncodedPairs:
    """Encodes what is not in the cache yet, and says how many rows were left out and why.

    Raises UserError for too many bad rows, too few prompts, a full disk, or a folder made of something else.
    """
    startup.lap("prepare")
    facts = {
        "version": VERSION,
        "pairs": preferences.fingerprint(),
        "size": config.size,
        "max_tokens": config.max_tokens,
        **facts_of(k2),
    }
    shards = Shards.claim(config.cache, "pairs.cache", len(preferences), facts, procs)
    tally = preferences.tally()

    def encode(number: int) -> None:
        for row in _encode(k2, preferences, config, shards, number):
            tally.add(row)

    shards.fill("pairs", encode, procs)
    pairs = EncodedPairs(shards, config.heldout, preferences.tally())
    if not len(pairs.train):
        raise UserError(f"{preferences.path}: all pairs are of one prompt, which is held out; add others")
    if procs.main:
        _say(preferences, pairs, config.max_tokens)
    startup.lap("encode")
    return pairs


def noised(
    k2: K2, pairs: EncodedPairs, jobs: Sequence[Job], micro_batch: int, time_mean: float, time_std: float
) -> list[Batch]:
    """Micro-batches, each of one size and with references of the same sizes, of pairs with one time and one noise for
    both images."""
    # Encoded only where it is needed, as the text encoder may be offloaded.
    null = k2.text([""]).tokens[0] if any(job.dropped for job in jobs) else torch.empty(0)
    alike: dict[Any, list[int]] = {}
    for j, job in enumerate(jobs):
        height, width = pairs.size[job.pair].tolist()
        grids, _ = pairs.shown[job.pair]
        alike.setdefault((height, width, grids), []).append(j)
    batches = []
    for (height, width, grids), members in alike.items():
        for first in range(0, len(members), micro_batch):
            chosen = members[first : first + micro_batch]
            part = [jobs[j] for j in chosen]
            read = [pairs[job.pair] for job in part]  # from disk
            x_w = torch.stack([pair.chosen for pair in read]).to(k2.device)
            x_l = torch.stack([pair.rejected for pair in read]).to(k2.device)
            n = torch.tensor([job.n for job in part], device=k2.device)
            t = sampler.logit_normal(n, time_mean, time_std, k2.mu(height, width))
            noise = sampler.noise([job.seed for job in part], x_w.shape[1:]).to(k2.device)
            texts = []
            for job, pair in zip(part, read):
                texts.append(null if job.dropped else pair.text.to(k2.device))
            strengths = [pairs.shown[job.pair][1] for job in part]
            # One noise and one time for both images: the difference of their errors is then due to the images alone.
            batches.append(
                Batch(
                    sampler.noised(x_w, noise, t),
                    sampler.noised(x_l, noise, t),
                    sampler.velocity_target(x_w, noise),
                    sampler.velocity_target(x_l, noise),
                    t,
                    Text.of(texts * 2),
                    torch.tensor([pair.label for pair in read], device=k2.device),
                    (height, width),
                    chosen,
                    _shown(k2, read, grids, strengths) if grids else None,
                )
            )
    return batches


def _shown(k2: K2, read: Sequence[EncodedPair], grids: Grids, strengths: Sequence[tuple[float, ...]]) -> References:
    """The references of pairs that have as many, of the same sizes."""
    by_pair = [pair.references for pair in read]
    latents = []
    for column in zip(*by_pair):  # the first references of all pairs, then the second ones
        latents.append(torch.stack(column).to(k2.device))
    powers = torch.tensor(strengths, device=k2.device) ** KAPPA
    # Where all are 1 the attention needs no bias for them.
    is_whole = set(itertools.chain(*strengths)) == {1}
    return References(tuple(latents), grids, strength=None if is_whole else powers)


def _unfit(k2: K2, pair: Preference) -> str | None:
    """Why the references of a pair cannot be shown; None: they can."""
    try:
        # Training shows references by attention, which takes strengths from 0 to 1.
        check_strengths([shown.strength for shown in pair.references], "attention", len(pair.references))
        for i, shown in enumerate(pair.references):
            scaled(shown.image, LONGEST, k2.pixel_multiple, f"references[{i}]")
    except UserError as error:
        return str(error)
    count = len(pair.references)
    return f"references: {counted(count, 'image')}; at most {MOST} are taken" if count > MOST else None


def _encode(k2: K2, preferences: Preferences, config: PairSetConfig, shards: Shards, number: int) -> list[Skipped]:
    """Writes one shard; returns the rows that are not in it."""
    pairs: dict[int, Preference] = {}
    skipped: list[Skipped] = []
    size_of: dict[int, tuple[int, int]] = {}
    by_size: dict[tuple[int, int], list[int]] = {}
    for i in shards.of(number):
        row = preferences[i]
        if isinstance(row, Skipped):
            skipped.append(row)
            continue
        height, width = config.size or (row.chosen.height, row.chosen.width)
        reason = _unfit(k2, row)
        if config.size is None and (height % k2.pixel_multiple or width % k2.pixel_multiple):
            reason = f"is {height}x{width} pixels, no multiples of {k2.pixel_multiple}; set pairs.size"
        if reason is not None:
            skipped.append(Skipped(preferences.name(i), reason))
            continue
        pairs[i], size_of[i] = row, (height, width)
        by_size.setdefault((height, width), []).append(i)
    tensors: dict[str, Tensor] = {}
    for (height, width), rows in by_size.items():
        images: list[Image.Image] = []
        names: list[str] = []
        for i in rows:
            for name, image in (("chosen", pairs[i].chosen), ("rejected", pairs[i].rejected)):
                images.append(ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS))
                names.append(f"{i}.{name}")
        for name, latents in zip(names, k2.encode_images(images).cpu()):
            tensors[name] = latents.clone()  # a view would be saved with the whole batch behind it
    grids: dict[int, Grids] = {}
    for i, pair in pairs.items():
        # No larger than the pair's images: the references of a small image would cost more than the image.
        longest = min(LONGEST, max(size_of[i]))
        own = []
        for j, shown in enumerate(pair.references):
            image = scaled(shown.image, longest, k2.pixel_multiple, f"{i}")
            latents = k2.encode_images(torch.from_numpy(image.copy())[None])[0]
            tensors[f"{i}.reference.{j}"] = latents.cpu().clone()
            own.append(k2.grid(*image.shape[:2]))
        grids[i] = tuple(own)
    # A text that several pairs have is encoded once for the shard.
    prompts = list(dict.fromkeys(pair.prompt for pair in pairs.values()))
    encoding = k2.encode(prompts, config.max_tokens)
    for j, fused in enumerate(k2.all_text_tokens(encoding.features)):
        tensors[f"text.{j}"] = fused.cpu()
    encoded = []
    for i, pair in pairs.items():
        p = label(pair.share, pair.source == "human")
        strengths = [shown.strength for shown in pair.references]
        encoded.append([i, prompts.index(pair.prompt), *size_of[i], p, _digest(pair.prompt), grids[i], strengths])
    made = {
        "pairs": encoded,
        "cuts": list(filter(None, encoding.cut)),
        "skipped": [[row.where, row.reason, row.tie] for row in skipped],
    }
    shards.write(number, tensors, made)
    return skipped


def _say(preferences: Preferences, pairs: EncodedPairs, max_tokens: int) -> None:
    """Which rows are left out, and which prompts are cut."""
    tally, where = pairs.tally, f"{preferences.path}:"
    if tally.ties:
        log.info(f"{where} {tally.ties} of {counted(tally.rows, 'row')} left out as ties")
    if tally.bad:
        log.warning(f"{where} {len(tally.bad)} of {counted(tally.rows, 'row')} left out as bad: {tally.first()}")
    warn_of_cut(pairs.cuts, "prompt", "pairs.max_tokens", max_tokens)


def _digest(prompt: str) -> int:
    # 63 bits, as numpy's int64 has a sign.
    return int.from_bytes(hashlib.blake2b(prompt.encode(), digest_size=8).digest(), "big") >> 1
