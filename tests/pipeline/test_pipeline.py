"""Pipelines on the tiny model: stages in their own processes, wired, finished, resumed, stopped, and refused."""

import dataclasses
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from posttrain import cli
from posttrain.pairs.config import DeltaConfig, DrawConfig, PairsConfig, PairSource
from posttrain.pipeline.plan import resolve
from tests.helpers import runs, warm
from tests.test_cli import fails

BRIGHT = {"name": "a", "function": {"class_path": "tests.helpers.warm.Bright"}}


@pytest.fixture(scope="module")
def server(tmp_path_factory, model):
    server = warm.Warm(tmp_path_factory.mktemp("warm"), model)
    yield server
    server.close()


@pytest.fixture
def recipes(tmp_path, model):
    """Recipes of pairs, stpo and grpo on the tiny model, as files; a pipeline sets their outputs and inputs."""
    made = {}
    for name, config in (("stpo", runs.stpo_config), ("grpo", runs.config)):
        (tmp_path / name).mkdir()
        made[name] = config(tmp_path / name, model)
        made[name].steps = 1
        made[name].rewards[0].function = "tests.helpers.warm:brightness"
    made["pairs"] = PairsConfig(
        output="none", model=made["grpo"].model, prompts=made["grpo"].prompts.train,
        sources=[PairSource("steps", delta=DeltaConfig(DrawConfig(), DrawConfig(steps=1)))],
        pairs=4, min_distance=0, steps=2, sizes=[[32, 32]], block=4, max_tokens=64,
    )  # fmt: skip
    made["stpo"].batch, made["stpo"].pairs.heldout = 2, 0.4
    paths = {}
    for name, config in made.items():
        data = dataclasses.asdict(config)
        del data["output"]
        paths[name] = tmp_path / f"{name}.yaml"
        paths[name].write_text(json.dumps(data))
    return paths


@pytest.fixture
def write(tmp_path, recipes, server):
    """A function that writes a pipeline: of all stages, or of these; what is set for one is added."""
    inputs = {"stpo": {"pairs.train": "${pairs}"}, "grpo": {"model.start": "${stpo}"}}

    def write(*names: str, name: str = "p", **settings) -> Path:
        stages = []
        for stage in names or ("pairs", "stpo", "grpo", "export"):
            given = settings.get(stage, {})
            added = inputs.get(stage, {}) | given
            for field, maker in (("pairs.train", "pairs"), ("model.start", "stpo")):
                if names and maker not in names and field in added and field not in given:
                    del added[field]
            if stage == "export":
                added |= {"source": "${grpo}", "format": "lora"}
            recipe = [str(recipes[stage])] if stage in recipes else []
            stages.append({"name": stage, "command": stage, "recipes": recipe, "set": added})
        path = tmp_path / f"{name}.yaml"
        path.write_text(json.dumps({"output": str(tmp_path / name), "stages": stages, "launch": server.launch}))
        return path

    return write


def start(*args) -> subprocess.Popen:
    command = [sys.executable, "-m", "posttrain.cli", "run", *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=runs.ROOT)


def run(*args) -> subprocess.CompletedProcess:
    process = start(*args)
    out, err = process.communicate(timeout=240)
    return subprocess.CompletedProcess([], process.returncode, out, err)


def state(folder: Path) -> dict:
    return json.loads((folder / "stages.json").read_text())


def wait_for_steps(run: Path, steps: int) -> None:
    began = time.monotonic()
    while not (run / "metrics.jsonl").exists() or len(runs.training_rows(run)) < steps:
        assert time.monotonic() - began < 120
        time.sleep(0.02)


@pytest.mark.long
def test_stages_follow_each_other_and_are_done_once(write, tmp_path):
    folder, path = tmp_path / "p", write()
    planned = run(path, "--dry-run")
    assert (planned.returncode, planned.stderr) == (0, "") and not folder.exists()
    lines = [line.split() for line in planned.stdout.split("\n\n")[0].splitlines()]
    assert [line[:5] for line in lines] == [
        ["1", "pairs", "pairs", "to", "do"],
        ["2", "stpo", "stpo", "to", "do"],
        ["3", "grpo", "grpo", "to", "do"],
        ["4", "export", "export", "to", "do"],
    ]
    assert planned.stdout.count("model.start from stpo") == planned.stdout.count("pairs.train from pairs") == 1

    result = run(path)
    assert result.returncode == 0, result.stderr
    assert all(entry["finished"] for entry in state(folder).values()) and list(state(folder)) == [
        "pairs", "stpo", "grpo", "export",
    ]  # fmt: skip
    last = runs.latest(folder / "grpo")
    assert [Path(one["path"]).parent.parent for one in last.state["origin"]["merged"]] == [folder / "stpo"]
    assert load_file(folder / "export.safetensors") and (folder / "export.md").is_file()
    page = (folder / "index.html").read_text()
    assert "What each stage gained" in page and "<td>stpo</td><td>pairs/<wbr>accuracy, trained</td>" in page
    assert page.count('href="stpo/report.html"') == 2 and '<th class="n">start</th>' in page
    assert "brightness" in page and "data:image" in page and "://" not in page

    fails(run(path), "output: ", "already contains a pipeline; add --resume")
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*.safetensors")}
    again = run(path, "--resume")
    assert again.returncode == 0 and again.stderr.splitlines() == [
        f"posttrain: finished: 4 stages; report: {folder}/index.html; exported: {folder}/export.safetensors"
    ]
    assert before == {file: file.stat().st_mtime_ns for file in folder.rglob("*.safetensors")}
    assert "finished" in run(path, "--dry-run").stdout

    noted = state(folder)
    noted["export"]["finished"] = None  # as after a kill in between
    (folder / "stages.json").write_text(json.dumps(noted))
    again = run(path, "--resume")
    assert again.returncode == 0 and state(folder)["export"]["finished"]
    assert again.stderr.count("is finished") == 3 and "stage export: export into" in again.stderr
    assert before == {file: file.stat().st_mtime_ns for file in folder.rglob("*.safetensors")}

    changed = write(stpo={"optim.lr": 0.5})
    fails(run(changed, "--resume"), "stage stpo: its settings have changed since it finished: optim.lr 0.003 -> 0.5")
    fails(run(write("pairs", "stpo"), "--resume"), "stages: grpo is finished but no longer in the recipe")
    (folder / "pairs").rename(tmp_path / "elsewhere")
    fails(run(write(), "--resume"), "stage pairs: is finished, but", "is missing; put it back")


@pytest.mark.long
def test_a_pipeline_that_was_killed_ends_as_one_that_was_not(write, tmp_path):
    """Once by SIGTERM to the pipeline, once by SIGKILL of the stage's process."""
    settings = {"steps": 6, "checkpoint.every": 1}
    assert run(write("grpo", name="whole", grpo=settings)).returncode == 0
    folder, path = tmp_path / "p", write("grpo", grpo=settings)
    process = start(path)
    wait_for_steps(folder / "grpo", 1)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 0 and "stopped in stage grpo; continue with --resume" in said
    done = runs.latest(folder / "grpo").step
    assert state(folder)["grpo"]["finished"] is None and 1 <= done < 6

    process = start(path, "--resume")
    wait_for_steps(folder / "grpo", done + 1)
    stage = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True).stdout
    os.kill(int(stage), signal.SIGKILL)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and "error: stage grpo: was ended by signal 9" in said

    assert run(path, "--resume").returncode == 0
    assert state(folder)["grpo"]["finished"]
    a, b = (runs.latest(tmp_path / name / "grpo") for name in ("whole", "p"))
    assert a.step == b.step == 6
    runs.assert_equal(a.tensors["adapter"], b.tensors["adapter"])


def test_interrupt_ends_with_its_code(write, tmp_path):
    process = start(write("grpo", grpo={"steps": 1000}))
    wait_for_steps(tmp_path / "p/grpo", 1)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert runs.latest(tmp_path / "p/grpo").step < 1000


def test_a_stage_that_was_stopped_alone_is_not_finished(write, tmp_path):
    process = start(write("grpo", "export", grpo={"steps": 1000}))
    wait_for_steps(tmp_path / "p/grpo", 1)
    stage = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True).stdout
    os.kill(int(stage), signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and "error: stage grpo: was stopped before its last step" in said
    assert not (tmp_path / "p/export.safetensors").exists()


def test_a_stage_that_fails_is_named(write, tmp_path):
    path = write("grpo", "export", grpo={"rewards": [{"name": "none", "function": "tests.helpers.warm:nothing"}]})
    result = run(path)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert " could be scored: all None" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("posttrain: error: stage grpo: failed with exit code 2")
    assert not (tmp_path / "p/export.safetensors").exists()


def planned(values: list[float], **settings) -> dict:
    """Settings of a stage of grpo whose held-out judge says these, and that its stop rule ends."""
    script = {"name": "heldout", "heldout_only": True}
    script["function"] = {"class_path": "tests.helpers.warm.Script", "init_args": {"values": values}}
    trained = {"name": "brightness", "function": "tests.helpers.warm:brightness"}
    rule = {"eval.every": 1, "eval.best": "heldout", "eval.stop.metric": "heldout"}
    return {"rewards": [trained, script], "steps": 20, "checkpoint.keep": 1, **rule, **settings}


@pytest.mark.long
def test_what_follows_a_collapse_starts_from_the_best_step(write, tmp_path):
    """The held-out judge's figure is best after step 2 and falls; the run ends with step 4."""
    path = write("grpo", "export", grpo=planned([0.5, 0.6, 0.8, 0.7, 0.3]))
    data = json.loads(path.read_text())
    further = {**data["stages"][0], "name": "further"}
    further["set"] = {"model.start": "${grpo}", "steps": 1, "rewards": planned([])["rewards"][:1]}
    path.write_text(json.dumps(data | {"stages": [*data["stages"], further]}))
    result = run(path)
    assert result.returncode == 0, result.stderr
    grpo = tmp_path / "p/grpo"
    told = f"posttrain: {grpo}: its stop rule ended it at step 4; taking its best step 2 by heldout"
    assert result.stderr.splitlines().count(told) == 3  # when it ended, and for each stage behind it

    best, newest = grpo / "checkpoints/step-000002", grpo / "checkpoints/step-000004"
    exported = load_file(tmp_path / "p/export.safetensors")
    for source in (best, newest):
        assert cli.main(["export", "--source", str(source), "--output", str(tmp_path / f"{source.name}.safetensors"),
                         "--format", "lora"]) == 0  # fmt: skip
    runs.assert_equal(exported, load_file(tmp_path / "step-000002.safetensors"))
    collapsed = load_file(tmp_path / "step-000004.safetensors")
    assert not any(exported[key].equal(collapsed[key]) for key in exported if "lora_B" in key)

    merged = runs.latest(tmp_path / "p/further").state["origin"]["merged"]
    assert [Path(one["path"]) for one in merged] == [best]
    shown = {run: sorted((tmp_path / "p" / run).glob("*.png")) for run in
             ("further/samples/step-000000", "grpo/samples/step-000002", "grpo/samples/step-000004")}  # fmt: skip
    began, right, wrong = ([np.asarray(Image.open(file), int) for file in files] for files in shown.values())
    assert all(abs(a - b).max() <= 1 for a, b in zip(began, right, strict=True))
    assert any(abs(a - b).max() > 1 for a, b in zip(began, wrong, strict=True))
    page = (tmp_path / "p/index.html").read_text()
    assert "<td>heldout</td><td>0.5000</td><td>0.8000</td>" in page.replace(' class="n"', "")
    assert 'aria-label="where step 0 ends and step 2 begins"' in page and "and step 4 begins" not in page


@pytest.mark.long
def test_a_stage_that_collapsed_from_its_start_fails_the_pipeline(write, tmp_path):
    path = write("grpo", "export", grpo=planned([0.5, 0.4, 0.3]))
    for options in ([], ["--resume"]):
        result = run(path, *options)
        assert result.returncode == 1 and state(tmp_path / "p")["grpo"]["finished"] is None
        said = result.stderr.splitlines()[-1]
        assert said.startswith(f"posttrain: error: stage grpo: {tmp_path}/p/grpo: its stop rule ended it at step 2, ")
        assert f"remove {tmp_path}/p/grpo, and continue with --resume" in said
    assert not (tmp_path / "p/export.safetensors").exists()


def test_one_at_a_time(write, tmp_path):
    (tmp_path / "p").mkdir()
    with (tmp_path / "p/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        fails(run(write("grpo")), "another posttrain run, or a stage that outlived one, is at work here")


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a stage goes on and keeps others out")
def test_a_pipeline_that_is_killed_takes_its_stage_along(write, tmp_path):
    process = start(write("grpo", grpo={"steps": 1000}))
    wait_for_steps(tmp_path / "p/grpo", 1)
    stage = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True).stdout
    process.kill()
    process.wait(60)
    began = time.monotonic()
    while Path(f"/proc/{int(stage)}").exists() and time.monotonic() - began < 60:
        time.sleep(0.05)
    done = runs.latest(tmp_path / "p/grpo").step
    assert 1 <= done < 1000
    assert run(write("grpo", grpo={"steps": done + 1}), "--resume").returncode == 0
    assert runs.latest(tmp_path / "p/grpo").step == done + 1


@pytest.mark.long
def test_a_resumed_pipeline_waits_for_what_was_left_behind(write, tmp_path):
    (tmp_path / "p").mkdir()
    with (tmp_path / "p/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = start(write("grpo"), "--resume")
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(8)
    assert process.wait(120) == 0 and state(tmp_path / "p")["grpo"]["finished"]


def test_one_seed_for_all_stages(write):
    """But those that name their own, and the commands that have none."""
    config = cli.parse(["run", str(write(stpo={"seed": 3})), "--seed", "7"]).config
    assert [getattr(stage.config, "seed", None) for stage in resolve(config)] == [7, 3, 7, None]
    config.seed = None
    assert [getattr(stage.config, "seed", None) for stage in resolve(config)] == [0, 3, 0, None]


@pytest.mark.parametrize(
    ("names", "settings", "says"),
    [
        (["grpo"], {"grpo": {"output": "x"}}, "stage grpo: set.output: the pipeline sets it"),
        (["grpo"], {"grpo": {"optim.lrr": 1}}, "stage grpo: set: --optim.lrr: unknown option; did you mean"),
        (["grpo"], {"grpo": {"optim.lr": -1}}, "stage grpo: set: optim.lr: is -1.0; use a number above 0"),
        (["grpo"], {"grpo": {"model": {"start": "${stpo}"}}}, "start: ${stpo}: no earlier stage has that name"),
        (["pairs", "stpo"], {"stpo": {"model.start": "${pairs}"}}, "(pairs); give the output of sft or style or"),
        (["stpo", "grpo"], {"grpo": {"model.start": "${grpo}"}}, "has that name; earlier stages: stpo"),
        (["grpo"], {"grpo": {"model.start": "nowhere"}}, "model.start: nowhere does not exist, and no earlier stage"),
        (["grpo"], {"grpo": {"model.path": "no/where/at/all"}}, "model.path: no/where/at/all has no model_index.json"),
        (["grpo"], {"grpo": {"model.transformer_file": "x"}}, "model.transformer_file: x: no such file"),
        (["grpo"], {"grpo": {"prompts.train": "none.jsonl"}}, "none.jsonl: no such file"),
        (["grpo"], {"grpo": {"rewards": [{"name": "a", "function": "tests.helpers.warm:dark"}]}}, "reward a: function"),
        (["grpo"], {"grpo": {"rewards": [BRIGHT]}}, "init_args: missing a required argument: 'scale': it takes scale"),
    ],
)  # fmt: skip
def test_a_dry_run_finds_what_is_wrong(write, tmp_path, capsys, monkeypatch, names, settings, says):
    monkeypatch.chdir(runs.ROOT)
    assert cli.main(["run", str(write(*names, **settings)), "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("output: a\nstages: []\n", "stages: is empty; name at least one stage"),
        ("output: a\nseed: -1\nstages: [{name: a, command: grpo}]\n", "seed: is -1; use 0 or more"),
        ("output: ''\nstages: [{name: a, command: grpo}]\n", "output: is empty"),
        ("output: a\nstages: [{name: a/b, command: grpo}]\n", "stages[0].name: is 'a/b'; it names a directory"),
        ("output: a\nstages: [{name: a, command: grpo}, {name: a, command: grpo}]\n", "'a' is used twice"),
        ("output: a\nstages: [{name: a, command: gpro}]\n", "command: 'gpro' cannot be a stage; did you mean grpo?"),
        ("output: a\nstages: [{name: a, command: report}]\n", "command: 'report' cannot be a stage"),
        ("output: a\nstages: [{name: a, command: grpo}]\n", "stage a: set: model.path"),
        ("output: a\nstages: [{name: a, command: grpo, recipes: [none.yaml]}]\n", "stage a: none.yaml: no such file"),
        ("output: a\nstages: [{name: a}]\n", "stages[0].command: is missing"),
    ],
)
def test_a_pipeline_that_is_none(tmp_path, capsys, text, says):
    (tmp_path / "p.yaml").write_text(text)
    assert cli.main(["run", str(tmp_path / "p.yaml")]) == 2
    assert says in capsys.readouterr().err


def test_launch_that_is_no_program(write, tmp_path, capsys):
    path = write("grpo")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"launch": ["no-such-program"]}))
    assert cli.main(["run", str(path)]) == 2
    assert "launch: no-such-program cannot be run" in capsys.readouterr().err


def test_the_nano_recipe_holds_together(monkeypatch, capsys):
    monkeypatch.chdir(runs.ROOT)
    assert cli.main(["run", "recipes/nano/pipeline.yaml", "--dry-run"]) == 0
    lines = capsys.readouterr().out.split("\n\n")[0].splitlines()
    words = ["pairs", "stpo", "grpo", "tdm", "export", "export", "expander", "expander", "expander"]
    assert [line.split()[2] for line in lines] == words
    assert lines[3].endswith("model.start from grpo")
    assert lines[8].endswith("model.path from expander_sft, renderer.path from turbo")
