"""What people chose: the store, the schedule, and agreement. No page here."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain.annotate import agreement
from posttrain.annotate import answers as annotations
from posttrain.annotate.answers import Answer, Choice, Schedule, Showing, Store, person, read, schedule
from posttrain.errors import UserError

ROOT = Path(__file__).parents[2]
SETTINGS = Schedule(seed=3, repeats=0.2)
LETTERS: dict[str, Answer] = {"l": "left", "r": "right", "t": "tie", "s": "skip"}
IDS = [f"pair{i:03d}" for i in range(100)]


def store_of(path: Path, choices: str = "lrts") -> list[str]:
    """A store in which ann answered pairs 0, 1, ... by these letters; its lines."""
    store = Store(path, SETTINGS)
    for i, letter in enumerate(choices):
        assert store.add("ann", Showing(IDS[i], False, "chosen"), LETTERS[letter], 1.5)
    store.close()
    return path.read_text().splitlines(keepends=True)


# ---- the schedule -------------------------------------------------------------------------------------------


def test_schedule_shows_each_pair_once_and_a_share_of_them_again_with_sides_swapped():
    showings = schedule(IDS, "ann", SETTINGS)
    first = {s.pair: (i, s) for i, s in enumerate(showings) if not s.again}
    again = {s.pair: (i, s) for i, s in enumerate(showings) if s.again}
    assert sorted(first) == IDS and len(first) + len(again) == len(showings) and len(again) == 20
    for pair, (i, showing) in again.items():
        j, before = first[pair]
        assert {showing.left, before.left} == {"chosen", "rejected"}
        assert sum(not s.again for s in showings[j + 1 : i]) >= 10
    assert sum(i < 60 for i, _ in again.values()) >= 5  # who stops half-way has been asked twice, too
    assert 35 <= sum(s.left == "chosen" for _, s in first.values()) <= 65


def test_schedule_is_the_annotators_own_and_stays():
    assert schedule(IDS, "ann", SETTINGS) == schedule(IDS[::-1], "ann", SETTINGS)
    order = [s.pair for s in schedule(IDS, "ann", SETTINGS) if not s.again]
    assert order != [s.pair for s in schedule(IDS, "bob", SETTINGS) if not s.again]
    assert order != [s.pair for s in schedule(IDS, "ann", Schedule(4, 0.2)) if not s.again]
    more = [s.pair for s in schedule([*IDS, "new"], "ann", SETTINGS) if not s.again]
    assert [pair for pair in more if pair != "new"] == order
    # Written down, so that a later version goes on with a store in the same order, on the same sides.
    expected = [("pair066", "rejected"), ("pair025", "chosen"), ("pair023", "chosen"), ("pair065", "chosen")]
    assert [(s.pair, s.left) for s in schedule(IDS, "ann", SETTINGS)[:4]] == expected


@pytest.mark.parametrize(
    ("pairs", "repeats", "twice"), [(1, 0.5, 0), (2, 0.5, 1), (3, 0.5, 1), (7, 0.3, 2), (30, 0, 0)]
)
def test_schedule_of_few_pairs(pairs, repeats, twice):
    showings = schedule(IDS[:pairs], "ann", Schedule(0, repeats))
    assert sum(s.again for s in showings) == twice
    places = {(s.pair, s.again): i for i, s in enumerate(showings)}
    for pair, again in places:
        if again:
            between = showings[places[pair, False] + 1 : places[pair, True]]
            assert sum(not s.again for s in between) >= pairs // 2


def test_schedule_of_single_images_has_no_sides():
    settings = Schedule(3, 0.2, "artifact")
    showings = schedule(IDS, "ann", settings)
    assert all(showing.left is None for showing in showings)
    # The order is that of pairs, whatever their sides.
    assert [(s.pair, s.again) for s in showings] == [(s.pair, s.again) for s in schedule(IDS, "ann", SETTINGS)]


# ---- the store ----------------------------------------------------------------------------------------------


def test_store_gives_back_what_was_chosen(tmp_path):
    path = tmp_path / "new/choices.jsonl"
    store_of(path, "lr")
    store = Store(path, SETTINGS)
    assert not store.add("ann", Showing(IDS[1], False, "chosen"), "tie", 1)  # answered already
    assert store.add("ann", Showing(IDS[1], True, "rejected"), "tie", 1)
    assert store.add("bob", Showing(IDS[1], False, "rejected"), "left", 2.25)
    taken = store.undo("ann")
    assert taken is not None and (taken.pair, taken.again, taken.choice) == (IDS[1], True, "tie")
    assert store.undo("nobody") is None
    held = read(path)
    assert held.schedule == SETTINGS
    assert held.choices == {"ann": store.choices("ann"), "bob": store.choices("bob")}
    assert [(c.pair, c.choice, c.left, c.share) for c in held.choices["ann"]] == [
        (IDS[0], "left", "chosen", 1.0),
        (IDS[1], "right", "chosen", 0.0),
    ]
    assert [(c.seconds, c.share) for c in held.choices["bob"]] == [(2.25, 0.0)]
    assert len(path.read_text().splitlines()) == 1 + 4 + 1  # settings, choices, what was taken back
    store.close()


def test_store_of_marks(tmp_path):
    """Of single images; it is no store of choices, and one of before there were marks still is one."""
    path, settings = tmp_path / "marks.jsonl", Schedule(3, 0.2, "artifact")
    store = Store(path, settings)
    for i, answer in enumerate(("faulty", "fine", "unsure", "skip")):
        assert store.add("ann", Showing(IDS[i], False, None), answer, 1.0)
    store.close()
    held = read(path)
    assert held.schedule == settings and [c.share for c in held.choices["ann"]] == [1.0, 0.0, 0.5, None]
    with pytest.raises(UserError, match=r"was started with mode artifact, not preference; pass --mode artifact, or"):
        Store(path, SETTINGS)
    head = {"annotations": 1, "seed": 3, "repeats": 0.2}
    (tmp_path / "old.jsonl").write_text(json.dumps({**head, "hash": annotations._hash("", head)}) + "\n")
    assert read(tmp_path / "old.jsonl").schedule == SETTINGS


def test_person():
    assert person("  Ann  LEE ") == person("ann lee")
    for name in ("", "  ", "x" * 65, "a\x00b"):
        with pytest.raises(UserError, match=r"^name: "):
            person(name)


CHOOSE_FOR_EVER = """
import sys
from pathlib import Path
from posttrain.annotate.answers import Schedule, Showing, Store
store = Store(Path(sys.argv[1]), Schedule(3, 0.2))
for i in range(1_000_000):
    store.add("ann", Showing(f"pair{i}", False, "chosen"), "left", 1.0)
    print(i, flush=True)
"""


def test_kill_loses_nothing_that_was_saved(tmp_path):
    path = tmp_path / "choices.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-c", CHOOSE_FOR_EVER, str(path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    for _ in range(20):
        process.stdout.readline()
    with pytest.raises(UserError, match=r"choices.jsonl: is locked by another posttrain annotate; "):
        Store(path, SETTINGS)
    os.kill(process.pid, signal.SIGKILL)
    said = 20 + len(process.stdout.read().split())
    process.wait()
    store = Store(path, SETTINGS)
    saved = [choice.pair for choice in store.choices("ann")]
    assert len(saved) in (said, said + 1) and saved == [f"pair{i}" for i in range(len(saved))]
    store.close()


@pytest.mark.parametrize("cut", [1, 30])
def test_line_that_was_cut_off_is_dropped(tmp_path, capsys, cut):
    path = tmp_path / "choices.jsonl"
    lines = store_of(path, "lrt")
    path.write_text("".join(lines)[:-cut])
    assert len(read(path).choices["ann"]) == 2 and capsys.readouterr().err == ""
    store = Store(path, SETTINGS)
    said = capsys.readouterr().err
    assert said == f"posttrain: warning: {path}: the last line was cut off ({len(lines[-1]) - cut} bytes); dropped\n"
    assert [c.choice for c in store.choices("ann")] == ["left", "right"]
    assert store.add("ann", Showing(IDS[2], False, "chosen"), "skip", 1)
    store.close()
    assert [c.choice for c in read(path).choices["ann"]] == ["left", "right", "skip"]


def replaced(old: str, new: str):
    return lambda lines: [*lines[:3], lines[3].replace(old, new), *lines[4:]]


@pytest.mark.parametrize(
    ("edit", "line"),
    [
        (replaced('"tie"', '"left"'), 4),
        (replaced("1.5", "1.6"), 4),
        (replaced('"annotator"', "annotator"), 4),
        (replaced("{", "[{"), 4),
        (lambda lines: lines[:2] + lines[3:], 3),
        (lambda lines: [*lines[:2], lines[3], lines[2], *lines[4:]], 3),
        (lambda lines: [lines[0].replace('"seed": 3', '"seed": 4'), *lines[1:]], 1),
        (lambda lines: [*lines[:2], "\n", *lines[2:]], 3),
    ],
)
def test_edited_store_is_named_with_its_line(tmp_path, edit, line):
    path = tmp_path / "choices.jsonl"
    path.write_text("".join(edit(store_of(path))))
    for opened in (read, lambda path: Store(path, SETTINGS)):
        with pytest.raises(UserError) as error:
            opened(path)
        assert str(error.value).startswith(f"{path}:{line}: was edited, or a line before it was removed; restore")


def test_store_that_is_none(tmp_path):
    path = tmp_path / "a.jsonl"
    with pytest.raises(UserError, match=r"a.jsonl: cannot be read \(No such file or directory\); give the --store"):
        read(path)
    path.write_text("")
    with pytest.raises(UserError, match=r"a.jsonl: holds no choice yet; give the --store"):
        read(path)
    path.write_text('{"prompt": "a fox"}\n')
    with pytest.raises(UserError, match=r"a.jsonl:1: is no annotation store; choose another --store"):
        Store(path, SETTINGS)
    assert path.read_text() == '{"prompt": "a fox"}\n'
    store_of(tmp_path / "b.jsonl")
    with pytest.raises(UserError, match=r"b.jsonl: was started with seed 3, not 5; pass --seed 3, or choose another"):
        Store(tmp_path / "b.jsonl", Schedule(5, 0.2))


FULL = """
import resource, sys
from pathlib import Path
from posttrain.annotate.answers import Schedule, Showing, Store
from posttrain.errors import UserError
path = Path(sys.argv[1])
store = Store(path, Schedule(3, 0.2))
store.add("ann", Showing("a", False, "chosen"), "left", 1.0)
resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, resource.RLIM_INFINITY))
for call in (lambda: store.add("ann", Showing("b", False, "chosen"), "left", 1.0), lambda: store.undo("ann")):
    try:
        call()
        sys.exit("was saved")
    except UserError as error:
        print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
store.add("ann", Showing("b", False, "chosen"), "right", 1.0)
"""


def test_full_disk_saves_all_or_nothing(tmp_path):
    path = tmp_path / "choices.jsonl"
    result = subprocess.run([sys.executable, "-c", FULL, str(path)], cwd=ROOT, capture_output=True, text=True)
    says = f"{path}: nothing was saved (File too large); free some space, then again\n"
    assert (result.returncode, result.stdout, result.stderr) == (0, says * 2, "")
    assert [(c.pair, c.choice) for c in read(path).choices["ann"]] == [("a", "left"), ("b", "right")]


# ---- agreement ----------------------------------------------------------------------------------------------


def test_kappa_by_hand():
    """Ten pairs: six equal preferences, one equal tie, three unequal; a has 2 ties of 10, b has 1.

    p_o = 7/10; p_e = 0.2 * 0.1 + 0.8 * 0.9 / 2 = 0.02 + 0.36 = 0.38; kappa = (0.7 - 0.38) / 0.62 = 0.516129.
    """
    answers = [(1.0, 1.0)] * 4 + [(0.0, 0.0)] * 2 + [(0.5, 0.5), (0.5, 1.0), (1.0, 0.0), (0.0, 1.0)]
    found = agreement.agreement(answers)
    assert (found.pairs, found.equal) == (10, 0.7)
    assert found.kappa == pytest.approx(0.32 / 0.62)
    # It does not depend on which image is called chosen.
    assert agreement.agreement([(1 - a, 1 - b) for a, b in answers]) == found
    assert agreement.agreement([(1 - a, 1 - b) for a, b in answers[:5]] + answers[5:]) == found


def test_kappa_of_marks_by_hand():
    """Ten images: both call one faulty, six fine and one unsure; of the other two a calls both faulty, b both fine.

    p_o = 8/10; a: 3 faulty, 6 fine, 1 unsure; b: 1, 8, 1; p_e = 0.3 * 0.1 + 0.6 * 0.8 + 0.1 * 0.1 = 0.52;
    kappa = 0.28 / 0.48. Counted as pairs, where neither answer is special, it would be more.
    """
    answers = [(1.0, 1.0)] + [(0.0, 0.0)] * 6 + [(0.5, 0.5)] + [(1.0, 0.0)] * 2
    found = agreement.agreement(answers, of_images=True)
    assert (found.pairs, found.equal) == (10, 0.8) and found.kappa == pytest.approx(0.28 / 0.48)
    as_pairs = agreement.agreement(answers).kappa
    assert as_pairs == pytest.approx((0.8 - (0.01 + 0.81 / 2)) / (1 - (0.01 + 0.81 / 2)))
    assert as_pairs is not None and found.kappa is not None and as_pairs > found.kappa
    assert agreement.agreement([(0.0, 0.0)] * 3, of_images=True).kappa is None  # two who call all fine


def marked(name: str, image: str, answer: Answer, again: bool = False, seconds: float = 2.0) -> Choice:
    return Choice(name, image, again, None, answer, seconds, "")


def test_report_of_marks():
    marks = {
        "ann": [marked("ann", "a", "faulty"), marked("ann", "b", "fine"), marked("ann", "c", "unsure"),
                marked("ann", "d", "fine"), marked("ann", "a", "fine", again=True)],
        "bob": [marked("bob", "a", "faulty"), marked("bob", "b", "faulty"), marked("bob", "d", "skip", seconds=4.0)],
    }  # fmt: skip
    assert agreement.votes(marks) == {"a": 0.75, "b": 0.5, "c": 0.5, "d": 0.0}
    found = agreement.report_marks(marks, 5)
    ann, bob = found["people"]
    assert (ann["answers"], ann["unsure"], ann["skips"], ann["faulty"]) == (5, 1, 0, 0.25)
    assert ann["repeats"] == {"pairs": 1, "equal": 0.0, "kappa": 0.0}
    assert (bob["faulty"], bob["skips"], bob["median_seconds"]) == (1.0, 1, 2.0)
    assert found["between"] == [{"people": ["ann", "bob"], "pairs": 2, "equal": 0.5, "kappa": 0.0}]
    assert [found[name] for name in ("images", "answered", "undecided", "faulty")] == [5, 4, 2, 1]
    text = "\n".join(agreement.mark_lines(found))
    assert (
        text.startswith("4 of 5 images marked: 1 faulty, 2 undecided") and "ann and bob: 50% of 2 (kappa 0.00)" in text
    )
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    ("answers", "equal", "kappa"),
    [
        ([], None, None),
        ([(0.5, 0.5)], 1.0, None),  # nothing but ties on both sides: no chance to compare with
        ([(1.0, 1.0), (0.0, 0.0)], 1.0, 1.0),
        ([(1.0, 1.0), (1.0, 0.0)], 0.5, 0.0),  # without ties: 2 * 0.5 - 1
        ([(1.0, 0.0)], 0.0, -1.0),
    ],
)
def test_kappa_at_its_ends(answers, equal, kappa):
    found = agreement.agreement(answers)
    assert (found.equal, found.kappa) == (equal, kappa)


def made(name: str, pair: str, share: float | None, again: bool = False, left: str = "chosen", seconds: float = 2.0):
    other = {"chosen": "right", "rejected": "left"}[left]
    answer = {None: "skip", 0.5: "tie", 1.0: "left" if left == "chosen" else "right", 0.0: other}[share]
    choice = Choice(name, pair, again, left, answer, seconds, "")  # type: ignore[arg-type]
    assert choice.share == share
    return choice


CHOICES = {
    # Answers a, b, c, d, and a and b again, of which one is the same: with self 1 of 2.
    "ann": [made("ann", "a", 1.0), made("ann", "b", 1.0, left="rejected"), made("ann", "c", 0.0), made("ann", "d", 0.5),
            made("ann", "a", 1.0, again=True, left="rejected"), made("ann", "b", 0.0, again=True)],
    # Agrees with ann about a and b, not c; skips d.
    "bob": [made("bob", "a", 1.0, seconds=1), made("bob", "b", 1.0, seconds=2), made("bob", "c", 1.0, seconds=9),
            made("bob", "d", None, seconds=3)],
    "eve": [made("eve", "c", 0.0)],
}  # fmt: skip


def test_votes():
    """One vote a person: ann's of b is the mean of yes and no, so b is (0.5 + 1) / 2."""
    assert agreement.votes(CHOICES) == {"a": 1.0, "b": 0.75, "c": pytest.approx(1 / 3), "d": 0.5}


def test_report():
    found = agreement.report(CHOICES, {"a": 0.1, "b": None, "c": 0.3, "d": 0.4, "e": 0.5})
    ann, bob, eve = found["people"]
    assert (ann["answers"], ann["ties"], ann["skips"], ann["median_seconds"]) == (6, 1, 0, 2.0)
    assert ann["left"] == pytest.approx(1 / 5)  # left, right, right, tie, right, right
    assert ann["repeats"] == {"pairs": 2, "equal": 0.5, "kappa": 0.0}
    assert ann["judges"] == {"pairs": 3, "equal": pytest.approx(2 / 3), "kappa": pytest.approx(1 / 3)}
    assert (bob["skips"], bob["median_seconds"], bob["left"]) == (1, 2.5, 1.0)
    assert bob["repeats"] == {"pairs": 0, "equal": None, "kappa": None}
    assert eve["judges"] == {"pairs": 1, "equal": 0.0, "kappa": -1.0}
    with_bob, with_eve, neither = found["between"]
    assert with_bob == {
        "people": ["ann", "bob"],
        "pairs": 3,
        "equal": pytest.approx(2 / 3),
        "kappa": pytest.approx(1 / 3),
    }
    assert with_eve == {"people": ["ann", "eve"], "pairs": 1, "equal": 1.0, "kappa": 1.0}
    assert neither == {"people": ["bob", "eve"], "pairs": 1, "equal": 0.0, "kappa": -1.0}
    assert found["together"] == {"pairs": 5, "equal": pytest.approx(3 / 5), "kappa": pytest.approx(1 / 5)}
    # Majorities: a and b as the judges, c against, d undecided, e not answered.
    assert found["judges"] == {"pairs": 3, "equal": pytest.approx(2 / 3), "kappa": pytest.approx(1 / 3)}
    counts = ("pairs", "answered", "undecided", "against_judges")
    assert [found[name] for name in counts] == [5, 4, 1, 1]
    assert found["judges_by_margin"] == []
    text = "\n".join(agreement.report_lines(found))
    assert "ann and bob: 67% of 3 (kappa 0.33)" in text and "bob: 4 answers (0 ties, 1 skip), median 2.5 s" in text
    json.dumps(found, allow_nan=False)


def test_agreement_with_judges_by_margin():
    """Fifteen pairs, margins 0 to 14: people follow the judges in 2, 3 and 5 of each five."""
    follow = [1, 1, 0, 0, 0, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1]
    choices = {"ann": [made("ann", f"p{i}", float(f)) for i, f in enumerate(follow)]}
    thirds = agreement.report(choices, {f"p{i}": float(i) for i in range(15)})["judges_by_margin"]
    assert [(t["from"], t["to"], t["pairs"], t["equal"]) for t in thirds] == [
        (0.0, 4.0, 5, 0.4),
        (5.0, 9.0, 5, 0.6),
        (10.0, 14.0, 5, 1.0),
    ]
