"""Adapters on every linear, text fusion included, in several processes and divided: the run of one process."""

import importlib.util
import re

import pytest

from tests.distributed.test_sharding import ENGINES, compared
from tests.helpers import runs

WAYS = ["ddp", "fsdp2", "sequence"]
if importlib.util.find_spec("deepspeed"):
    WAYS += ["zero2", "zero3"]


@pytest.mark.long
@pytest.mark.parametrize("method", ["tdm", "stpo"])
def test_two_processes_equal_one(command, model, tmp_path, method):
    """Student, fake score and teacher, or policy and reference, each with text of its own; what is dealt out does not
    divide by two."""
    config = runs.tdm_config(tmp_path, model) if method == "tdm" else runs.stpo_config(tmp_path, model)
    config.batch, config.micro_batch, config.eval.prompts, config.eval.groups = 5, 2, 1, 0
    config.lora.targets = ["all"]
    if method == "stpo":
        config.loss.terms_every = 0
    found = {}
    for way in ["one", *WAYS]:
        config.output, config.model.sequence_parallel = str(tmp_path / way), 1 + (way == "sequence")
        path = runs.recipe(config, tmp_path / "recipe.yaml")
        result = command(method, "--config", path, processes=1 + (way != "one"), **ENGINES.get(way, {}))
        assert result.returncode == 0, result.stderr[-3000:]
        assert len(re.findall("lora.targets: all adapt", result.stderr)) == 1, result.stderr
        found[way] = compared(tmp_path / way), runs.latest(tmp_path / way)
    rows, saved = found.pop("one")
    for way, (other, again) in found.items():
        for a, b in zip(rows, other, strict=True):
            assert a == pytest.approx(b, rel=2e-4, abs=1e-6), way
        for name in ("adapter", "fake") if method == "tdm" else ("adapter",):
            trained = runs.flat(saved.tensors[name])
            assert (trained - runs.flat(again.tensors[name])).norm() < 1e-3 * trained.norm(), (way, name)
