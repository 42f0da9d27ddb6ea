"""Sets of images with captions, in every form that they are read in, and what people's files are like."""

import csv
import io
import json
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from posttrain.errors import UserError
from posttrain.sft.config import ImageColumns, ImageSetConfig
from posttrain.sft.dataset import ImageSet
from posttrain.sft.sources import Folder, Tars, open_source
from prompts.tables import Parquet

LONG, SHORT = [f"a long caption of image {i}" for i in range(3)], [f"image {i}" for i in range(3)]


def picture(i: int, size=(24, 16)) -> Image.Image:
    return Image.fromarray(np.full((*size[::-1], 3), 40 * i + 20, np.uint8))


def png(i: int) -> bytes:
    buffer = io.BytesIO()
    picture(i).save(buffer, "png")
    return buffer.getvalue()


def folder(place: Path) -> Path:
    """Three images, one of them deeper, with what systems put beside files."""
    (place / "deeper").mkdir(parents=True)
    for i, name in enumerate(("a", "b", "deeper/c")):
        (place / f"{name}.png").write_bytes(png(i))
        (place / f"{name}.txt").write_text(f"  {LONG[i]}\n")
        (place / f"{name}.json").write_text(json.dumps({"short": SHORT[i], "rating": i}))
    (place / "._a.png").write_bytes(b"resource fork")
    (place / "notes.md").write_text("no image")
    return place


def tars(place: Path) -> Path:
    place.mkdir()
    for number, members in enumerate(((0, 1), (2,))):
        with tarfile.open(place / f"shard-{number}.tar", "w") as tar:
            for i in members:
                # Parts of a sample in any order, with one that is not read, and a dot in the extension.
                beside = json.dumps({"short": SHORT[i]}).encode()
                for suffix, data in (("json", beside), ("cls", b"7"), ("png", png(i)), ("txt", LONG[i].encode())):
                    info = tarfile.TarInfo(f"train/{i:03d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return place


def rows(place: Path) -> list[dict]:
    place.mkdir()
    for i in range(3):
        (place / f"{i}.png").write_bytes(png(i))
    return [{"image": f"{i}.png", "caption": LONG[i], "short": SHORT[i]} for i in range(3)]


def jsonl(place: Path) -> Path:
    lines = [json.dumps(row) for row in rows(place)]
    (place / "set.jsonl").write_text("\n".join(lines) + "\n")
    return place / "set.jsonl"


def table(place: Path) -> Path:
    with (place.parent / "set.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["image", "caption", "short"])
        writer.writeheader()
        writer.writerows([row | {"image": f"files/{row['image']}"} for row in rows(place.parent / "files")])
    return place.parent / "set.csv"


def dataset(place: Path) -> datasets.Dataset:
    columns = {"image": [str(place / row["image"]) for row in rows(place)], "caption": LONG, "short": SHORT}
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())


def parquet(place: Path) -> Path:
    dataset(place).to_parquet(place.parent / "set.parquet")
    return place.parent / "set.parquet"


def saved(place: Path) -> Path:
    dataset(place).save_to_disk(place.parent / "saved")
    return place.parent / "saved"


def hub(place: Path) -> str:
    return f"hf:{parquet(place)}"


def image_set(source, **settings) -> ImageSet:
    return ImageSet(ImageSetConfig(str(source), **settings))


@pytest.mark.parametrize("make", [folder, tars, jsonl, table, parquet, saved, hub], ids=lambda make: make.__name__)
def test_all_forms_give_the_same_examples(tmp_path, make):
    columns = ImageColumns(captions={"caption": 3, "short": 1})
    images = image_set(make(tmp_path / "set"), columns=columns)
    assert len(images) == 3
    for i in range(3):
        example = images[i]
        assert [(c.text, c.weight) for c in example.captions] == [(LONG[i], 3), (SHORT[i], 1)]
        assert example.image.size == (24, 16) and example.image.getpixel((0, 0)) == (40 * i + 20,) * 3
        assert images.captions(i) == example.captions
    assert len({images[i].digest() for i in range(3)}) == 3
    assert images.fingerprint() == image_set(images.path, columns=columns).fingerprint()
    assert images.fingerprint() != image_set(images.path).fingerprint()


@pytest.mark.parametrize("make", [folder, tars, jsonl], ids=lambda make: make.__name__)
def test_a_path_from_the_working_directory(tmp_path, make, monkeypatch):
    place = make(tmp_path / "set")
    monkeypatch.chdir(tmp_path)
    images = image_set(place.relative_to(tmp_path))
    assert images[2].image.getpixel((0, 0)) == (100, 100, 100) and images[2].captions[0].text == LONG[2]


def test_rows_are_named_by_their_files(tmp_path):
    assert image_set(folder(tmp_path / "a")).name(2) == str(tmp_path / "a/deeper/c.png")
    assert image_set(tars(tmp_path / "b")).name(2) == f"{tmp_path / 'b/shard-1.tar'}: train/002"
    assert image_set(jsonl(tmp_path / "c")).name(2) == f"{tmp_path / 'c/set.jsonl'}:3"


def test_a_change_of_a_file_is_another_set(tmp_path):
    place = folder(tmp_path / "set")
    before = image_set(place).fingerprint()
    (place / "a.txt").write_text("another caption")
    assert image_set(place).fingerprint() != before
    (place / "a.txt").unlink()
    moved = image_set(place).fingerprint()
    (place / "b.png").rename(place / "z.png")
    assert len({before, moved, image_set(place).fingerprint()}) == 3


def test_a_cell_may_hold_several_captions(tmp_path):
    place = folder(tmp_path / "set")
    (place / "a.json").write_text(json.dumps({"short": ["one", " ", "two "]}))
    (place / "b.json").write_text(json.dumps({"short": None}))
    (place / "b.txt").unlink()
    images = image_set(place, columns=ImageColumns(captions={"short": 1, "caption": 2}))
    assert [(c.text, c.weight) for c in images[0].captions] == [("one", 0.5), ("two", 0.5), (LONG[0], 2)]
    with pytest.raises(ValueError, match=r"^short: is missing; caption: is missing$"):
        images[1]


BAD = {
    "an image that is cut off": ("a.png", png(0)[:-40], "image: cannot be read: Truncated"),
    "what is not an image": ("a.png", b"no image", r"image: is not an image \(8 bytes\)"),
    "no caption": ("a.txt", None, "caption: is missing"),
    "an empty caption": ("a.txt", b" \n", "caption: is empty"),
    "another encoding": ("a.txt", "Füchse".encode("latin-1"), r"its \.txt is not UTF-8 text; save it as UTF-8"),
    "UTF-16": ("a.txt", "a fox".encode("utf-16"), r"its \.txt is not UTF-8 text"),
    "no JSON": ("a.json", b"{", r"its \.json: not JSON"),
    "a list": ("a.json", b"[1]", r"its \.json is not an object"),
    "a number": ("a.json", b'{"caption": 3}', "caption: is neither text nor a list of texts"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_row_says_why(tmp_path, kind):
    name, data, reason = BAD[kind]
    place = folder(tmp_path / "set")
    (place / name).unlink()
    if data is not None:
        (place / name).write_bytes(data)
    images = image_set(place)
    with pytest.raises(ValueError, match=f"^{reason}"):
        images[0]
    assert images[1].captions[0].text == LONG[1]


def test_images_as_people_have_them(tmp_path):
    """Turned by EXIF, with alpha on white, CMYK and 16 bits are read; several frames are refused."""
    place = tmp_path / "set"
    place.mkdir()
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter to the right
    picture(1).save(place / "a.jpg", exif=turned)
    Image.new("RGBA", (24, 16), (0, 0, 0, 0)).save(place / "b.png")
    picture(1).convert("CMYK").save(place / "c.jpg")
    Image.fromarray(np.full((16, 24), 65535, np.uint16)).save(place / "d.png")
    picture(1).save(place / "e.gif", save_all=True, append_images=[picture(2)])
    Image.new("RGB", (1, 1)).save(place / "f.png")
    for name in "abcdef":
        (place / f"{name}.txt").write_text(name)
    images = image_set(place)
    assert images[0].image.size == (16, 24)
    assert images[1].image.getpixel((0, 0)) == images[3].image.getpixel((0, 0)) == (255, 255, 255)
    assert images[2].image.mode == "RGB" and images[5].image.size == (1, 1)
    with pytest.raises(ValueError, match="image: has 2 frames or pages; give one image a file"):
        images[4]


def test_what_is_no_set(tmp_path):
    with pytest.raises(UserError, match="none: no such file or directory"):
        open_source(str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: holds no image .*give the folder of the images"):
        open_source(str(tmp_path / "empty"))
    (tmp_path / "set.tar.gz").write_bytes(b"")
    with pytest.raises(UserError, match=r"set\.tar\.gz: is compressed, .*unpack it to a \.tar"):
        open_source(str(tmp_path / "set.tar.gz"))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match=r"empty\.jsonl: holds no image$"):
        image_set(tmp_path / "empty.jsonl")
    with pytest.raises(UserError, match=r"images\.columns\.captions: 'text' is no column of .*; it has: image, capt"):
        image_set(folder(tmp_path / "set"), columns=ImageColumns(captions={"text": 1}))
    with pytest.raises(UserError, match=r"images\.columns\.image: 'picture' is no column of"):
        image_set(jsonl(tmp_path / "c"), columns=ImageColumns("picture"))


@pytest.mark.parametrize("end", ["in a file", "in a header", "between files"])
def test_a_tar_that_is_cut_off_is_refused(tmp_path, end):
    """Also where tarfile itself takes it for whole."""
    file = tars(tmp_path / "set") / "shard-0.tar"
    with tarfile.open(file) as tar:
        last = tar.getmembers()[-1]
    at = {"in a file": last.offset_data + 3, "in a header": last.offset + 100, "between files": last.offset}[end]
    file.write_bytes(file.read_bytes()[:at])
    with pytest.raises(UserError, match=r"shard-0\.tar: is not a whole, uncompressed tar file: .*copy or make it"):
        open_source(str(tmp_path / "set"))


def test_a_folder_is_read_as_what_it_holds(tmp_path):
    assert isinstance(open_source(str(folder(tmp_path / "a"))), Folder)
    assert isinstance(open_source(str(tars(tmp_path / "b"))), Tars)
    assert isinstance(open_source(str(tars(tmp_path / "c") / "shard-1.tar")), Tars)
    place = folder(tmp_path / "d")
    parquet(tmp_path / "x").rename(place / "set.parquet")
    assert isinstance(open_source(str(place)), Parquet)
    place = tars(tmp_path / "e")
    Image.new("RGB", (8, 8)).save(place / "a.png")
    with pytest.raises(UserError, match=r"e: holds 1 image and \d tar files, such as shard-0\.tar; give a folder of"):
        open_source(str(place))
