"""Judges: an adapter that learns and nothing else, its model card, mistakes in the data."""

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from posttrain import cli
from posttrain.config.load import load_config
from posttrain.config.sections import LoraConfig, OptimConfig, TrackConfig
from posttrain.errors import UserError
from posttrain.judge import records as judge_records
from posttrain.judge import train as judge
from posttrain.judge.config import JudgeConfig
from posttrain.judge.records import read_records
from posttrain.nano.build import judge_model
from posttrain.nano.world import judge_data
from posttrain.preferences.config import ColumnMap
from posttrain.preferences.dataset import Preference
from posttrain.preferences.writer import PreferenceWriter
from posttrain.training import checkpoint
from prompts.templates import load_template
from rewards.vlm import VLM
from tests.helpers import runs


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    tokenizer = judge_model.make_tokenizer()
    judge_model.save(judge_model.make_model(tokenizer), tokenizer, folder)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    judge_data.write(folder, pairs=24, faults=24, seed=0, workers=1)
    return folder


def config(model, folder, tmp_path, mode: str, **changes) -> JudgeConfig:
    file = {"preference": "preferences.jsonl", "artifact": "artifacts.jsonl"}[mode]
    settings = {
        "output": str(tmp_path / "run"), "model": model, "data": str(folder / file), "mode": mode, "heldout": 0.3,
        "steps": 8, "batch": 4, "micro_batch": 2, "dtype": "float32", "lora": LoraConfig(rank=4, alpha=8),
        "optim": OptimConfig(lr=0.005), "track": TrackConfig(tensorboard=False),
    }  # fmt: skip
    return JudgeConfig(**(settings | changes))


@pytest.mark.parametrize("mode", ["preference", "artifact"])
def test_it_learns_and_writes_an_adapter(model, data, tmp_path, mode):
    settings = config(model, data, tmp_path, mode)
    judge.train(settings)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    runs.assert_metrics_are_defined(tmp_path / "run")
    assert len(rows) == 8 and rows[-1]["loss"] < rows[0]["loss"] - 0.2
    assert rows[-1]["mass"] > rows[0]["mass"]  # the answer becomes a yes or a no
    adapter = tmp_path / "run" / "adapter"
    assert json.loads((adapter / "adapter_config.json").read_text())["r"] == 4
    card = (adapter / "README.md").read_text()
    assert "Held out" in card and "Brier score" in card and "| predicted | observed | records |" in card
    assert ("accuracy of one who knew" in card) == (mode == "preference")
    assert ("area under the ROC curve" in card) == (mode == "artifact")

    from peft import PeftModel

    vlm = VLM.load(model)
    template = load_template({"preference": "aesthetic", "artifact": "artifact"}[mode])
    picture = Image.open(next((data / "images").iterdir()))
    before = vlm.p_yes([picture], [template.render()])
    vlm.model = PeftModel.from_pretrained(vlm.model, str(adapter)).eval()
    assert abs(vlm.p_yes([picture], [template.render()])[0] - before[0]) > 1e-3
    with pytest.raises(UserError, match="run: holds a run already; add --resume or choose another --output"):
        judge.train(settings)


def test_only_the_adapter_learns(model, data, tmp_path):
    settings = config(model, data, tmp_path, "preference")
    vlm = VLM.load(model)
    judge.add_adapter(vlm, settings)
    learning = [name for name, p in vlm.model.named_parameters() if p.requires_grad]
    assert learning and all("lora_" in name and "language_model" in name for name in learning)
    before = {name: p.detach().clone() for name, p in vlm.model.named_parameters()}
    stepper = judge.Stepper([p for p in vlm.model.parameters() if p.requires_grad], settings.optim)
    records = read_records(settings)
    order = [(i, 0) for i in range(4)]
    batches = judge._loader(vlm, load_template("aesthetic"), records, order, settings)
    judge.update(vlm, stepper, batches, settings, 1)
    moved = {name for name, p in vlm.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and moved <= set(learning)


def test_workers_read_the_same_batches(model, data, tmp_path):
    vlm, template = VLM.load(model), load_template("artifact")
    scores = []
    for workers in (0, 2):
        settings = config(model, data, tmp_path, "artifact", data=str(data / "images"), workers=workers)
        records = read_records(settings)[:12]
        scores.append(judge.score(vlm, template, records, settings))
    np.testing.assert_array_equal(*scores)
    assert scores[0].shape == (12, 1)
    assert np.abs(scores[0][::2] - scores[0][1::2]).min() > 0  # corrupted pictures are others


def test_a_prompt_is_on_one_side(model, data, tmp_path):
    settings = config(model, data, tmp_path, "preference", heldout_sources=["soft"])
    records = read_records(settings)
    training, heldout = judge.split(records, settings)
    assert len(training) + len(heldout) <= len(records)
    assert not {r.group for r in training} & {r.group for r in heldout if r.sources != ("soft",)}
    assert all(r.sources != ("soft",) for r in training) and any(r.sources == ("soft",) for r in heldout)
    with pytest.raises(UserError, match="heldout_sources: no record is from x; the sources are crisp, noisy, soft"):
        judge.split(records, dataclasses.replace(settings, heldout_sources=["x"]))


# ---- preference sets ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, data) -> Path:
    """The nano pairs as `posttrain pairs` and `annotations` write them: every third is a person's, of two votes in
    three, and every fifth is drawn by another policy."""
    folder = tmp_path_factory.mktemp("sets") / "pairs"
    with PreferenceWriter(folder) as writer:
        for i, line in enumerate((data / "preferences.jsonl").read_text().splitlines()):
            row = json.loads(line)
            chosen, rejected = (Image.open(data / row[name]) for name in ("chosen", "rejected"))
            human, policy = i % 3 == 0, "other" if i % 5 == 0 else "unknown"
            share, source = (2 / 3, "human") if human else (1.0, "synthetic")
            writer.add(Preference(row["prompt"], chosen, rejected, source, policy, "strong", margin=0.3, share=share))
    return folder


def test_a_preference_set_is_read_by_its_one_reader(model, data, pairs, tmp_path):
    """Vote shares are the labels; source and policies are the generators; each image comes out as it went in."""
    settings = config(model, data, tmp_path, "preference", data=str(pairs))
    records = read_records(settings)
    rows = [json.loads(line) for line in (data / "preferences.jsonl").read_text().splitlines()]
    assert [r.prompt for r in records] == [row["prompt"] for row in rows]
    assert [r.share for r in records[:3]] == [2 / 3, 1.0, 1.0]
    assert [r.sources for r in records[:3]] == [("human", "other", "strong"), ("strong", "synthetic"),
                                                ("strong", "synthetic")]  # fmt: skip
    for record, row in zip(records[:2], rows):
        for image, name in zip(record.images.read(), ("chosen", "rejected")):
            np.testing.assert_array_equal(image, Image.open(data / row[name]).convert("RGB"))
    again = read_records(dataclasses.replace(settings, workers=2))
    assert judge_records.fingerprint(again) == judge_records.fingerprint(records)
    training, heldout = judge.split(records, dataclasses.replace(settings, heldout_sources=["other"]))
    assert all("other" not in r.sources for r in training) and sum("other" in r.sources for r in heldout) == 5


def test_ties_bad_rows_and_columns_are_as_the_reader_says(model, data, tmp_path, capsys):
    """A set of others: a tie and a row without image are left out and counted; columns say who is preferred."""
    for name, colour in {"a": "red", "b": "blue"}.items():
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{name}.png")
    rows = [
        {"text": f"prompt {i}", "x": "a.png", "y": "b.png", "votes": share} for i, share in enumerate([1, 0.25, 0.5])
    ]
    rows.append({"text": "prompt 3", "x": "a.png", "y": "gone.png", "votes": 1})
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = ColumnMap("text", first="x", second="y", label="votes")
    path = str(tmp_path / "set.jsonl")
    settings = config(model, data, tmp_path, "preference", data=path, columns=columns, max_bad=0.3)
    records = read_records(settings)
    assert [(r.prompt, r.share, r.sources) for r in records] == [
        ("prompt 0", 1, ("human",)),
        ("prompt 1", 0.75, ("human",)),
    ]
    assert [r.images.read()[0].getpixel((0, 0)) for r in records] == [(255, 0, 0), (0, 0, 255)]
    said = capsys.readouterr().err
    assert f"warning: {path}: rows left out: 1 bad, 1 ties: {path}:4: y: gone.png is missing" in said
    with pytest.raises(UserError, match=r"more than 0.01 of 4 rows are bad \(max_bad\): .*:4: y: gone.png is missing"):
        read_records(dataclasses.replace(settings, max_bad=0.01))


# ---- resuming -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shallow(tmp_path_factory, model) -> str:
    """A model of one layer and one block of vision, which trains in a moment."""
    folder = tmp_path_factory.mktemp("base") / "shallow"
    shutil.copytree(model, folder)
    settings: Any = Qwen3VLConfig.from_pretrained(model)
    settings.text_config.num_hidden_layers = settings.vision_config.depth = 1
    torch.manual_seed(0)
    Qwen3VLForConditionalGeneration(settings).save_pretrained(folder)
    return str(folder)


def outcome(run: Path) -> tuple:
    """The adapter and the last checkpoint's tensors, and all figures."""
    last = checkpoint.load_latest(run / "checkpoints")
    assert last is not None
    tensors = {f"{file}/{name}": value for file, group in last.tensors.items() for name, value in group.items()}
    figures = json.loads((run / "adapter/figures.json").read_text())
    adapter = (run / "adapter/adapter_model.safetensors").read_bytes()
    return tensors, (last.step, last.state, runs.untimed(run), figures, adapter)


@pytest.mark.parametrize(("mode", "number"), [("preference", signal.SIGTERM), ("artifact", signal.SIGINT)])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(shallow, data, pairs, tmp_path, monkeypatch, mode, number):
    """Bit for bit, with an average; after a signal, and after a kill between checkpoints."""
    settings = {"optim": OptimConfig(lr=0.01, ema=0.8), "steps": 4, "batch": 2, "data": str(pairs), "heldout": 0.4}
    if mode == "artifact":  # with corruptions, drawn anew in each epoch
        settings["data"] = str(tmp_path / "good")
        (tmp_path / "good").mkdir()
        for image in sorted((data / "images").iterdir())[:8]:
            (tmp_path / "good" / image.name).write_bytes(image.read_bytes())
    whole = config(shallow, data, tmp_path, mode, output=str(tmp_path / "whole"), **settings)
    judge.train(whole)
    stopped = config(shallow, data, tmp_path, mode, **settings)
    stopped.checkpoint.every = 10
    update = judge.update

    def interrupted(vlm, stepper, batches, config, step):
        if step == 2:
            os.kill(os.getpid(), number)
        if step == 4:
            raise MemoryError  # as sudden as SIGKILL
        return update(vlm, stepper, batches, config, step)

    with monkeypatch.context() as patch:
        patch.setattr(judge, "update", interrupted)
        if number == signal.SIGINT:
            with pytest.raises(KeyboardInterrupt):
                judge.train(stopped)
        else:
            judge.train(stopped)
        assert "Training was stopped before the end" in (tmp_path / "run/adapter/README.md").read_text()
        saved = checkpoint.load_latest(tmp_path / "run/checkpoints")
        assert saved is not None and saved.step == 2
        with pytest.raises(MemoryError):
            judge.train(stopped, resume=True)
    judge.train(stopped, resume=True)
    (a, rest_a), (b, rest_b) = outcome(tmp_path / "whole"), outcome(tmp_path / "run")
    runs.assert_equal(a, b)
    assert rest_a == rest_b
    card = (tmp_path / "run/adapter/README.md").read_text()
    assert "Held out" in card and "4 updates of 2 records" in card
    assert ("| human |" in card and "| synthetic |" in card) == (mode == "preference")
    with pytest.raises(UserError, match="is of posttrain judge, whose adapter/ vLLM serves as it is; give a run that"):
        checkpoint.find(tmp_path / "run")
    judge.train(stopped, resume=True)  # which is done already
    assert outcome(tmp_path / "run")[1] == rest_a


def test_a_run_goes_on_only_with_what_it_began_with(shallow, model, data, pairs, tmp_path, capsys):
    settings = config(shallow, data, tmp_path, "preference", steps=1)
    judge.train(settings)
    capsys.readouterr()
    other = str(tmp_path / "question.txt")
    Path(other).write_text("Is it nice? Answer with yes or no.")
    for change, problem in [
        ({"data": str(pairs)}, "data: is not what "),
        ({"template": other}, "template: is not what "),
        ({"mode": "artifact", "data": str(data / "artifacts.jsonl")}, "mode: is not what "),
        ({"heldout": 0.2}, "run: cannot be resumed with heldout 0.3 -> 0.2: restore that"),
        ({"lora": LoraConfig(rank=8, alpha=8)}, "run: cannot be resumed with lora.rank 4 -> 8: restore that"),
    ]:
        with pytest.raises(UserError, match=problem):
            judge.train(dataclasses.replace(settings, **change), resume=True)
    moved = tmp_path / "moved"
    moved.symlink_to(data)
    judge.train(dataclasses.replace(settings, data=str(moved / "preferences.jsonl")), resume=True)
    with pytest.raises(UserError, match="model: is not what "):
        judge.train(dataclasses.replace(settings, model=model), resume=True)


def test_taste_has_a_noise_ceiling(model, data, tmp_path):
    rows = [json.loads(line) for line in (data / "preferences.jsonl").read_text().splitlines()]
    chance = np.array([r["chance"] for r in rows])
    assert 0.75 < np.maximum(chance, 1 - chance).mean() < 0.97
    records = read_records(config(model, data, tmp_path, "preference"))
    knows = np.log(chance / (1 - chance))[:, None] * [0.5, -0.5]
    figures = judge.figures("preference", records, knows, 0)
    assert figures["noise_ceiling"] == pytest.approx(np.maximum(chance, 1 - chance).mean())
    assert figures["accuracy"] == pytest.approx((chance > 0.5).mean())


@pytest.mark.parametrize(
    "line, problem",
    [
        ("{", "not JSON"),
        ("[]", "is not a JSON object"),
        ('{"image": "a.png"}', "fault: missing"),
        ('{"image": "b.png", "fault": true}', r"b.png cannot be read as an image"),
        ('{"image": "a.png", "fault": 2}', "fault: is 2; use a number from 0 to 1"),
        ('{"image": "a.png", "fault": 1, "prompt": 3}', "prompt: is not text"),
        ('{"chosen": "a.png"}', "image: missing"),
    ],
)
def test_mistakes_in_data_name_the_line(tmp_path, line, problem):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    file = tmp_path / "data.jsonl"
    file.write_text('{"image": "a.png", "fault": false}\n' + line + "\n")
    with pytest.raises(UserError, match=rf"data.jsonl:2: .*{problem}|data.jsonl:2: {problem}"):
        read_records(JudgeConfig("o", "m", str(file), "artifact"))


def test_mistakes_are_user_errors(tmp_path, model, data, capsys):
    for path, mode, problem in [
        (tmp_path, "preference", "is a directory without a parquet file or a saved dataset"),
        (tmp_path, "artifact", "contains no artifacts.jsonl and no image"),
        (tmp_path / "nothing.jsonl", "artifact", "cannot be read as a JSONL file"),
        (tmp_path / "nothing", "preference", "no such file or directory; give a file, a directory or"),
    ]:
        with pytest.raises(UserError, match=problem):
            read_records(JudgeConfig("o", "m", str(path), mode))  # type: ignore[arg-type]
    (tmp_path / "choices.jsonl").write_text('{"annotations": 1, "seed": 0, "repeats": 0.1, "hash": "0"}\n')
    with pytest.raises(UserError, match=r"choices.jsonl:1: is a store of posttrain annotate; give the --output of"):
        read_records(JudgeConfig("o", "m", str(tmp_path / "choices.jsonl"), "preference"))
    with pytest.raises(UserError, match="no other field"):
        judge.check_prompts([], load_template("rubric"), "x")
    settings = config(model, data, tmp_path, "preference", heldout=1e-9)
    with pytest.raises(UserError, match="0 held out"):
        judge.split(read_records(settings), settings)
    recipe = "recipes/nano/judge_aesthetic.yaml"
    for options, problem in [
        (["--optim.passes", "2"], "optim.passes: is 2"),
        (["--heldout", "1"], "heldout: is 1.0"),
        (["--micro_batch", "7"], "use a divisor of batch"),
        (["--lora.targets", "[qkv]"], "lora.targets: names qkv; vLLM serves"),
        (["--max_bad", "1"], "max_bad: is 1.0; use at least 0 and below 1"),
        (["--checkpoint.keep", "0"], "checkpoint.keep: is 0"),
    ]:
        assert cli.main(["judge", "--config", recipe, *options]) == 2
        assert problem in capsys.readouterr().err


@pytest.mark.parametrize("name", ["judge_aesthetic", "judge_artifact"])
def test_recipes_are_valid(name):
    path = Path(f"recipes/nano/{name}.yaml")
    settings, _ = load_config("judge", ["--config", str(path)])
    assert settings.model == yaml.safe_load(path.read_text())["model"]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-40]), "last.png: cannot be read: "),
        (lambda file: Image.new("RGB", (3, 40)).save(file), "last.png: is 40x3 pixels, and a judge needs 4 or more"),
        (
            lambda file: Image.new("RGB", (1608, 8)).save(file),
            "last.png: is 8x1608 pixels, .* over 200 times the other",
        ),
        (
            lambda file: Image.new("L", (8, 8)).save(
                file, "PNG", save_all=True, append_images=[Image.new("L", (8, 8), 9)]
            ),
            "last.png: has 2 frames or pages",
        ),
    ],
)
@pytest.mark.parametrize("shape", ["directory", "artifact", "preference"])
def test_every_image_is_decoded_before_the_model_is_loaded(tmp_path, monkeypatch, shape, damage, says):
    """The last of the images, which no batch of the run would reach."""

    def load(*_):
        raise AssertionError("the model is loaded")

    monkeypatch.setattr(VLM, "load", load)
    folder, rng = tmp_path / "data", np.random.default_rng(0)
    folder.mkdir()
    names = [f"{i:03d}.png" for i in range(5)] + ["last.png"]
    for name in names:
        Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(folder / name)
    rows = {
        "artifact": [{"image": name, "fault": True, "prompt": name} for name in names],
        "preference": [{"chosen": names[0], "rejected": name, "prompt": name} for name in names[1:]],
    }
    path = folder
    if shape != "directory":
        path = folder / "data.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows[shape]))
    mode = "preference" if shape == "preference" else "artifact"
    settings = JudgeConfig(str(tmp_path / "run"), "m", str(path), mode, heldout=0.4)  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="the model is loaded"):
        judge.train(settings)
    damage(folder / "last.png")
    with pytest.raises(UserError, match=says):
        judge.train(settings)
