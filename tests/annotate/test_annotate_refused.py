"""What posttrain annotate refuses before it serves."""

import json
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from posttrain import cli
from posttrain.annotate.answers import Schedule, Store
from posttrain.preferences.dataset import Preference
from posttrain.preferences.writer import PreferenceWriter


@pytest.fixture
def annotate(tmp_path, capsys) -> Callable[..., str]:
    """Run the command, which must end with one line and code 2; returns the line."""
    with PreferenceWriter(tmp_path / "pairs") as writer:
        for i in range(2):
            chosen, rejected = (Image.new("RGB", (8, 8), (i, side, 0)) for side in (0, 255))
            writer.add(Preference(f"prompt {i}", chosen, rejected, "synthetic"))

    def run(*options, pairs: Path = tmp_path / "pairs") -> str:
        capsys.readouterr()
        given = ["--pairs", pairs, "--store", tmp_path / "choices.jsonl", "--port", 0, *options]
        assert cli.main(["annotate", *map(str, given)]) == 2
        line, *more = capsys.readouterr().err.splitlines()
        assert more == [] and line.startswith("posttrain: error: ")
        return line.removeprefix("posttrain: error: ")

    return run


def test_refused_before_it_serves(annotate, tmp_path, monkeypatch):
    says = "command line: host: {} is reached from beyond this machine; set password_env as well"
    for host in ("0.0.0.0", "::", "192.168.0.7", "a-name"):
        assert annotate("--host", host) == says.format(host)
    for path in ("annotate", "/annotate/"):
        assert annotate("--root_path", path).startswith(f"command line: root_path: is '{path}'; write it as /annotate")
    secret = ["--host", "0.0.0.0", "--password_env", "SECRET"]
    assert annotate(*secret).startswith("password_env: SECRET is not set; put a password of 8 characters or more")
    monkeypatch.setenv("SECRET", "short")
    assert annotate(*secret).startswith("password_env: SECRET is too short; put a password of 8")
    assert annotate("--repeats", 0.7) == "command line: repeats: is 0.7; use 0 to 0.5"
    assert annotate("--port", 70000) == "command line: port: is 70000; use 1 to 65535, or 0 for any free one"
    assert not (tmp_path / "choices.jsonl").exists()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        says = f"port: 127.0.0.1:{port} cannot be listened at (Address already in use); choose another --port, or 0"
        assert annotate("--port", port).startswith(says)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "gradio", None)
        says = "annotate: needs gradio, which is not installed; pip install 'posttrain[annotate]'"
        assert annotate() == says


def test_store_that_cannot_be_used(annotate, tmp_path):
    path = tmp_path / "choices.jsonl"
    held = Store(path, Schedule(0, 0.1))
    assert annotate().startswith(f"{path}: is locked by another posttrain annotate; several people share one server")
    held.close()
    assert annotate("--seed", 1).startswith(f"{path}: was started with seed 0, not 1; pass --seed 0")
    path.write_text(path.read_text().replace('"repeats": 0.1', '"repeats": 0.2'))
    assert annotate().startswith(f"{path}:1: was edited, or a line before it was removed; restore")
    assert annotate("--store", tmp_path).startswith(f"{tmp_path}: cannot be written (Is a directory); choose another")


def test_pairs_with_bad_pictures_are_named(annotate, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:40])
    path = tmp_path / "rows.jsonl"
    for name, reason in (("none.png", "none.png is missing"), ("cut.png", "is not an image (40 bytes)")):
        path.write_text(json.dumps({"prompt": "a", "chosen": "good.png", "rejected": name}) + "\n")
        line = annotate(pairs=path)
        assert line.startswith(f"{path}: more than 0.01 of 1 row are bad (max_bad): {path}:1: rejected: {reason}")
        assert line.endswith("fix them or raise max_bad")
    assert annotate(pairs=tmp_path / "nowhere").startswith(f"{tmp_path}/nowhere: no such file or directory")
