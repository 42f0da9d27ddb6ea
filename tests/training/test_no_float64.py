"""Every method's step runs on a device that has no float64."""

import pytest
import torch

from posttrain.expander import gdpo
from posttrain.grpo import train as grpo
from posttrain.judge import train as judge
from posttrain.stpo import train as stpo
from posttrain.tdm import train as tdm
from tests.helpers import expander_runs, no_float64, runs
from tests.judge.test_judge import config as judge_config
from tests.judge.test_judge import data as data  # fixtures
from tests.judge.test_judge import model as judge_model


@pytest.fixture
def device(monkeypatch):
    return no_float64.emulated(monkeypatch)


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


@pytest.mark.parametrize("guard", ["output", "exact"])
def test_stpo(tmp_path, model, device, guard):
    config = runs.stpo_config(tmp_path, model)
    config.steps, config.loss.guard = 1, guard
    with device:
        stpo.train(config)


def test_tdm(tmp_path, model, device):
    config = runs.tdm_config(tmp_path, model)
    config.steps = 1
    with device:
        tdm.train(config)


def test_gdpo(tmp_path, model, device):
    config = expander_runs.config(tmp_path, expander_runs.parts(tmp_path, model))
    config.steps = 1
    with device:
        gdpo.train(config)


def test_judge(tmp_path, judge_model, data, device):
    with device:
        judge.train(judge_config(judge_model, data, tmp_path, "preference", steps=1))
