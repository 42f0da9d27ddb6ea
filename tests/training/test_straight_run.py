"""From the command to the loss there are at most six calls of our own, so that a run can be read top to bottom."""

import inspect
from pathlib import Path

import pytest

import posttrain
from posttrain import cli
from posttrain.grpo import losses as grpo_losses
from posttrain.mopd import losses as mopd_losses
from posttrain.nft import losses as nft_losses
from posttrain.sft import train as sft
from posttrain.stpo import train as stpo
from posttrain.style import train as style
from posttrain.tdm import losses as tdm_losses
from tests.helpers import runs, style_runs

OURS = Path(posttrain.__file__).parent
MOST_CALLS = 6
METHODS = {
    "grpo": (runs.config, grpo_losses, "clipped_policy"),
    "sft": (runs.sft_config, sft, "flow_loss"),
    "style": (style_runs.config, style, "flow_loss"),
    "stpo": (runs.stpo_config, stpo, "preference_terms"),
    "nft": (runs.nft_config, nft_losses, "nft_loss"),
    "mopd": (runs.mopd_config, mopd_losses, "distance"),
    "tdm": (runs.tdm_config, tdm_losses, "fake_loss"),
}


@pytest.mark.parametrize("method", METHODS)
def test_calls_from_the_command_to_the_loss(method, model, tmp_path, monkeypatch):
    make, module, name = METHODS[method]
    loss, paths = getattr(module, name), []

    def traced(*arguments, **options):
        ours = [frame.function for frame in inspect.stack()[1:] if Path(frame.filename).is_relative_to(OURS)]
        paths.append(ours[::-1])  # the outermost first
        return loss(*arguments, **options)

    monkeypatch.setattr(module, name, traced)
    config = make(tmp_path, model)
    config.steps, config.eval.every = 1, 0
    if method == "tdm":
        config.fake.warmup = 0
    assert cli.main([method, "--config", str(runs.recipe(config, tmp_path / "recipe.yaml"))]) == 0
    training = [path for path in paths if "updates" in path]  # the others are evaluations
    assert training
    for path in training:
        assert path[0] == "main" and len(path) <= MOST_CALLS, " -> ".join([*path, name])
