"""The preflight of nft, stpo, tdm, pairs and expander gdpo on tiny models: sound recipes pass, planted faults fail."""

import json
import tempfile
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from posttrain import cli
from posttrain.commands import COMMANDS
from posttrain.model.k2 import K2
from posttrain.nft import update as nft_update
from posttrain.preflight import common, few
from posttrain.preflight import tdm as preflight_tdm
from posttrain.sft import train as sft
from posttrain.stpo import train as stpo
from posttrain.tdm import train as tdm
from posttrain.training import shard_cache
from posttrain.training.stepper import Stepper
from tests.helpers import expander_runs, pair_runs, runs, style_runs
from tests.preflight.test_preflight import failed, table


@pytest.fixture
def check(tmp_path, capsys, monkeypatch):
    """Runs the command on a recipe: its exit code; result and text by row, and what stderr says."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))

    def run(config, code: int) -> tuple[dict[str, tuple[str, str]], str]:
        capsys.readouterr()
        path = tmp_path / "recipe.yaml"
        path.write_text(json.dumps({key: value for key, value in asdict(config).items() if key != "track"}))
        assert cli.main(["preflight", "--config", str(path)]) == code, capsys.readouterr()
        out, err = capsys.readouterr()
        assert max(map(len, out.splitlines())) <= 120
        assert not Path(config.output).exists() and not list((tmp_path / "tmp").iterdir())
        return table(out), err

    return run


def test_stpo(check, tmp_path, model, monkeypatch):
    """With the exact guard, and terms that are kept apart in the first step."""
    config = runs.stpo_config(tmp_path, model)
    config.loss.guard, config.loss.terms_every, config.batch = "exact", 2, 20
    rows, err = check(config, 0)
    assert list(rows) == [
        "adapter", "pairs", "judges", "evaluation", "policy is the reference", "loss and gradient", "policy moves",
        "further updates", "memory", "step", "run", "export",
    ]  # fmt: skip
    assert {result for result, _ in rows.values()} == {"pass", "skipped"} and rows["judges"][0] == "skipped"
    assert "20 encoded, 0 bad, 0 prompts cut" in rows["pairs"][1] and "for all 20" in rows["pairs"][1]
    assert "the margin z is 0 nats before the first update, the loss 0.6931" in rows["policy is the reference"][1]
    assert "bit-identical" in rows["policy moves"][1] and "s for 20 pairs (update" in rows["step"][1]
    for phase in ("the model is read", "pairs are encoded", "update", "export", "done"):
        assert f" s: {phase}\n" in err

    true = K2.velocity

    def other(*args, **options):
        return true(*args, **options) * (1 + 0.3 * torch.is_grad_enabled())

    monkeypatch.setattr(K2, "velocity", other)
    config.loss.guard, config.loss.terms_every = "output", 0  # terms apart have their velocities without gradients
    rows, _ = check(config, 1)
    assert "policy is the reference" in failed(rows)


def test_stpo_whose_gradient_is_none(check, tmp_path, model, monkeypatch):
    true = stpo.preference_terms

    def broken(*args, **settings):
        terms, metrics = true(*args, **settings)
        return {name: term * float("nan") for name, term in terms.items()}, metrics

    monkeypatch.setattr(stpo, "preference_terms", broken)
    rows, _ = check(runs.stpo_config(tmp_path, model), 1)
    assert {"loss and gradient", "policy moves"} <= set(failed(rows)) and rows["export"][0] == "skipped"


def test_sft(check, tmp_path, model, monkeypatch):
    config = runs.sft_config(tmp_path, model)
    config.batch, config.heldout = 20, None
    (tmp_path / "captioned/000.txt").write_text("")
    rows, err = check(config, 0)
    assert list(rows) == [
        "adapter", "images", "judges", "evaluation", "loss and gradient", "policy moves", "further updates", "memory",
        "step", "run", "export",
    ]  # fmt: skip
    assert {result for result, _ in rows.values()} == {"pass", "skipped"} and rows["judges"][0] == "skipped"
    assert "19 encoded, 1 bad, 0 left out, 0 captions cut" in rows["images"][1] and "for all 20" in rows["images"][1]
    assert "bit-identical" in rows["policy moves"][1] and "s for 20 images (update" in rows["step"][1]
    for phase in ("the model is read", "images are encoded", "update", "export", "done"):
        assert f" s: {phase}\n" in err
    monkeypatch.setattr(sft, "flow_loss", lambda v, target: (v - target).sum((1, 2)) * float("nan"))
    rows, _ = check(config, 1)
    assert {"loss and gradient", "policy moves"} <= set(failed(rows)) and rows["export"][0] == "skipped"


def test_style(check, tmp_path, model):
    config = style_runs.config(tmp_path, model)
    rows, _ = check(config, 0)
    assert {"images", "loss and gradient", "policy moves", "further updates", "step", "export"} <= rows.keys()
    assert {result for result, _ in rows.values()} == {"pass", "skipped"}
    assert "18 encoded" in rows["images"][1] and "s for 6 images (update" in rows["step"][1]


def test_style_on_references_alone(check, tmp_path, model):
    config = style_runs.config(tmp_path, model)
    config.lanes, config.references.drop, config.references.drop_both = "references", 0.0, 0.0
    rows, _ = check(config, 0)
    assert {result for result, _ in rows.values()} == {"pass", "skipped"}
    assert rows["adapter"][0] == rows["policy moves"][0] == "pass"
    assert rows["export"] == ("skipped", "an adapter on references alone is exported in no format")


def test_a_set_with_many_bad_images(check, tmp_path, model, monkeypatch):
    """A third of 60, of which 12 are looked at: four are bad, and images.max_bad is a tenth."""
    config = runs.sft_config(tmp_path, model)
    monkeypatch.setattr(few, "ROWS", 12)
    folder = runs.captioned(tmp_path, 60)
    for i in range(0, 60, 3):
        (folder / f"{i:03d}.txt").unlink()
    rows, err = check(config, 1)
    assert failed(rows) == ["images"] and "000.png: caption: is missing" in err


def test_tdm(check, tmp_path, model, monkeypatch):
    config = runs.tdm_config(tmp_path, model)
    rows, _ = check(config, 0)
    assert list(rows) == [
        "adapter", "judges", "evaluation", "all begin as the teacher", "fake score", "student", "updates keep apart",
        "policy moves", "memory", "step", "run", "export",
    ]  # fmt: skip
    assert "leaves the fake score bit-identical" in rows["updates keep apart"][1]
    assert "differ by 0 of the teacher's" in rows["all begin as the teacher"][1]
    assert "s for 6 images (trajectory" in rows["step"][1]
    checks = preflight_tdm.TDMChecks.__new__(preflight_tdm.TDMChecks)
    checks.config = runs.tdm_config(tmp_path, model)
    checks.config.student.steps = [8, 4]
    assert checks.full_steps() == [8, 4]  # an evaluation draws in each

    true = tdm.update_student

    def leaking(k2, *args):
        with torch.no_grad():
            k2.role_parameters(tdm.FAKE)[1].add_(1e-3)
        return true(k2, *args)

    monkeypatch.setattr(tdm, "update_student", leaking)
    rows, _ = check(config, 1)
    assert failed(rows) == ["updates keep apart"]


def test_nft(check, tmp_path, model, monkeypatch):
    """Images, scores and advantages are checked as grpo's; the update is nft's own."""
    config = runs.nft_config(tmp_path, model)
    rows, _ = check(config, 0)
    assert list(rows) == [
        "adapter", "judges", "evaluation", "images differ", "missing scores", "spread of brightness",
        "planted failure", "old policy is the policy", "loss and gradient", "policy moves", "old policy waits",
        "memory", "step", "run", "export",
    ]  # fmt: skip
    assert "8 of 8 images different" in rows["images differ"][1]
    assert "differ by 0 of themselves" in rows["old policy is the policy"][1]
    assert "s for 8 images (sample" in rows["step"][1]
    config.old.max = 0.0
    rows, _ = check(config, 0)
    assert "old policy is the policy" in rows and "old policy waits" not in rows

    true = K2.velocity
    with monkeypatch.context() as patch:
        patch.setattr(K2, "velocity", lambda *args, **more: true(*args, **more) * (1 + 0.3 * torch.is_grad_enabled()))
        rows, _ = check(config, 1)
    assert failed(rows) == ["old policy is the policy"]

    def leaking(self):
        norm = step(self)
        with torch.no_grad():
            seen[-1].role_parameters(nft_update.OLD)[1].add_(1e-3)
        return norm

    seen, add_roles, step = [], nft_update.add_roles, Stepper.step
    monkeypatch.setattr(nft_update, "add_roles", lambda k2, config: seen.append(k2) or add_roles(k2, config))
    monkeypatch.setattr(Stepper, "step", leaking)
    config.old.max = 0.5
    rows, _ = check(config, 1)
    assert failed(rows) == ["old policy waits"]


def test_pairs(check, tmp_path, model):
    config = pair_runs.recipe(tmp_path, model)
    rows, _ = check(config, 0)
    assert list(rows) == ["judges", "source guidance", "source judged", "memory", "run"]
    assert "of 3 candidates: 3 kept; distance of the two images" in rows["source judged"][1]
    assert "12 pairs; a forward of an image takes" in rows["run"][1]
    config.rewards[0].function, config.sources[1].name = "tests.helpers.runs:constant", "blind"
    rows, _ = check(config, 1)
    assert failed(rows) == ["source blind"] and "cannot tell them apart" in rows["source blind"][1]


def test_expander_gdpo(check, tmp_path, model):
    config = expander_runs.config(tmp_path, expander_runs.parts(tmp_path, model))
    config.rewards[0].noise = 10.0  # as a run does, preflight holds scores against it
    rows, _ = check(config, 0)
    assert {"renderer", "expansions", "one render each", "loss and gradient", "policy moves", "step", "run"} <= set(
        rows
    )
    assert "6 images drawn for 8 expansions, 0 missing" in rows["one render each"][1]
    assert "100% of the groups are flat" in rows["scores of brightness"][1]
    assert rows["scores of redness"] == ("skipped", "it does not apply to these prompts")
    assert rows["export"][0] == "pass" and "in one process: " in rows["run"][1]


def test_each_method_has_a_preflight():
    for method in ("grpo", *COMMANDS["preflight"].recipes_of):
        assert (Path(common.__file__).parent / f"{method.split()[-1]}.py").is_file()


def test_few_pairs_stand_for_the_set(tmp_path, model):
    """Of a hundred rows, 32 spread over all of them."""
    from posttrain.preferences.dataset import read_preferences

    found = few.Few(read_preferences(runs.pairs(tmp_path, 100)))
    assert len(found) == 32 and found.places[0] == 0 and found.places[-1] == 99 and shard_cache.SHARD >= 32
    assert found.name(31) == found.whole.name(99)
