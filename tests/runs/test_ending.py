"""What a run says last."""

import json
import signal

import pytest
import yaml
from accelerate import tracking

from posttrain.errors import UserError
from posttrain.runs import guard
from posttrain.runs import run as run_module
from posttrain.runs.ending import end_line, newest_checkpoint, stopped_line
from posttrain.runs.run import Run
from tests.runs.test_track import config as config  # a fixture


def saved(run, *names):
    for name in names:
        (run / "checkpoints" / name).mkdir(parents=True)


def test_the_newest_checkpoint(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    saved(tmp_path, "step-000002", "step-000010", ".tmp-step-000011", "best")
    assert newest_checkpoint(tmp_path) == (10, tmp_path / "checkpoints/step-000010")
    saved(tmp_path, "checkpoint-12")  # of TRL's trainers
    assert newest_checkpoint(tmp_path)[0] == 12


def test_before_after_and_report(tmp_path):
    before = {"graded": 0.25, "image/brightness": 0.5, "pairs/z": 0.0, "pairs/accuracy": 0.5, "missing": None}
    after = {"graded": 0.5, "image/brightness": 0.4, "pairs/z": 1.0, "pairs/accuracy": 0.875, "missing": 0.1}
    line = f"{tmp_path}: done; graded 0.25 -> 0.5, pairs/accuracy 0.5 -> 0.875"
    assert end_line(tmp_path, {"before": before, "after": after}) == line
    (tmp_path / "report.html").touch()
    assert end_line(tmp_path, {"before": before, "after": after}) == f"{line}; report: {tmp_path}/report.html"
    assert end_line(tmp_path, {"seconds": 3}) == f"{tmp_path}: done; report: {tmp_path}/report.html"


def test_where_it_was_stopped(tmp_path):
    assert stopped_line(tmp_path, None, "again") == f"{tmp_path}: stopped; no step is saved yet; to go on, again"
    assert stopped_line(tmp_path, 9, "again") == f"{tmp_path}: stopped; what is written so far is kept; to go on, again"
    saved(tmp_path, "step-000004")
    where = f"step 4 of 9 is saved in {tmp_path}/checkpoints/step-000004"
    assert stopped_line(tmp_path, 9, "again") == f"{tmp_path}: stopped; {where}; to go on, again"


def test_ctrl_c_says_what_is_saved_and_how_to_go_on(config, capsys):
    run = Run.create(config)
    with pytest.raises(KeyboardInterrupt), run:
        run.start(9)
        saved(run.path, "step-000004")
        raise KeyboardInterrupt
    assert "stopped; step 4 of 9 is saved in" in (said := capsys.readouterr().err) and "continue with --resume" in said


@pytest.mark.parametrize(("steps", "says"), [(4, "stopped; step 4 of 9"), (9, "done; oracle 0.1 -> 0.2")])
def test_a_signal_stops_a_run_that_is_not_through(config, capsys, steps, says):
    with Run.create(config) as run:
        run.start(9)
        saved(run.path, "step-000004")
        run.stopped = signal.SIGTERM
        run.summary({"before": {"oracle": 0.1}, "after": {"oracle": 0.2}, "steps": steps})
    assert says in capsys.readouterr().err


def test_resuming_a_finished_run_says_so(config, capsys):
    with Run.create(config) as run:
        run.start(9, 9)
    assert "is finished: step 9 of 9 is done, and nothing is left; raise steps to go on" in capsys.readouterr().err


def test_settings_changed_on_resuming_are_recorded(config):
    """In changes.json, and as comments of the recipe, which still runs again."""
    with Run.create(config) as run:
        saved(run.path, "step-000004")
    config.optim.lr = 5e-5
    Run.create(config, resume=True).close()
    saved(run.path, "step-000008")
    config.steps = 500
    Run.create(config, resume=True).close()
    rows = json.loads((run.path / "changes.json").read_text())
    found = [(row["after_step"], row["setting"], row["now"]) for row in rows]
    assert found == [(4, "optim.lr", 5e-5), (8, "steps", 500)]
    text = (run.path / "recipe.yaml").read_text()
    assert text.startswith("# resumed after step 4 with another optim.lr: ")
    assert "# resumed after step 8 with another steps: " in text
    assert yaml.safe_load(text)["optim"]["lr"] == 5e-5


def test_a_run_without_a_checkpoint_begins_anew_with_its_recipe(config):
    Run.create(config).close()
    config.optim.lr = 5e-5
    run = Run.create(config, resume=True)
    run.close()
    assert not (run.path / "changes.json").exists() and "#" not in (run.path / "recipe.yaml").read_text()


def test_a_resumed_run_continues_its_wandb_run(config, monkeypatch):
    made = []

    class Tracker:
        def __init__(self, project, **settings):
            made.append(settings)

        start = finish = lambda self: None

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Tracker)
    monkeypatch.setattr(guard, "check_run", lambda *_: None)
    monkeypatch.setattr(run_module, "check_run", lambda *_: None)
    config.track.trackers = ["wandb"]
    for step in (0, 4, 0):
        with Run.create(config, resume=True) as run:
            run.start(9, step)
    first, resumed, again = (settings["id"] for settings in made)
    assert first == resumed != again and {settings["resume"] for settings in made} == {"allow"}


def test_wandb_without_a_key_is_refused_before_anything_is_loaded(config, tmp_path, monkeypatch):
    monkeypatch.setattr(guard.importlib.util, "find_spec", lambda name: name)
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    config.track.trackers = ["wandb"]
    with pytest.raises(UserError, match="wandb is not logged in; run `wandb login`, set WANDB_API_KEY"):
        guard.check_run(config)
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    guard.check_run(config)
    (tmp_path / "netrc").unlink()
    monkeypatch.setenv("WANDB_MODE", "offline")
    guard.check_run(config)
