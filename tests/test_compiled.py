"""Every method as it runs at K2's size: blocks compiled, in bf16, one of them computed again in backward.

Whole runs of a few steps. torch's own compiler takes minutes on a CPU, so what is traced is run as it is (`aot_eager`):
tracing, the division into forward and backward, and the rule that a compiled graph is walked backward once are the
same. Sizes are fixed, all prompts have one length and all batches are of two, so that the methods share what is traced.
"""

import functools
import json
from pathlib import Path

import pytest
import torch
from torch._functorch import config as functorch_config

from posttrain import sample_images
from posttrain.config.sections import ModelConfig
from posttrain.expander.gdpo_config import RendererConfig
from posttrain.expander.renderer import K2Renderer
from posttrain.grpo import train as grpo
from posttrain.model import blocks
from posttrain.model.k2 import K2
from posttrain.pairs import make
from posttrain.sample_config import SampleConfig
from posttrain.stpo import train as stpo
from posttrain.tdm import train as tdm
from tests.helpers import pair_runs, runs, tiny

PROMPTS = ["a red circle", "a circle red", "a red red", "a circle circle"]


@pytest.fixture(scope="module", autouse=True)
def traced():
    made = functools.cache(
        lambda function, device: torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=False)
    )
    # Of fixed sizes torch would build a backward graph when it is first walked, for as often as it is then.
    eager = functorch_config.patch(force_non_lazy_backward_lowering=True)
    limit = torch._dynamo.config.patch(recompile_limit=blocks.MAX_VARIANTS)
    with pytest.MonkeyPatch.context() as patch, limit, eager:
        patch.setattr(blocks, "_compiled", made)
        patch.setattr(torch._dynamo, "maybe_mark_dynamic", lambda *_: None)
        patch.setattr(tiny, "PROMPTS", PROMPTS)
        yield


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level("WARNING", "torch.__trace")  # pytest would write out all that is traced


def large(config):
    """As at true size; and one adapter a block, which is traced sooner than eight."""
    config.model.dtype, config.model.compile, config.model.recompute = "bfloat16", True, 1
    config.lora.targets = ["to_q"]
    return config


def adapter(run):
    saved = runs.latest(run).tensors["adapter"]
    assert all(value.isfinite().all() for value in saved.values())
    return torch.cat([value.flatten() for key, value in saved.items() if "lora_B" in key])


def test_graphs_that_are_walked_twice_are_refused(model):
    """As torch's own compiler refuses them: without that the other tests would show nothing."""
    k2 = K2.load(model, dtype=torch.bfloat16)
    k2.add_role("policy", 4, 8.0, ["to_q"])
    parameters, k2.blocks.compiled = k2.train_role("policy"), True
    with k2.role("policy"):
        v = k2.velocity(torch.randn(2, 16, 64), 0.5, k2.text(PROMPTS[:1], 64), 32, 32)
    with pytest.raises(RuntimeError, match="donated buffers"):
        torch.autograd.grad(v.sum(), parameters, retain_graph=True)


@pytest.mark.parametrize("guard", ["output", "exact"])
def test_stpo(tmp_path, model, guard):
    config = large(runs.stpo_config(tmp_path, model))
    config.steps, config.batch, config.micro_batch, config.pairs.measured = 3, 2, 1, 4
    config.loss.guard, config.loss.terms_every = guard, 2
    stpo.train(config)
    shares = [sum(v for name, v in row.items() if name.startswith("gradient/")) for row in rows(config)]
    assert shares == pytest.approx([1, 1 if guard == "exact" else 0, 1])
    assert adapter(config.output).abs().sum() > 0


def test_grpo(tmp_path, model):
    config = large(runs.config(tmp_path, model))
    config.steps, config.groups.prompts_per_step, config.groups.group_size, config.groups.micro_batch = 3, 1, 2, 2
    grpo.train(config)
    assert len(rows(config)) == 3 and rows(config)[0]["ratio_error"] < 0.1
    assert adapter(config.output).abs().sum() > 0


def test_tdm(tmp_path, model):
    config = large(runs.tdm_config(tmp_path, model))
    lines = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS)
    Path(config.prompts.train).write_text(lines)
    config.steps, config.batch, config.micro_batch, config.eval.groups = 3, 2, 2, 0
    tdm.train(config)
    assert "generator_loss" in runs.rows(config.output)[-2]
    assert adapter(config.output).abs().sum() > 0


def rows(config):
    return runs.training_rows(config.output)


def test_drawing(tmp_path, model, monkeypatch):
    """Pairs, samples, and the images of the expander's prompts."""
    chosen = ModelConfig(str(model), dtype="bfloat16", compile=True, recompute=1)
    sample_images.sample(
        SampleConfig(str(tmp_path / "sample"), chosen, prompt=PROMPTS[0], images=2, size=[32, 32], steps=2)
    )
    assert len(list((tmp_path / "sample").glob("*.png"))) == 2
    config = pair_runs.recipe(tmp_path, model, pairs=4, sizes=[[32, 32]], micro_batch=2)
    config.model = chosen
    make.make(config)
    monkeypatch.setattr(blocks, "compiles_by_default", lambda device, dtype: dtype == torch.bfloat16)  # as on a GPU
    drawn = K2Renderer(RendererConfig(str(model), size=[32, 32], steps=2, micro_batch=2), torch.device("cpu"))
    assert all(drawn(PROMPTS, [1, 2, 3, 4]).images)
