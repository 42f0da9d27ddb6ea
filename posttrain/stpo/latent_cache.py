"""Latents and fused text of a set of pairs, encoded once and kept on disk.

    <cache>/<fingerprint>/    cache.json             what they were made of and with; a change makes another folder
                              00000.safetensors ...  64 rows of the set each, and why some of these are no pairs

A shard is written atomically, so encoding that was killed continues with the next. Processes share the shards; reading
opens the file of a row, and holds no latents in memory.

Legend: B pairs of a micro-batch, N image tokens, L text tokens, C channels.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from posttrain.distributed.processes import Processes
from posttrain.errors import UserError, counted
from posttrain.log import log
from posttrain.model import sampler
from posttrain.model.architecture import text_weights
from posttrain.model.fingerprint import fingerprint
from posttrain.model.k2 import K2, Text
from posttrain.preferences.dataset import Preference, Preferences
from posttrain.preferences.sources import Skipped, Tally
from posttrain.runs import startup
from posttrain.runs.files import replacing
from posttrain.stpo.config import PairSetConfig
from posttrain.stpo.losses import label
from posttrain.training.checkpoint import is_full

VERSION = 2  # 1: images were read without their orientation and transparency
SHARD = 64
"""Rows of the set in a shard."""


@dataclass
class EncodedPair:
    chosen: Tensor
    """(N, C) latents in fp32."""
    rejected: Tensor
    text: Tensor
    """(L, C) fused text, in the network's type."""
    label: float
    size: tuple[int, int]


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

    def __init__(self, folder: Path, shards: int, heldout: float, tally: Tally):
        self.folder, self.fingerprint = folder, folder.name
        self.tally = tally
        self.cuts: list[int] = []
        """Tokens that did not fit, of each prompt of which some did not."""
        places, labels, prompts = [], [], []
        for number in range(shards):
            with _opened(folder / _name(number)) as file:
                made = json.loads(file.metadata()["rows"])
            # Rows are (row of the set, text, height, width, label, hash of the prompt); a shard may have no pair.
            columns = list(zip(*made["pairs"])) or [()] * 6
            places.append(np.array(columns[:4], np.int32))
            labels.append(np.array(columns[4], np.float32))
            prompts.append(np.array(columns[5], np.int64))
            self.cuts += made["cuts"]
            for values in made["skipped"]:
                tally.add(Skipped(*values))
        self._row, self._text, height, width = np.concatenate(places, axis=1)
        self.size, self.label = np.stack([height, width], 1), np.concatenate(labels)
        prompt = np.concatenate(prompts)
        # Whole prompts are held out: images of one prompt are alike. Hashes are in no order of the set.
        hashes = np.unique(prompt)
        is_heldout = np.isin(prompt, hashes[: max(1, round(heldout * len(hashes)))])
        self.heldout, self.train = np.flatnonzero(is_heldout), np.flatnonzero(~is_heldout)

    def __getitem__(self, i: int) -> EncodedPair:
        row, (height, width) = self._row[i], self.size[i].tolist()
        with _opened(self.folder / _name(row // SHARD)) as file:
            chosen, rejected = file.get_tensor(f"{row}.chosen"), file.get_tensor(f"{row}.rejected")
            text = file.get_tensor(f"text.{self._text[i]}")
        return EncodedPair(chosen, rejected, text, float(self.label[i]), (height, width))


def encode_pairs(k2: K2, preferences: Preferences, config: PairSetConfig, procs: Processes) -> EncodedPairs:
    """Encodes what is not in the cache yet, and says how many rows were left out and why.

    Raises UserError for too many bad rows, too few prompts, a full disk, or a folder made of something else.
    """
    startup.lap("prepare")
    facts = _facts(k2, preferences, config)
    folder = Path(config.cache) / hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    _claim(folder, facts, procs)
    shards = -(-len(preferences) // SHARD)
    due = [n for n in range(shards) if not (folder / _name(n)).exists()]
    procs.all_gather(None)  # nobody writes before all have looked, so that all divide the same shards
    tally, last = preferences.tally(), time.monotonic()
    for turn in procs.local_indices(len(due)):
        for row in _encode(k2, preferences, config, folder, due[turn]):
            tally.add(row)
        if procs.main and time.monotonic() - last > 10:  # seconds
            done = min(len(preferences), SHARD * (shards - len(due) + turn + 1))
            log.info(f"encoded {done} of {counted(len(preferences), 'pair')} into {folder}")
            last = time.monotonic()
    procs.all_gather(None)
    pairs = EncodedPairs(folder, shards, config.heldout, preferences.tally())
    if not len(pairs.train):
        raise UserError(f"{preferences.path}: all pairs are of one prompt, which is held out; add others")
    if procs.main:
        _say(preferences, pairs, config.max_tokens)
    startup.lap("encode")
    return pairs


def noised(
    k2: K2, pairs: EncodedPairs, jobs: Sequence[Job], micro_batch: int, time_mean: float, time_std: float
) -> list[Batch]:
    """Micro-batches, each of one size, of pairs with one time and one noise for both images."""
    null = k2.text([""]).tokens[0] if any(job.dropped for job in jobs) else torch.empty(0)
    by_size: dict[tuple[int, ...], list[int]] = {}
    for j, job in enumerate(jobs):
        by_size.setdefault(tuple(pairs.size[job.pair].tolist()), []).append(j)
    batches = []
    for (height, width), members in by_size.items():
        for first in range(0, len(members), micro_batch):
            chosen = members[first : first + micro_batch]
            part = [jobs[j] for j in chosen]
            read = [pairs[job.pair] for job in part]  # from disk
            x_w = torch.stack([pair.chosen for pair in read]).to(k2.device)
            x_l = torch.stack([pair.rejected for pair in read]).to(k2.device)
            n = torch.tensor([job.n for job in part], device=k2.device)
            t = sampler.logit_normal(n, time_mean, time_std, k2.mu(height, width))
            noise = sampler.noise([job.seed for job in part], x_w.shape[1:]).to(k2.device)
            fused = [null if job.dropped else pair.text.to(k2.device) for job, pair in zip(part, read)]
            # One noise and one time for both images: the difference of their errors is then due to the images alone.
            batches.append(
                Batch(
                    sampler.noised(x_w, noise, t),
                    sampler.noised(x_l, noise, t),
                    sampler.velocity_target(x_w, noise),
                    sampler.velocity_target(x_l, noise),
                    t,
                    Text.of(fused * 2),
                    torch.tensor([pair.label for pair in read], device=k2.device),
                    (height, width),
                    chosen,
                )
            )
    return batches


def _facts(k2: K2, preferences: Preferences, config: PairSetConfig) -> dict[str, Any]:
    """All that the encoded pairs depend on."""
    pipe = k2.pipe
    assert k2.text_encoder is not None and k2.tokenizer is not None
    vae = {key: value for key, value in k2.vae.config.items() if not key.startswith("_")}
    # What decides tokens: vocabulary and chat template.
    words = [k2.tokenizer.get_vocab(), pipe.prompt_template_encode_prefix, pipe.prompt_template_encode_suffix]
    return {
        "version": VERSION,
        "pairs": preferences.fingerprint(),
        "size": config.size,
        "max_tokens": config.max_tokens,
        "vae": fingerprint(k2.vae.state_dict()) + _hash(vae),
        "text_encoder": fingerprint(k2.text_encoder.state_dict()) + _hash(list(pipe.text_encoder_select_layers)),
        "fusion": fingerprint(text_weights(k2.transformer)),
        "tokenizer": _hash(words),
        "dtype": str(k2.dtype),
    }


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _claim(folder: Path, facts: dict[str, Any], procs: Processes) -> None:
    """Makes the folder, or checks that it is of these facts."""
    card = folder / "cache.json"
    try:
        # Facts follow from the recipe, so that any process could write them; one does, and all check them.
        if procs.main and not card.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(card, shared=True) as temporary:
                temporary.write_text(json.dumps(facts, indent=1) + "\n")
        procs.all_gather(None)
        made = json.loads(card.read_text())
    except OSError as error:
        raise UserError(f"pairs.cache: {folder} cannot be written: {error.strerror}; choose another") from None
    except ValueError:
        raise UserError(f"{card}: is not JSON; remove {folder}") from None
    if made != facts:
        other = ", ".join(name for name in {**facts, **made} if made.get(name) != facts.get(name))
        raise UserError(f"{folder}: was encoded with another {other}; remove it")


def _encode(k2: K2, preferences: Preferences, config: PairSetConfig, folder: Path, number: int) -> list[Skipped]:
    """Writes one shard; returns the rows that are not in it."""
    pairs: dict[int, Preference] = {}
    skipped: list[Skipped] = []
    for i in range(SHARD * number, min(SHARD * (number + 1), len(preferences))):
        row = preferences[i]
        if isinstance(row, Skipped):
            skipped.append(row)
        elif config.size is None and any(side % k2.pixel_multiple for side in row.chosen.size):
            width, height = row.chosen.size
            reason = f"is {height}x{width} pixels, no multiples of {k2.pixel_multiple}; set pairs.size"
            skipped.append(Skipped(preferences.name(i), reason))
        else:
            pairs[i] = row
    by_size: dict[tuple[int, int], list[int]] = {}
    for i, pair in pairs.items():
        height, width = config.size or (pair.chosen.height, pair.chosen.width)
        by_size.setdefault((height, width), []).append(i)
    size_of: dict[int, tuple[int, int]] = {}
    tensors: dict[str, Tensor] = {}
    for (height, width), rows in by_size.items():
        images: list[Image.Image] = []
        names: list[str] = []
        for i in rows:
            size_of[i] = height, width
            for name, image in (("chosen", pairs[i].chosen), ("rejected", pairs[i].rejected)):
                images.append(ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS))
                names.append(f"{i}.{name}")
        for name, latents in zip(names, k2.encode_images(images).cpu()):
            tensors[name] = latents.clone()  # a view would be saved with the whole batch behind it
    prompts = list(dict.fromkeys(pair.prompt for pair in pairs.values()))
    encoding = k2.encode(prompts, config.max_tokens)
    for j, features in enumerate(encoding.features):
        tensors[f"text.{j}"] = k2.fuse(features).cpu()
    encoded = []
    for i, pair in pairs.items():
        p = label(pair.share, pair.source == "human")
        encoded.append([i, prompts.index(pair.prompt), *size_of[i], p, _digest(pair.prompt)])
    made = {
        "pairs": encoded,
        "cuts": [cut for cut in encoding.cut if cut],
        "skipped": [[row.where, row.reason, row.tie] for row in skipped],
    }
    try:
        # Shared, as two runs may encode the same pairs at once.
        with replacing(folder / _name(number), shared=True) as temporary:
            save_file(tensors, temporary, {"rows": json.dumps(made)})
    except (OSError, SafetensorError) as error:
        if not is_full(error):
            raise
        raise UserError(f"pairs.cache: {folder}: no space left; free some or choose another disk") from error
    return skipped


def _say(preferences: Preferences, pairs: EncodedPairs, max_tokens: int) -> None:
    """Which rows are left out, and which prompts are cut."""
    tally, where = pairs.tally, f"{preferences.path}:"
    if tally.ties:
        log.info(f"{where} {tally.ties} of {counted(tally.rows, 'row')} left out as ties")
    if tally.bad:
        log.warning(f"{where} {len(tally.bad)} of {counted(tally.rows, 'row')} left out as bad: {tally.first()}")
    if pairs.cuts:
        log.warning(
            f"longer than pairs.max_tokens ({max_tokens}): {counted(len(pairs.cuts), 'prompt')}, of which up to"
            f" {counted(max(pairs.cuts), 'token')} are cut"
        )


def _digest(prompt: str) -> int:
    # 63 bits, as numpy's int64 has a sign.
    return int.from_bytes(hashlib.blake2b(prompt.encode(), digest_size=8).digest(), "big") >> 1


def _name(number: int) -> str:
    return f"{number:05d}.safetensors"


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: is damaged ({error}); remove it, and it is made again") from None
