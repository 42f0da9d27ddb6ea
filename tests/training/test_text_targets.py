"""Runs of each method whose adapters reach the layers that fuse text: policy, reference and fake score read texts of
their own."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from posttrain.errors import UserError
from posttrain.export.export import load_checkpoint
from posttrain.grpo import train as grpo
from posttrain.model import sampler
from posttrain.model.k2 import K2, to_pil
from posttrain.stpo import train as stpo
from posttrain.tdm import train as tdm
from posttrain.tdm.rollout import MU
from posttrain.training import checkpoint
from tests.helpers import runs, tiny

TARGETS = ["to_q", "img_in", "time_mod_proj", "txt_in", "text_fusion.projector", "text_fusion.refiner_blocks"]
METHODS = {
    "grpo": (runs.config, grpo.train),
    "stpo": (runs.stpo_config, stpo.train),
    "tdm": (runs.tdm_config, tdm.train),
}


def recipe(method: str, folder: Path, model: Path) -> Any:
    config: Any = METHODS[method][0](folder, model)
    config.lora.targets, config.steps, config.checkpoint.every, config.checkpoint.keep = TARGETS, 3, 1, 3
    config.eval.every = 1
    if method == "grpo":
        config.loss.kl = 0.1
    if method == "tdm":
        config.lora.targets = ["all"]
    return config


@pytest.fixture(scope="module", params=METHODS)
def trained(request, model, tmp_path_factory):
    """A method's name, its recipe, and what it said."""
    folder = tmp_path_factory.mktemp(request.param)
    config = recipe(request.param, folder, model)
    METHODS[request.param][1](config)
    return request.param, config


def probe(k2: K2, role: str | None) -> torch.Tensor:
    """Of two prompts of different lengths."""
    x = sampler.noise([1, 2], (k2.image_tokens(32, 32), k2.latent_channels))
    with torch.no_grad(), k2.role(role):
        return k2.velocity(x, torch.tensor([0.3, 0.8]), k2.text(tiny.PROMPTS[1:3], 64), 32, 32)


def test_the_text_layers_learn_and_the_reference_stays(trained, model):
    method, config = trained
    saved = runs.latest(config.output)
    assert saved.state["lora"]["targets"] == config.lora.targets
    parts = ["adapter", *(name for name in saved.tensors if name.startswith("fake") and "optim" not in name)]
    assert len(parts) == 1 + (method == "tdm")
    for part in parts:
        moved = {key for key, value in saved.tensors[part].items() if "lora_B" in key and value.abs().max() > 1e-4}
        assert len(moved) == len(saved.tensors[part]) / 2
        assert {"txt_in.linear_1.lora_B.weight", "text_fusion.projector.lora_B.weight", "img_in.lora_B.weight"} <= moved
    k2, base = load_checkpoint(saved), K2.load(model)
    reference, policy, plain = probe(k2, None), probe(k2, "policy"), probe(base, None)
    assert (reference - plain).abs().max() < 1e-5 * plain.abs().max()  # the cached text's, within rounding
    assert (policy - plain).abs().max() > 1e-3


def test_it_begins_as_the_reference(trained, model):
    method, config = trained
    if method == "tdm":
        k2 = K2.load(model)
        tdm.add_roles(k2, config)
        assert all(torch.equal(probe(k2, role), probe(k2, None)) for role in ("policy", "fake"))
        return
    first = runs.training_rows(config.output)[0]
    if method == "grpo":
        assert first["ratio_error"] < 1e-5 and first["kl"] < 1e-12
    else:
        assert first["z"] == 0 and first["drift_winner"] == 0 and first["accuracy"] == 0.5


def test_it_resumes_bit_for_bit(trained, tmp_path):
    method, config = trained
    whole, config.output = config.output, str(tmp_path / "again")
    shutil.copytree(whole, config.output, symlinks=True)
    for step in (2, 3):
        shutil.rmtree(Path(config.output) / f"checkpoints/step-{step:06d}")
    try:
        METHODS[method][1](config, resume=True)
        again = runs.latest(config.output)
    finally:
        config.output = whole
    one = runs.latest(whole)
    assert one.tensors.keys() == again.tensors.keys()
    for name in one.tensors:
        if name != "rng":
            runs.assert_equal(one.tensors[name], again.tensors[name])


def test_evaluation_draws_what_the_policy_draws(trained, model):
    """The images of the last evaluation, from the saved adapter merged into plain weights with cached text."""
    method, config = trained
    saved = runs.latest(config.output)
    k2 = load_checkpoint(saved)
    k2.stack_role("policy")
    k2.merge_stack()
    assert k2.fused_text_is_constant()
    heldout = tiny.PROMPTS[1:] if method == "tdm" else tiny.PROMPTS[2:]
    steps, mu = (4, MU) if method == "tdm" else (2, None)
    shape = (k2.image_tokens(32, 32), k2.latent_channels)
    noise = sampler.noise([sampler.seed_for(config.eval.seed, i) for i in range(2)], shape)
    drawn = to_pil(k2.decode(k2.sample(k2.text(heldout[:2], 64), noise, steps, 32, 32, mu=mu), 32, 32))
    files = sorted(Path(config.output).glob("samples/step-000003/*.png"))
    assert len(files) == 2
    for image, file in zip(drawn, files):
        assert np.abs(np.asarray(image, int) - np.asarray(Image.open(file).convert("RGB"), int)).max() <= 1


def test_what_it_costs_is_said_once(model, tmp_path, capsys):
    config = recipe("stpo", tmp_path, model)
    config.steps, config.eval.every = 1, 0
    stpo.train(config)
    said = capsys.readouterr().err
    assert (
        said.count("lora.targets: txt_in, text_fusion.projector, text_fusion.refiner_blocks adapt how a prompt's") == 1
    )


def test_a_cache_of_features_is_not_one_of_fused_text(model, tmp_path):
    config = recipe("stpo", tmp_path, model)
    config.steps, config.eval.every = 1, 0
    folders = []
    for targets in (TARGETS, None):
        config.lora.targets, config.output = targets, str(tmp_path / f"run-{targets is None}")
        stpo.train(config)
        folders.append(set(Path(config.pairs.cache).iterdir()))
    assert len(folders[0]) == 1 and len(folders[1]) == 2


def test_a_name_that_is_no_layer_is_refused_before_the_model_is_read(model, tmp_path, command):
    config = runs.config(tmp_path, model)
    config.model.path = str(tmp_path / "none")
    result = command("grpo", "--config", runs.recipe(config, tmp_path / "r.yaml"), "--lora.targets", "[to_q,txt]")
    assert result.returncode == 2, result.stderr
    assert "lora.targets: names txt, which K2 does not have; choose from blocks, all, to_q" in result.stderr
    config = runs.config(tmp_path, model)
    config.lora.targets = ["txt_in.linear_9"]
    with pytest.raises(UserError, match=r"'txt_in\.linear_9' is no linear of a K2 block"):
        grpo.train(config)
    assert not (Path(config.output) / "checkpoints").exists()


def test_a_stage_that_adapts_text_is_started_from(model, tmp_path):
    """Fused text is then cached again, with the stage in it."""
    config = recipe("grpo", tmp_path, model)
    config.steps, config.eval.every = 1, 0
    grpo.train(config)
    first = probe(load_checkpoint(runs.latest(config.output)), "policy")
    config.model.start, config.output, config.lora.targets = config.output, str(tmp_path / "second"), None
    config.optim.lr = 1e-9
    grpo.train(config)
    second = load_checkpoint(checkpoint.load(checkpoint.find(config.output)))
    assert second.fused_text_is_constant()
    assert (probe(second, "policy") - first).abs().max() < 1e-5 * first.abs().max()
