"""Out of memory in a step: the fault is injected where the model is asked for a velocity."""

import json

import numpy as np
import pytest
import torch

from posttrain.errors import UserError
from posttrain.grpo import train as grpo
from posttrain.model.k2 import K2
from posttrain.mopd import train as mopd
from posttrain.nft import train as nft
from posttrain.sft import train as sft
from posttrain.stpo import train as stpo
from posttrain.style import train as style
from posttrain.tdm import train as tdm
from prompts.pool import PoolConfig
from rewards.background import ScoreQueue
from tests.helpers import runs, style_runs, tiny

METHODS = {
    "grpo": (grpo, runs.config), "nft": (nft, runs.nft_config), "mopd": (mopd, runs.mopd_config),
    "sft": (sft, runs.sft_config), "style": (style, style_runs.config),
    "stpo": (stpo, runs.stpo_config),
    "tdm": (tdm, runs.tdm_config),
}  # fmt: skip


def recipe(method, folder, model):
    folder.mkdir(exist_ok=True)
    made = METHODS[method][1](folder, model)
    if method in ("grpo", "nft"):
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


@pytest.mark.parametrize(
    ("method", "nth"),
    [
        ("grpo", 1),
        ("grpo", 6),
        ("nft", 1),
        ("nft", 7),
        ("mopd", 2),
        ("sft", 2),
        ("style", 3),
        ("stpo", 2),
        ("tdm", 2),
        ("tdm", 5),
    ],
)
def test_the_step_is_retried_with_half_the_micro_batch(method, nth, model, tmp_path, monkeypatch, capsys):
    whole = recipe(method, tmp_path / "whole", model)
    METHODS[method][0].train(whole)
    halved = recipe(method, tmp_path / "halved", model)
    fail_above(monkeypatch, 4 if method == "stpo" else 2, nth)  # stpo asks for both pictures of a pair at once
    METHODS[method][0].train(halved)
    assert capsys.readouterr().err.count("is retried with 2") == 1
    a, b = runs.latest(whole.output), runs.latest(halved.output)
    assert a.step == b.step
    # Rounding alone: its share is far below what one other draw, or one update more, would make.
    for name, value in a.tensors["adapter"].items():
        torch.testing.assert_close(b.tensors["adapter"][name], value, rtol=2e-3, atol=2e-4)
    pools = [dict(saved.state.get("pool") or {}) for saved in (a, b)]
    spreads = [pool.pop("spread", []) for pool in pools]  # of scores, which round too
    assert pools[0] == pools[1] and spreads[1] == pytest.approx(spreads[0], rel=1e-4)
    assert a.state["history"].get("images") == b.state["history"].get("images")
    counters = [saved.state["counters"] for saved in (a, b)]
    norms = [counts.pop("norms") for counts in counters]
    assert norms[1] == pytest.approx(norms[0], rel=1e-5) and counters[0] == counters[1]


def test_the_second_attempt_is_the_same_step(model, tmp_path, monkeypatch):
    """Prompts, images and update are those of a run that has the smaller micro-batch from the start, though the
    adaptive pool marks what it draws: with a staleness of 1 what is marked has half the weight in another draw."""
    submitted = []

    def keeping(self, images, prompts, columns=None, submit=ScoreQueue.submit):
        submitted.append((list(prompts), np.stack([np.asarray(image, int) for image in images])))
        submit(self, images, prompts, columns)

    monkeypatch.setattr(ScoreQueue, "submit", keeping)
    found = []
    for name, micro_batch in (("small", 2), ("halved", 4)):
        made = recipe("grpo", tmp_path / name, model)
        rows = [json.dumps({"prompt": f"{tiny.PROMPTS[i % 4]} {i}"}) for i in range(12)]
        (tmp_path / name / "train.jsonl").write_text("\n".join(rows))
        made.pool, made.groups.micro_batch = PoolConfig(kind="adaptive", staleness=1), micro_batch
        made.seed = 4  # another draw of the first step would take another prompt
        if micro_batch == 4:
            fail_above(monkeypatch, 2, 1)  # the first update's first pass, when all is drawn
        submitted.clear()
        grpo.train(made)
        found.append((list(submitted), runs.latest(made.output)))
    (small, a), (halved, b) = found
    assert len(small) == 4 and len(halved) == 6  # two groups in each of two steps, and the first step once more
    for (prompts, images), (again, drawn) in zip([*small[:2], *small], halved, strict=True):
        assert prompts == again and abs(images - drawn).max() <= 1
    for name, value in a.tensors["adapter"].items():
        torch.testing.assert_close(b.tensors["adapter"][name], value, rtol=2e-3, atol=2e-4)
    runs.assert_equal(a.tensors["pool"], b.tensors["pool"])


@pytest.mark.parametrize("method", ["grpo", "nft", "mopd", "sft", "style", "stpo", "tdm"])
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
