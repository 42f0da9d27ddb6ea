"""Images as data URLs. All questions about an image share one encoding, whichever reward asks."""

import asyncio
import base64
import hashlib
import io
import struct
import threading
import zlib
from collections import OrderedDict
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
from PIL import Image

from posttrain.image_reader import to_rgb

CACHED_BYTES = 1 << 30
"""Size of the cache of encoded images: some 400 of 1024 x 1024 pixels."""
SMALL = 512 * 512  # pixels: up to here an image is not compressed, and encoded sooner than handed to a thread


@dataclass(frozen=True)
class EncodedImage:
    hash: str  # of the pixels
    url: str


_encoded: OrderedDict[str, "Future[EncodedImage]"] = OrderedDict()
_kept = 0  # bytes of those
_lock = threading.Lock()


def encode(image: Image.Image) -> EncodedImage:
    """Without loss: small images as PNG that is only stored, larger ones as WebP, which releases the GIL.

    To compress 256 x 256 pixels takes 1.6 ms as WebP and 5 ms as PNG, and halves what is sent; to store them, 0.2 ms.
    """
    image = to_rgb(image)
    pixels = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
    with _lock:
        future = _encoded.get(pixels)
        encodes = future is None  # this call does the work, and others of the same image wait for it
        if future is None:
            future = _encoded[pixels] = Future()
        _encoded.move_to_end(pixels)
    if encodes:
        try:
            kind, data = ("png", _stored_png(image)) if _small(image) else ("webp", _webp(image))
            url = f"data:image/{kind};base64," + base64.b64encode(data).decode()
            future.set_result(EncodedImage(pixels, url))
        except Exception as error:
            with _lock:
                del _encoded[pixels]
            future.set_exception(error)
            raise
        _forget_oldest(len(future.result().url))
    return future.result()


def _forget_oldest(new: int) -> None:
    """Keeps to CACHED_BYTES, now that there are so many new ones."""
    global _kept
    with _lock:
        _kept += new
        while _kept > CACHED_BYTES and (oldest := next(iter(_encoded))) and _encoded[oldest].done():
            _kept -= len(_encoded.pop(oldest).result().url)


async def encode_async(image: Image.Image) -> EncodedImage:
    return encode(image) if _small(image) else await asyncio.to_thread(encode, image)


def _small(image: Image.Image) -> bool:
    return image.width * image.height <= SMALL


def _webp(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=True, method=0, quality=0)
    return buffer.getvalue()


def _stored_png(image: Image.Image) -> bytes:
    """Pillow's PNG tries filters on each row even where it does not compress, which takes 3 ms."""
    rows = np.zeros((image.height, 1 + 3 * image.width), np.uint8)  # in front of each row its filter: 0, none
    rows[:, 1:] = np.asarray(image).reshape(image.height, -1)
    header = struct.pack(">IIBBBBB", image.width, image.height, 8, 2, 0, 0, 0)  # 8 bits, RGB
    png = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 0)), (b"IEND", b"")):
        # A chunk: length of its data, kind, data, checksum of kind and data.
        png += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return png
