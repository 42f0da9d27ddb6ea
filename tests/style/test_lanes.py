"""An adapter that acts on the rows of references alone."""

from pathlib import Path

import pytest

from posttrain import cli
from posttrain.config.types import ConfigError
from posttrain.errors import UserError
from posttrain.style import train as style
from tests.helpers import runs, style_runs
from tests.helpers.settings import validate


def test_an_adapter_on_references_alone(config, tmp_path, capsys):
    """Resumes bit for bit, is drawn by sample, and is refused as a file, as a stage and where it learns nothing."""
    config.lanes, config.references.drop, config.references.drop_both = "references", 0.0, 0.0
    whole = style_runs.whole_and_in_parts(config, tmp_path / "parts")
    last = runs.latest(whole)
    runs.assert_equal(last.tensors["adapter"], runs.latest(config.output).tensors["adapter"])
    assert last.state["lora"]["lanes"] == "references"
    assert max(value.abs().max() for key, value in last.tensors["adapter"].items() if "lora_B" in key) > 1e-4
    reference = Path(config.images.train) / "00.png"
    words = ["--model.path", config.model.path, "--model.dtype", "float32", "--size", "[32,32]", "--steps", "2"]
    words += ["--prompt", "a fox", "--guidance", "0", "--adapter", whole]
    drawn = []
    for name, more in (("with", [f"{reference}:1"]), ("zero", [f"{reference}:0"]), ("without", [])):
        shown = ["--references", *more] if more else []
        assert cli.main(["sample", *words, *shown, "--output", str(tmp_path / name)]) == 0
        drawn.append((tmp_path / name / "000.png").read_bytes())
    assert drawn[0] != drawn[1] == drawn[2]
    capsys.readouterr()
    recipe = str(runs.recipe(config, tmp_path / "r.yaml"))
    for arguments in (
        ["export", "--source", whole, "--format", "lora", "--output", str(tmp_path / "a.safetensors")],
        ["export", "--source", whole, "--format", "diffusers", "--output", str(tmp_path / "model")],
        ["style", "--config", recipe, "--model.start", whole, "--output", str(tmp_path / "next")],
    ):
        assert cli.main(arguments) == 2
        told = capsys.readouterr().err
        assert "acts on the rows of references alone" in told and "use diffusers" not in told
    config.lanes = "all"
    with pytest.raises(UserError, match="lanes references -> all"):
        style.train(config, resume=True)
    config.lanes = "references"
    config.references.drop = 0.1
    with pytest.raises(ConfigError, match="teaches nothing where lanes is references"):
        validate(config)
