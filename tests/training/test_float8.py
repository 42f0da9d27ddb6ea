"""All weights trained with products in 8 bits: which linears, how near to exact, whole runs, and what is refused.

On a CPU torchao emulates the products, with the numbers of a GPU."""

import dataclasses
import functools
import json
import sys
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from posttrain import cli
from posttrain.config.sections import float8_for
from posttrain.config.types import ConfigError
from posttrain.distributed.processes import Processes
from posttrain.errors import UserError
from posttrain.export.export import load_checkpoint
from posttrain.model import architecture, blocks, fp8
from posttrain.model.k2 import K2, Text
from posttrain.sample_config import SampleConfig
from posttrain.tdm import train as tdm
from posttrain.training.evaluate import Evaluator
from posttrain.training.policy import POLICY, load_model
from prompts.records import read_prompts
from tests.distributed.test_sharding import ENGINES
from tests.helpers import runs
from tests.helpers.settings import validate


def made(recipe: str | None, copies: bool = False) -> K2:
    k2 = K2.random("cpu", torch.bfloat16, "tiny", text=False)
    k2.blocks.float8 = recipe
    k2.add_full_role(POLICY, reference=True)
    if copies:
        k2.add_full_copy("fake")
    fp8.train_in_float8(k2)
    return k2


def velocity(k2: K2, role: str | None) -> torch.Tensor:
    x = torch.randn(3, 6, k2.latent_channels, generator=torch.Generator().manual_seed(0))
    text = Text(k2.fuse(k2.random_features(7))[None])
    with k2.role(role):
        return k2.velocity(x, 0.5, text, 2 * k2.pixel_multiple, 3 * k2.pixel_multiple)


def gradients(k2: K2) -> dict[str, torch.Tensor]:
    k2.train_role(POLICY)
    named = k2.role_named_parameters(POLICY)
    found = torch.autograd.grad(velocity(k2, POLICY).square().mean(), list(named.values()))
    return dict(zip(named, found))


def off(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_the_blocks_linears_are_near_the_exact_ones(recipe):
    exact, found = made(None), made(recipe, copies=True)
    changed = {name for name, module in found.transformer.named_modules() if type(module).__name__ != "Linear"}
    linears = {name for name, module in found.transformer.named_modules() if isinstance(module, torch.nn.Linear)}
    of_blocks = {name for name in linears if architecture.is_block_matrix(f"{name}.weight")}
    assert of_blocks == linears & changed and len(of_blocks) == 16
    assert {"img_in", "final_layer.linear", "time_embed.linear_1", "time_mod_proj"} <= linears - of_blocks
    changed_linear: Any = found.transformer.get_submodule("transformer_blocks.0.ff.gate")
    assert changed_linear.config.pad_inner_dim  # numbers of tokens are seldom multiples of 16
    assert found.role_named_parameters(POLICY).keys() == exact.role_named_parameters(POLICY).keys()
    assert all(p.dtype == torch.float32 for p in found.role_parameters(POLICY))
    expected, v = velocity(exact, POLICY), velocity(found, POLICY)
    assert 1e-4 < off(v, expected) < 0.1
    # The reference and a copy begin as the policy, to the bit.
    assert torch.equal(v, velocity(found, None)) and torch.equal(v, velocity(found, "fake"))
    given, wanted = gradients(found), gradients(exact)
    for name in ("transformer_blocks.0.ff.gate.weight", "transformer_blocks.1.attn.to_k.weight", "img_in.weight"):
        assert given[name].dtype == torch.float32 and 1e-4 < off(given[name], wanted[name]) < 0.3, name
    found.blocks.recompute = 2
    again = gradients(found)
    assert all(torch.equal(again[name], value) for name, value in given.items())
    with fp8.exact(found):
        assert torch.equal(velocity(found, POLICY), expected)
    assert torch.equal(velocity(found, POLICY), v)


def test_compiled_it_is_the_same(monkeypatch):
    """Traced whole, with and without gradient, in fp8 and exactly; a second time nothing is compiled again."""
    traced = functools.cache(lambda function, device: torch.compile(function, backend="eager", fullgraph=True))
    monkeypatch.setattr(blocks, "_compiled", traced)
    with torch._dynamo.config.patch(recompile_limit=blocks.MAX_VARIANTS):
        k2 = made("rowwise")
        expected, given = velocity(k2, POLICY), gradients(k2)
        with fp8.exact(k2):
            wanted = velocity(k2, POLICY)
        k2.blocks.compiled = True
        for again in (False, True):
            before = blocks.graphs()
            assert torch.equal(velocity(k2, POLICY), expected)
            found = gradients(k2)
            assert all(torch.equal(found[name], value) for name, value in given.items())
            with fp8.exact(k2):
                assert torch.equal(velocity(k2, POLICY), wanted)
            assert (blocks.graphs() == before) is again


def test_rowwise_scales_save_rows_that_tensorwise_scales_round_away():
    """Rows of a weight that are 2^-20 of the others: below e4m3's least number with one scale for all."""
    linear = torch.nn.Linear(32, 32, bias=False)
    with torch.no_grad():
        linear.weight[0] *= 2**20
    x = torch.randn(4, 32, dtype=torch.bfloat16)
    exact = x.float() @ linear.weight.detach().T
    errors = {}
    for recipe in ("tensorwise", "rowwise"):
        config_class, convert, kind = fp8._training()
        config = config_class.from_recipe_name(recipe)
        net = torch.nn.ModuleDict({"l": torch.nn.Linear(32, 32, bias=False)})
        net["l"].weight = linear.weight
        convert(net, config=dataclasses.replace(config, emulate=True))
        net["l"].__class__ = kind
        net["l"].blocks = made(None).blocks
        errors[recipe] = off(net["l"](x).detach().float()[:, 1:], exact[:, 1:])
    assert errors["tensorwise"] > 0.99 and errors["rowwise"] < 0.1


def test_what_auto_means():
    sizes = (256, 256), (512, 512), (1008, 1024), (1024, 1024), (1280, 1280)
    assert [float8_for(h * w) for h, w in sizes] == ["tensorwise", "rowwise", "rowwise", None, None]
    assert float8_for(256 * 256 + 16) == "rowwise"


# ---- runs -----------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path, model):
    recipe = runs.stpo_config(tmp_path, model)
    recipe.lora, recipe.optim.lr, recipe.model.dtype, recipe.loss.terms_every = None, 3e-4, "bfloat16", 0
    recipe.model.float8, recipe.pairs.size, recipe.steps, recipe.checkpoint.every = "auto", [32, 32], 3, 2
    return recipe


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_run_trains_in_8_bits_and_is_evaluated_exactly(config, tmp_path, capsys, kind):
    config.optim.kind = kind
    path = runs.recipe(config, tmp_path / "r.yaml")
    assert cli.main(["stpo", "--config", str(path)]) == 0
    assert "model.float8: tensorwise, in 24 linears of the blocks of each network" in capsys.readouterr().err
    whole = runs.latest(config.output)
    assert whole.state["model"]["float8"] == "tensorwise"  # what auto meant
    rows = runs.training_rows(config.output)
    assert rows[0]["z"] == 0 and rows[0]["winner"] == 0 and rows[-1]["drift_winner"] > 0
    runs.assert_metrics_are_defined(config.output, "brightness")

    # What is exported draws what was evaluated.
    k2 = load_checkpoint(whole)
    evaluator = Evaluator(k2, read_prompts(config.heldout), [], config.eval, (32, 32), 16, 64, Processes())
    with k2.role(POLICY):
        images = evaluator().images
    for i, image in enumerate(images):
        shown = np.asarray(Image.open(f"{config.output}/samples/step-000003/{i:03d}.png"))
        assert np.array_equal(shown, image)

    # Resumed equals uninterrupted; and exact training is another.
    words = ["--output", str(tmp_path / "half")]
    assert cli.main(["stpo", "--config", str(path), *words, "--steps", "2"]) == 0
    assert cli.main(["stpo", "--config", str(path), *words, "--resume"]) == 0
    runs.assert_equal(runs.latest(tmp_path / "half").tensors["weights"], whole.tensors["weights"])
    words = ["--output", str(tmp_path / "exact"), "--model.float8", "null"]
    assert cli.main(["stpo", "--config", str(path), *words]) == 0
    exact, begun = runs.latest(tmp_path / "exact").tensors["weights"], K2.load(config.model.path).base_state_dict()
    moved = [torch.cat([(t[k] - begun[k]).flatten() for k in exact]) for t in (whole.tensors["weights"], exact)]
    # AdamW makes a whole step of any gradient, so one whose sign 8 bits change counts double.
    assert 1e-3 < off(moved[0], moved[1]) < 0.7
    # Later steps of so large a beta are chaotic in any arithmetic.
    assert rows[0]["grad_norm"] == pytest.approx(runs.training_rows(tmp_path / "exact")[0]["grad_norm"], rel=0.05)


def test_tdm_of_all_weights(tmp_path, model):
    """Student, fake score and teacher compute alike: at the start the student is the teacher."""
    recipe = runs.tdm_config(tmp_path, model)
    recipe.lora, recipe.optim.lr, recipe.model.dtype, recipe.model.float8 = None, 1e-4, "bfloat16", "rowwise"
    tdm.train(recipe)
    first, *_, last = [row for row in runs.rows(recipe.output) if "fake_loss" in row]
    assert first["fake_grad_norm"] > 0 and last["generator_grad_norm"] > 0


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_fsdp2_equals_one_process(command, config, tmp_path, recipe):
    """Weights are gathered in bfloat16, of which one process makes the same fp8."""
    config.model.float8, config.model.recompute = recipe, 2
    for engine, processes in (("ddp", 2), ("fsdp2", 2)):
        config.output = str(tmp_path / engine)
        path = runs.recipe(config, tmp_path / "r.yaml")
        result = command("stpo", "--config", path, processes=processes, **ENGINES.get(engine, {}))
        assert result.returncode == 0, result.stderr[-3000:]
    for a, b in zip(*(runs.training_rows(tmp_path / name) for name in ("ddp", "fsdp2")), strict=True):
        for metric in ("loss", "grad_norm", "winner", "loser", "z"):
            assert a[metric] == pytest.approx(b[metric], rel=1e-3, abs=1e-6), metric
    result = command("stpo", "--config", path, "--output", tmp_path / "zero", processes=2, **ENGINES["zero3"])
    assert result.returncode == 2 and "model.float8: ZeRO-3 does not go with it; use FSDP2" in result.stderr


def test_preflight(config, tmp_path, capsys):
    """The policy begins as the reference, and the export draws what the policy draws exactly."""
    path = runs.recipe(config, tmp_path / "r.yaml")
    assert cli.main(["preflight", "--config", str(path)]) == 0
    out = capsys.readouterr().out
    assert "FAIL" not in out and "the margin z is 0 nats before the first update" in out


# ---- what is refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora": "adapter"}, "is for training all weights, and lora is set; use model.quantize: fp8 for its base"),
        ({"dtype": "float32"}, "fp8 multiplies in bfloat16, and model.dtype is float32"),
        ({"sequence_parallel": 2}, "scales would be those of a part of the tokens"),
        ({"size": None}, "auto goes by image sizes, which are not set; use tensorwise, rowwise or null"),
    ],
)
def test_settings_that_do_not_go_together(config, tmp_path, model, capsys, changes, words):
    if "lora" in changes:
        config.lora = runs.stpo_config(tmp_path, model).lora
    if "size" in changes:
        config.pairs.size = None
    for name in ("dtype", "sequence_parallel"):
        if name in changes:
            setattr(config.model, name, changes[name])
    path = runs.recipe(config, tmp_path / "r.yaml")
    assert cli.main(["stpo", "--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert f"model.float8: {words}" in error and len(error.strip().splitlines()) == 1


def test_reinforcement_learning_and_commands_that_draw_refuse_it(tmp_path, model):
    recipe = runs.config(tmp_path, model)
    recipe.lora, recipe.model.dtype, recipe.model.float8 = None, "bfloat16", "tensorwise"
    with pytest.raises(ConfigError, match=r"model\.float8: would make ratios of the noise of 8 bits"):
        validate(recipe)
    with pytest.raises(ConfigError, match=r"model\.float8: is for training, and this command does not train"):
        validate(SampleConfig("out", recipe.model, prompt="a"))


def test_a_machine_without_it_is_told_before_weights_are_read(config, monkeypatch):
    validate(config)
    config.model.float8 = "tensorwise"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(UserError, match=r"model\.float8: fp8: NVIDIA A100 has none"):
        load_model(config.model, torch.device("cuda"))
    monkeypatch.setitem(sys.modules, "torchao", None)
    for name in [name for name in sys.modules if name.startswith("torchao.")]:
        monkeypatch.setitem(sys.modules, name, None)
    fp8._training.cache_clear()
    config.model.path = "nowhere"
    with pytest.raises(UserError, match=r"model\.float8: fp8 needs torchao .*pip install 'posttrain\[fp8\]'"):
        load_model(config.model, "cpu")


def test_larger_images_are_trained_exactly(config, tmp_path, capsys):
    """auto, at 1024 x 1024: nothing is changed, and the recipe says so."""
    config.pairs.size = [1024, 1024]
    path = runs.recipe(config, tmp_path / "r.yaml")
    assert cli.main(["stpo", "--config", str(path), "--print_config"]) == 0
    assert "float8: null" in capsys.readouterr().out
    assert json.loads(path.read_text())["model"]["float8"] == "auto"
