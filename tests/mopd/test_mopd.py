"""MOPD on a tiny real K2: whole runs, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from posttrain import cli
from posttrain.config.load import load_config
from posttrain.config.types import ConfigError
from posttrain.errors import UserError
from posttrain.mopd import train as mopd
from rewards.base import RewardSpec
from tests.helpers import runs
from tests.helpers.settings import validate


@pytest.fixture
def config(tmp_path, model):
    return runs.mopd_config(tmp_path, model)


# ---- whole runs -------------------------------------------------------------------------------------------


def test_run_directory(config, monkeypatch):
    seen = runs.watch_loading(mopd, monkeypatch)
    config.eval.every, config.cosines_every = 1, 2
    mopd.train(config)
    run = Path(config.output)
    runs.assert_metrics_are_defined(run, "brightness")
    first, second = runs.training_rows(run)
    assert first["distance/anchor"] == 0 and first["kl"] < 1e-12  # the student begins as the reference
    assert first["distance/light"] > first["distance/dark"] > 1e-6 and first["relative/light"] == 1
    assert second["kl"] > 0 and second["grad_norm"] > 0 and "relative/anchor" in second
    cosines = {name for name in second if name.startswith("cosine/")}
    assert cosines == {"cosine/light/dark", "cosine/light/anchor", "cosine/dark/anchor"}
    assert not any(name.startswith("cosine/") for name in first)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["before"].keys() == set(config.metric_names()) - {"image/diversity"}
    assert summary["images"] == 2 * (4 + 2 + 4) and summary["retention"]["light"]["reward"] == "brightness"
    assert set(summary["teachers"]) == {"light", "dark"} and len(summary["gains"]["dark"]["teacher"]) == 2
    page = (run / "report.html").read_text()
    assert "<h3>distance</h3>" in page and "<h3>cosine/light</h3>" in page
    ((k2, base),) = seen
    runs.assert_equal(dict(k2.base_state_dict()), base)
    saved = runs.latest(run)
    assert saved.state["method"] == "mopd" and saved.tensors.keys() == {"adapter", "optimizer"}
    assert saved.state["teachers"].keys() == {"light", "dark"}


def test_the_student_comes_nearer_to_its_teachers(config):
    """And with a teacher's guidance: the student is drawn without."""
    config.steps, config.images, config.loss.reference, config.anchor = 30, 6, 0.0, 0.0
    config.optim.lr, config.eval.prompts = 1e-2, 1
    mopd.train(config)
    rows = runs.training_rows(config.output)
    both = np.array([row["distance/light"] + row["distance/dark"] for row in rows])
    assert both[-8:].mean() < 0.8 * both[:8].mean(), both


@pytest.mark.parametrize("ema", [0.0, 0.7])
@pytest.mark.parametrize("how", ["cycle", "alternate"])
def test_killed_and_resumed_equals_uninterrupted(config, monkeypatch, tmp_path, ema, how):
    """Killed in step 4, after step 3 was logged and the last checkpoint was step 2's; compared bit for bit."""
    config.optim.ema, config.update, config.cosines_every = ema, how, 3
    config.steps, config.checkpoint.every, config.eval.every = 4, 2, 2
    mopd.train(config)
    whole, config.output = config.output, str(tmp_path / "killed")

    def killed(*arguments):
        if len(runs.training_rows(config.output)) == 3:
            raise RuntimeError("killed")
        return learn(*arguments)

    learn = mopd.learn
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(mopd, "learn", killed)
        mopd.train(config)
    assert runs.latest(config.output).step == 2
    torch.manual_seed(99)
    np.random.seed(99)
    mopd.train(config, resume=True)
    a, b = runs.latest(whole), runs.latest(config.output)
    for name in a.tensors:
        runs.assert_equal(a.tensors[name], b.tensors[name])
    assert a.state["counters"] == b.state["counters"] and a.state["counters"]["updates"] == (
        4 if how == "cycle" else 12
    )
    assert runs.untimed(whole) == runs.untimed(config.output)


@pytest.mark.long
def test_two_processes_equal_one(command, config, tmp_path):
    """Five images of a teacher, which two do not divide; the second half of a run resumes in the other number."""
    config.images, config.cosines_every, config.checkpoint.every = 5, 2, 2
    config.sampling.sizes = [[32, 32], [16, 48]]
    outputs = []
    for first, then in ((1, 1), (2, 2), (2, 1)):
        config.output = str(tmp_path / f"run-{first}-{then}")
        for steps, processes, resume in ((2, first, []), (4, then, ["--resume"])):
            config.steps = steps
            path = runs.recipe(config, tmp_path / "recipe.yaml")
            result = command("mopd", "--config", path, *resume, processes=processes)
            assert result.returncode == 0, result.stderr[-3000:]
        outputs.append(Path(config.output))
    one, *others = outputs
    for other in others:
        for a, b in zip(runs.untimed(one), runs.untimed(other), strict=True):
            a, b = ({name: value for name, value in row.items() if value is not None} for row in (a, b))
            assert a == pytest.approx(b, rel=1e-3, abs=1e-6)
        a, b = (runs.flat(runs.latest(run).tensors["adapter"]) for run in (one, other))
        assert (a - b).norm() < 1e-3 * a.norm()


def test_a_teacher_that_changed_is_noticed(config, tmp_path, model):
    config.checkpoint.every = 1
    mopd.train(config)
    runs.teacher(tmp_path / "dark", model, 7)
    config.steps = 3
    with pytest.raises(UserError, match=r"teachers\.dark\.run: is not the adapter that the run began with"):
        mopd.train(config, resume=True)


def test_a_teacher_that_says_nothing_new_ends_the_run(config, tmp_path, model):
    """Its adapter is there, but far too small to be seen; with guidance there would be something to learn."""
    config.teachers["dark"].run = str(runs.teacher(tmp_path / "faint", model, 1, size=1e-7))
    with pytest.raises(UserError, match=r"teachers\.dark\.run: .* says what the untrained student says"):
        mopd.train(config)


def test_guidance_on_top_is_warned_of(config, capsys):
    config.eval.guidance = [0.0, 1.5]
    mopd.train(config)
    assert "eval.guidance: teachers with guidance are absorbed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("lora", None, "teachers are adapters beside the student's"),
        ("teachers", {}, "name at least one teacher"),
        ("sampling.states", 5, "is 5, but 4 steps have fewer"),
        ("eval.guidance", [1.5], "begins with 1.5; the student is measured"),
        ("optim.passes", 2, "is 2; after an update"),
        ("loss.reference", -1.0, "use 0 or more"),
    ],
)
def test_mistakes(config, path, value, says):
    target, (*sections, name) = config, path.split(".")
    for section in sections:
        target = getattr(target, section)
    setattr(target, name, value)
    with pytest.raises(ConfigError) as error:
        validate(config)
    assert error.value.field == path and says in str(error.value)


def test_mistakes_of_teachers(config, tmp_path, capsys):
    def says(text: str):
        assert cli.main(["mopd", "--config", str(runs.recipe(config, tmp_path / "recipe.yaml"))]) == 2
        assert text in capsys.readouterr().err

    config.teachers["dark"].tags = ["dark", "light"]
    says("teachers.dark.tags: 'light' is light's too; a prompt has one teacher")
    config.teachers["dark"].tags = []
    says("tags: is empty and prompts is null, so it would teach nothing")
    config.teachers["dark"].tags, config.teachers["dark"].reward = ["dark"], "taste"
    says("teachers.dark.reward: 'taste' is none of rewards")
    config.teachers["dark"].reward = "far"
    config.rewards.append(RewardSpec("far", "tests.helpers.runs:contrast", group=True))
    says("teachers.dark.reward: 'far' is none of rewards that score an image by itself: ['brightness']")
    config.teachers["dark"].reward = None
    config.teachers["anchor"] = config.teachers.pop("dark")
    says("teachers.anchor: names a teacher: use letters")


@pytest.mark.parametrize("name", ["nano/mopd", "k2/mopd"])
def test_recipes_are_valid(name):
    config, _ = load_config("mopd", ["--config", str(runs.ROOT / f"recipes/{name}.yaml")])
    assert config.lora is not None and len(config.teachers) >= 2
