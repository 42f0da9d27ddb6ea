"""Images that people mark, and what the judge of artifacts is trained on of their marks."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from posttrain import cli
from posttrain.annotate.answers import Answer, Schedule, Showing, Store
from posttrain.annotate.marked_images import Images, find
from posttrain.config.sections import TrackConfig
from posttrain.errors import UserError
from posttrain.judge.config import JudgeConfig
from posttrain.judge.records import read_records
from posttrain.runs.run import Run

SETTINGS = Schedule(0, 0.1, "artifact")
PROMPTS = ["a red fox", "two cats"]


def pixels(step: int, i: int) -> np.ndarray:
    return np.full((8, 8, 3), 10 * step + i, np.uint8)


@pytest.fixture
def run(tmp_path) -> Path:
    """A run directory with samples of two prompts at steps 0 and 5, as a run writes them."""
    made = Run(tmp_path / "run", TrackConfig(tensorboard=False), True, True)
    for step in (0, 5):
        made.samples(step, np.stack([pixels(step, i) for i in range(2)]), PROMPTS, [0, 1])
    (tmp_path / "run/samples/step-000005/scores.json").write_text("[]")
    return tmp_path / "run"


def test_images_of_a_run_a_sample_and_a_directory(run, tmp_path):
    found = find(run)
    assert [(f.prompt, f.source, f.path.name) for f in found] == [
        ("a red fox", "step-000000", "000.png"), ("two cats", "step-000000", "001.png"),
        ("a red fox", "step-000005", "000.png"), ("two cats", "step-000005", "001.png"),
    ]  # fmt: skip
    assert [f.source for f in find(run / "samples/step-000005")] == ["step-000005"] * 2
    assert [f.prompt for f in find(run / "samples/step-000005")] == PROMPTS
    drawn = tmp_path / "drawn"  # as posttrain sample leaves it
    drawn.mkdir()
    (drawn / "prompts.json").write_text(json.dumps([{"prompt": p, "seed": 1} for p in PROMPTS]))
    for i in range(2):
        Image.fromarray(pixels(1, i)).save(drawn / f"{i:03d}.png")
    assert [(f.prompt, f.source) for f in find(drawn)] == [(p, None) for p in PROMPTS]
    (drawn / "prompts.json").unlink()
    (drawn / "again.png").write_bytes((drawn / "000.png").read_bytes())
    images = Images(str(drawn))
    assert list(images.prompts.values()) == ["", ""]  # the same image twice is one
    (drawn / "000.png").write_bytes((drawn / "001.png").read_bytes())
    (first, _) = images.prompts
    with pytest.raises(UserError, match=r"000.png: has changed; restore it as it was at the start"):
        images[first]


def marked(run: Path, store: Path, answers: dict[str, list[Answer]]) -> list[str]:
    ids = list(Images(str(run)).prompts)
    held = Store(store, SETTINGS)
    for name, given in answers.items():
        for image, answer in zip(ids, given):
            held.add(name, Showing(image, False, None), answer, 1.0)
    held.close()
    return ids


def test_marks_become_what_the_judge_reads(run, tmp_path, capsys):
    """Two of three call the first faulty, all the second fine; one is undecided, one was skipped."""
    ids = marked(run, tmp_path / "marks.jsonl", {
        "ann": ["faulty", "fine", "faulty", "skip"], "bob": ["faulty", "fine", "fine"],
        "eve": ["fine", "fine", "unsure"],
    })  # fmt: skip
    options = ["--images", str(run), "--store", str(tmp_path / "marks.jsonl"), "--output", str(tmp_path / "faults")]
    assert cli.main(["annotations", *options]) == 0
    out = capsys.readouterr().out
    assert "3 of 4 images marked: 1 faulty, 1 undecided" in out
    assert out.endswith(f"posttrain: wrote {tmp_path}/faults (2 images, 1 undecided left out)\n")
    rows = [json.loads(line) for line in (tmp_path / "faults/artifacts.jsonl").read_text().splitlines()]
    assert rows == [
        {"image": f"images/{ids[0]}.png", "fault": pytest.approx(2 / 3), "prompt": PROMPTS[0], "source": "step-000000"},
        {"image": f"images/{ids[1]}.png", "fault": 0.0, "prompt": PROMPTS[1], "source": "step-000000"},
    ]
    assert json.loads((tmp_path / "faults/agreement.json").read_text())["images"] == 4
    records = read_records(JudgeConfig("o", "m", str(tmp_path / "faults"), "artifact"))
    assert [(r.share, r.prompt, r.sources, r.corrupt) for r in records] == [
        (pytest.approx(2 / 3), PROMPTS[0], ("step-000000",), False), (0.0, PROMPTS[1], ("step-000000",), False),
    ]  # fmt: skip
    np.testing.assert_array_equal(records[1].images.read()[0], pixels(0, 1))
    assert cli.main(["annotations", *options]) == 2
    assert f"{tmp_path}/faults: is not empty; choose another directory" in capsys.readouterr().err
    assert not list(tmp_path.glob(".faults*"))


def test_mistakes_are_named(run, tmp_path, capsys):
    store = tmp_path / "marks.jsonl"
    marked(run, store, {"ann": ["unsure", "skip"]})

    def says(command: str, *options: str) -> str:
        assert cli.main([command, *options]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line.removeprefix("posttrain: error: ")

    given = ["--store", str(store)]
    line = says("annotations", *given, "--images", str(run), "--output", str(tmp_path / "out"))
    assert line == f"{store}: decides about no image, so there is nothing to write; mark some first"
    assert says("annotations", *given, "--pairs", str(run)).startswith(
        f"{store}: holds answers of mode artifact; give --i"
    )
    assert "pairs: give either pairs or images" in says("annotations", *given)
    line = says("annotations", *given, "--images", str(run / "samples/step-000005"))
    assert line.startswith(f"{store}: 2 of the 2 images in it cannot be found in {run}/samples/step-000005 (such as ")
    assert "images: missing; mode artifact asks about images" in says("annotate", *given, "--mode", "artifact")
    line = says("annotate", *given, "--mode", "artifact", "--images", str(run), "--pairs", "p")
    assert "pairs: is not read in mode artifact; leave it out or change mode" in line
    assert "pairs: missing; mode preference asks about pairs" in says("annotate", *given)
    wanted = ["--mode", "artifact", "--port", "0", "--store", str(tmp_path / "new.jsonl"), "--images"]
    assert says("annotate", *wanted, str(tmp_path / "none")).startswith(
        f"images: {tmp_path}/none is no directory; give a"
    )
    (tmp_path / "empty").mkdir()
    assert "holds no image (.png, .jpg, .jpeg, .webp, " in says("annotate", *wanted, str(tmp_path / "empty"))
    bad = run / "samples/step-000005/001.png"
    bad.write_bytes(bad.read_bytes()[:40])
    assert says("annotate", *wanted, str(run)).startswith(f"{bad}: is not an image (40 bytes)")
    (run / "samples/prompts.json").write_text("{")
    assert says("annotate", *wanted, str(run)).startswith(f"{run}/samples/prompts.json: is not a list of prompts (")
    assert not (tmp_path / "new.jsonl").exists()
