"""What a dry run says of time, disk and cost."""

import json

import pytest

from posttrain import cli
from posttrain.bench import measurement
from tests.helpers import runs


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path):
    monkeypatch.chdir(runs.ROOT)
    monkeypatch.setenv("HOME", str(tmp_path))  # where no ~/vllm is


def table(capsys, path, *options: str) -> tuple[dict[str, list[str]], list[str]]:
    """(cells by stage, notes) that a dry run prints."""
    assert cli.main(["run", str(path), "--dry-run", *options]) == 0
    lines = capsys.readouterr().out.split("\n\n")[1].splitlines()
    end = next(i for i, line in enumerate(lines) if line.startswith("all"))
    rows = {line.split()[0]: line.split()[1:] for line in lines[1:end]}
    return rows | {"all": lines[end].split()[-4:]}, lines[end + 1 :]


def test_stages_and_their_sum(capsys):
    rows, notes = table(capsys, "recipes/k2/pipeline.yaml", "--price", "2")
    assert rows.pop("stage") == ["hours", "GPUs", "GPU", "hours", "disk", "GB", "cost"]
    total, planned = rows.pop("all"), [row for row in rows.values() if row[0] != "-"]
    for hours, gpus, gpu_hours, _, cost in planned:
        assert float(gpu_hours) == pytest.approx(float(hours) * int(gpus), rel=0.01)
        assert float(cost) == pytest.approx(2 * float(gpu_hours), rel=0.01)
    for column, i in ((0, 0), (2, 1), (4, 3)):  # of all, GPUs are left out
        assert float(total[i]) == pytest.approx(sum(float(row[column]) for row in planned), rel=0.02)
    assert rows["grpo"][1] == "8"  # seven train and the eighth serves
    assert [name for name, row in rows.items() if row[0] == "-"] == ["expander_data"]
    assert any(note.startswith("expander_data: no time: ") for note in notes)
    assert "tdm: tdm at 1024 x 1024 scaled from 512 x 512 by operations" in notes


def test_checkpoints_and_exports_on_disk(capsys):
    """Rank 64 is 214.7 million weights, 0.859 GB in float32. grpo: adapter, average and moments, thrice: 10.3 GB. tdm:
    and once more without average, thrice: 18.0. Its adapter stands on two others: 2.58. The whole transformer in
    float32, and the text encoder and VAE: 51.3 + 8.3."""
    rows, _ = table(capsys, "recipes/k2/pipeline.yaml")
    assert [rows[name][3] for name in ("grpo", "tdm", "turbo_lora", "turbo")] == ["10.3", "18", "2.58", "59.6"]


def test_files_of_an_average_on_disk(capsys, tmp_path):
    """As much as a moving average's copies in three checkpoints, 10.3 GB, and five adapters for each: 15 x 0.859."""
    stage = {"name": "grpo", "command": "grpo", "recipes": ["recipes/k2/grpo.yaml"]}
    stage["set"] = {"optim.ema": 0.0, "optim.average": {"every": 5, "last": 5}}
    (tmp_path / "p.yaml").write_text(json.dumps({"output": "runs/x", "stages": [stage]}))
    assert float(table(capsys, tmp_path / "p.yaml")[0]["grpo"][3]) == pytest.approx(10.3 + 15 * 0.859, rel=0.01)


def test_more_gpus_take_less_time(capsys, tmp_path):
    data = {"output": "runs/x", "stages": [{"name": "grpo", "command": "grpo", "recipes": ["recipes/k2/grpo.yaml"]}]}
    hours = []
    for count in (1, 2):
        data["launch"] = ["torchrun", "--nproc-per-node", str(count), "-m", "posttrain.cli"]
        (tmp_path / "p.yaml").write_text(json.dumps(data))
        hours.append(float(table(capsys, tmp_path / "p.yaml")[0]["grpo"][0]))
    assert hours[1] == pytest.approx(hours[0] / 2, rel=0.02)


def test_another_model_than_the_measured_one_has_no_estimate(capsys, tmp_path):
    assert cli.main(["run", "recipes/nano/pipeline.yaml", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "Time and disk: not estimated, because NVIDIA H200 was measured with another model than" in out
    assert cli.main(["run", "recipes/nano/pipeline.yaml", "--dry-run", "--measured", "h300"]) == 2
    error = capsys.readouterr().err
    assert "measured: h300: no such file" in error and "h200" in error and error.count("\n") == 1


def test_what_ships_is_what_a_plan_needs():
    for name in measurement.names():
        found = measurement.load(name)
        assert {"commit", "started", "packages"} <= found.result["environment"].keys()
        for row in found.result["rows"]:
            assert row.keys() <= {*measurement.FIELDS, "ms"}
            assert row["images_per_second"] > 0 and 0 < row["share"] < 1.5
