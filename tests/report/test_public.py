"""What others may see of a run names no directory or user of this machine."""

from pathlib import Path

import pytest

from posttrain.report.public import public


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("/home/alice/models/k2-raw", "k2-raw"),
        ("/home/alice/my models/k2 raw", "k2 raw"),
        ("/home/alice/rewards.py:warmth", "rewards.py:warmth"),
        ("/home/a/.cache/huggingface/hub/models--krea--Krea-2-Raw/snapshots/0123/", "krea/Krea-2-Raw"),
        ("--download-dir=/home/alice/hub", "--download-dir=hub"),
        ("merged [/home/alice/a, 3]", "merged [a, 3]"),
        # what is no path of this machine stays
        ("krea/Krea-2-Raw", "krea/Krea-2-Raw"),
        ("prompts/nano/train.jsonl", "prompts/nano/train.jsonl"),
        ("http://10.0.0.2:8000/v1", "http://10.0.0.2:8000/v1"),
        ("hf:owner/name:train", "hf:owner/name:train"),
        ("a sign that reads 24/7 and/or 1/2", "a sign that reads 24/7 and/or 1/2"),
        (0.5, 0.5),
        (None, None),
    ],
)
def test_paths(given, shown):
    assert public(given) == shown
    assert public({"a": [given]}) == {"a": [shown]}


def test_what_lies_in_the_working_directory_is_relative_to_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert public(str(tmp_path / "runs/a")) == public(Path(tmp_path / "runs/a")) == "runs/a"
