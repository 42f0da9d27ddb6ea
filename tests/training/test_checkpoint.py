"""Checkpoints: bit for bit, whole or not there, and never lost to a full disk."""

import errno
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from posttrain.errors import UserError
from posttrain.training import checkpoint, optim

ROOT = Path(__file__).parents[2]


def tensors(seed: float = 1.0):
    return {
        "adapter": {"a.weight": torch.full((3, 2), seed), "b": torch.tensor(seed, dtype=torch.bfloat16)},
        "ema": {},
    }


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_round_trip(tmp_path):
    odd = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    given = {"x": {"odd": odd, "view": torch.arange(6).reshape(2, 3).T, "flag": torch.tensor([True])}}
    state = {"best": 0.1 + 0.2, "pool": {"p1": [1, 2.5, None]}}
    path = checkpoint.save(tmp_path, 7, given, state, keep=2)
    assert path == tmp_path / "step-000007"
    assert names(path) == ["manifest.json", "state.json", "x.safetensors"]
    loaded = checkpoint.load_latest(tmp_path)
    assert loaded is not None and loaded.step == 7 and loaded.state == state
    for name, value in given["x"].items():
        got = loaded.tensors["x"][name]
        assert got.dtype == value.dtype and got.shape == value.shape
        assert got.contiguous().numpy().tobytes() == value.contiguous().numpy().tobytes()


def test_nothing_saved_yet(tmp_path):
    assert checkpoint.load_latest(tmp_path / "none") is None
    with pytest.raises(UserError, match="holds no whole checkpoint"):
        checkpoint.find(tmp_path)
    with pytest.raises(UserError, match="none: not a whole checkpoint: no such directory"):
        checkpoint.load(tmp_path / "none")


def tear_remove(path: Path):
    (path / "manifest.json").unlink()


def tear_truncate(path: Path):
    file = path / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def tear_flip(path: Path):
    file = path / "adapter.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))


def tear_manifest(path: Path):
    (path / "manifest.json").write_text("{")


def tear_shape(path: Path):
    (path / "manifest.json").write_text("[]")


def tear_names(path: Path):
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["state.json"]
    (path / "manifest.json").write_text(json.dumps(manifest))


def tear_file(path: Path):
    (path / "state.json").unlink()


TEARS = [tear_remove, tear_truncate, tear_flip, tear_manifest, tear_shape, tear_names, tear_file]


@pytest.mark.parametrize("tear", TEARS)
def test_a_torn_checkpoint_is_passed_over(tmp_path, capsys, tear):
    run = tmp_path / "checkpoints"
    checkpoint.save(run, 1, tensors(1.0), {}, keep=3)
    checkpoint.save(run, 2, tensors(2.0), {}, keep=3)
    tear(run / "step-000002")
    loaded = checkpoint.load_latest(run)
    assert loaded is not None and loaded.step == 1
    message = capsys.readouterr().err
    assert "step-000002: not a whole checkpoint" in message and "trying the one before" in message
    assert checkpoint.find(tmp_path) == checkpoint.find(run / "step-000001") == run / "step-000001"
    tear(run / "step-000001")
    with pytest.raises(UserError, match="no checkpoint is whole"):
        checkpoint.load_latest(run)


def test_a_step_saved_again_replaces_the_torn_one(tmp_path):
    checkpoint.save(tmp_path, 1, tensors(1.0), {}, keep=1)
    tear_truncate(tmp_path / "step-000001")
    checkpoint.save(tmp_path, 1, tensors(3.0), {}, keep=1)
    loaded = checkpoint.load_latest(tmp_path)
    assert loaded is not None and loaded.tensors["adapter"]["a.weight"][0, 0] == 3
    assert names(tmp_path) == ["step-000001"]


def test_leftovers_of_a_killed_save_are_removed(tmp_path):
    (tmp_path / ".tmp-dead").mkdir()
    (tmp_path / ".tmp-dead" / "adapter.safetensors").write_text("half")
    assert checkpoint.load_latest(tmp_path) is None
    checkpoint.save(tmp_path, 1, tensors(), {}, keep=1)
    assert names(tmp_path) == ["step-000001"]


def test_without_links_the_best_step_is_named_in_a_file(tmp_path, monkeypatch):
    def refuse(self, target, target_is_directory=False):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(Path, "symlink_to", refuse)
    for step in range(1, 5):
        checkpoint.save(tmp_path / "checkpoints", step, tensors(), {"method": "grpo"}, keep=1)
        if step == 2:
            checkpoint.mark_best(tmp_path / "checkpoints", 2)
    best = tmp_path / "checkpoints/best"
    assert best.read_text() == "step-000002\n"
    assert names(tmp_path / "checkpoints") == ["best", "step-000002", "step-000004"]
    assert checkpoint.load(best).step == 2 and checkpoint.find(best).name == "step-000002"
    assert checkpoint.load_latest(tmp_path / "checkpoints").step == 4


def test_pruning_keeps_the_newest_and_the_best(tmp_path):
    for step in range(1, 6):
        checkpoint.save(tmp_path, step, tensors(float(step)), {}, keep=2)
        if step == 2:
            checkpoint.mark_best(tmp_path, 2)
    assert names(tmp_path) == ["best", "step-000002", "step-000004", "step-000005"]
    assert checkpoint.load(tmp_path / "best").step == 2
    checkpoint.mark_best(tmp_path, 5)
    checkpoint.save(tmp_path, 6, tensors(), {}, keep=2)
    assert names(tmp_path) == ["best", "step-000005", "step-000006"]
    checkpoint.mark_best(tmp_path, 7)  # not saved: none is marked, rather than another
    assert names(tmp_path) == ["step-000005", "step-000006"]


def train(model, optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()


def make(seed: int):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Linear(5, 3))
    groups = [{"params": model[0].parameters(), "lr": 3e-3}, {"params": model[1].parameters()}]
    return model, torch.optim.AdamW(groups, lr=1e-3, betas=(0.8, 0.97), weight_decay=0.01, amsgrad=True)


def test_resumed_adamw_equals_uninterrupted_bit_for_bit(tmp_path):
    model, optimizer = make(0)
    train(model, optimizer, 5)
    optimizer_tensors, optimizer_state = optim.flatten_optimizer(optimizer)
    rng_tensors, rng_state = checkpoint.rng_state()
    given = {"model": dict(model.state_dict()), "optimizer": optimizer_tensors, "rng": rng_tensors}
    checkpoint.save(tmp_path, 5, given, {"optimizer": optimizer_state, "rng": rng_state}, keep=1)
    train(model, optimizer, 5)
    after = random.random(), float(np.random.normal())

    resumed, resumed_optimizer = make(1)
    train(resumed, resumed_optimizer, 2)
    loaded = checkpoint.load_latest(tmp_path)
    assert loaded is not None
    resumed.load_state_dict(loaded.tensors["model"])
    optim.restore_optimizer(resumed_optimizer, loaded.tensors["optimizer"], loaded.state["optimizer"])
    checkpoint.restore_rng(loaded.tensors["rng"], loaded.state["rng"])
    assert resumed_optimizer.param_groups[0]["betas"] == (0.8, 0.97)
    train(resumed, resumed_optimizer, 5)
    for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(optimizer.state.values(), resumed_optimizer.state.values(), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert (random.random(), float(np.random.normal())) == after


def test_a_rate_that_is_a_tensor_is_kept(tmp_path):
    """As optimisers hold it whose step is captured or compiled."""
    weights = torch.ones(3, requires_grad=True)
    optimizer = torch.optim.AdamW([weights], lr=torch.tensor(0.25))
    weights.sum().backward()
    optimizer.step()
    saved, state = optim.flatten_optimizer(optimizer)
    assert saved["group0.lr"].item() == 0.25 and "lr" not in state["groups"][0]
    checkpoint.save(tmp_path, 1, {"optimizer": saved}, {"optimizer": state}, keep=1)
    loaded = checkpoint.load(tmp_path / "step-000001")
    resumed = torch.optim.AdamW([weights], lr=torch.tensor(0.5))
    optim.restore_optimizer(resumed, loaded.tensors["optimizer"], loaded.state["optimizer"])
    assert resumed.param_groups[0]["lr"].item() == 0.25


def test_rng_keeps_the_second_half_of_a_gaussian_pair():
    random.gauss(0, 1), np.random.standard_normal()  # each draws two and holds one back
    saved = checkpoint.rng_state()
    expected = random.gauss(0, 1), float(np.random.standard_normal()), torch.rand(3)
    saved = (saved[0], json.loads(json.dumps(saved[1])))
    checkpoint.restore_rng(*saved)
    assert (random.gauss(0, 1), float(np.random.standard_normal())) == expected[:2]
    assert torch.equal(torch.rand(3), expected[2])


def test_another_model_is_refused():
    model, optimizer = make(0)
    train(model, optimizer, 1)
    saved = optim.flatten_optimizer(optimizer)
    wider = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 3))
    other = torch.optim.AdamW([{"params": wider[0].parameters()}, {"params": wider[1].parameters()}])
    with pytest.raises(UserError, match=r"shape \[5, 4\] and the model's \[6, 4\]"):
        optim.restore_optimizer(other, *saved)
    with pytest.raises(UserError, match="4 trained tensors and the model 2"):
        optim.restore_optimizer(torch.optim.AdamW(wider[0].parameters()), *saved)
    with pytest.raises(UserError, match=r"optim\.kind: the checkpoint's is AdamW and the recipe's SGD"):
        optim.restore_optimizer(torch.optim.SGD(model.parameters()), *saved)


FILL = """
import resource, sys, torch
from posttrain.training import checkpoint
from posttrain.errors import UserError
directory, limit = sys.argv[1], int(sys.argv[2])
checkpoint.save(directory, 1, {"adapter": {"w": torch.zeros(1000)}}, {}, keep=2)
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    checkpoint.save(directory, 2, {"adapter": {"w": torch.zeros(1_000_000)}}, {}, keep=2)
except UserError as error:
    print(error)
    sys.exit(2)
"""


def check_full(directory: Path, limit: int) -> None:
    result = subprocess.run(
        [sys.executable, "-c", FILL, str(directory), str(limit)], capture_output=True, text=True, cwd=ROOT
    )
    assert result.returncode == 2, result
    assert "step-000002: no space left while saving (4 MB); free some" in result.stdout
    assert names(directory) == ["step-000001"]
    loaded = checkpoint.load_latest(directory)
    assert loaded is not None and loaded.step == 1


def test_file_too_large_leaves_the_previous_checkpoint(tmp_path):
    check_full(tmp_path / "checkpoints", 1_000_000)


def test_full_disk_leaves_the_previous_checkpoint(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk is not permitted here")
    try:
        check_full(disk / "checkpoints", 0)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


WRITE = """
import sys, torch
from pathlib import Path
from posttrain.training import checkpoint
writer = checkpoint.Writer()
writer.save(Path(sys.argv[1]), 1, {"adapter": {"w": torch.zeros(1000)}}, {}, keep=1)
writer.save(Path(sys.argv[1]), 2, {"adapter": {"w": torch.zeros(100_000_000)}}, {}, keep=1)
print("goes on", flush=True)
sys.stdin.read()
"""


def test_a_process_that_is_killed_while_a_thread_writes_leaves_the_checkpoint_before(tmp_path):
    arguments = [sys.executable, "-c", WRITE, str(tmp_path)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None and process.stdout.readline() == "goes on\n"
        while not any(tmp_path.glob(".tmp-*/adapter.safetensors")):
            assert process.poll() is None and not (tmp_path / "step-000002").exists()
        process.kill()
    loaded = checkpoint.load_latest(tmp_path)
    assert loaded is not None and loaded.step == 1


def test_what_goes_wrong_in_the_thread_is_raised_once_at_the_next_look(tmp_path):
    writer = checkpoint.Writer()
    (tmp_path / "file").write_text("in the way")
    writer.save(tmp_path / "file", 1, tensors(), {}, keep=1)
    with pytest.raises(UserError, match="file"):
        writer.check(wait=True)
    assert writer.done
    state = {"pool": [1]}
    writer.save(tmp_path / "run", 2, tensors(), state, keep=1, best=2)
    state["pool"].append(2)  # of the next step
    writer.save(tmp_path / "run", 3, tensors(), state, keep=1)
    writer.check(wait=True)
    assert names(tmp_path / "run") == ["best", "step-000002", "step-000003"]
    assert checkpoint.load(tmp_path / "run/best").state == {"pool": [1]}


def test_copies_are_written_over_those_of_before():
    now = {"a": torch.arange(3.0), "b": torch.ones(2, dtype=torch.bfloat16), "c": torch.ones(2)}
    before = checkpoint.on_host(now)
    first = before["a"]
    now["a"] += 1
    after = checkpoint.on_host(now, over=before | {"b": torch.ones(2), "c": torch.ones(3)})
    assert after["a"] is first and after["a"].tolist() == [1, 2, 3]
    now["a"] += 1
    assert after["a"].tolist() == [1, 2, 3] and after["b"].dtype == torch.bfloat16 and after["c"].shape == (2,)
    assert checkpoint.on_host(now, keep=False) == {}


def test_memory_is_there_before_the_first_checkpoint(tmp_path):
    writer, now = checkpoint.Writer(), {"adapter": {"w": torch.arange(3.0, dtype=torch.bfloat16)}}
    writer.reserve(now)
    writer.check(wait=True)
    room = writer.copies["adapter"]["w"]
    copies = {name: checkpoint.on_host(group, over=writer.copies[name]) for name, group in now.items()}
    assert copies["adapter"]["w"] is room and room.tolist() == [0, 1, 2]
    writer.save(tmp_path, 1, copies, {}, keep=1)
    writer.check(wait=True)
    assert writer.copies is copies and checkpoint.load(tmp_path / "step-000001").tensors["adapter"]["w"].equal(room)
    writer.reserve({"weights": {"w": torch.empty(1, device="meta").expand(10**15)}})
    with pytest.raises(UserError, match="no memory for a copy of what it holds"):
        writer.check(wait=True)
