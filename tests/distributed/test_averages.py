"""The mean of checkpoints in two processes, sharded or not: that of one."""

import json
import shutil

import pytest
import torch

from posttrain.config.optimizer import AverageConfig
from posttrain.model.k2 import K2
from tests.distributed.test_sharding import ENGINES
from tests.helpers import runs


@pytest.mark.long
@pytest.mark.parametrize(("lora", "engines"), [(True, ("ddp", "fsdp2")), (False, ("fsdp2", "zero3"))])
def test_two_processes_equal_one(command, model, tmp_path, lora, engines):
    """The main process reads and computes, and the others get their part; half-way another engine goes on."""
    config = runs.stpo_config(tmp_path, model)
    config.steps, config.checkpoint.every, config.eval.every, config.loss.terms_every = 4, 2, 2, 0
    config.optim.average, config.optim.eps = AverageConfig(every=1, last=3), 1e-8
    if not lora:
        config.lora, config.optim.lr = None, 1e-4
    begun = K2.load(model).base_state_dict()
    outputs = []
    for name in ("one", *engines, *(f"{engine} resumed" for engine in engines)):
        config.output = str(tmp_path / name)
        engine, *resumed = name.split()
        if resumed:
            shutil.copytree(outputs[0], config.output, symlinks=True)
            shutil.rmtree(tmp_path / name / "checkpoints/step-000004")
        args = ["--resume"] if resumed else []
        path = runs.recipe(config, tmp_path / "r.yaml")
        processes = 1 if engine == "one" else 2
        result = command("stpo", "--config", path, *args, processes=processes, **ENGINES.get(engine, {}))
        assert result.returncode == 0, result.stderr[-3000:]
        outputs.append(tmp_path / name)
    one, *others = outputs
    a, file = runs.latest(one), "adapter" if lora else "weights"
    for other in others:
        b = runs.latest(other)
        assert a.step == b.step == 4 and b.state["average"]["steps"] == [2, 3, 4]
        for name in (file, "live"):
            parts = []
            for tensors in (a.tensors[name], b.tensors[name]):
                parts.append(torch.cat([(tensors[key] - begun.get(key, 0)).flatten() for key in a.tensors[name]]))
            assert (parts[0] - parts[1]).norm() < 1e-3 * parts[0].norm(), (other, name)
        assert not b.tensors[file][next(iter(b.tensors[file]))].equal(b.tensors["live"][next(iter(b.tensors["live"]))])
        rows = [[row for row in runs.rows(run) if "eval/average_checkpoints" in row] for run in (one, other)]
        for first, second in zip(*rows, strict=True):
            # What the rank leaves out is small, and so more of it is rounding.
            loose = {name: first.get(name) == pytest.approx(second.get(name), rel=0.05) for name in first}
            assert all(agrees for name, agrees in loose.items() if name.startswith("eval/") and "diversity" not in name)
        assert json.loads((other / "summary.json").read_text())["steps"] == 4
