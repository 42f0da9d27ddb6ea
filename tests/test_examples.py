"""The examples run, as a reader runs them; and the method among them resumes and exports as the others do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

import posttrain as pt
from posttrain import cli
from posttrain.errors import UserError
from tests.helpers import runs, tiny

sys.path.append(str(runs.ROOT / "examples"))
import reward_weighted_regression as rwr


def python(folder: Path, *words: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(runs.ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.long
def test_draw_and_score(tmp_path):
    lines = python(tmp_path, str(runs.ROOT / "examples/draw_and_score.py")).splitlines()
    assert len(lines) == 4 and all("brightness 0." in line and "artifact_free" in line for line in lines)


@pytest.mark.long
def test_a_folder_is_scored(tmp_path):
    shades = (0, 100, 200)
    for i, shade in enumerate(shades):
        pixels = np.full((64, 64, 3), shade, np.uint8)
        pixels[::2] += 5 * i  # more detail where it is brighter
        Image.fromarray(pixels).save(tmp_path / f"{i:03d}.png")
    printed = python(tmp_path, str(runs.ROOT / "examples/score_folder.py"), str(tmp_path))
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert [*scores] == ["000.png", "001.png", "002.png"]
    assert scores["002.png"]["brightness"] == pytest.approx((200 + 10 / 2) / 255)
    line = next(line for line in printed.splitlines() if line.startswith("brightness"))
    mean, std, own, detail = (float(word) for word in line.split()[1:5])
    assert mean == pytest.approx(np.mean([0, 102.5, 205]) / 255, abs=1e-3) and std > 0.3
    assert own == 1 and detail == pytest.approx(1, abs=0.01)


# ---- a method of one's own ------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path, model):
    """The example's settings on the tiny model: four images of 32 x 32 a step, three steps."""
    made = rwr.nano_config(str(tmp_path / "run"), steps=3)
    for name, prompts in (("train", tiny.PROMPTS), ("heldout", tiny.PROMPTS[:2])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))
        setattr(made.prompts, name, str(tmp_path / f"{name}.jsonl"))
    made.model.path, made.size, made.draw_steps = str(model), [32, 32], 2
    made.rewards = [pt.RewardSpec("brightness", runs.brightness)]
    made.groups.group_size, made.eval.prompts, made.eval.steps = 2, 1, 2
    made.lora.rank = 2
    return made


def weights(run: str) -> dict:
    return runs.latest(run).tensors["adapter"]


def test_the_adapter_moves_and_is_exported_and_sampled(config, tmp_path):
    rwr.train(config)
    moved = [value for name, value in weights(config.output).items() if "lora_B" in name]
    assert moved and all(value.abs().max() > 0 for value in moved)
    rows = runs.training_rows(config.output)
    assert [row["step"] for row in rows] == [1, 2, 3] and all(row["grad_norm"] > 0 for row in rows)
    assert (Path(config.output) / "report.html").is_file()
    recipe = (Path(config.output) / "recipe.yaml").read_text()
    assert "function: tests.helpers.runs:brightness" in recipe and "temperature: 0.1" in recipe
    lora = tmp_path / "lora.safetensors"
    words = ["--source", config.output, "--format", "lora", "--output", str(lora)]
    assert cli.main(["export", *words]) == 0
    assert any(value.abs().max() > 0 for name, value in load_file(lora).items() if "lora_B" in name)
    assert "rwr" in lora.with_suffix(".md").read_text()
    k2 = pt.load_model(config.model.path, adapter=config.output)
    with k2.role(pt.POLICY):
        tuned = pt.draw(k2, tiny.PROMPTS[:1], (32, 32), steps=2, guidance=0)
    plain = pt.draw(k2, tiny.PROMPTS[:1], (32, 32), steps=2, guidance=0)
    assert np.asarray(tuned[0]).shape == (32, 32, 3) and not np.array_equal(tuned[0], plain[0])


def test_a_resumed_run_ends_as_an_uninterrupted_one(config, tmp_path):
    rwr.train(config)
    whole = weights(config.output)
    config.output, config.steps = str(tmp_path / "parts"), 1
    rwr.train(config)
    config.steps = 3
    with pytest.raises(UserError, match="holds a run already; add --resume or choose another --output"):
        rwr.train(config)
    rwr.train(config, resume=True)
    runs.assert_equal(weights(config.output), whole)


def test_better_images_of_a_group_weigh_more(config, monkeypatch):
    """Where one image has all the weight, the gradient is that image's alone."""
    config.temperature, config.steps = 1e-12, 1
    seen, loss_of = [], rwr.flow_loss

    def flow_loss(*arguments):
        seen.append(loss_of(*arguments))
        seen[-1].retain_grad()
        return seen[-1]

    monkeypatch.setattr(rwr, "flow_loss", flow_loss)
    rwr.train(config)
    assert len(seen) == 2
    for loss in seen:
        assert sorted(loss.grad.tolist()) == [0, 1]


# ---- the pieces -----------------------------------------------------------------------------------------------


def test_what_is_drawn_depends_on_no_batch(model):
    k2 = pt.load_model(str(model))
    prompts = [*tiny.PROMPTS[:2], tiny.PROMPTS[0]]
    three = pt.draw(k2, prompts, (32, 32), steps=2, guidance=1.0, micro_batch=2)
    first = pt.draw(k2, prompts[:1], (32, 32), steps=2, guidance=1.0)
    assert np.abs(np.asarray(three[0], int) - np.asarray(first[0], int)).max() <= 1  # padding rounds otherwise
    assert not np.array_equal(three[0], three[2])
    with pytest.raises(UserError, match=f"resolution 33x32: both must be multiples of {k2.pixel_multiple} pixels"):
        pt.draw(k2, prompts, (33, 32))


def test_scores_of_a_notebook_and_their_total():
    async def notebook():
        rewards = pt.load_rewards([some, pt.RewardSpec("other", lambda images, prompts: [1.0, 3.0, None])])
        return pt.score(rewards, [Image.new("RGB", (4, 4))] * 3, ["a", "b", "c"])

    def some(images, prompts):
        return [0.5, None, None]

    import asyncio

    scores = asyncio.run(notebook())
    assert scores.valid_NK.tolist() == [[True, True], [False, True], [False, False]]
    mean = pt.total(scores)
    assert mean[:2].tolist() == [0.75, 3.0] and mean[2].isnan()
    assert pt.total(scores, [3, 1])[0] == pytest.approx((3 * 0.5 + 1) / 4)
