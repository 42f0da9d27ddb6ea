"""The preference record: what is written is read again, by `datasets` too, and each bad row is named."""

import dataclasses
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from posttrain.errors import UserError
from posttrain.preferences.config import ColumnMap
from posttrain.preferences.dataset import Preference, Skipped, read_preferences
from posttrain.preferences.writer import PreferenceWriter

ROOT = Path(__file__).parents[2]


def picture(seed: int, size: tuple[int, int] = (16, 24)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def pair(i: int, **fields) -> Preference:
    made = {"prompt": f"prompt {i}", "chosen": picture(2 * i), "rejected": picture(2 * i + 1), "source": "synthetic"}
    return Preference(**{**made, **fields})


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


def assert_same(a: Preference, b: Preference):
    for field in dataclasses.fields(Preference):
        x, y = getattr(a, field.name), getattr(b, field.name)
        assert x.tobytes() == y.tobytes() if isinstance(x, Image.Image) else x == y, field.name


# our own directories


def test_round_trip(tmp_path):
    pairs = [
        pair(
            0, chosen_policy="raw s=4.5", rejected_policy="step 100", rejected_on_policy=True, margin=0.25, seed=2**62
        ),
        pair(1, source="human", share=0.7),
        pair(2, prompt="ein Fuchs 🦊", chosen=picture(4).convert("L")),
    ]
    with PreferenceWriter(tmp_path / "a", rows=2, card={"recipe": {"seed": 3}}) as writer:
        for one in pairs:
            writer.add(one)
        writer.card["agreement"] = 0.9
    preferences = read_preferences(tmp_path / "a")
    assert len(preferences) == 3
    for got, expected in zip(preferences, pairs, strict=True):
        assert_same(got, expected)
    card = preferences.card
    assert (card["rows"], card["on_policy"], card["sources"]) == (3, 1, {"synthetic": 2, "human": 1})
    assert (card["recipe"], card["agreement"], list(card["shards"].values())) == ({"seed": 3}, 0.9, [2, 1])


def test_datasets_reads_it(tmp_path, monkeypatch):
    with PreferenceWriter(tmp_path / "a", rows=2) as writer:
        for i in range(3):
            writer.add(pair(i, margin=0.5 if i else None))
    rows = datasets.load_dataset(str(tmp_path / "a"), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows["prompt"] == ["prompt 0", "prompt 1", "prompt 2"] and rows["margin"] == [None, 0.5, 0.5]
    assert rows[2]["chosen"].tobytes() == picture(4).tobytes() and rows[2]["id"] == pair(2).id
    rows.save_to_disk(str(tmp_path / "saved"))
    again = list(read_preferences(tmp_path / "saved"))
    for i, got in enumerate(again):
        assert_same(got, pair(i, margin=0.5 if i else None))


def test_id_is_of_prompt_and_pictures():
    ids = [pair(0).id, pair(0, share=0.6).id, pair(0, prompt="other").id, pair(0, chosen=picture(9)).id,
           pair(0, chosen=picture(1), rejected=picture(0)).id]  # fmt: skip
    assert ids[0] == ids[1] and len(set(ids)) == 4


WRITE = """
import os, sys
from posttrain.preferences.writer import PreferenceWriter
from tests.preferences.test_preferences import pair
with PreferenceWriter(sys.argv[1], resume=True, rows=2) as writer:
    for i in range(writer.written, 7):
        if i == 5:
            os.kill(os.getpid(), 9)
        writer.add(pair(i))
"""


def test_a_killed_writer_goes_on(tmp_path):
    result = subprocess.run([sys.executable, "-c", WRITE, str(tmp_path / "a")], cwd=ROOT)
    assert result.returncode == -9
    (tmp_path / "a/.shard-00002.parquet").write_bytes(b"half")
    with pytest.raises(UserError, match=r"a: is unfinished: it has shards and no preferences\.json"):
        read_preferences(tmp_path / "a")
    with pytest.raises(UserError, match="is not empty; go on"):
        PreferenceWriter(tmp_path / "a")
    with PreferenceWriter(tmp_path / "a", resume=True, rows=2) as writer:
        assert writer.written == 4
        for i in range(4, 7):
            writer.add(pair(i))
    with PreferenceWriter(tmp_path / "b", rows=3) as writer:
        for i in range(7):
            writer.add(pair(i))
    a, b = read_preferences(tmp_path / "a"), read_preferences(tmp_path / "b")
    assert [p.id for p in a] == [p.id for p in b] == [pair(i).id for i in range(7)]
    assert a.fingerprint() == b.fingerprint()
    with pytest.raises(UserError, match="holds a finished set of pairs; choose another"):
        PreferenceWriter(tmp_path / "a", resume=True)


def test_an_exception_leaves_the_set_unfinished(tmp_path):
    with pytest.raises(KeyError), PreferenceWriter(tmp_path / "a", rows=2) as writer:
        for i in range(3):
            writer.add(pair(i))
        raise KeyError
    assert not (tmp_path / "a/preferences.json").exists()
    assert PreferenceWriter(tmp_path / "a", resume=True).written == 2


def test_what_is_no_pair_is_not_written(tmp_path):
    with PreferenceWriter(tmp_path / "a") as writer:
        writer.add(pair(0))
        for wrong in ({"share": 0.3}, {"rejected": picture(0)}, {"rejected": picture(1, (8, 8))}, {"prompt": " "},
                      {"margin": float("nan")}, {"source": "machine"}, {"chosen_on_policy": "yes"}):  # fmt: skip
            with pytest.raises(ValueError, match=r"share: |same|size: |prompt: |margin: |source: |on_policy: "):
                writer.add(pair(0, **wrong))
    assert len(read_preferences(tmp_path / "a")) == 1


def damage_version(folder):
    card = json.loads((folder / "preferences.json").read_text())
    (folder / "preferences.json").write_text(json.dumps({**card, "version": 2}))


def damage_remove(folder):
    (folder / "shard-00001.parquet").unlink()


def damage_swap(folder):
    (folder / "shard-00000.parquet").replace(folder / "shard-00001.parquet")
    damage = pa.table({"prompt": ["a"] * 3})
    pq.write_table(damage, folder / "shard-00000.parquet")


def damage_column(folder):
    """Its default would be read in its place."""
    table = pq.read_table(folder / "shard-00001.parquet")
    pq.write_table(table.rename_columns([name.replace("share", "shbre") for name in table.column_names]),
                   folder / "shard-00001.parquet")  # fmt: skip


def damage_page(folder):
    """A byte of the first prompt, of which only the checksum of its page tells."""
    data = (folder / "shard-00000.parquet").read_bytes()
    assert b"prompt 0" in data
    (folder / "shard-00000.parquet").write_bytes(data.replace(b"prompt 0", b"prompt 9"))


def test_pages_have_checksums(tmp_path):
    with PreferenceWriter(tmp_path / "a", rows=1) as writer:
        writer.add(pair(0))
        writer.add(pair(1))
    damage_page(tmp_path / "a")
    first, second = (read_preferences(tmp_path / "a")[i] for i in range(2))
    assert isinstance(first, Skipped) and "CRC checksum" in first.reason
    assert_same(second, pair(1))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (damage_column, "shard-00001.parquet: has other columns than it was written with; copy"),
        (damage_version, "preferences.json: version 2; this posttrain reads 1"),
        (damage_remove, "shard-00001.parquet: is missing; copy the whole directory"),
        (damage_swap, "shard-00000.parquet: has 3 rows, not 1 as preferences.json says"),
    ],
)
def test_a_damaged_directory(tmp_path, damage, says):
    with PreferenceWriter(tmp_path / "a", rows=1) as writer:
        writer.add(pair(0))
        writer.add(pair(1))
    damage(tmp_path / "a")
    with pytest.raises(UserError, match=says):
        read_preferences(tmp_path / "a")


# others


def jsonl(folder: Path, rows: list) -> Path:
    """Pictures 0 to 3, and files that are none, beside a file of rows."""
    (folder / "images").mkdir(exist_ok=True)
    for i in range(4):
        picture(i).save(folder / f"images/{i}.png")
    picture(4, (8, 8)).save(folder / "images/small.png")
    (folder / "images/cut.png").write_bytes((folder / "images/0.png").read_bytes()[:300])
    (folder / "images/empty.png").write_bytes(b"")
    (folder / "images/text.png").write_text("hello")
    path = folder / "pairs.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def row(chosen="images/0.png", rejected="images/1.png", prompt="a fox", **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def test_jsonl_with_paths(tmp_path, monkeypatch):
    path = jsonl(tmp_path, [row(), "", row("images/2.png", "images/3.png", share=0.75, margin=2, source="synthetic")])
    monkeypatch.chdir(ROOT)
    a, b = read_preferences(path)
    assert a.chosen.tobytes() == picture(0).tobytes() and a.rejected.tobytes() == picture(1).tobytes()
    assert (a.source, a.share, a.margin, a.chosen_policy, a.chosen_on_policy) == ("human", 1, None, "unknown", False)
    assert (b.source, b.share, b.margin) == ("synthetic", 0.75, 2)


def test_bad_rows_are_named_and_skipped(tmp_path):
    rows = [
        row(),
        row(rejected="images/none.png"),
        row("images/cut.png"),
        row("images/empty.png"),
        row("images/text.png"),
        row(rejected="images/0.png"),
        row(rejected="images/small.png"),
        row(prompt="  "),
        row(prompt=3),
        row(None),
        row(share=0.4),
        row(share="most"),
        '{"prompt": ',
        "[1]",
        row(share=0.5),
        row("images/2.png", "images/3.png"),
    ]
    expected = [
        None, "rejected: images/none.png is missing", "chosen: cannot be read: .*[Tt]runcated",
        r"chosen: is not an image \(0 bytes\)", r"chosen: is not an image \(5 bytes\)", "the images are the same",
        "differ in size: 24x16 and 8x8", "prompt: is empty", "prompt: is no text", "chosen: no image",
        r"share: is 0\.4", "share: is 'most', no number", "not JSON", "is not an object", "neither image", None,
    ]  # fmt: skip
    preferences = read_preferences(jsonl(tmp_path, rows), max_bad=0.9)
    for i, reason in enumerate(expected):
        got = preferences[i]
        assert isinstance(got, Preference if reason is None else Skipped)
        if isinstance(got, Skipped):
            assert got.where == f"{tmp_path}/pairs.jsonl:{i + 1}" and got.tie == (i == 14)
            assert reason is not None and re.search(reason, got.reason)
    assert [p.prompt for p in preferences] == ["a fox"] * 2


def test_too_many_bad_rows_stop(tmp_path):
    """3 of 20 are more than a tenth, 2 are not; ties do not count."""
    rows = [row("images/cut.png"), row(prompt=""), *[row(share=0.5)] * 5, *[row()] * 13]
    assert len(list(read_preferences(jsonl(tmp_path, rows), max_bad=0.1))) == 13
    preferences = read_preferences(jsonl(tmp_path, [*rows[:-1], row("images/empty.png")]), max_bad=0.1)
    with pytest.raises(UserError) as error:
        list(preferences)
    assert "more than 0.1 of 20 rows are bad (max_bad): " in str(error.value)
    assert "pairs.jsonl:1: chosen: cannot" in str(error.value) and "pairs.jsonl:2: prompt: is empty" in str(error.value)
    with pytest.raises(UserError, match="no pair to learn from: 2 rows, all ties or bad"):
        list(read_preferences(jsonl(tmp_path, [row(share=0.5)] * 2)))


PICK_A_PIC = ColumnMap("caption", first="jpg_0", second="jpg_1", label="label_0", label_second="label_1")
HPD = ColumnMap(pair="images", label="human_preference", source="human")


def test_columns_as_of_pick_a_pic(tmp_path):
    """Parquet with the bytes of two files and a label each; 0.5 and 0.5 is a tie, as are 0 and 0."""
    labels = [(1, 0), (0, 1), (0.5, 0.5), (0, 0), (3, 1)]
    table = {"caption": [f"caption {i}" for i in range(5)], "jpg_0": [png(picture(i)) for i in range(5)],
             "jpg_1": [png(picture(10 + i)) for i in range(5)], "label_0": [float(a) for a, _ in labels],
             "label_1": [float(b) for _, b in labels], "prompt": ["not this"] * 5}  # fmt: skip
    pq.write_table(pa.table(table), tmp_path / "train.parquet", row_group_size=2)
    for path in (tmp_path, tmp_path / "train.parquet"):
        preferences = read_preferences(path, PICK_A_PIC)
        kept = list(preferences)
        assert [p.prompt for p in kept] == ["caption 0", "caption 1", "caption 4"]
        chosen = [picture(0), picture(11), picture(4)]
        assert [p.chosen.tobytes() for p in kept] == [c.tobytes() for c in chosen]
        assert [p.share for p in kept] == [1, 1, 0.75]
        ties = [preferences[2], preferences[3]]
        assert all(isinstance(t, Skipped) and t.tie for t in ties)
        assert isinstance(ties[1], Skipped) and ties[1].where == f"{tmp_path}/train.parquet row 3"


def test_columns_as_of_hpd(tmp_path):
    """A list of two pictures and a list of two votes, in a dataset of the `datasets` library."""
    features = datasets.Features(
        {"prompt": datasets.Value("string"), "images": datasets.List(datasets.Image()),
         "human_preference": datasets.List(datasets.Value("int64"))}
    )  # fmt: skip
    rows = {"prompt": ["a", "b", "c"], "images": [[picture(0), picture(1)], [picture(2), picture(3)], [picture(4)]],
            "human_preference": [[0, 1], [1, 0], [1, 0]]}  # fmt: skip
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "hpd"))
    preferences = read_preferences(tmp_path / "hpd", HPD, max_bad=0.5)
    a, b = preferences
    assert a.chosen.tobytes() == picture(1).tobytes() and b.chosen.tobytes() == picture(2).tobytes()
    assert isinstance(preferences[2], Skipped) and preferences[2].reason == "images: is not a list of two images"


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        (ColumnMap("caption", chosen="chosen", rejected="rejected"), "columns.prompt: 'caption' is no column of"),
        (ColumnMap(first="chosen", second="rejected", label="winner"), "it has: prompt, chosen, rejected$"),
        (ColumnMap(chosen="chosen"), "columns: name chosen and rejected; or first, second and label; or"),
        (ColumnMap(chosen="chosen", rejected="rejected", pair="pair"), "columns: name"),
        (ColumnMap(first="chosen", second="rejected"), "columns: name"),
        (ColumnMap(), "columns: name"),
    ],
)
def test_a_column_map_that_does_not_fit(tmp_path, columns, says):
    with pytest.raises(UserError, match=says):
        read_preferences(jsonl(tmp_path, [row()]), columns)


def test_sets_that_are_not_there(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "cut.parquet").write_bytes(b"PAR1")
    for path, says in (
        ("none", "none: no such file or directory; give a file, a directory"),
        ("empty.jsonl", "holds no pair"),
        ("folder", "is a directory without a parquet file or a saved dataset"),
        ("cut.parquet", "is not a whole parquet file"),
    ):
        with pytest.raises(UserError, match=says):
            read_preferences(tmp_path / path)
    with pytest.raises(UserError, match="'chosen' is no column"):
        read_preferences(jsonl(tmp_path, [{"prompt": "a"}]))
    with pytest.raises(UserError, match=r"hf:.*cannot be loaded: .*write it as hf:NAME, "):
        read_preferences("hf:" + str(tmp_path / "none"))


def test_fingerprint_follows_the_content(tmp_path):
    path = jsonl(tmp_path, [row(), row("images/2.png")])
    before = read_preferences(path).fingerprint()
    assert before == read_preferences(path).fingerprint()
    assert before != read_preferences(path, ColumnMap(chosen="rejected", rejected="chosen")).fingerprint()
    picture(7).save(tmp_path / "images/2.png", compress_level=0)
    assert before != read_preferences(path).fingerprint()
