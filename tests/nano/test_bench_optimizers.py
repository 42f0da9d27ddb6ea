"""The bench of optimisers: two real fits of a few steps, and what it makes of runs."""

import json
import sys

import pytest

from posttrain.nano.bench import muon_adamw as optimizers


def test_a_short_comparison(tmp_path, monkeypatch, capsys):
    """Both optimisers see the same batches and begin at the same held-out loss; runs that are there are kept."""
    monkeypatch.setattr(optimizers, "IMAGES", 8)
    monkeypatch.setattr(optimizers, "HELDOUT", 4)
    monkeypatch.setattr(optimizers, "RATES", {"adamw": [1e-3], "muon": [1e-3, 2e-3]})
    monkeypatch.setattr(optimizers, "LAST", 2)
    monkeypatch.setattr(optimizers, "EVERY", 1)
    monkeypatch.setattr(optimizers.clipping, "LEAST", 2)
    argv = ["optimizers", "--output", str(tmp_path), "--steps", "4", "--batch", "4", "--every", "2", "--seeds", "0"]
    monkeypatch.setattr(sys, "argv", argv)
    optimizers.main()
    runs = {file.stem: json.loads(file.read_text()) for file in tmp_path.glob("*-0.json")}
    assert runs.keys() == {"adamw-0.001-0", "muon-0.001-0", "muon-0.002-0"}
    assert len({run["losses"][0][1] for run in runs.values()}) == 1
    assert all([step for step, _ in run["losses"]] == [0, 2, 4] for run in runs.values())
    assert runs["adamw-0.001-0"]["norms"][0] == pytest.approx(runs["muon-0.002-0"]["norms"][0], rel=1e-6)
    assert runs["muon-0.001-0"]["bytes"] < 0.6 * runs["adamw-0.001-0"]["bytes"]
    # The first update, at the foot of the warm-up, moves every weight of full rank by about .17 of the rate.
    assert all(0.05 < value < 0.21 for value in runs["muon-0.001-0"]["update_rms"])
    table = json.loads((tmp_path / "table.json").read_text())
    assert [row["kind"] for row in table] == ["adamw", "muon"] and table[0]["bytes"] == 1
    monkeypatch.setattr(optimizers, "fit", None)
    capsys.readouterr()
    optimizers.main()
    assert "| muon | " in capsys.readouterr().out


def test_when_a_loss_is_reached():
    losses = [(0, 1.0), (10, 0.6), (20, 0.7), (30, 0.4)]
    assert optimizers.steps_to(losses, 0.8) == pytest.approx(5)
    assert optimizers.steps_to(losses, 0.5) == pytest.approx(20 + 10 * 0.2 / 0.3)
    assert optimizers.steps_to(losses, 0.3) is None
    assert optimizers.spike([1.0] * 16 + [3.0, 1.0]) == 3
