"""Seconds to the first step by part; a later run in the same process begins anew. Files are hashed once."""

import hashlib
import time

import pytest

from posttrain.runs import startup
from posttrain.runs.run import Run
from posttrain.training import checkpoint
from tests.helpers import runs


def test_parts_and_their_total(monkeypatch):
    clock = startup.Startup()
    clock._last = 100.0
    now = iter([103.0, 104.5, 110.5, 118.5, 1000.0, 1002.0])
    monkeypatch.setattr(time, "time", lambda: next(now))
    for part in ("import", "check", "import", "first_step"):
        clock.lap(part)
    assert clock.taken(3.0) == {"import": 9.0, "check": 1.5, "first_step": 8.0, "total": 18.5, "compile": 5.0}
    clock.lap("processes")  # of a later run: what was between is no part of it
    clock.lap("read")
    assert clock.taken(None) == {"read": 2.0, "total": 2.0}


def test_pairs_have_compiled_before_their_first_block():
    """Blocks are taken in several at a time, so that the second seems to take no time."""
    clock = startup.Startup()
    for part in ("warm_up", "first_step"):
        clock.lap(part)
    assert set(clock.taken(0.001)) == {"warm_up", "first_step", "total"}


def test_a_run_that_failed_leaves_nothing_to_the_next(tmp_path, monkeypatch, model):
    monkeypatch.setattr(startup.CLOCK, "_seconds", {})
    config = runs.config(tmp_path, model)
    with pytest.raises(RuntimeError), Run.create(config, False):
        startup.lap("warm_up")
        raise RuntimeError("anything")
    startup.lap("first_step")
    assert set(startup.CLOCK.taken(0.0)) == {"total"}


def test_a_process_knows_when_it_began():
    clock = startup.Startup()
    assert clock._last is not None and 0 < time.time() - clock._last < 24 * 3600


def test_a_checkpoint_is_hashed_once_until_it_changes(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"one")
    (tmp_path / "state.json").write_text("{}")
    checkpoint.seal(tmp_path)
    hashed, true = [], hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, kind: hashed.append(file.name) or true(file, kind))
    assert checkpoint.problem(tmp_path) is None and checkpoint.problem(tmp_path) is None and hashed == []
    (tmp_path / "a").write_bytes(b"two")
    assert checkpoint.problem(tmp_path) == "a does not match its checksum" and len(hashed) == 1
