"""`posttrain evaluate` as a command: models, adapters, folders and servers on the same prompts."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from posttrain.config.load import make
from posttrain.errors import UserError
from posttrain.evaluate.config import EvaluateConfig
from posttrain.evaluate.evaluate import evaluate
from tests.helpers import runs
from tests.helpers.images_server import ImagesServer

SIDE = 64
EXPANDER = "posttrain/nano/weights/expander-nano"
PROMPTS = ["a red cube", "two blue spheres", "the word CAT", "a green cone"]
CALLS: list[int] = []
"""Images of each call of `counted`."""


def warmth(images, prompts):
    return [float(np.asarray(image, float)[..., 0].mean() / 255) for image in images]


def counted(images, prompts):
    CALLS.append(len(images))
    return [0.25 if "word" not in prompt else None for prompt in prompts]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, raw_model):
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    data = {
        "model": {"path": str(raw_model), "dtype": "float32"},
        "prompts": str(folder / "prompts.jsonl"),
        "rewards": [{"name": "warmth", "function": f"{__name__}:warmth"}],
        "size": [SIDE, SIDE],
        "steps": 2,
        "images": 2,
        "micro_batch": 3,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(data))
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, raw_model):
    """The run of a tiny adapter that has moved."""
    return runs.teacher(tmp_path_factory.mktemp("run") / "run", raw_model, 1, 0.5)


def results(output: Path) -> dict:
    return json.loads((output / "evaluation.json").read_text())


def test_models_folders_and_guidances(command, recipe, trained, tmp_path):
    out = tmp_path / "out"
    words = ["evaluate", "base", f"moved={trained}", "--config", recipe, "--output", out, "--guidance", "[0,2]"]
    done = command(*words)
    assert done.returncode == 0, done.stderr
    found = results(out)
    assert list(found["subjects"]) == ["base@0", "base@2", "moved@0", "moved@2"]
    assert found["paired"]["moved@2"]["against"] == "base@2" and found["paired"]["base@2"]["against"] == "base@0"
    assert found["paired"]["moved@0"]["figures"]["warmth"]["difference"] != 0
    pixels = np.asarray(Image.open(out / "images/base@0/0001-1.png"), float)[..., 0]
    rows = json.loads((out / "scores/base@0.json").read_text())["warmth"]["rows"]
    assert rows["1-1"]["score"] == pytest.approx(pixels.mean() / 255)
    means = [np.mean([rows[f"{i}-{j}"]["score"] for j in range(2)]) for i in range(len(PROMPTS))]
    figure = found["subjects"]["base@0"]["figures"]["warmth"]
    assert figure["mean"] == pytest.approx(np.mean(means)) and figure["prompts"] == len(PROMPTS)
    assert figure["error"] == pytest.approx(np.std(means, ddof=1) / len(means) ** 0.5)
    assert "image/diversity" in found["subjects"]["base@0"]["figures"]
    assert "moved@2" in (out / "report.html").read_text() and "| moved@2 | base@2 |" in (out / "table.md").read_text()

    # A folder of the same images scores the same; the command that made it draws what evaluate draws.
    words = ["sample", "--model.path", yaml.safe_load(recipe.read_text())["model"]["path"], "--model.dtype", "float32"]
    words += ["--prompts", recipe.parent / "prompts.jsonl", "--size", f"[{SIDE},{SIDE}]", "--steps", 2, "--guidance", 0]
    assert command(*words, "--images", 2, "--output", tmp_path / "drawn").returncode == 0
    folder = tmp_path / "folder"
    done = command("evaluate", f"mine={tmp_path / 'drawn'}", "--config", recipe, "--output", folder)
    assert done.returncode == 0, done.stderr
    assert results(folder)["subjects"]["mine"]["figures"]["warmth"] == pytest.approx(figure, abs=1e-6)


def test_two_processes_are_one(command, recipe, tmp_path):
    for name, processes in (("one", 1), ("two", 2)):
        done = command("evaluate", "base", "--config", recipe, "--output", tmp_path / name, processes=processes)
        assert done.returncode == 0, done.stderr
    one, two = (results(tmp_path / name)["subjects"]["base"]["figures"] for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        assert two[name]["mean"] == pytest.approx(one[name]["mean"], abs=1e-3)  # batches differ, and images are rounded


def config(recipe: Path, output: Path, subjects=("base",), **changes) -> EvaluateConfig:
    data = yaml.safe_load(recipe.read_text()) | {"output": str(output), "subjects": list(subjects)} | changes
    return make(EvaluateConfig, data)


def test_only_what_is_missing_is_drawn_and_asked(recipe, tmp_path):
    out = tmp_path / "out"
    assert evaluate(config(recipe, out)) == 0
    before, images = results(out), {file: file.stat().st_mtime_ns for file in (out / "images/base").glob("*.png")}
    assert len(images) == 8
    gone = out / "images/base/0002-0.png"
    gone.unlink()
    CALLS.clear()
    rewards = yaml.safe_load(recipe.read_text())["rewards"] + [{"name": "more", "function": f"{__name__}:counted"}]
    assert evaluate(config(recipe, out, rewards=rewards)) == 0
    drawn = {file for file in images if file.stat().st_mtime_ns != images[file]}
    assert drawn == {gone} and sum(CALLS) == 8
    after = results(out)["subjects"]["base"]["figures"]
    assert after["warmth"] == before["subjects"]["base"]["figures"]["warmth"]
    assert after["more"] == {"mean": 0.25, "error": 0.0, "prompts": 3, "failed": 0}  # null is no 0
    CALLS.clear()
    assert evaluate(config(recipe, out, rewards=rewards)) == 0 and not CALLS


def test_a_change_below_the_limit_fails(recipe, trained, tmp_path, capsys):
    out = tmp_path / "out"
    subjects = ["base", f"moved={trained}"]
    assert evaluate(config(recipe, out, subjects, least_change={"warmth": 1.0})) == 1
    assert "failed: moved: warmth" in capsys.readouterr().out
    assert evaluate(config(recipe, out, subjects, least_change={"warmth": -1.0})) == 0


def test_a_server(recipe, tmp_path):
    def draw(body):
        return Image.new("RGB", (SIDE, SIDE), (51 if "cube" in body["prompt"] else 102, 0, 0))

    with ImagesServer(draw, seconds=0.2) as server:
        subjects = [f"served={server.url}#some-model"]
        assert evaluate(config(recipe, tmp_path / "out", subjects, images=1)) == 0
        assert {body["model"] for body in server.requests} == {"some-model"}
        assert len({body["seed"] for body in server.requests}) == len(PROMPTS)
    served = results(tmp_path / "out")["subjects"]["served"]
    assert served["figures"]["warmth"]["mean"] == pytest.approx(0.35)
    assert served["seconds_image"] > 0.2 / len(PROMPTS)  # of the requests, not of saving their images

    def refuse(number, body):
        return (400, b'{"error": {"message": "no such size"}}')

    with (
        ImagesServer(draw, refuse) as server,
        pytest.raises(UserError, match=r"subjects: http.*4 images missing.*no such size"),
    ):
        evaluate(config(recipe, tmp_path / "refused", [f"served={server.url}"], images=1))


def test_an_expander_with_another_system_text(recipe, tmp_path):
    """Images of another text are not gone on with."""
    text = tmp_path / "system.txt"
    text.write_text("a large red star, dark style")
    asked = {"expand": {"base": EXPANDER}, "first": 1, "images": 1}
    for name, system in (("own", {}), ("other", {"base": str(text)})):
        assert evaluate(config(recipe, tmp_path / name, ["base"], expand_system=system, **asked)) == 0
    own, other = (
        json.loads((tmp_path / name / "images/base/expansions.json").read_text()) for name in ("own", "other")
    )
    assert own != other and all(other)
    with pytest.raises(UserError, match=r"system: is another text when these images were begun"):
        evaluate(config(recipe, tmp_path / "other", ["base"], **asked))
    text.write_text("a small blue circle")
    with pytest.raises(UserError, match=r"system: is another text when these images were begun"):
        evaluate(config(recipe, tmp_path / "other", ["base"], expand_system={"base": str(text)}, **asked))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"subjects": ["base", "base"]}, "subjects: base is there twice"),
        ({"subjects": ["nowhere/run"]}, "subjects: nowhere/run: no such file"),
        ({"expand": {"other": "x"}}, "expand: other is no subject"),
        ({"expand_system": {"base": "x"}}, "expand_system: base has no expander"),
        ({"expand": {"base": "x"}, "expand_system": {"base": "nowhere.txt"}}, "system: nowhere.txt: No such file"),
        ({"prompts": None}, "prompts: give either prompts"),
        ({"rewards": []}, "rewards: name at least one"),
        ({"least_change": {"warm": 0.0}}, "least_change: warm is not a reward of this evaluation"),
    ],
)
def test_mistakes_are_told_before_a_model_is_read(recipe, tmp_path, changes, told, monkeypatch):
    monkeypatch.setattr("posttrain.evaluate.subjects.K2", None)
    with pytest.raises(UserError, match=told):
        evaluate(config(recipe, tmp_path / "out", **{"subjects": ["base"], **changes}))


def test_images_of_other_settings_are_not_gone_on_with(recipe, tmp_path):
    out = tmp_path / "out"
    assert evaluate(config(recipe, out)) == 0
    with pytest.raises(UserError, match=r"seed: 1, and was 0 when these images were begun"):
        evaluate(config(recipe, out, seed=1))
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds no evaluation"):
        evaluate(config(recipe, other))


def test_a_folder_with_too_few_images(recipe, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "000.png")
    with pytest.raises(UserError, match=r"has 0 images of 'two blue spheres'|has 1 image of 'a red cube'"):
        evaluate(config(recipe, tmp_path / "out", [str(folder)]))
    shutil.rmtree(folder)


def test_an_image_that_was_replaced_is_scored_anew(recipe, tmp_path):
    """And one that is damaged is named; nothing of an earlier file is shown as if it were this one's."""
    folder, out = tmp_path / "images", tmp_path / "out"
    folder.mkdir()
    for i in range(len(PROMPTS)):
        Image.new("RGB", (16, 16), (51, 0, 0)).save(folder / f"{i:03d}.png")
    made = config(recipe, out, [f"mine={folder}"], images=1)
    assert evaluate(made) == 0 and results(out)["subjects"]["mine"]["figures"]["warmth"]["mean"] == pytest.approx(0.2)
    Image.new("RGB", (16, 16), (255, 0, 0)).save(folder / "001.png")
    assert evaluate(made) == 0 and results(out)["subjects"]["mine"]["figures"]["warmth"]["mean"] == pytest.approx(0.4)
    data = (folder / "002.png").read_bytes()
    (folder / "002.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"002\.png: .*draw it again, or replace it"):
        evaluate(made)


def test_a_folder_with_sides_of_any_length_has_a_diversity(recipe, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    rows = []
    for i, prompt in enumerate(PROMPTS):
        for j in range(2):
            name = f"{i:03d}-{j}.png"
            Image.new("RGB", (17 + j, 23), (100 * j, 0, 0)).save(folder / name)
            rows.append({"file": name, "prompt": prompt})
    (folder / "prompts.json").write_text(json.dumps(rows))
    assert evaluate(config(recipe, tmp_path / "out", [f"mine={folder}"], images=2)) == 0
    figures = results(tmp_path / "out")["subjects"]["mine"]["figures"]
    assert figures["image/diversity"]["mean"] == pytest.approx(100 / 255 / 3**0.5, rel=1e-6)
