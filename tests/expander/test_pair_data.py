"""Thoughts, weights, photographs and languages of the expander's pairs."""

import json
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from posttrain.config.types import ConfigError
from posttrain.expander.config import ExpanderDataConfig, PhotographsConfig, TagConfig, WriterConfig
from posttrain.expander.data import make
from posttrain.expander.pair_data.thoughts import copied, problem
from posttrain.expander.pair_data.weights import (
    as_photograph,
    divergence,
    names_medium,
    photograph_weight,
    share,
    weight,
)
from posttrain.nano.world import expander_pairs
from posttrain.nano.world.captions import statements
from tests.expander.test_expander import BASE
from tests.helpers import fake_writer


def rows(folder: Path) -> list[dict]:
    parts = [pq.read_table(folder / f"{name}.parquet").to_pylist() for name in ("train", "heldout")]
    return parts[0] + parts[1]


def counts(folder: Path) -> dict:
    return json.loads((folder / "expander_data.json").read_text())


# ---- arithmetic


def test_weights_and_shares():
    """A tenth of the pairs at weight 3 gets a quarter of the draws."""
    assert [weight(added) for added in (0, 1.5, 2, 7)] == [1, 2.5, 3, 3]
    assert share([3.0] + [1.0] * 9, [True] + [False] * 9) == pytest.approx(0.25)


def test_divergence_of_media():
    assert divergence(0.45, 0.40) == pytest.approx(0.0051, abs=5e-5)
    assert divergence(0.50, 0.40) == pytest.approx(0.0204, abs=5e-5)
    assert divergence(0.4, 0.4) == 0 and divergence(0.0, 0.0) == 0 and divergence(0.1, 0.0) == math.inf


def test_photographs_get_what_the_divergence_allows():
    """Of ten captions four are photographs, whose prompts leave the medium open. At .01 nat their share may rise to
    .4701, which is 4 w / (4 w + 6) at w = 1.331."""
    photographs = [True] * 4 + [False] * 6
    found = photograph_weight([0.0] * 10, photographs, photographs, 2.0, 0.01)
    shifted = share([1 + found] * 4 + [1.0] * 6, photographs)
    assert divergence(shifted, 0.4) == pytest.approx(0.01, abs=1e-6) and found == pytest.approx(0.331, abs=2e-3)
    assert photograph_weight([0.0] * 10, photographs, photographs, 0.1, 0.01) == 0.1
    assert photograph_weight([2.0] * 4 + [0.0] * 6, photographs, photographs, 0.1, 0.01) < 1e-9


def test_media_in_texts():
    assert names_medium("a Photograph of a cat") and names_medium("watercolor of a cat") and names_medium("35mm photo")
    assert not names_medium("a cat by the inkwell")
    assert as_photograph("A cat on the sill.") == "A photograph of a cat on the sill."
    assert as_photograph("Three cats with hats") == "A photograph of three cats with hats"
    assert as_photograph("Sunlight on the sill") is None and as_photograph("A mulher na praia") is None


# ---- thoughts

THOUGHT = (
    "They want a heron, and nothing more is said of it. Place, hour and weather stay open, and so does the medium, for"
    " which a quiet photograph suits best. I choose fog over shallow water."
)
CAPTION = "A grey heron stands in shallow water at dawn while fog drifts over the reeds behind it."


@pytest.mark.parametrize(
    ("thought", "says"),
    [
        (THOUGHT, None),
        ("Fog.", "1 words, not 25 to 120"),
        (f"{THOUGHT} The caption says so.", "speaks of a caption"),
        (f"{THOUGHT} That is my target.", "speaks of a caption"),
        (f"{THOUGHT} Targeted light.", None),
        (f"{THOUGHT} A grey heron stands in shallow water at dawn.", "copies the caption"),
    ],
)
def test_thoughts_that_give_the_caption_away_are_dropped(thought, says):
    assert problem(thought, "a heron", CAPTION) == says


def test_copied_runs_of_five_words():
    """Of "a b c d e f g" three runs, one of which is in the other text."""
    assert copied("x a b c d e y", "", "a b c d e f g") == pytest.approx(1 / 3)
    assert copied("A, B; c d e.", "", "a b c d e") == 1 and copied("a b c d", "", "a b c d") == 0
    assert copied("x a b c d e y", "a b c d e", "a b c d e f g") == 0  # what is asked may be repeated


def test_nano_thoughts_are_short_and_true(tmp_path):
    """At most 24 tokens; what they say is in the caption, and those that are asked of keep to the prompt."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    captions = "posttrain.nano.world.expander_pairs:candidates"
    make(ExpanderDataConfig(str(tmp_path / "data"), captions, count=300, heldout=0.2, thoughts=True))
    found = rows(tmp_path / "data")
    short = [row for row in found if row["kind"] != "long"]
    empty = [row for row in short if not row["thought"]]
    assert len(empty) / len(short) == pytest.approx(0.15, abs=0.05)
    assert not any(row["thought"] for row in found if row["kind"] == "long")
    assert counts(tmp_path / "data")["thoughts"] == len(short) - len(empty)
    for row in short:
        if row["thought"]:
            assert len(tokenizer(row["thought"]).input_ids) <= 24
            chosen = row["thought"].partition("; ")[2]
            said = {f"the {kind} is {value}" for value, kind in (part.split() for part in chosen.split(", ") if part)}
            assert said <= statements(row["completion"])


def test_without_thoughts_nothing_else_changes(tmp_path):
    """The same pairs, with and without."""
    captions = "posttrain.nano.world.expander_pairs:candidates"
    config = ExpanderDataConfig(str(tmp_path / "x"), captions, count=60, seed=5, thoughts=True, direct_share=1.0)
    pairs = expander_pairs.candidates(config, 7)
    assert all(not pair.thought for pair in pairs) and pairs
    rng = np.random.default_rng(0)
    scene, completion = expander_pairs.caption(rng)
    assert expander_pairs.short(scene, completion, rng).thought


# ---- a language model

CAPTIONS = [
    "a red cube, on a wooden shelf",
    'a sign that says "OPEN", at night in rain',
    "a heron, in fog with sun",
    "a greedy boat, at sea",
    "a secret door, in a wall",
    "a photo of a green hill, at noon",
]


def written(tmp_path: Path, url: str, **changes) -> ExpanderDataConfig:
    file = tmp_path / "captions.jsonl"
    file.write_text("".join(json.dumps({"caption": c}) + "\n" for c in CAPTIONS))
    settings = {"lengths": ["short"], "registers": ["plain"], "per_caption": 1, "long_share": 0.0, "heldout": 0.3,
                "direct_share": 0.0, **changes}  # fmt: skip
    writer = WriterConfig("m", url, concurrency=2, timeout=5)
    return ExpanderDataConfig(str(tmp_path / "out"), str(file), "caption", writer=writer, **settings)


def test_a_writer_thinks_and_is_checked(tmp_path):
    with fake_writer.serving() as url:
        make(written(tmp_path, url, thoughts=True))
    found = {row["completion"]: row["thought"] for row in rows(tmp_path / "out")}
    assert found.keys() == set(CAPTIONS) - {"a greedy boat, at sea", "a secret door, in a wall"}
    assert found[CAPTIONS[0]].startswith("a red cube") and found[CAPTIONS[0]].endswith("on a wooden shelf")
    assert counts(tmp_path / "out")["dropped"] == {"thought asks for more": 1, "thought speaks of a caption": 1}


def test_tags_weigh_pairs_and_shares_are_told(tmp_path):
    """Two captions of six say "at": weight 2 instead of 1 makes 4 of 8."""
    tags = {"rich": TagConfig("at", 1.0, target=0.5), "none": TagConfig("a unicorn", 2.0)}
    with fake_writer.serving() as url:
        make(written(tmp_path, url, tags=tags))
    found = {row["completion"]: row["weight"] for row in rows(tmp_path / "out")}
    assert {text for text, w in found.items() if w == 2} == {c for c in CAPTIONS if "at" in c} and len(found) == 6
    told = counts(tmp_path / "out")["shares"]
    several = sum("at" in c for c in CAPTIONS)
    assert told["rich"] == pytest.approx({"before": several / 6, "after": 2 * several / (6 + several), "target": 0.5})
    assert told["none"] == {"before": 0, "after": 0, "target": None}


def test_photographs_are_named_and_drawn_a_little_more(tmp_path):
    """Three captions of six say "the", "photo" or "heron"; a prompt that names the medium is left alone."""
    with fake_writer.serving() as url:
        make(written(tmp_path, url, photographs=PhotographsConfig("a heron", 0.25, 0.05)))
    found = {row["completion"]: row["weight"] for row in rows(tmp_path / "out")}
    assert found["A photograph of a heron, in fog with sun"] == pytest.approx(1.25)
    assert sorted(found.values())[:5] == [1.0] * 5 and "a photo of a green hill, at noon" in found
    told = counts(tmp_path / "out")["shares"]["photograph"]
    assert told["before"] == pytest.approx(1 / 6) and told["after"] == pytest.approx(1.25 / 6.25)
    assert told["kl"] == pytest.approx(divergence(0.2, 1 / 6)) and told["weight"] == 0.25


def test_languages_translate_captions_too(tmp_path):
    """The fake one writes a as α; prompt and caption are then of one language, and pairs say which."""
    with fake_writer.serving() as url:
        make(written(tmp_path, url, languages={"Greek": 1.0}))
    found = rows(tmp_path / "out")
    assert len(found) == 6 and all(row["register"] == "plain, short, Greek" for row in found)
    assert {row["completion"] for row in found} == {c.replace("a", "α") for c in CAPTIONS}
    assert all(row["prompt"] in row["completion"] for row in found)


def test_a_translation_that_changes_a_quote_is_dropped(tmp_path):
    CAPTIONS.append('an unfaithful sign that says "CLOSED", in the rain')
    try:
        with fake_writer.serving() as url:
            make(written(tmp_path, url, languages={"Greek": 1.0}))
    finally:
        CAPTIONS.pop()
    assert counts(tmp_path / "out")["dropped"] == {"not translated": 1}


def test_languages_share_the_captions(tmp_path):
    from posttrain.expander.data import _language

    config = ExpanderDataConfig("o", "c.jsonl", writer=WriterConfig("m", "http://127.0.0.1:9/v1"),
                                languages={"French": 0.2, "Hindi": 0.3})  # fmt: skip
    drawn = [_language(config, np.random.default_rng([0, i])) for i in range(2000)]
    shares = [drawn.count(name) / 2000 for name in ("French", "Hindi", None)]
    assert shares == pytest.approx([0.2, 0.3, 0.5], abs=0.03)
    with pytest.raises(ConfigError, match=r"languages: add up to 1\.2"):
        ExpanderDataConfig("o", "c.jsonl", writer=WriterConfig("m", "http://127.0.0.1:9/v1"),
                           languages={"French": 0.9, "Hindi": 0.3})  # fmt: skip
