"""The pairs that come of what people chose."""

import json
from pathlib import Path

import pytest
from PIL import Image

from posttrain import cli
from posttrain.annotate.answers import Showing, Store
from posttrain.annotate.export import Pairs
from posttrain.errors import UserError
from posttrain.preferences.dataset import Preference, read_preferences
from posttrain.preferences.writer import PreferenceWriter
from tests.annotate.test_annotations import LETTERS, SETTINGS, store_of


def pairs_in(folder: Path, count: int = 4) -> list[Preference]:
    made = [
        Preference(
            f"prompt {i}",
            Image.new("RGB", (8, 8), (i, 200, 0)),
            Image.new("RGB", (8, 8), (i, 0, 200)),
            "synthetic",
            "strong",
            "weak",
            chosen_on_policy=True,
            margin=0.1 * i,
            seed=i,
        )
        for i in range(count)
    ]
    with PreferenceWriter(folder) as writer:
        for pair in made:
            writer.add(pair)
    return made


def annotations(*options) -> int:
    return cli.main(["annotations", *map(str, options)])


def test_human_pairs(tmp_path, capsys):
    """Pair 0 keeps its order, 1 is turned round by two of three, 2 is a tie, 3 was skipped."""
    pairs = pairs_in(tmp_path / "pairs")
    store = Store(tmp_path / "choices.jsonl", SETTINGS)
    for name, answers in {"ann": "lrts", "bob": "lrts", "eve": "tlts"}.items():
        for pair, letter in zip(pairs, answers):
            store.add(name, Showing(pair.id, False, "chosen"), LETTERS[letter], 1.0)
    options = ["--pairs", tmp_path / "pairs", "--store", tmp_path / "choices.jsonl"]
    assert annotations(*options, "--output", tmp_path / "human") == 0  # while the store is in use
    store.close()
    out = capsys.readouterr().out
    assert "3 of 4 pairs answered, 1 of them undecided" in out
    assert out.endswith(f"posttrain: wrote {tmp_path}/human (2 pairs, 1 undecided left out)\n")
    written = read_preferences(tmp_path / "human")
    same, turned = written
    assert (same.prompt, same.source, same.seed, same.margin, same.share) == ("prompt 0", "human", 0, None, 2.5 / 3)
    assert same.chosen.getpixel((0, 0)) == (0, 200, 0) and same.chosen_policy == "strong" and same.chosen_on_policy
    assert (turned.prompt, turned.share) == ("prompt 1", pytest.approx(2 / 3))
    assert turned.chosen.getpixel((0, 0)) == (1, 0, 200) and turned.rejected.getpixel((0, 0)) == (1, 200, 0)
    assert (turned.chosen_policy, turned.rejected_policy) == ("weak", "strong")
    assert (turned.chosen_on_policy, turned.rejected_on_policy) == (False, True)
    assert written.card["agreement"]["judges"]["equal"] == 0.5

    assert annotations(*options, "--output", tmp_path / "human") == 2
    assert f"{tmp_path}/human: holds a finished set of pairs; choose another" in capsys.readouterr().err


def test_store_of_other_pairs_or_of_none(tmp_path, capsys):
    pairs_in(tmp_path / "pairs")
    store_of(tmp_path / "other.jsonl", "lr")
    assert annotations("--pairs", tmp_path / "pairs", "--store", tmp_path / "other.jsonl") == 2
    says = f"{tmp_path}/other.jsonl: 2 of the 2 pairs in it cannot be found in {tmp_path}/pairs (such as pair000); give"
    assert says in capsys.readouterr().err
    store = Store(tmp_path / "skips.jsonl", SETTINGS)
    store.add("ann", Showing(next(iter(read_preferences(tmp_path / "pairs"))).id, False, "chosen"), "skip", 0.0)
    store.close()
    options = ["--pairs", tmp_path / "pairs", "--store", tmp_path / "skips.jsonl"]
    assert annotations(*options, "--output", tmp_path / "human") == 2
    assert "skips.jsonl: decides no pair, so there is nothing to write" in capsys.readouterr().err
    assert not (tmp_path / "human").exists()


def test_image_that_goes_missing_later_is_named_with_its_row(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "b.png")
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "a fox", "chosen": "a.png", "rejected": "b.png"}) + "\n")
    pairs = Pairs(str(path), max_bad=0.0)
    (pair,) = pairs.prompts
    assert pairs[pair].prompt == "a fox"
    (tmp_path / "a.png").write_bytes((tmp_path / "b.png").read_bytes()[:30])
    with pytest.raises(UserError, match=rf"^{path}:1: chosen: .*; restore {path} as it was at the start$"):
        pairs[pair]
    Image.new("RGB", (8, 8), "green").save(tmp_path / "a.png")
    with pytest.raises(UserError, match=rf"^{path}: row 0 has changed; restore it as it was at the start$"):
        pairs[pair]
