"""Out of memory in a step: the fault is injected where the model is asked for a velocity."""

import pytest
import torch

from posttrain import grpo, stpo, tdm
from posttrain.config import PoolConfig
from posttrain.k2 import K2
from prompts.errors import UserError
from tests import runs

METHODS = {"grpo": (grpo, runs.config), "stpo": (stpo, runs.stpo_config), "tdm": (tdm, runs.tdm_config)}


def recipe(method, folder, model):
    folder.mkdir(exist_ok=True)
    made = METHODS[method][1](folder, model)
    if method == "grpo":
        made.pool = PoolConfig(kind="adaptive")
        made.groups.micro_batch = 4
    return made


def fail_above(monkeypatch, pictures, nth):
    """From its nth call with gradients on, a forward of more than so many pictures has no room."""
    calls, velocity = [0], K2.velocity

    def wanting(self, x, *arguments, **options):
        if torch.is_grad_enabled():
            calls[0] += 1
            if calls[0] >= nth and len(x) > pictures:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return velocity(self, x, *arguments, **options)

    monkeypatch.setattr(K2, "velocity", wanting)


@pytest.mark.parametrize(("method", "nth"), [("grpo", 1), ("grpo", 6), ("stpo", 2), ("tdm", 2), ("tdm", 5)])
def test_the_step_is_begun_again_with_half_of_micro_batch(method, nth, model, tmp_path, monkeypatch, capsys):
    whole = recipe(method, tmp_path / "whole", model)
    METHODS[method][0].train(whole)
    halved = recipe(method, tmp_path / "halved", model)
    fail_above(monkeypatch, 4 if method == "stpo" else 2, nth)  # stpo asks for both pictures of a pair at once
    METHODS[method][0].train(halved)
    assert capsys.readouterr().err.count("is begun again with 2") == 1
    a, b = runs.latest(whole.output), runs.latest(halved.output)
    assert a.step == b.step
    # Rounding alone: its share is far below what one other draw, or one update more, would make.
    for name, value in a.tensors["adapter"].items():
        torch.testing.assert_close(b.tensors["adapter"][name], value, rtol=2e-3, atol=2e-4)
    assert a.state.get("pool") == b.state.get("pool")
    assert a.state["history"].get("images") == b.state["history"].get("images")
    assert a.state["counters"] == b.state["counters"]


@pytest.mark.parametrize("method", ["grpo", "stpo", "tdm"])
def test_the_second_time_is_the_last(method, model, tmp_path, monkeypatch):
    made = recipe(method, tmp_path, model)
    fail_above(monkeypatch, 0, 1)
    with pytest.raises(UserError, match=r"micro_batch: a step does not fit into memory with 2 .*Tried to allocate"):
        METHODS[method][0].train(made)


def test_outside_of_a_step_it_is_a_clear_stop(model, tmp_path, monkeypatch):
    made = recipe("grpo", tmp_path, model)

    def none(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(K2, "decode", none)
    with pytest.raises(UserError, match=r"out of memory .* lower micro_batch"):
        grpo.train(made)
