"""The run directory: nothing overwritten, nothing invalid, nothing lost on resuming."""

import importlib.metadata
import io
import json
import math

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console

from posttrain.config.load import load_config
from posttrain.config.sections import ModelConfig, PromptsConfig
from posttrain.errors import UserError
from posttrain.grpo.config import GRPOConfig
from posttrain.runs.progress import Progress, grid_image
from posttrain.runs.run import Run, peak_memory
from rewards.base import RewardSpec


@pytest.fixture
def config(tmp_path):
    config = GRPOConfig(
        output=str(tmp_path / "run"),
        model=ModelConfig(path="k2"),
        prompts=PromptsConfig(train="a.jsonl", heldout="b.jsonl"),
        rewards=[RewardSpec(name="oracle", function="pkg.mod:score")],
    )
    config.track.tensorboard = False
    return config


def lines(run: Run) -> list[dict]:
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (run.path / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_recipe_is_resolved_and_runs_again(config):
    run = Run.create(config)
    saved = yaml.safe_load((run.path / "recipe.yaml").read_text())
    assert saved["optim"]["betas"] == [0.9, 0.99] and saved["sampling"]["window"] == 2
    again, _ = load_config("grpo", ["--config", str(run.path / "recipe.yaml")])
    assert again == config
    environment = json.loads((run.path / "environment.json").read_text())
    assert environment["packages"]["torch"] == importlib.metadata.version("torch")
    assert environment["cpus"] > 0


def test_a_run_is_not_overwritten(config, capsys):
    Run.create(config)
    with pytest.raises(UserError, match="holds a run already; add --resume or choose another --output"):
        Run.create(config)
    config.optim.lr = 5e-5
    Run.create(config, resume=True)
    assert "optim.lr 0.0001 -> 5e-05" in capsys.readouterr().err


def test_a_file_in_the_way(config, tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="a file is in the way"):
        Run.create(config)


def test_tracker_that_is_not_installed(config, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config.track.trackers = ["trackio"]
    with pytest.raises(UserError, match="pip install trackio"):
        Run.create(config)


def test_metrics_are_valid_json_and_non_finite_values_are_counted(config):
    with Run.create(config) as run:
        run.start(total=3)
        run.log(1, {"reward": torch.tensor(0.5), "kl": np.float32(0.25), "images": 8, "text": None})
        run.log(2, {"reward": float("nan"), "grad_norm": float("inf"), "kl": -math.inf})
    first, second = lines(run)
    assert (first["step"], first["reward"], first["kl"], first["images"], first["text"]) == (
        1,
        0.5,
        0.25,
        8,
        None,
    )
    assert "non_finite" not in first
    assert (second["reward"], second["grad_norm"], second["kl"], second["non_finite"]) == (
        None,
        None,
        None,
        3,
    )
    assert run.non_finite == 3


def test_resuming_drops_later_steps_and_a_torn_line(config):
    with Run.create(config) as run:
        run.start(total=9)
        for step in range(1, 6):
            run.log(step, {"reward": step / 10})
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "rew')
    with Run.create(config, resume=True) as run:
        run.start(total=9, step=3)
        run.log(4, {"reward": 0.9})
    assert [(line["step"], line["reward"]) for line in lines(run)] == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.9)]


def test_resuming_where_nothing_was_begins(config):
    with Run.create(config, resume=True) as run:
        run.start(total=1)
        run.log(0, {"eval/reward": 1})
    with Run.create(config, resume=True) as run:  # killed before the first checkpoint
        run.start(total=1)
        run.log(0, {"eval/reward": 1})
        run.log(1, {"reward": 1})
    assert [line["step"] for line in lines(run)] == [0, 1]


def test_tensorboard(config):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config.track.tensorboard = True
    for resume, start, steps in ((False, 0, range(1, 5)), (True, 2, range(3, 4))):
        with Run.create(config, resume=resume) as run:
            run.start(total=4, step=start)
            for step in steps:
                run.log(step, {"reward": step + 10 * start, "lost": None})
    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["reward"]
    assert [(e.step, e.value) for e in events.Scalars("reward")] == [(1, 1.0), (2, 2.0), (3, 23.0)]


def test_other_processes_write_nothing(config):
    with Run.create(config, main=False) as run:
        run.start(total=1)
        run.log(1, {"reward": 1.0})
        assert run.grid(0, np.zeros((1, 8, 8, 3), np.uint8), 1, 1) is None
        run.samples(0, np.zeros((1, 8, 8, 3), np.uint8), ["a"], [0])
        run.summary({"seconds": 1})
    assert not run.path.exists()


def test_grid_and_samples(config):
    images = np.zeros((3, 32, 64, 3), np.uint8)
    images[0] = 255, 0, 0
    images[2] = 0, 0, 255
    run = Run.create(config)
    path = run.grid(25, images, rows=2, columns=2, captions=["one", "two", "a caption that is rather too long " * 4])
    assert path is not None and path.name == "step-000025.png"
    grid = np.asarray(Image.open(path))
    assert grid.shape == (2 * (64 + 28 + 6) + 6, 2 * (128 + 6) + 6, 3)
    assert tuple(grid[20, 20]) == (255, 0, 0) and tuple(grid[6 + 98 + 10, 20]) == (0, 0, 255)
    run.samples(0, images, ["a", "b", "c"], [1, 2, 3])
    assert np.array_equal(np.asarray(Image.open(run.path / "samples/step-000000/002.png")), images[2])
    assert json.loads((run.path / "samples/prompts.json").read_text())[1] == {"prompt": "b", "seed": 2}
    with pytest.raises(ValueError, match="3 images do not fit"):
        grid_image(images, 1, 2)


def test_summary(config):
    run = Run.create(config)
    run.summary({"before": {"reward": np.float64(0.5)}, "seconds": torch.tensor(2.0), "lost": float("nan")})
    saved = json.loads((run.path / "summary.json").read_text())
    assert saved.pop("startup")["total"] >= 0
    assert saved == {"before": {"reward": 0.5}, "seconds": 2.0, "lost": None}


def test_quiet_progress_prints_a_line_and_then_waits(monkeypatch):
    clock = iter([0.0, 11.0, 12.0, 22.0, 30.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    out = io.StringIO()
    progress = Progress(4, console=Console(file=out))
    for step in range(1, 5):
        progress.update(step, {"loss": 1.0, **({"reward": 0.5} if step > 1 else {})})
    assert out.getvalue().splitlines() == [
        "step 1/4  11.00 s/step  0:33 left",
        "step 3/4  reward 0.5000  7.33 s/step  0:07 left",
        "step 4/4  reward 0.5000  7.50 s/step  0:00 left",
    ]


def test_a_step_is_told_once(monkeypatch):
    """Its evaluation is logged after it, also of the last one."""
    clock = iter([0.0, 11.0, 22.0, 33.0, 44.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    out = io.StringIO()
    progress = Progress(2, console=Console(file=out))
    for step in (1, 1, 2, 2):
        progress.update(step, {"reward": 0.5})
    assert [line[:8] for line in out.getvalue().splitlines()] == ["step 1/2", "step 2/2"]


def test_progress_bar_on_a_terminal():
    out = io.StringIO()
    progress = Progress(10, step=4, console=Console(file=out, force_terminal=True, width=100))
    progress.update(5, {"accuracy": 0.25})
    progress.close()
    assert "5/10" in out.getvalue() and "accuracy 0.2500" in out.getvalue() and "left" in out.getvalue()


def test_peak_memory_is_in_gib():
    assert 0.05 < peak_memory()["peak_ram_gib"] < 500


def test_the_evaluation_at_the_start_takes_no_steps_time(monkeypatch):
    clock, lines = [100.0], io.StringIO()
    monkeypatch.setattr("posttrain.runs.progress.time.monotonic", lambda: clock[0])
    bar = Progress(3, console=Console(file=lines, width=200))
    clock[0] += 240
    bar.update(0, {"reward": 0.5})
    for step in (1, 2, 3):
        clock[0] += 20
        bar.update(step, {})
    found = lines.getvalue().splitlines()
    assert found[0] == "step 0/3  reward 0.5000" and found[1] == "step 1/3  20.00 s/step  0:40 left"
