"""A merge as a stage: it reads the runs of earlier stages, and later stages read it."""

import dataclasses
import json

import pytest

from posttrain import cli
from posttrain.pipeline import fit, hours
from posttrain.pipeline.config import PipelineConfig
from posttrain.pipeline.plan import resolve
from posttrain.training import checkpoint
from tests.helpers import runs, warm
from tests.test_cli import fails

RUNS = ["${a}:0.5", "${b}"]


@pytest.fixture
def write(tmp_path, model):
    """A function that writes a pipeline: two runs of grpo of one step, their merge, a run from it and its export."""

    def write(parents: list[str] = RUNS, launch: list[str] | None = None, **settings):
        recipes = {}
        for name in "abc":
            (tmp_path / name).mkdir(exist_ok=True)
            made = runs.config(tmp_path / name, model)
            made.steps, made.seed = 1, ord(name)
            made.rewards[0].function = "tests.helpers.warm:brightness"
            data = dataclasses.asdict(made)
            del data["output"]
            recipes[name] = tmp_path / f"{name}.yaml"
            recipes[name].write_text(json.dumps(data))
        stages: list[dict] = [{"name": name, "command": "grpo", "recipes": [str(recipes[name])]} for name in "ab"]
        stages.append({"name": "both", "command": "merge", "set": {"parents": parents, **settings}})
        go_on = {"model.start": "${both}"}
        stages.append({"name": "c", "command": "grpo", "recipes": [str(recipes["c"])], "set": go_on})
        stages.append({"name": "lora", "command": "export", "set": {"source": "${both}", "format": "lora"}})
        path = tmp_path / "p.yaml"
        path.write_text(json.dumps({"output": str(tmp_path / "p"), "stages": stages, "launch": launch or []}))
        return path

    return write


def stages_of(path):
    return resolve(PipelineConfig(**json.loads(path.read_text())))


def test_a_merge_is_wired_and_counted(write, capsys):
    path = write()
    a, b, both, c, lora = stages_of(path)
    assert both.config.parents == [f"{a.output}:0.5", str(b.output)]
    assert both.reads == {"parents[0]": "a", "parents[1]": "b"}
    assert c.reads == {"model.start": "both"} and lora.reads == {"source": "both"}
    # Ranks 4 and 4 stand below c's own.
    every = [a, b, both, c, lora]
    assert fit.stacked_ranks(c, every) == 8 and fit.own_ranks(c, every) == 12
    small = stages_of(write(rank=3))
    assert fit.stacked_ranks(small[3], small) == 3
    assert fit.memory(both, every, 80, 1) is None and fit.memory(c, every, 80, 1) is not None
    assert hours._disk(lora, every)[1] == "disk of an export of a merge is not counted"
    assert cli.main(["run", str(path), "--dry-run"]) == 0
    assert "parents[0] from a, parents[1] from b" in capsys.readouterr().out


def test_a_merge_of_what_no_stage_makes_is_refused(command, write, tmp_path):
    fails(command("run", write(["${a}:0.5", "${d}:0.5"])), "stage both", "set.parents: ${d}: no earlier stage")
    fails(command("run", write(["${a}:x", "${b}"])), "stage both", "'x' is not a number")
    fails(command("run", write(["${a}", str(tmp_path / "none")])), "parents[1]: ", "does not exist, and no earlier")


@pytest.mark.long
def test_a_pipeline_merges(write, tmp_path, tmp_path_factory, model):
    server = warm.Warm(tmp_path_factory.mktemp("warm"), model)
    try:
        path = write(launch=server.launch)
        assert cli.main(["run", str(path)]) == 0
    finally:
        server.close()
    written = json.loads((tmp_path / "p/both/merge.json").read_text())
    assert [parent["weight"] for parent in written["parents"]] == [0.5, 1.0]
    assert {row["parent"] for row in written["kept"]} == {f"{tmp_path}/p/a", f"{tmp_path}/p/b"}
    origin = runs.latest(tmp_path / "p/c").state["origin"]["merged"]
    assert [entry["path"] for entry in origin] == [str(checkpoint.find(tmp_path / "p/both"))]
    assert (tmp_path / "p/lora.safetensors").is_file() and "both" in (tmp_path / "p/index.html").read_text()
    assert "merge (linear) of 0.5 x" in (tmp_path / "p/lora.md").read_text()
    # What is finished is not done again.
    assert cli.main(["run", str(path), "--resume"]) == 0
