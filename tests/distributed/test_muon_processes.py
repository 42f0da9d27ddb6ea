"""Muon in several processes: matrices are dealt out, and the update is that of one process."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from posttrain.config.sections import OptimConfig
from posttrain.distributed import shards
from posttrain.model.k2 import K2
from posttrain.training import muon
from posttrain.training.stepper import Stepper
from tests.distributed.test_sharding import ENGINES
from tests.helpers import runs

SHAPES = {"attn.to_q": (48, 48), "attn.to_k": (5, 48), "ff.gate": (96, 48), "ff.down": (48, 96), "attn.to_v": (1, 48)}
"""Of the matrices of a block: for three processes five of three costs, with rows that do not divide or are too few."""


def test_rows_are_those_of_fsdp2():
    assert muon.rows_of(128, 3) == [43, 43, 42] and muon.rows_of(2, 4) == [1, 1, 0, 0]
    for rows, processes in ((128, 3), (2, 4), (5, 4), (1536, 7)):
        chunks = [len(chunk) for chunk in torch.zeros(rows).chunk(processes)]
        assert muon.rows_of(rows, processes)[: len(chunks)] == chunks and sum(muon.rows_of(rows, processes)) == rows


def trained(mesh=None) -> dict[str, torch.Tensor]:
    """Weights after three updates by gradients that depend on nothing, whole; with `mesh` of DTensors."""
    weights: dict[str, torch.Tensor] = {"norm.weight": torch.ones(48)}
    for name, shape in SHAPES.items():
        weights[f"transformer_blocks.0.{name}.weight"] = torch.ones(shape)
    named = {}
    for name, weight in weights.items():
        sharded = mesh is not None and weight.ndim == 2
        named[name] = (distribute_tensor(weight, mesh, [Shard(0)]) if sharded else weight).requires_grad_()
    stepper = Stepper(named, OptimConfig(kind="muon", lr=1e-2, weight_decay=0.1))
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for name, parameter in named.items():
            gradient = torch.randn(weights[name].shape, generator=generator)
            if parameter.is_leaf and shards.is_parted(parameter):
                gradient = distribute_tensor(gradient, mesh, [Shard(0)])
            parameter.grad = gradient
        stepper.step()
    assert stepper.metrics()["update_rms"] > 0 or dist.get_rank() > 0
    return {name: shards.whole(parameter).detach().clone() for name, parameter in named.items()}


def save_trained(args: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.save(trained(init_device_mesh("cpu", (dist.get_world_size(),))), f"{args[0]}-{dist.get_rank()}")
    dist.destroy_process_group()


@pytest.mark.parametrize("size", [2, 3])
def test_the_same_gradients_make_the_same_update_bit_for_bit(command, tmp_path, size):
    result = command(tmp_path / "part", processes=size, function=f"{__name__}:save_trained")
    assert result.returncode == 0, result.stderr
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = trained()
    torch.set_num_threads(threads)
    for rank in range(size):
        runs.assert_equal(torch.load(tmp_path / f"part-{rank}", weights_only=True), expected)


def config(tmp_path, model):
    made = runs.stpo_config(tmp_path, model)
    made.lora, made.optim.kind, made.optim.lr, made.optim.eps = None, "muon", 3e-4, 1e-8
    made.steps, made.checkpoint.every = 3, 1
    return made


@pytest.fixture(scope="module")
def one(command, model, tmp_path_factory):
    """The run of one process."""
    folder = tmp_path_factory.mktemp("one")
    made = config(folder, model)
    result = command("stpo", "--config", runs.recipe(made, folder / "r.yaml"))
    assert result.returncode == 0, result.stderr[-3000:]
    return made.output


@pytest.mark.parametrize(("engine", "processes"), [("ddp", 2), ("fsdp2", 2), ("fsdp2", 3)])
def test_processes_equal_one(command, model, tmp_path, one, engine, processes):
    """Weights, moments and losses to 1e-3. Gradients differ by the order of sums, of which bfloat16 makes some 3e-3 of
    an update, also where nothing is dealt out (ddp). Rows do not divide, nor does a batch."""
    made = config(tmp_path, model)
    path = runs.recipe(made, tmp_path / "r.yaml")
    result = command("stpo", "--config", path, processes=processes, **ENGINES.get(engine, {}))
    assert result.returncode == 0, result.stderr[-3000:]
    first_saved, second_saved = runs.latest(one), runs.latest(made.output)
    begun = K2.load(model).base_state_dict()
    for name in ("weights", "optimizer"):
        a, b = first_saved.tensors[name], second_saved.tensors[name]
        assert [(key, value.shape) for key, value in a.items()] == [(key, value.shape) for key, value in b.items()]
        first, second = (torch.cat([tensors[key].flatten() for key in a]) for tensors in (a, b))
        assert (first - second).norm() < 1e-3 * first.norm(), name
        first, second = (torch.cat([(tensors[key] - begun.get(key, 0)).flatten() for key in a]) for tensors in (a, b))
        assert first.norm() > 0 and (first - second).norm() < 1e-2 * first.norm(), name
    for first, second in zip(runs.training_rows(one), runs.training_rows(made.output), strict=True):
        for metric in ("loss", "grad_norm", "z", "winner", "loser"):
            assert first[metric] == pytest.approx(second[metric], rel=1e-3, abs=1e-6)
        # Of the matrices that the main process owns, when they are dealt out.
        assert first["update_rms"] == pytest.approx(second["update_rms"], rel=0.2)


def test_another_engine_carries_on(command, model, tmp_path, one):
    """The state of a sharded run is that of whole matrices, and the other way round."""
    made = config(tmp_path, model)
    for steps, engine in ((1, "fsdp2"), (2, "one"), (3, "fsdp2")):
        made.steps = steps
        path = runs.recipe(made, tmp_path / "r.yaml")
        result = command(
            "stpo", "--config", path, *(["--resume"] if steps > 1 else []), processes=1 + (engine == "fsdp2"),
            **ENGINES[engine],
        )  # fmt: skip
        assert result.returncode == 0, result.stderr[-3000:]
    begun = K2.load(model).base_state_dict()
    a, b = runs.latest(made.output).tensors["weights"], runs.latest(one).tensors["weights"]
    first, second = (torch.cat([(tensors[key] - begun[key]).flatten() for key in a]) for tensors in (a, b))
    assert (first - second).norm() < 1e-2 * first.norm()


def test_zero_is_refused(command, model, tmp_path):
    made = config(tmp_path, model)
    path = runs.recipe(made, tmp_path / "r.yaml")
    result = command("stpo", "--config", path, processes=2, **ENGINES["zero3"])
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "optim.kind: muon needs whole rows, which ZeRO does not keep together; use FSDP2 or adamw" in result.stderr
