"""Latents and fused text of a set of images, encoded once and kept on disk (training/shard_cache.py).

Each row is read once: its image is scaled and cropped to a bucket of each resolution that it is large enough for, and
encoded. A shard also says what was cropped, and why a row is left out. Reading opens the file of a row, and holds no
latents in memory.

Legend: N image tokens, L text tokens, C channels.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from posttrain.distributed.processes import Processes
from posttrain.errors import UserError, counted
from posttrain.log import log
from posttrain.model.k2 import K2
from posttrain.preferences.sources import Skipped, Tally
from posttrain.runs import startup
from posttrain.sft import buckets
from posttrain.sft.buckets import Box, Size
from posttrain.sft.config import ImageSetConfig
from posttrain.sft.dataset import ImageSet
from posttrain.training.shard_cache import Shards, facts_of, warn_of_cut

VERSION = 1
SMALL, CUT, TWICE = "too small for images.resolutions", "cut by more than images.max_cut", "there twice"
"""Why a sound image is left out."""
CROPPED = 1e-3
"""Share of an image from which on it counts as cropped; less is rounding."""


@dataclass(frozen=True)
class Crop:
    """What of an image a bucket shows."""

    size: Size
    """The bucket."""
    box: Box


@dataclass(frozen=True)
class Kept:
    """An image that is trained on or held out."""

    row: int
    digest: int
    size: Size
    """As it was read, in pixels."""
    texts: list[tuple[int, float]]
    """Of each caption the number of its text in the shard, and its weight."""
    crops: list[Crop]
    """At most one of each resolution."""


class EncodedImages:
    """The images of a set. An entry is an image in one of its buckets, which is read when it is asked for."""

    def __init__(self, shards: Shards, heldout: float, tally: Tally, null: Tensor):
        """`null` is the fused text of the empty caption, (L, C)."""
        self.folder, self.fingerprint, self.null = shards.folder, shards.folder.name, null
        self.tally, self._shards = tally, shards
        self.cuts: list[int] = []
        """Tokens that did not fit, of each caption of which some did not."""
        self.images: list[Kept] = []
        self.left_out: dict[int, str] = {}
        """By row, why a sound image is not trained on."""
        # Shards are encoded apart from each other, so that what is there twice is only found here.
        seen: set[int] = set()
        for made in shards.made():
            self.cuts += made["cuts"]
            for where, reason in made["bad"]:
                tally.add(Skipped(where, reason))
            self.left_out |= dict(made["left_out"])
            for row, digest, size, texts, crops in made["images"]:
                if digest in seen:
                    self.left_out[row] = TWICE
                    continue
                seen.add(digest)
                placed = [Crop(tuple(bucket), tuple(box)) for bucket, box in crops]
                self.images.append(Kept(row, digest, tuple(size), texts, placed))
        self.entries: list[tuple[int, int]] = []
        """Number of the image, and of its crop."""
        sizes: list[Size] = []
        of_entries: list[int] = []
        for i, image in enumerate(self.images):
            for j, crop in enumerate(image.crops):
                self.entries.append((i, j))
                sizes.append(crop.size)
                of_entries.append(image.digest)
        self.size = np.array(sizes, np.int32).reshape(-1, 2)
        # By a hash of their pixels, which is in no order of the set. All entries of an image are on one side.
        digests = np.array(of_entries, np.int64)
        unique = np.unique(digests)
        is_heldout = np.isin(digests, unique[: max(1, round(heldout * len(unique)))])
        self.heldout, self.train = np.flatnonzero(is_heldout), np.flatnonzero(~is_heldout)

    def row(self, entry: int) -> int:
        """The row of the set that an entry is of."""
        return self.images[self.entries[entry][0]].row

    def read(self, entry: int, choice: float) -> tuple[Tensor, Tensor]:
        """Latents (N, C), fp32, and the fused text (L, C) of the caption that `choice`, of [0, 1), falls to; 1 is the
        last caption, which may have weight 0."""
        i, j = self.entries[entry]
        image = self.images[i]
        bounds = np.cumsum([weight for _, weight in image.texts])
        # A choice of 1 is beyond the last bound, and a caption of weight 0 ends where the one before it does.
        place = min(int(np.searchsorted(bounds, choice * bounds[-1], side="right")), len(bounds) - 1)
        names = f"{image.row}.{j}", f"text.{image.texts[place][0]}"
        return self._shards.read(image.row, names[0]), self._shards.read(image.row, names[1])

    def cut(self, entry: int) -> float:
        """Share of the image that the crop of an entry cuts off."""
        i, j = self.entries[entry]
        return buckets.cut(self.images[i].size, self.images[i].crops[j].box)


def encode_images(k2: K2, images: ImageSet, config: ImageSetConfig, procs: Processes) -> EncodedImages:
    """Encodes what is not in the cache yet, and says how many rows were left out and why.

    Raises UserError for too many bad rows, nothing that is left to train on, a full disk, or a folder made of something
    else.
    """
    startup.lap("prepare")
    # A recipe is checked without the model, whose tokens may be larger.
    if config.multiple % k2.pixel_multiple:
        raise UserError(f"images.multiple: is {config.multiple}; this model wants a multiple of {k2.pixel_multiple}")
    # All that latents and text depend on: another value makes another folder.
    facts = {
        "version": VERSION,
        "images": images.fingerprint(),
        "resolutions": config.resolutions,
        "buckets": [config.multiple, config.max_ratio, config.max_enlarge, config.max_cut],
        "max_tokens": config.max_tokens,
        **facts_of(k2),
    }
    shards = Shards.claim(config.cache, "images.cache", len(images), facts, procs)
    tally = images.tally()

    def encode(number: int) -> None:
        for row in _encode(k2, images, config, shards, number):
            tally.add(row)

    shards.fill("images", encode, procs)
    # The empty caption is in no shard: it belongs to the model and not to the set.
    null = k2.text([""]).tokens[0].cpu()
    encoded = EncodedImages(shards, config.heldout, images.tally(), null)
    if procs.main:
        _say(images, encoded, config.max_tokens)
    if not len(encoded.train):
        counts = Counter(encoded.left_out.values())
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items())
        raise UserError(
            f"{images.path}: of {counted(len(images), 'image')} {len(encoded.images)} can be trained on"
            f"{f' ({reasons})' if reasons else ''}, and one at least is held out; add images, or lower"
            " images.resolutions"
        )
    startup.lap("encode")
    return encoded


def _encode(k2: K2, images: ImageSet, config: ImageSetConfig, shards: Shards, number: int) -> list[Skipped]:
    """Writes one shard; returns the bad rows."""
    bad: list[Skipped] = []
    left_out: list[tuple[int, str]] = []
    kept: list[Any] = []
    texts: dict[str, int] = {}
    by_size: dict[Size, list[tuple[str, Image.Image]]] = {}
    for row in shards.of(number):
        try:
            example = images[row]
        except ValueError as error:
            bad.append(Skipped(images.name(row), str(error)))
            continue
        size = example.image.height, example.image.width
        crops = _crops(size, config)
        if isinstance(crops, str):
            left_out.append((row, crops))
            continue
        for j, (bucket, box) in enumerate(crops):
            scaled = example.image.resize((bucket[1], bucket[0]), Image.Resampling.LANCZOS, box=box)
            by_size.setdefault(bucket, []).append((f"{row}.{j}", scaled))
        captions = []
        for caption in example.captions:
            # A text that several images have is encoded once for the shard.
            number_of_text = texts.setdefault(caption.text, len(texts))
            captions.append((number_of_text, caption.weight))
        kept.append((row, example.digest(), size, captions, crops))
    tensors: dict[str, Tensor] = {}
    for members in by_size.values():
        latents = k2.encode_images([image for _, image in members]).cpu()
        for (name, _), own in zip(members, latents):
            tensors[name] = own.clone()  # a view would be saved with the whole batch behind it
    encoding = k2.encode(list(texts), config.max_tokens)
    for place, fused in enumerate(k2.all_text_tokens(encoding.features)):
        tensors[f"text.{place}"] = fused.cpu()
    made = {
        "images": kept,
        "left_out": left_out,
        "bad": [(row.where, row.reason) for row in bad],
        "cuts": list(filter(None, encoding.cut)),
    }
    shards.write(number, tensors, made)
    return bad


def _crops(size: Size, config: ImageSetConfig) -> list[tuple[Size, Box]] | str:
    """Bucket and box of each resolution that an image can be trained in; or why there is none."""
    crops = []
    reason = SMALL
    for side in config.resolutions:
        bucket = buckets.nearest(size, buckets.buckets(side, config.multiple, config.max_ratio))
        box = buckets.crop(size, bucket)
        if buckets.enlargement(size, bucket) > config.max_enlarge:
            continue  # a smaller resolution may still do
        if buckets.cut(size, box) > config.max_cut:
            reason = CUT
            continue
        crops.append((bucket, box))
    return crops or reason


def _say(images: ImageSet, encoded: EncodedImages, max_tokens: int) -> None:
    """Which rows are left out, which captions are cut, and how many buckets there are."""
    tally, where = encoded.tally, f"{images.path}:"
    if tally.bad:
        log.warning(f"{where} bad and left out: {len(tally.bad)} of {counted(tally.rows, 'row')}: {tally.first()}")
    for reason, count in Counter(encoded.left_out.values()).items():
        log.warning(f"{where} {reason} and left out: {count} of {counted(tally.rows, 'image')}")
    warn_of_cut(encoded.cuts, "caption", "images.max_tokens", max_tokens)
    cropped = 0
    for entry in range(len(encoded.entries)):
        cropped += encoded.cut(entry) > CROPPED
    sizes = set(map(tuple, encoded.size.tolist()))
    log.info(
        f"{where} {counted(len(encoded.images), 'image')} in {counted(len(sizes), 'bucket')}; {cropped} of"
        f" {len(encoded.entries)} crops cut something off"
    )
