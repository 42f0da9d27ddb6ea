"""Images and tables as people bring them, whole or damaged; see fuzz.py.

What is whole is read as Pillow alone decodes it; of what is damaged, a UserError or a ValueError of one line, or the
same content. No checksum covers the pixels of some formats: there a damage within them (`noticeable`) may give another
image, and nothing else.
"""

from __future__ import annotations

import dataclasses
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image, ImageOps

from posttrain.image_reader import read_image
from posttrain.preferences.dataset import Preference, Skipped, read_preferences
from posttrain.preferences.writer import PreferenceWriter
from prompts.records import read_prompts
from tests.helpers.malformed import pictures, refused, torn

KINDS: list[tuple[str, str, dict[str, Any]]] = [
    *[("PNG", mode, {}) for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "I;16")],
    *[("JPEG", mode, {"quality": 95}) for mode in ("RGB", "L", "CMYK")],
    ("JPEG", "RGB", {"progressive": True}),
    *[("WEBP", mode, {"lossless": True}) for mode in ("RGB", "RGBA")],
    ("WEBP", "RGB", {}),
    *[("AVIF", mode, {"speed": 10}) for mode in ("RGB", "RGBA")],
    *[("BMP", mode, {}) for mode in ("RGB", "L", "P")],
    *[("TIFF", mode, {}) for mode in ("RGB", "RGBA", "CMYK", "I;16", "F")],
    ("TIFF", "RGB", {"compression": "tiff_lzw"}),
    *[("TIFF", mode, {"compression": "tiff_adobe_deflate"}) for mode in ("RGB", "RGBA", "L")],
    ("GIF", "P", {}),
    *[("PPM", mode, {}) for mode in ("RGB", "L")],
]
"""Format, mode and options."""
TAIL = 512
"""Zeros at the end that compressed formats are refused for."""


@dataclasses.dataclass
class File:
    kind: str
    options: dict[str, Any]
    data: bytes
    shown: np.ndarray
    """(height, width, 3): what Pillow makes of it, from 0 to 255."""


def image_file(rng: random.Random, folder: Path) -> bool:
    """Whether an image is refused; it is neither damaged nor refused in a tenth of the cases."""
    made = _image(rng)
    how, data = ("whole", made.data) if rng.random() < 0.1 else _damaged(made, rng)
    try:
        read = read_image(data)
    except ValueError as error:
        said = str(error)
        assert how != "whole", said
        assert said.isprintable() and len(said) > 10, said
        return True
    assert read.mode == "RGB"
    if _noticeable(made, how, data):
        assert read.size == made.shown.shape[1::-1], (made.kind, made.options, how)
        difference = np.abs(np.asarray(read, float) - made.shown).max()
        assert difference <= 1, (made.kind, made.options, how, difference)
    return False


def _image(rng: random.Random) -> File:
    kind, mode, options = rng.choice(KINDS)
    width, height = rng.randint(1, 48), rng.randint(1, 48)
    generator = np.random.default_rng(rng.randrange(2**32))
    coarse = Image.fromarray(generator.integers(0, 256, (6, 6, 4), dtype=np.uint8))
    pixels = coarse.resize((width, height), Image.Resampling.BICUBIC)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(pixels.convert("L")).astype(np.uint16) * 257)
    elif mode == "F":
        image = Image.fromarray(np.asarray(pixels.convert("L")).astype(np.float32) / 255)
    elif mode == "P":
        image = pixels.convert("RGB").quantize(32)
    else:
        image = pixels.convert(mode)
    options = dict(options)
    if kind in ("PNG", "JPEG", "WEBP", "TIFF") and rng.random() < 0.5:
        options["exif"] = exif = Image.Exif()
        exif[0x0112] = rng.randint(1, 8)
    if kind == "PNG" and mode == "P" and rng.random() < 0.5:
        options["transparency"] = 0
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return File(kind, options, buffer.getvalue(), _shown(buffer.getvalue()))


def _shown(data: bytes) -> np.ndarray:
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    values = np.asarray(image, float)
    if image.mode in ("F", "I;16"):
        return np.repeat((values * 255 if image.mode == "F" else values / 257)[..., None], 3, -1)
    if not image.has_transparency_data:
        return np.asarray(image.convert("RGB"), float)
    layers = np.asarray(image.convert("RGBA"), float)
    share = layers[..., 3:] / 255
    return layers[..., :3] * share + 255 * (1 - share)


def _damaged(made: File, rng: random.Random) -> tuple[str, bytes]:
    data = made.data
    # The directory of a TIFF has no checksum, its compressed pixels before it have one.
    end = int.from_bytes(data[4:8], "little") if _checked_tiff(made) else len(data)
    begin = rng.randrange(8 if _checked_tiff(made) else 0, end)
    stop = min(end, begin + rng.randint(1, 64))
    noise = rng.randbytes(stop - begin)
    ways: dict[str, Callable[[], bytes]] = {
        "cut": lambda: data[:begin],
        "zeros": lambda: data[:begin] + bytes(len(data) - begin),
        "hole": lambda: data[:begin] + bytes(stop - begin) + data[stop:],
        "flip": lambda: data[:begin] + bytes([data[begin] ^ 1 << rng.randrange(8)]) + data[begin + 1 :],
        "drop": lambda: data[:begin] + data[stop:],
        "insert": lambda: data[:begin] + noise + data[begin:],
        "overwrite": lambda: data[:begin] + noise + data[stop:],
        "junk": lambda: rng.choice([b"", noise, b"<html></html>", b"\x89PNG\r\n\x1a\n", bytes(600)]),
    }
    how = rng.choice(list(ways))
    return how, ways[how]()


def _checked_tiff(made: File) -> bool:
    return made.kind == "TIFF" and "deflate" in made.options.get("compression", "")


def _noticeable(made: File, how: str, data: bytes) -> bool:
    """Whether it can be told from the file that it is damaged."""
    if made.kind == "PNG" or _checked_tiff(made) or how in ("whole", "cut", "junk") or data == made.data:
        return True
    if how == "zeros":
        zeros = len(data) - len(data.rstrip(b"\0"))
        return made.kind in ("JPEG", "GIF") or (made.kind in ("WEBP", "AVIF") and zeros >= TAIL)
    return how == "drop" and made.kind in ("WEBP", "AVIF", "TIFF")


# ---- tables -------------------------------------------------------------------------------------------------------

ROWS = [{"prompt": f'prompt {i}, "quoted"\nünd', "id": f"p{i}", "tags": ["a", "b"]} for i in range(6)]


def table_file(rng: random.Random, folder: Path) -> bool:
    """Prompts as a file or a directory of `save_to_disk`: they are read, or refused, or (a damage within a text) other
    texts are read."""
    kind = rng.choice(["jsonl", "json", "csv", "tsv", "parquet", "saved"])
    source = folder / ("saved" if kind == "saved" else f"prompts.{kind}")
    data = _written(kind, source, rng)
    whole = rng.random() < 0.1
    if whole:
        assert [record.prompt for record in read_prompts(source)] == [row["prompt"] for row in ROWS]
        return False
    victim = source if data is not None else rng.choice(sorted(source.iterdir()))
    damaged = torn(victim.read_bytes(), rng)
    victim.write_bytes(damaged)

    def read() -> None:
        records = read_prompts(source)
        assert records and all(isinstance(record.prompt, str) and record.prompt.strip() for record in records)
        assert all(isinstance(tag, str) for record in records for tag in record.tags)

    return refused(read)


def _written(kind: str, source: Path, rng: random.Random) -> bytes | None:
    """The bytes of the file; None for a directory."""
    if kind == "saved":
        datasets.Dataset.from_list(ROWS).save_to_disk(str(source))
        return None
    if kind == "parquet":
        datasets.Dataset.from_list(ROWS).to_parquet(str(source))
        return source.read_bytes()
    ending = rng.choice(["\n", "\r\n"])
    if kind == "jsonl":
        text = "".join(json.dumps(row, ensure_ascii=False) + ending for row in ROWS)
    elif kind == "json":
        text = json.dumps(ROWS, indent=rng.choice([None, 1]))
    else:
        mark = "," if kind == "csv" else "\t"
        cells = [list(ROWS[0]), *([row["prompt"], row["id"], json.dumps(row["tags"])] for row in ROWS)]
        quoted = [[f'"{cell}"' for cell in (text.replace('"', '""') for text in line)] for line in cells]
        text = "".join(mark.join(line) + ending for line in quoted)
    source.write_bytes((rng.choice(["", "\ufeff"]) + text).encode())
    return source.read_bytes()


def pair_directory(rng: random.Random, folder: Path) -> bool:
    """A set of this project with one file damaged: each pair is read as it was written, or left out, or all refused."""
    rows, file = pictures(folder), folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    written = list(read_preferences(file))
    with PreferenceWriter(folder / "set", rows=2) as writer:
        for pair in written:
            writer.add(pair)
    victim = rng.choice(sorted((folder / "set").glob("shard-*")))
    data = victim.read_bytes()
    place = rng.randrange(len(data))
    if rng.random() < 0.5:
        victim.write_bytes(data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :])
    else:
        victim.write_bytes(torn(data, rng))
    left_out = []

    def read() -> None:
        pairs = read_preferences(folder / "set", max_bad=0.99)
        for i, pair in enumerate(written):
            got = pairs[i]
            if isinstance(got, Skipped):
                left_out.append(got.reason)
            else:
                _assert_same(got, pair)

    return refused(read) or bool(left_out)


def _assert_same(got: Preference, pair: Preference) -> None:
    for field in dataclasses.fields(Preference):
        a, b = getattr(got, field.name), getattr(pair, field.name)
        assert a.tobytes() == b.tobytes() if isinstance(a, Image.Image) else a == b, (field.name, a, b)
