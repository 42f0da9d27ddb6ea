"""Sets that are encoded once and kept on disk: the folder, its shards, and what everything in it depends on.

    <cache>/<fingerprint>/    cache.json             what it was made of and with; a change makes another folder
                              00000.safetensors ...  SHARD rows of the set each, and what became of these rows

A shard is written atomically, so encoding that was killed continues with the next. Processes share the shards.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from posttrain.distributed.processes import Processes
from posttrain.errors import UserError, counted
from posttrain.log import log
from posttrain.model.fingerprint import fingerprint
from posttrain.model.k2 import K2
from posttrain.runs.files import replacing
from posttrain.training.checkpoint import is_full

SHARD = 64
"""Rows of the set in a shard."""
OPEN = 1024
"""Shards that are open at a time, at most."""


def facts_of(k2: K2) -> dict[str, str]:
    """All of the model that latents and fused text depend on."""
    pipe = k2.pipe
    assert k2.text_encoder is not None and k2.tokenizer is not None
    vae = {key: value for key, value in k2.vae.config.items() if not key.startswith("_")}
    # What decides tokens: vocabulary and chat template.
    words = [k2.tokenizer.get_vocab(), pipe.prompt_template_encode_prefix, pipe.prompt_template_encode_suffix]
    return {
        "vae": fingerprint(k2.vae.state_dict()) + _hash(vae),
        "text_encoder": fingerprint(k2.text_encoder.state_dict()) + _hash(list(pipe.text_encoder_select_layers)),
        "fusion": k2.text_fingerprint(),
        "tokenizer": _hash(words),
        "dtype": str(k2.dtype),
    }


@dataclass(frozen=True)
class Shards:
    """The folder of one encoded set."""

    folder: Path
    rows: int
    """Rows of the set, those that cannot be encoded included."""
    setting: str
    """The setting that names the directory of all caches, for messages."""
    _files: dict[int, Any] = field(default_factory=dict, compare=False, repr=False)
    """Shards that are open, by their number."""

    @classmethod
    def claim(cls, cache: str, setting: str, rows: int, facts: dict[str, Any], procs: Processes) -> Shards:
        """Makes the folder, or checks that it is of these facts. Raises UserError if it is not, or cannot be made."""
        folder = Path(cache) / hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
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
            raise UserError(f"{setting}: {folder} cannot be written: {error.strerror}; choose another") from None
        except ValueError:
            raise UserError(f"{card}: is not JSON; remove {folder}") from None
        if made != facts:
            other = ", ".join(name for name in {**facts, **made} if made.get(name) != facts.get(name))
            raise UserError(f"{folder}: was encoded with another {other}; remove it")
        return cls(folder, rows, setting)

    @property
    def count(self) -> int:
        return -(-self.rows // SHARD)

    def of(self, number: int) -> range:
        """The rows of a shard."""
        return range(SHARD * number, min(SHARD * (number + 1), self.rows))

    def path(self, number: int) -> Path:
        return self.folder / f"{number:05d}.safetensors"

    def fill(self, noun: str, encode: Callable[[int], None], procs: Processes) -> None:
        """Calls `encode` with the number of each shard that is not there yet; `noun` is what rows are, in the plural.
        Returns when all shards of all processes are there."""
        due = [number for number in range(self.count) if not self.path(number).exists()]
        procs.all_gather(None)  # nobody writes before all have looked, so that all divide the same shards
        last = time.monotonic()
        for turn in procs.local_indices(len(due)):
            encode(due[turn])
            if procs.main and time.monotonic() - last > 10:  # seconds
                done = min(self.rows, SHARD * (self.count - len(due) + turn + 1))
                log.info(f"encoded {done} of {self.rows} {noun} into {self.folder}")
                last = time.monotonic()
        procs.all_gather(None)

    def write(self, number: int, tensors: Mapping[str, Tensor], made: Mapping[str, Any]) -> None:
        """Writes a shard; `made` says what became of its rows, as JSON. Raises UserError if the disk is full."""
        try:
            # Shared, as two runs may encode the same set at once.
            with replacing(self.path(number), shared=True) as temporary:
                save_file(dict(tensors), temporary, {"rows": json.dumps(made)})
        except (OSError, SafetensorError) as error:
            if not is_full(error):
                raise
            raise UserError(
                f"{self.setting}: {self.folder}: no space left; free some or choose another disk"
            ) from error

    def made(self) -> Iterator[dict[str, Any]]:
        """What became of the rows of each shard. Raises UserError for a damaged one."""
        for number in range(self.count):
            with _opened(self.path(number)) as file:
                yield json.loads(file.metadata()["rows"])

    def read(self, row: int, name: str) -> Tensor:
        """A tensor of a row's shard, which stays open: for one thread. Raises UserError if the shard is damaged."""
        number = row // SHARD
        if number not in self._files:
            # To open one reads its list of tensors, which takes longer than to read a small image.
            if len(self._files) == OPEN:
                self._files.pop(next(iter(self._files)))
            self._files[number] = _opened(self.path(number))
        # A copy: what is read is the file in memory, and a write to it would be there at the next read.
        return self._files[number].get_tensor(name).clone()


def warn_of_cut(cuts: Sequence[int], noun: str, setting: str, max_tokens: int) -> None:
    """Says how many texts were longer than that. `cuts` are the tokens that did not fit, of each that was."""
    if cuts:
        log.warning(
            f"longer than {setting} ({max_tokens}): {counted(len(cuts), noun)}, of which up to"
            f" {counted(max(cuts), 'token')} are cut"
        )


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: is damaged ({error}); remove it, and it is made again") from None
