"""Every method's step runs on a device that has no float64."""

import json
import math
from pathlib import Path

import pytest
import torch

from posttrain.config.sections import LoraConfig, TrackConfig
from posttrain.expander import gdpo
from posttrain.grpo import train as grpo
from posttrain.judge import train as judge
from posttrain.judge.config import JudgeConfig
from posttrain.mopd import train as mopd
from posttrain.nano.build import judge_model
from posttrain.nano.world import judge_data
from posttrain.nft import train as nft
from posttrain.stpo import train as stpo
from posttrain.tdm import train as tdm
from tests.helpers import expander_runs, no_float64, runs


@pytest.fixture
def device(monkeypatch):
    return no_float64.emulated(monkeypatch)


def trained(config):
    """The last step in the metrics of a run, all of whose training losses are numbers."""
    rows = [json.loads(line) for line in (Path(config.output) / "metrics.jsonl").read_text().splitlines()]
    losses = [value for row in rows for name, value in row.items() if name.endswith("loss") and value is not None]
    assert all(math.isfinite(value) for value in losses)
    return max(row["step"] for row in rows)


def test_the_emulated_device_has_no_float64(device):
    layer = torch.nn.Linear(2, 2)
    device.mark_all(layer)
    with device:
        moved = layer(torch.ones(1, 2)).detach()
        assert torch.tensor(moved.tolist(), dtype=torch.float64).dtype == torch.float64
        with pytest.raises(TypeError, match="float64"):
            moved.double()
        with pytest.raises(TypeError, match="float64"):
            moved.sum().to(torch.float64)


@pytest.mark.parametrize("ratio, kl", [("guard", 0.1), ("plain", 0.0)])
def test_grpo(tmp_path, model, device, ratio, kl):
    config = runs.config(tmp_path, model)
    config.steps, config.loss.ratio, config.loss.kl = 1, ratio, kl
    with device:
        grpo.train(config)
    assert trained(config) == 1


def test_mopd(tmp_path, model, device):
    config = runs.mopd_config(tmp_path, model)
    config.cosines_every = 2
    with device:
        mopd.train(config)
    assert trained(config) == 2


@pytest.mark.parametrize("most", [0.0, 0.5])
def test_nft(tmp_path, model, device, most):
    config = runs.nft_config(tmp_path, model)
    config.old.max = most
    with device:
        nft.train(config)
    assert trained(config) == 2


@pytest.mark.parametrize("guard", ["output", "exact"])
def test_stpo(tmp_path, model, device, guard):
    config = runs.stpo_config(tmp_path, model)
    config.steps, config.loss.guard = 1, guard
    with device:
        stpo.train(config)
    assert trained(config) == 1


def test_tdm(tmp_path, model, device):
    config = runs.tdm_config(tmp_path, model)
    config.steps = 1
    with device:
        tdm.train(config)
    assert trained(config) == 1


def test_gdpo(tmp_path, model, device):
    config = expander_runs.config(tmp_path, expander_runs.parts(tmp_path, model))
    config.steps = 1
    with device:
        gdpo.train(config)
    assert trained(config) == 1


def test_judge(tmp_path, device):
    tokenizer = judge_model.make_tokenizer()
    judge_model.save(judge_model.make_model(tokenizer), tokenizer, tmp_path / "model")
    judge_data.write(tmp_path / "data", pairs=8, faults=8, seed=0, workers=1)
    config = JudgeConfig(
        output=str(tmp_path / "run"), model=str(tmp_path / "model"), data=str(tmp_path / "data/preferences.jsonl"),
        mode="preference", heldout=0.3, steps=1, batch=2, micro_batch=2, dtype="float32",
        lora=LoraConfig(rank=4, alpha=8), track=TrackConfig(tensorboard=False),
    )  # fmt: skip
    with device:
        judge.train(config)
    assert trained(config) == 1
