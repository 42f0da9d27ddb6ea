"""Pipelines of the expander's stages: wired, finished, and what a dry run refuses."""

import json
from pathlib import Path

import pytest

from posttrain import cli
from tests.helpers import runs
from tests.pipeline.test_pipeline import run, state


def expander(tmp_path: Path, **settings) -> Path:
    """A pipeline of the expander's stages by the nano recipes, drawing with K2-nano; what is set for one is added."""
    small = {"expander_data": {"count": 40}, "expander_sft": {"steps": 1, "batch": 4, "micro_batch": 4, "measured": 4}}
    wired = {"expander_sft": {"data": "${expander_data}"}, "expander_gdpo": {"model.path": "${expander_sft}"}}
    stages = [
        {
            "name": name,
            "command": name.replace("_", " "),
            "recipes": [f"recipes/nano/{name}.yaml"],
            "set": small.get(name, {}) | wired.get(name, {}) | settings.get(name, {}),
        }
        for name in ("expander_data", "expander_sft", "expander_gdpo")
    ]
    path = tmp_path / "e.yaml"
    path.write_text(json.dumps({"output": str(tmp_path / "e"), "stages": stages}))
    return path


@pytest.mark.long
def test_the_expanders_stages_too(tmp_path):
    data = json.loads(expander(tmp_path).read_text())
    path = tmp_path / "two.yaml"
    path.write_text(json.dumps(data | {"stages": data["stages"][:2]}))
    done = run(path)
    assert done.returncode == 0, done.stderr
    assert all(entry["finished"] for entry in state(tmp_path / "e").values())
    assert (tmp_path / "e/expander_sft/adapter/adapter_model.safetensors").is_file()
    planned = run(expander(tmp_path), "--dry-run", "--resume")
    first, second, _ = planned.stdout.split("\n\n")[0].splitlines()
    assert first.split()[4] == second.split()[4] == "finished"
    assert "model.path from expander_sft" in planned.stdout


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"expander_gdpo": {"model.path": "${expander_data}"}}, "(expander data); give the output of expander sft"),
        ({"expander_gdpo": {"renderer.path": "${expander_sft}"}}, "(expander sft); give the output of export"),
        ({"expander_gdpo": {"renderer.path": "prompts"}}, "renderer.path: prompts has no model_index.json"),
        ({"expander_sft": {"model": "${expander_data}"}}, "(expander data); give a chat model"),
        ({"expander_sft": {"data": "no/where/data"}}, "data: no/where/data does not exist"),
        ({"expander_gdpo": {"prompts.heldout": "none.jsonl"}}, "none.jsonl: no such file"),
    ],
)
def test_a_dry_run_finds_what_is_wrong_with_the_expander(tmp_path, capsys, monkeypatch, settings, says):
    monkeypatch.chdir(runs.ROOT)
    assert cli.main(["run", str(expander(tmp_path, **settings)), "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
