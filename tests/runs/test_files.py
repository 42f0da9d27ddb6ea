"""What is written can be read by whom the umask lets, whichever library writes it."""

import errno
import os

import pytest
import torch
from safetensors.torch import save_file

from posttrain.runs import files
from posttrain.training import checkpoint


def modes(folder):
    return {path.name: path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()}


def write(path):
    save_file({"a": torch.zeros(2)}, path)


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_have_the_mode_that_the_umask_leaves(tmp_path, monkeypatch, umask, mode):
    monkeypatch.setattr(files, "UMASK", umask)
    (tmp_path / "plain").touch(mode=0o600)
    write(tmp_path / "a.safetensors")
    files.apply_umask(tmp_path)
    assert modes(tmp_path) == {"plain": mode, "a.safetensors": mode}


def test_checkpoints_and_replaced_files_and_directories_can_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "UMASK", 0o022)
    with files.replacing(tmp_path / "a.safetensors") as temporary:
        write(temporary)
    with files.replacing_directory(tmp_path / "folder") as temporary:
        write(temporary / "b.safetensors")
    checkpoint.save(tmp_path / "run", 1, {"adapter": {"a": torch.zeros(2)}}, {}, keep=1)
    found = modes(tmp_path)
    assert {"a.safetensors", "b.safetensors", "adapter.safetensors", "state.json"} <= found.keys()
    assert {mode & 0o044 for mode in found.values()} == {0o044}


def test_executables_stay_executable(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "UMASK", 0o022)
    script = tmp_path / "run.sh"
    script.touch(mode=0o700)
    files.apply_umask(script)
    assert script.stat().st_mode & 0o777 == 0o744


def test_a_directory_that_cannot_be_synced_is_not_an_error_but_a_file_is(tmp_path, monkeypatch):
    def refuse(descriptor):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", refuse)
    files.sync(tmp_path)
    (tmp_path / "a").touch()
    with pytest.raises(OSError, match="Invalid argument"):
        files.sync(tmp_path / "a")
