"""SIGKILL at 53 random moments: what is resumed ends as what was left alone, bit for bit.

The moments are shares of an uninterrupted run's time, from fixed seeds. Where in its work a moment finds a process
depends on the machine, so each time this runs it tries other places.
"""

import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.chaos import methods
from tests.helpers import runs, warm

KILLS = {
    "sft": 5, "stpo": 6, "grpo": 6, "nft": 5, "mopd": 5, "tdm": 5, "pairs": 5, "expander gdpo": 4, "expander sft": 4,
    "judge": 4, "run": 4,
}  # fmt: skip


@pytest.mark.parametrize(("method", "number"), [(m, n) for m in methods.METHODS for n in range(KILLS[m])])
def test_resumed_equals_uninterrupted(command, parts, whole, tmp_path, method, number):
    expected, seconds = whole(method)
    make, state = methods.METHODS[method]
    path = runs.recipe(make(tmp_path, parts, method), tmp_path / "recipe.yaml")
    moment = random.Random(f"{method} {number}").uniform(0.02, 0.98)
    for _ in range(4):
        (process,) = command.start(*method.split(), "--config", path, "--resume")
        time.sleep(seconds * moment)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
        if command.wait().returncode == -signal.SIGKILL:
            break
        moment *= 0.7  # it was done already
        shutil.rmtree(tmp_path / "run")
    else:
        raise AssertionError("it always was done before it could be killed")
    print("killed at", f"{moment:.2f} of {seconds:.1f} s;", sorted(p.name for p in tmp_path.glob("run/checkpoints/*")))
    result = command(*method.split(), "--config", path, "--resume")
    assert result.returncode == 0, result.stderr
    methods.assert_same(expected, state(tmp_path / "run"))


# ---- a pipeline: its own process is killed, or that of the stage at work --------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory, model):
    server = warm.Warm(tmp_path_factory.mktemp("warm"), model)
    yield server
    server.close()


def pipeline(folder: Path, parts: Path, server: warm.Warm) -> Path:
    stages = []
    for name, command, inputs in [("pairs", "pairs", {}), ("stpo", "stpo", {"pairs.train": "${pairs}"}),
                                  ("grpo", "grpo", {"model.start": "${stpo}"})]:  # fmt: skip
        place = folder / f"{name}-files"
        place.mkdir()
        made = dataclasses.asdict((methods.pairs if command == "pairs" else methods.training)(place, parts, command))
        del made["output"]
        made["rewards"] = [{"name": "brightness", "function": "tests.helpers.warm:brightness"}]
        if command == "stpo":
            made |= {"batch": 2, "steps": 3}
            made["pairs"] |= {"heldout": 0.4}
        (folder / f"{name}.yaml").write_text(json.dumps(made))
        stages.append({"name": name, "command": command, "recipes": [str(folder / f"{name}.yaml")], "set": inputs})
    path = folder / "p.yaml"
    path.write_text(json.dumps({"output": str(folder / "p"), "stages": stages, "launch": server.launch}))
    return path


def start(*args) -> subprocess.Popen:
    command = [sys.executable, "-m", "posttrain.cli", "run", *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=runs.ROOT)


def outcome(folder: Path) -> tuple:
    tensors, rest = {}, []
    for name in ("stpo", "grpo"):
        made, (step, _, rows, before, after) = methods.of_training(folder / name)
        tensors |= {f"{name}/{key}": value for key, value in made.items()}
        rest.append((step, rows, before, after))
    return tensors, (rest, methods.of_pairs(folder / "pairs")[1][0])


@pytest.fixture(scope="module")
def whole_pipeline(server, parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    path, began = pipeline(folder, parts, server), time.monotonic()
    process = start(path)
    said = process.communicate(timeout=240)[1]
    assert process.returncode == 0, said
    return outcome(folder / "p"), time.monotonic() - began


@pytest.mark.parametrize("number", range(KILLS["run"]))
def test_resumed_pipeline_equals_uninterrupted(server, parts, whole_pipeline, tmp_path, number):
    expected, seconds = whole_pipeline
    path = pipeline(tmp_path, parts, server)
    process = start(path)
    time.sleep(seconds * random.Random(number).uniform(0.1, 0.9))
    stage = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True).stdout
    if number % 2:
        process.kill()
    for child in stage.split():  # one that is left behind works on, and keeps the next pipeline out until it ends
        os.kill(int(child), signal.SIGKILL if number % 2 == 0 else signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode != 0
    for _ in range(200):
        process = start(path, "--resume")
        said = process.communicate(timeout=240)[1]
        if "at work here" not in said:
            break
        time.sleep(0.1)
    assert process.returncode == 0, said
    methods.assert_same(expected, outcome(tmp_path / "p"))
