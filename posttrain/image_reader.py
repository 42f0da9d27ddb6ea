"""The one reader of images that others made: any file that people bring, as 8-bit RGB, or refused with a reason.

| what an image may have | what becomes of it |
|---|---|
| EXIF orientation | turned as viewers show it |
| transparency, also of a palette or of one colour | composited on white (GROUND) |
| grey, a palette, CMYK, YCbCr | converted to RGB, as Pillow does |
| 16 bits a channel | rounded to 8 bits |
| one channel of floats | 0 is black and 1 is white; refused if a value lies outside |
| 32-bit integers, Lab, several frames or pages, another format than those of FORMATS | refused |
| more than 179 million pixels, Pillow's limit | refused |
| a colour profile | not applied, as in Pillow |
| a file that is cut off or damaged | refused, as far as its format can tell |

The checksums of PNG and of TIFF with deflate are compared. Other formats have none: a changed byte within their pixels
makes another valid image, which cannot be noticed.
"""

from __future__ import annotations

import io
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

GROUND = (255, 255, 255)
"""The colour behind what is transparent."""
FORMATS = {"PNG", "JPEG", "MPO", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM"}
"""Formats that are read, by Pillow's names; MPO is a JPEG of a camera with a preview behind it."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".ppm")
"""Files that count as images where a directory of them is given."""


TIFF_BITS, TIFF_COMPRESSION, TIFF_WHITE = 258, 259, 262
"""Tags: BitsPerSample, Compression, and PhotometricInterpretation, in which 0 says that white is 0."""
TIFF_STRIPS, TIFF_TILES = (273, 279), (324, 325)
"""Tags of the places and lengths of the parts of a TIFF."""
DEFLATE = (8, 32946)
SECTOR = bytes(512)
"""No compressed image ends in so many zeros."""
KEY_OF_16_BITS = "has 16 bits and a transparent colour; save it with an alpha channel"

# From 89 to 179 million pixels Pillow reads an image and warns of it, with a line of its own code; above, it refuses.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class Refused(ValueError):
    """Why an image is not read."""


def read_image(source: bytes | str | Path) -> Image.Image:
    """The image of a file, or of a file's bytes, in 8-bit RGB.

    Raises ValueError with the reason for bytes that are not an image or one that is refused (see above), after the
    file's path if one is given; and OSError for a file that cannot be read.
    """
    if isinstance(source, bytes):
        return _read(source)
    try:
        return _read(Path(source).read_bytes())
    except Refused as error:
        raise Refused(f"{source}: {error}") from None


def _read(data: bytes) -> Image.Image:
    try:
        image = _opened(data)
        image.load()
        return _converted(image)
    except Refused:
        raise
    except UnidentifiedImageError:
        raise Refused(f"is not an image ({len(data)} bytes)") from None
    except Exception as error:  # Pillow raises all kinds of exceptions for damaged files, struct.error among them
        raise Refused(f"cannot be read: {str(error) or type(error).__name__}") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """A Pillow image of any mode in 8-bit RGB, by the rules above; itself if it is that already.

    Raises ValueError with the reason for one that is refused.
    """
    # One that was made in memory; one of a file may have an orientation.
    if type(image) is Image.Image and image.mode == "RGB" and not image.info:
        return image
    try:
        return _converted(image)
    except Refused:
        raise
    except Exception as error:  # as above
        raise Refused(f"cannot be read: {str(error) or type(error).__name__}") from None


def _opened(data: bytes) -> Image.Image:
    """The image, not decoded yet, with the checks of its format."""
    image = Image.open(io.BytesIO(data))
    if image.format not in FORMATS:
        raise Refused(f"is of format {image.format}, which is not supported; save it as PNG, JPEG or WebP")
    if image.format == "PNG":
        image.verify()  # compares the checksums, which decoding does not
        image = Image.open(io.BytesIO(data))  # which verify has used up
    if image.format == "TIFF":
        _check_deflate(data, getattr(image, "tag_v2", {}), 16 * image.width * image.height + 2**20)
    # What is missing of a download is often filled with zeros, which are decoded as if they were pixels.
    no_end = image.format in ("JPEG", "MPO") and not _has_end(data)
    if no_end or (image.format in ("WEBP", "AVIF") and data.endswith(SECTOR)):
        raise Refused("cannot be read: image file is truncated (its end is missing)")
    return image


def _check_deflate(data: bytes, tags: Mapping[int, Any], limit: int) -> None:
    """Raises Refused for a damaged part of a TIFF, of which libtiff returns some without an error, or for one that
    holds more than `limit` bytes."""
    if tags.get(TIFF_COMPRESSION) in DEFLATE:
        kind = TIFF_STRIPS if TIFF_STRIPS[0] in tags else TIFF_TILES
        for place, length in zip(tags[kind[0]], tags[kind[1]], strict=True):
            part = zlib.decompressobj()
            part.decompress(data[place : place + length], limit)
            if not part.eof:
                raise Refused("cannot be read: image file is truncated")


def _has_end(jpeg: bytes) -> bool:
    """Whether the end marker follows the beginning of the pixels, in which no compressed byte can look like it."""
    place = 2
    while jpeg[place : place + 1] == b"\xff" and jpeg[place + 1 : place + 2] != b"\xda":
        if jpeg[place + 1 : place + 2] == b"\xff":  # padding
            place += 1
        else:
            place += 2 + int.from_bytes(jpeg[place + 2 : place + 4], "big")
    return b"\xff\xd9" in jpeg[place:]


def _converted(image: Image.Image) -> Image.Image:
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise Refused(f"has {getattr(image, 'n_frames', 'several')} frames or pages; give one image a file")
    number_format, tags = image.format, getattr(image, "tag_v2", {})  # tags of a TIFF
    image = ImageOps.exif_transpose(image)  # before any conversion, which may lose the tag
    if image.mode.startswith("I") or image.mode == "F":
        if tags and (tags.get(TIFF_BITS) == (12,) or tags.get(TIFF_WHITE) == 0):
            raise Refused("is a TIFF of 12 bits, or of 16 with white as zero; save it as PNG")
        return _from_numbers(image, number_format)
    if image.mode in ("RGBa", "La"):  # colours that are multiplied by their opacity
        image = image.convert("RGBA" if image.mode == "RGBa" else "LA")
    if not image.has_transparency_data:
        return image.convert("RGB")
    key = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(key, tuple) and max(key) > 255:
        raise Refused(KEY_OF_16_BITS)
    layers = image.convert("RGBA")
    ground = Image.new("RGBA", layers.size, (*GROUND, 255))
    return Image.alpha_composite(ground, layers).convert("RGB")


def _from_numbers(image: Image.Image, file_format: str | None) -> Image.Image:
    """One channel of 16 bits or of floats, as gray."""
    if "transparency" in image.info:
        raise Refused(KEY_OF_16_BITS)
    values = np.asarray(image)
    if image.mode == "F":
        # NaN fails both comparisons.
        if not (values.min() >= 0 and values.max() <= 1):
            raise Refused("has floats outside 0 (black) to 1 (white); save it as 8 or 16 bits")
        shades = values * 255
    elif image.mode.startswith("I;16") or file_format == "PPM":  # which Pillow scales to 16 bits
        shades = values / 257
    else:
        raise Refused("has 32-bit integers, whose white is not known; save it as 8 or 16 bits")
    return Image.fromarray((shades + 0.5).astype(np.uint8)).convert("RGB")
