"""Judges: the losses' arithmetic, an adapter that learns and nothing else, its model card, mistakes in the data."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from posttrain import cli, judge, losses
from posttrain.calibration import auroc, brier, expected_calibration_error, reliability
from posttrain.config import JudgeConfig, LoraConfig, OptimConfig, TrackConfig
from posttrain.nano import judge_data, judge_model
from prompts.errors import UserError
from prompts.templates import load_template
from rewards.vlm import VLM


def test_bradley_terry_arithmetic():
    one, zero = torch.tensor([1.0]), torch.tensor([0.0])
    # -log sigma(1) = .313262; the offset term adds .01 (1 + 0)^2
    loss, _ = losses.bradley_terry(one, zero, one)
    assert loss.item() == pytest.approx(0.313262 + 0.01, abs=1e-6)
    gap = torch.tensor([1.0], requires_grad=True)
    losses.bradley_terry(gap, gap.detach() - 1, one)[0].sum().backward()
    offset = 2 * 0.01 * (1.0 + 0.0)
    assert gap.grad is not None and gap.grad.item() == pytest.approx(-0.268941 + offset, abs=1e-6)
    # three of four votes: the gap that is best is ln 3, with the sum of scores at 0
    scores = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.SGD([scores], lr=0.5)
    for _ in range(800):
        optimizer.zero_grad()
        losses.bradley_terry(scores[:1], scores[1:], torch.tensor([0.75]))[0].sum().backward()
        optimizer.step()
    assert (scores[0] - scores[1]).item() == pytest.approx(math.log(3), abs=1e-4)
    assert scores.sum().item() == pytest.approx(0, abs=1e-5)
    # logits 2 for yes and 0 for no: P(yes) = .880797
    assert torch.tensor(2.0).sigmoid().item() == pytest.approx(0.880797, abs=1e-6)


def test_calibration_arithmetic():
    p, y = np.array([0.05, 0.15, 0.85, 0.85]), np.array([0.0, 1.0, 1.0, 0.0])
    assert brier(p, y) == pytest.approx((0.05**2 + 0.85**2 + 0.15**2 + 0.85**2) / 4)
    assert reliability(p, y) == [(pytest.approx(0.05), 0.0, 1), (pytest.approx(0.15), 1.0, 1), (0.85, 0.5, 2)]
    assert expected_calibration_error(p, y) == pytest.approx((0.05 + 0.85 + 2 * 0.35) / 4)
    assert auroc(p, y) == pytest.approx((1 + 0.0 + 1 + 0.5) / 4)
    assert math.isnan(auroc(p, np.ones(4)))


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


def config(model, data, tmp_path, mode: str, **changes) -> JudgeConfig:
    file = {"preference": "preferences.jsonl", "artifact": "artifacts.jsonl"}[mode]
    settings = {
        "output": str(tmp_path / "run"), "model": model, "data": str(data / file), "mode": mode, "heldout": 0.3,
        "steps": 8, "batch": 4, "micro_batch": 2, "dtype": "float32", "lora": LoraConfig(rank=4, alpha=8),
        "optim": OptimConfig(lr=0.01), "track": TrackConfig(tensorboard=False),
    }  # fmt: skip
    return JudgeConfig(**(settings | changes))


@pytest.mark.parametrize("mode", ["preference", "artifact"])
def test_it_learns_and_writes_an_adapter(model, data, tmp_path, mode):
    settings = config(model, data, tmp_path, mode)
    judge.train(settings)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
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
    with pytest.raises(UserError, match="run: holds a run already; remove the directory or choose another --output"):
        judge.train(settings)


def test_only_the_adapter_learns(model, data, tmp_path):
    settings = config(model, data, tmp_path, "preference")
    vlm = VLM.load(model)
    judge.add_adapter(vlm, settings)
    learning = [name for name, p in vlm.model.named_parameters() if p.requires_grad]
    assert learning and all("lora_" in name and "language_model" in name for name in learning)
    before = {name: p.detach().clone() for name, p in vlm.model.named_parameters()}
    stepper = judge.Stepper([p for p in vlm.model.parameters() if p.requires_grad], settings.optim)
    records = judge.read_records(settings.data, "preference")
    order = [(i, 0) for i in range(4)]
    loader = judge._loader(vlm, load_template("aesthetic"), records, order, settings)
    judge.update(vlm, stepper, iter(loader), settings, 1)
    moved = {name for name, p in vlm.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and moved <= set(learning)


def test_workers_read_the_same_batches(model, data, tmp_path):
    vlm, template = VLM.load(model), load_template("artifact")
    scores = []
    for workers in (0, 2):
        settings = config(model, data / "images", tmp_path, "artifact", workers=workers)
        records = judge.read_records(str(data / "images"), "artifact")[:12]
        scores.append(judge.score(vlm, template, records, settings))
    np.testing.assert_array_equal(*scores)
    assert scores[0].shape == (12, 1)
    assert np.abs(scores[0][::2] - scores[0][1::2]).min() > 0  # corrupted pictures are others


def test_a_prompt_is_on_one_side(model, data, tmp_path):
    settings = config(model, data, tmp_path, "preference", heldout_sources=["soft"])
    records = judge.read_records(settings.data, "preference")
    training, heldout = judge.split(records, settings)
    assert len(training) + len(heldout) <= len(records)
    assert not {r.group for r in training} & {r.group for r in heldout if r.source != "soft"}
    assert all(r.source != "soft" for r in training) and any(r.source == "soft" for r in heldout)


def test_taste_has_a_noise_ceiling(data):
    rows = [json.loads(line) for line in (data / "preferences.jsonl").read_text().splitlines()]
    chance = np.array([r["chance"] for r in rows])
    assert 0.75 < np.maximum(chance, 1 - chance).mean() < 0.97
    records = judge.read_records(str(data / "preferences.jsonl"), "preference")
    knows = np.log(chance / (1 - chance))[:, None] * [0.5, -0.5]
    figures = judge.figures("preference", records, knows, 0)
    assert figures["noise_ceiling"] == pytest.approx(np.maximum(chance, 1 - chance).mean())
    assert figures["accuracy"] == pytest.approx((chance > 0.5).mean())


@pytest.mark.parametrize(
    "line, problem",
    [
        ("{", "not JSON"),
        ("[]", "is not an object"),
        ('{"image": "a.png"}', "fault: missing"),
        ('{"image": "b.png", "fault": true}', r"b.png is no image that can be read"),
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
        judge.read_records(str(file), "artifact")


def test_mistakes_are_user_errors(tmp_path, model, data, capsys):
    with pytest.raises(UserError, match="preferences need a JSONL file"):
        judge.read_records(str(tmp_path), "preference")
    with pytest.raises(UserError, match="holds no image"):
        judge.read_records(str(tmp_path), "artifact")
    with pytest.raises(UserError, match="cannot be read"):
        judge.read_records(str(tmp_path / "nothing.jsonl"), "artifact")
    with pytest.raises(UserError, match="no other field"):
        judge.check_prompts([], load_template("rubric"), "x")
    settings = config(model, data, tmp_path, "preference", heldout=1e-9)
    with pytest.raises(UserError, match="0 held out"):
        judge.split(judge.read_records(settings.data, "preference"), settings)
    recipe = "recipes/nano/judge_aesthetic.yaml"
    for options, problem in [
        (["--optim.passes", "2"], "optim.passes: is 2"),
        (["--heldout", "1"], "heldout: is 1.0"),
        (["--micro_batch", "7"], "use a divisor of batch"),
        (["--lora.targets", "[qkv]"], "lora.targets: names qkv; vLLM serves"),
    ]:
        assert cli.main(["judge", "--config", recipe, *options]) == 2
        assert problem in capsys.readouterr().err


@pytest.mark.parametrize("name", ["judge_aesthetic", "judge_artifact"])
def test_recipes_are_valid(name):
    path = Path(f"recipes/nano/{name}.yaml")
    settings, _ = cli.load_config("judge", ["--config", str(path)])
    assert settings.model == yaml.safe_load(path.read_text())["model"]
