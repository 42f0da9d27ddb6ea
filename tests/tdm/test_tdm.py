"""TDM on a tiny real K2: whole runs, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from posttrain import cli
from posttrain.config.load import load_config
from posttrain.config.metric_names import distilled_names
from posttrain.config.sections import ModelConfig, PromptsConfig
from posttrain.export.export import load_checkpoint
from posttrain.model import sampler
from posttrain.model.k2 import K2
from posttrain.nano.bench import tdm as bench_tdm
from posttrain.sample_config import SampleConfig
from posttrain.sample_images import sample
from posttrain.stpo import train as stpo
from posttrain.tdm import train as tdm
from posttrain.tdm.config import TDMConfig
from posttrain.tdm.rollout import MU
from posttrain.training import checkpoint
from posttrain.training.policy import load_base
from tests.helpers import runs, tiny


@pytest.fixture
def config(tmp_path, model):
    return runs.tdm_config(tmp_path, model)


def training_rows(run):
    return [row for row in runs.rows(run) if "fake_updates" in row]


# whole runs


def test_run_directory(config, monkeypatch):
    seen = runs.watch_loading(tdm, monkeypatch)
    config.student.steps, config.optim.ema = [4, 2], 0.5
    tdm.train(config)
    run = Path(config.output)
    assert {path.name for path in run.iterdir()} - {".lock"} == {
        "recipe.yaml", "environment.json", "metrics.jsonl", "grids", "samples", "checkpoints", "report.html",
        "summary.json",
    }  # fmt: skip
    warm, first, second = training_rows(run)
    runs.assert_metrics_are_defined(run, "brightness")
    own = {"generator_loss", "generator_grad_norm", "direction", "scale"}
    assert own.isdisjoint(warm) and own < first.keys() and own < second.keys()
    for row in (warm, first, second):
        assert row["fake_loss"] > 0 and row["fake_grad_norm"] > 0 and 0.5 < row["omega"] < 2
    assert first["direction"] > 0 and first["generator_grad_norm"] > 0

    teacher, before, *_, after = [row for row in runs.rows(run) if "fake_updates" not in row]
    named = set(distilled_names(["brightness"], [4, 2], 1))
    assert {name.removeprefix("eval/") for name in after} - {"step", "time"} == named
    assert {"image/contrast", "to_teacher/diversity@2steps", "brightness@2steps", "fake_loss"} < named
    for suffix in ("", "@2steps"):
        ratio = after[f"eval/image/saturation{suffix}"] / teacher["teacher/image/saturation"]
        assert after[f"eval/to_teacher/saturation{suffix}"] == pytest.approx(ratio)
    assert before["eval/brightness"] != before["eval/brightness@2steps"]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["after"] == {name: after[f"eval/{name}"] for name in named}
    assert summary["teacher"] == {name.removeprefix("teacher/"): v for name, v in teacher.items() if "/" in name}
    assert (summary["steps"], summary["images"]) == (3, 18)
    assert '<th class="n">teacher</th>' in (run / "report.html").read_text()
    assert {path.name for path in (run / "grids").iterdir()} == {"teacher.png", "step-000000.png", "step-000003.png"}

    saved = runs.latest(run)
    assert saved.tensors.keys() == {"adapter", "fake", "optimizer", "fake_optimizer", "live"}
    assert saved.state["method"] == "tdm" and saved.state["student"] == {"steps": [4, 2], "mu": 1.15, "guidance": 0.0}
    ((k2, base),) = seen
    runs.assert_equal(dict(k2.base_state_dict()), base)  # the teacher is what it was
    for name in ("adapter", "fake"):
        moved = [bool(v.any()) for key, v in saved.tensors[name].items() if key.endswith("lora_B.weight")]
        assert len(moved) == 24 and all(moved)
    assert not torch.equal(*(next(iter(saved.tensors[name].values())) for name in ("adapter", "fake")))
    # the picture shown is the average's, by the student's steps and shift
    again = load_checkpoint(saved)
    noise = sampler.noise([sampler.seed_for(config.eval.seed, 0)], (16, 64))
    with again.role("policy"):
        latents = again.sample(again.text([tiny.PROMPTS[1]], 64), noise, 4, 32, 32, mu=1.15)
    shown = np.asarray(Image.open(run / "samples/step-000003/000.png"), int)
    assert np.abs(again.decode(latents, 32, 32)[0].numpy() - shown).max() <= 1


@pytest.mark.parametrize(
    ("ema", "steps", "updates", "lora"), [(0.7, [4], 1, True), (0.0, [4, 1], 2, True), (0.5, [4], 1, False)]
)
def test_killed_and_resumed_equals_uninterrupted(config, monkeypatch, tmp_path, ema, steps, updates, lora):
    """Killed in step 4, after step 3 was logged and the last checkpoint was step 2's; compared bit for bit."""
    if not lora:
        config.lora, config.optim.lr = None, 1e-4
    config.optim.ema, config.student.steps, config.fake.updates = ema, steps, updates
    config.optim.warmup_steps, config.optim.cooldown_steps, config.eval.best = 3, 2, "to_teacher/saturation"
    config.steps, config.checkpoint.every, config.eval.every = 4, 2, 2
    tdm.train(config)
    whole, config.output = config.output, str(tmp_path / "killed")

    def killed(*arguments):
        if len(training_rows(config.output)) == 3:
            raise RuntimeError("killed")
        return update_fake(*arguments)

    update_fake = tdm.update_fake
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(tdm, "update_fake", killed)
        tdm.train(config)
    torch.manual_seed(99)
    np.random.seed(99)
    tdm.train(config, resume=True)
    a, b = runs.latest(whole), runs.latest(config.output)
    assert a.step == b.step == 4
    assert a.tensors.keys() == b.tensors.keys() and {"fake", "fake_optimizer"} < a.tensors.keys()
    for name in a.tensors:
        runs.assert_equal(a.tensors[name], b.tensors[name])
    assert a.state["counters"] == b.state["counters"] and a.state["fake"] == b.state["fake"]
    assert a.state["fake"]["counters"]["updates"] == 4 * updates and a.state["counters"]["updates"] == 3
    assert runs.untimed(whole) == runs.untimed(config.output)
    summaries = [json.loads((Path(run) / "summary.json").read_text()) for run in (whole, config.output)]
    for name in ("before", "after", "teacher", "images", "steps", "best"):
        assert summaries[0][name] == summaries[1][name]


def test_two_processes_distil_as_one(command, config, tmp_path):
    """Five pictures a step, of which one process draws three; three held-out ones."""
    config.batch, config.micro_batch, config.eval.prompts, config.optim.ema = 5, 2, 3, 0.5
    made = []
    for processes in (1, 2):
        config.output = str(tmp_path / f"run-{processes}")
        result = command("tdm", "--config", runs.recipe(config, tmp_path / "recipe.yaml"), processes=processes)
        assert result.returncode == 0, result.stderr[-3000:]
        made.append(Path(config.output))
    first, second = (runs.untimed(run) for run in made)
    assert len(first) == len(second) == 6
    for a, b in zip(first, second):
        assert a == pytest.approx(b, rel=2e-3, abs=1e-5)
    a, b = (checkpoint.load_latest(run / "checkpoints") for run in made)
    assert a is not None and b is not None and a.step == b.step == 3
    for name in ("adapter", "live", "fake"):
        trained, again = (runs.flat(saved.tensors[name]) for saved in (a, b))
        assert (trained - again).norm() < 1e-3 * trained.norm()


def test_a_limit_ends_the_run(config, tmp_path, capsys):
    config.steps, config.eval.every = 9, 1
    config.eval.stop = replace(config.eval.stop, metric="to_teacher/diversity", limit=9.0)
    config.eval.best = "brightness"
    assert cli.main(["tdm", "--config", str(runs.recipe(config, tmp_path / "recipe.yaml"))]) == 0
    assert runs.latest(config.output).step == 1
    stopped = json.loads((Path(config.output) / "summary.json").read_text())["stopped"]
    assert stopped.startswith("eval.stop: to_teacher/diversity is ") and stopped in capsys.readouterr().err


def test_goes_on_from_an_earlier_run(config, tmp_path, model):
    """What that trained is part of the teacher, and of what the student is exported on."""
    (tmp_path / "first").mkdir()
    first = runs.stpo_config(tmp_path / "first", model)
    stpo.train(first)
    config.model.start = first.output
    tdm.train(config)
    saved = runs.latest(config.output)
    assert [Path(entry["path"]).name for entry in saved.state["origin"]["merged"]] == ["step-000002"]
    k2 = load_base(saved)
    k2.merge_stack()
    base, plain = k2.base_state_dict(), K2.load(model).base_state_dict()
    assert any(not torch.equal(base[key], value) for key, value in plain.items())


# mistakes


def fails(capsys, config, tmp_path, *args):
    assert cli.main(["tdm", "--config", str(runs.recipe(config, tmp_path / "recipe.yaml")), *args]) == 2
    *_, said = capsys.readouterr().err.strip().splitlines()
    assert said.startswith("posttrain: error: ")
    return said


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--student.steps", "[8,17]"], "student.steps[1]: is 17; use 1 to 16"),
        (["--student.steps", "[0]"], "student.steps[0]: is 0; use 1 to 16"),
        (["--student.steps", "[]"], "student.steps: is []; name different numbers of steps, such as [8] or [8, 4]"),
        (["--student.steps", "[4,4]"], "student.steps: is [4, 4]; name different"),
        (["--fake.warmup", "3"], "fake.warmup: is 3 of 3 steps, so no student is trained; lower it"),
        (
            ["--fake.clip", "[1.5,2]"],
            "fake.clip: is [1.5, 2]; the weights lie around 1: use 0 <= least <= 1 <= greatest",
        ),
        (["--teacher.guidance", "-1"], "teacher.guidance: is -1"),
        (["--eval.guidance", "[1.5]"], "eval.guidance: is that of a student, which has none: leave it out"),
        (["--eval.best", "oracle"], "eval.best: 'oracle' is no metric of the evaluation; known here: "),
        (["--batch", "9"], "train.jsonl holds 8 prompts and a step takes 9; add prompts or lower batch"),
    ],
)
def test_mistakes(config, tmp_path, capsys, options, says):
    assert says in fails(capsys, config, tmp_path, *options)
    assert not Path(config.output).exists()


def test_a_distilled_teacher_is_refused(config, tmp_path, capsys):
    turbo = tiny.save(tmp_path / "turbo", distilled=True)
    said = fails(capsys, config, tmp_path, "--model.path", str(turbo))
    allowed = fails(capsys, config, tmp_path, "--model.path", str(turbo), "--model.allow_distilled", "true")
    assert "model.allow_distilled: a teacher must be able to use many steps; give the Raw checkpoint" in allowed
    assert "turbo: model_index.json: is_distilled is true: train the Raw checkpoint" in said
    tdm.train(config)
    config.model.start, config.output = config.output, str(tmp_path / "again")
    assert "step-000003 is distilled already; go on from the run before it" in fails(capsys, config, tmp_path)


def test_another_number_of_steps_cannot_be_resumed(config, tmp_path, capsys):
    tdm.train(config)
    said = fails(capsys, config, tmp_path, "--student.steps", "[2]", "--resume")
    assert "cannot be resumed with student.steps [4] -> [2]" in said


def test_recipe_is_valid():
    made, _ = load_config("tdm", ["--config", "recipes/nano/tdm.yaml"])
    assert made.student.steps == [8] and made.teacher.guidance == 1.5 and made.optim.betas == (0.0, 0.95)
    plain, _ = load_config(
        "tdm", ["--output", "a", "--model.path", "b", "--prompts.train", "c", "--prompts.heldout", "d"]
    )
    assert plain.optim.betas == (0.0, 0.95) and plain.optim.ema == 0.99 and plain.fake.warmup == 50


# the comparison with the teacher


def test_frechet_distance():
    """Of Gaussians with covariance diag(1, 4): a mean 3 away, or diag(9, 4): 9 / 5 and (3 - 1)^2 / 5. Here the sample's
    own mean is 0 and its covariance is exact."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 2))
    x = (x - x.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T * [1, 2]
    assert bench_tdm.frechet(x, x) == pytest.approx(0, abs=1e-9)
    assert bench_tdm.frechet(x + np.array([3, 0]), x) == pytest.approx(9 / 5)
    assert bench_tdm.frechet(x * [3, 1], x) == pytest.approx(4 / 5)


def test_table_of_seeds():
    names: list[str] = [*bench_tdm.FIGURES]
    seeds = [dict.fromkeys(names, value) for value in (0.5, 0.7)]
    rows = {"teacher": (56, [seeds[0]]), "student": (8, seeds)}
    _, _, teacher, student = bench_tdm.table(rows, seeds[0]).splitlines()
    assert teacher == "| teacher | 56 | 0.500 | 0.500 | 0.500 | 1.000 | 0.500 |"
    assert student.startswith("| student | 8 | 0.600 (0.500 to 0.700) |") and "| 1.200 (1.000 to 1.400) |" in student


def test_steps_whose_memory_is_measured(model):
    for step in (bench_tdm.flow_matching_step, bench_tdm.tdm_step):
        k2 = K2.load(model)
        config = TDMConfig(output="none", model=ModelConfig(""), prompts=PromptsConfig("", ""), batch=2, micro_batch=2)
        fused, null = [k2.text([prompt]).tokens[0] for prompt in tiny.PROMPTS[:2]], k2.text([""])
        step(k2, config, fused, null, (32, 32))
        trained = {name for name in k2.roles if any(p.any() for k, p in k2.role_named_parameters(name).items()
                                                    if "lora_B" in k)}  # fmt: skip
        assert trained == ({"policy"} if step is bench_tdm.flow_matching_step else {"policy", "fake"})


def test_samples_of_a_run_are_the_students(config, tmp_path, capsys):
    """8 steps, no guidance and the fixed shift, without being told."""
    config.steps = 2
    tdm.train(config)
    sample(SampleConfig(str(tmp_path / "out"), config.model, "a fox", adapter=config.output, size=[32, 32]))
    assert "(8 steps, guidance 0)" in capsys.readouterr().out
    k2 = load_checkpoint(runs.latest(config.output))
    with k2.role("policy"):
        latents = k2.sample(k2.text(["a fox"]), sampler.noise([sampler.seed_for(0, 0, 0)], (16, 64)), 8, 32, 32, mu=MU)
    drawn = np.asarray(Image.open(tmp_path / "out/000.png"), int)
    assert np.abs(k2.decode(latents, 32, 32)[0].numpy() - drawn).max() <= 1
