"""The reader of images: each kind of file is read as what it shows, or refused with a reason."""

import io
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImageOps

import posttrain
from posttrain.errors import UserError
from posttrain.image_reader import read_image, to_rgb
from rewards.encode import encode

SIDE = 64
RAMP = np.tile(np.linspace(0, 255, SIDE).astype(np.uint8), (SIDE, 1))
COLOURS = np.stack([RAMP, RAMP.T, 255 - RAMP], -1)
GRAY = np.repeat(RAMP[..., None], 3, -1)
OPAQUE = RAMP > 127
ON_WHITE = np.where(OPAQUE[..., None], COLOURS, 255)
"""COLOURS whose left half is clear, on white."""


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def rgba(hidden: int | None = None) -> Image.Image:
    """COLOURS whose left half is clear; it holds its colours still, or one shade."""
    colours = COLOURS if hidden is None else np.where(OPAQUE[..., None], COLOURS, np.uint8(hidden))
    return Image.fromarray(np.dstack([colours, OPAQUE * np.uint8(255)]))


def error(data: bytes, truth: np.ndarray) -> float:
    """Mean absolute difference, of 255."""
    image = read_image(data)
    assert image.mode == "RGB"
    return float(np.abs(np.asarray(image, float) - truth).mean())


SIXTEEN = Image.fromarray(RAMP.astype(np.uint16) * 257)
FLOATS = Image.fromarray((RAMP / 255).astype(np.float32))
PALETTE = Image.fromarray(COLOURS).quantize(64)
LUMA = Image.fromarray(COLOURS).convert("L")
CMYK = Image.fromarray(COLOURS).convert("CMYK")


@pytest.mark.parametrize(
    ("data", "truth"),
    [
        (saved(Image.fromarray(COLOURS), "PNG"), COLOURS),
        (saved(Image.fromarray(COLOURS), "WEBP", lossless=True), COLOURS),
        (saved(Image.fromarray(COLOURS), "AVIF", quality=100), COLOURS),
        (saved(Image.fromarray(COLOURS), "JPEG", quality=100), COLOURS),
        (saved(Image.fromarray(COLOURS), "TIFF", compression="tiff_adobe_deflate"), COLOURS),
        (saved(rgba(), "PNG"), ON_WHITE),
        (saved(rgba(0), "PNG"), ON_WHITE),
        (saved(rgba(), "WEBP", lossless=True, exact=True), ON_WHITE),
        (saved(rgba(128).convert("LA"), "PNG"), np.where(OPAQUE[..., None], np.asarray(LUMA)[..., None], 255)),
        (saved(PALETTE, "PNG"), np.asarray(PALETTE.convert("RGB"))),
        (
            saved(PALETTE, "PNG", transparency=3),
            np.where((np.asarray(PALETTE) == 3)[..., None], 255, np.asarray(PALETTE.convert("RGB"))),
        ),
        (saved(PALETTE, "GIF"), np.asarray(PALETTE.convert("RGB"))),
        (saved(Image.fromarray(RAMP), "PNG"), GRAY),
        (saved(Image.fromarray(RAMP), "PNG", transparency=0), np.where(GRAY == 0, 255, GRAY)),
        (saved(SIXTEEN, "PNG"), GRAY),
        (saved(SIXTEEN, "TIFF"), GRAY),
        (b"P5 64 64 65535\n" + (RAMP.astype(">u2") * 257).tobytes(), GRAY),
        (saved(FLOATS, "TIFF"), GRAY),
        (saved(CMYK, "JPEG", quality=100), np.asarray(CMYK.convert("RGB"))),
        (
            saved(Image.fromarray(COLOURS), "MPO", save_all=True, append_images=[PALETTE.convert("RGB")], quality=100),
            COLOURS,
        ),
    ],
)  # fmt: skip
def test_kinds_of_images(data, truth):
    assert error(data, truth) < 1


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_viewers_show_them(kind, orientation):
    """Against Pillow's own transposition; orientation 6 of a photo that lies on its left side stands up again."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(Image.fromarray(COLOURS[:32]), kind, exif=exif)
    shown = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert error(data, np.asarray(shown)) == 0
    assert read_image(data).size == ((32, 64) if orientation > 4 else (64, 32))
    if orientation == 6:
        upright = saved(Image.fromarray(np.rot90(COLOURS).copy()), kind, exif=exif)
        assert error(upright, COLOURS) < 3


def frames(kind: str) -> bytes:
    other = Image.fromarray(255 - COLOURS)
    return saved(Image.fromarray(COLOURS), kind, save_all=True, append_images=[other])


def zero_tail(data: bytes, begin: float = 0.5) -> bytes:
    kept = round(len(data) * begin)
    return data[:kept] + bytes(len(data) - kept)


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "is not an image (0 bytes)"),
        (b"hello", "is not an image (5 bytes)"),
        *[(frames(kind), "has 2 frames or pages; give one image a file") for kind in ("GIF", "WEBP", "PNG", "TIFF")],
        (saved(Image.fromarray(RAMP.astype(np.float32)), "TIFF"), "has floats outside 0 (black) to 1 (white)"),
        (saved(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF"), "has floats outside 0"),
        (saved(Image.fromarray(RAMP.astype(np.int32)), "TIFF"), "has 32-bit integers, whose white is not known"),
        (saved(SIXTEEN, "PNG", transparency=100), "has 16 bits and a transparent colour"),
        (saved(Image.fromarray(COLOURS), "JPEG2000"), "is of format JPEG2000, which is not supported; save it as PNG"),
        (saved(Image.fromarray(COLOURS), "EPS"), "is of format EPS, which is not supported"),
        (saved(NOISE, "PNG")[:-2000], "cannot be read: "),
        (saved(NOISE, "JPEG")[:-2000], "cannot be read: image file is truncated (its end is missing)"),
        *[
            (zero_tail(saved(NOISE, kind)), "cannot be read: image file is truncated (its end is missing)")
            for kind in ("JPEG", "WEBP", "AVIF")
        ],
        (zero_tail(saved(NOISE, "PNG")), "cannot be read: "),
    ],
)
def test_refused(data, says, tmp_path):
    with pytest.raises(ValueError) as raised:
        read_image(data)
    (file := tmp_path / "odd.png").write_bytes(data)
    with pytest.raises(ValueError, match=f"^{re.escape(f'{file}: {raised.value}')}$"):
        read_image(file)
    assert str(raised.value).startswith(says) and "\n" not in str(raised.value)


def test_damage_that_pillow_does_not_notice_is_refused():
    """A byte of a PNG's pixels, and some of a TIFF's, of which Pillow decodes other images without an error."""
    png, tiff = (
        bytearray(saved(NOISE, "PNG", compress_level=0)),
        bytearray(saved(NOISE, "TIFF", compression="tiff_adobe_deflate")),
    )
    png[20_000] ^= 1
    tiff[20_000:20_060] = bytes(60)
    assert not np.array_equal(Image.open(io.BytesIO(png)), NOISE)
    for data in (png, tiff):
        with pytest.raises(ValueError, match="cannot be read: "):
            read_image(bytes(data))


def test_zeros_behind_a_whole_jpeg_are_no_damage():
    data = saved(NOISE, "JPEG")
    assert error(data + bytes(4096), np.asarray(Image.open(io.BytesIO(data)))) == 0


def test_a_photograph_of_many_pixels_is_read_without_a_word(tmp_path):
    """Of 120 pixels where Pillow warns above 100 and refuses above 200; in a process with Python's own warnings."""
    Image.new("RGB", (12, 10)).save(tmp_path / "a.png")
    code = "from PIL import Image; from posttrain.image_reader import read_image; Image.MAX_IMAGE_PIXELS = 100;"
    code += f"print(read_image({str(tmp_path / 'a.png')!r}).size)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("(12, 10)\n", "")


def test_images_in_memory(tmp_path):
    """Those that are 8-bit RGB already stay what they are; judges and the library's rewards see the others as RGB."""
    plain = Image.fromarray(COLOURS)
    assert to_rgb(plain) is plain
    np.testing.assert_array_equal(to_rgb(rgba()), ON_WHITE)
    np.testing.assert_array_equal(to_rgb(SIXTEEN), GRAY)
    assert encode(rgba()) == encode(Image.fromarray(ON_WHITE))
    exif = Image.Exif()
    exif[0x0112] = 3
    (tmp_path / "a.png").write_bytes(saved(plain, "PNG", exif=exif))

    def corner(images, prompts):
        assert [image.mode for image in images] == ["RGB"] * len(images)
        return [np.asarray(image)[0, 0].mean() for image in images]

    rewards = posttrain.load_rewards([corner])
    scores = posttrain.score(rewards, [rgba(), Image.open(tmp_path / "a.png")], ["", ""])
    assert scores.values_NK[:, 0].tolist() == [255, pytest.approx(COLOURS[-1, -1].mean())]
    with pytest.raises(UserError, match=r"images\[1\]: has 32-bit integers"):
        posttrain.score(rewards, [plain, Image.fromarray(RAMP.astype(np.int32))], ["", ""])
