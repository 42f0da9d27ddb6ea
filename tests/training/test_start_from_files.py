"""Runs that start from an adapter's file of another tool, merged or continued, and exports and images of such files."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import Krea2Pipeline
from PIL import Image
from safetensors.torch import load_file, save_file

import posttrain as pt
from posttrain.config.sections import LoraConfig, ModelConfig
from posttrain.errors import UserError
from posttrain.export.config import ExportConfig
from posttrain.export.export import export, load_checkpoint
from posttrain.grpo import train as grpo
from posttrain.model import key_names, sampler
from posttrain.model.k2 import K2
from posttrain.sample_config import SampleConfig
from posttrain.sample_images import sample
from posttrain.tdm import train as tdm
from posttrain.training import policy
from posttrain.training.policy import POLICY, add_policy, load_base, load_model, stack_earlier
from tests.export.test_export import distance, ours, stock_latents
from tests.helpers import runs, tiny

LAYERS = ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.ff.down", "txt_in.linear_2", "img_in")
TARGETS = ["to_q", "ff.down", "txt_in", "img_in"]


@pytest.fixture(scope="module")
def files(model, tmp_path_factory):
    """By form: a file, and the whole weights that it means, in float64."""
    folder = tmp_path_factory.mktemp("files")
    base = K2.load(model).base_state_dict()
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator) * 0.2

    found = {}
    for form in ("lora", "dora", "lokr", "mixed"):
        tensors, whole = {}, {key: value.double() for key, value in base.items()}
        for rank, layer in enumerate(LAYERS, 2):
            weight = whole[f"{layer}.weight"]
            outputs, inputs = weight.shape
            name = "lora_unet_" + key_names.original_name(f"{layer}.").removesuffix(".").replace(".", "_")
            if form == "lokr" or (form == "mixed" and rank == 2):
                w1, w2 = random(4, 4), random(outputs // 4, inputs // 4)
                tensors |= {f"{name}.lokr_w1": w1, f"{name}.lokr_w2": w2, f"{name}.alpha": torch.tensor(1e10)}
                update = torch.kron(w1.double(), w2.double())
            else:
                a, b = random(rank, inputs), random(outputs, rank)
                tensors |= {
                    f"{name}.lora_down.weight": a,
                    f"{name}.lora_up.weight": b,
                    f"{name}.alpha": torch.tensor(1.0),
                }
                update = b.double() @ a.double() / rank
            if form == "dora":
                magnitude = tensors[f"{name}.dora_scale"] = weight.norm(dim=1, keepdim=True).float() * 1.1
                changed = weight + update
                update = magnitude.double() * changed / changed.norm(dim=1, keepdim=True) - weight
            whole[f"{layer}.weight"] = weight + update
        save_file(tensors, folder / f"{form}.safetensors")
        found[form] = folder / f"{form}.safetensors", whole
    return found


def with_weights(model, whole) -> K2:
    k2 = K2.load(model)
    k2.transformer.load_state_dict({key: value.float() for key, value in whole.items()})
    return k2


def probe(k2: K2, role: str | None) -> torch.Tensor:
    x = sampler.noise([1, 2], (k2.image_tokens(32, 32), k2.latent_channels))
    with torch.no_grad(), k2.role(role):
        return k2.velocity(x, torch.tensor([0.3, 0.8]), k2.text(tiny.PROMPTS[1:3], 64), 32, 32)


def settings(model, **changed) -> ModelConfig:
    return ModelConfig(path=str(model), dtype="float32", **changed)


FORMS = ["lora", "dora", "lokr", "mixed"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("targets", [None, ["all"]])
def test_merged_the_policy_begins_without_drift(files, model, form, targets):
    """Drift |v_policy - v_reference|^2 of 0, and both are the model with the file. It is exactly 0 where the file was
    merged into weights; a LoRA lies beside the policy's factors in one product, which may add its ranks in another
    order than the reference's alone."""
    file, whole = files[form]
    k2 = load_model(settings(model, start=str(file)), "cpu")
    add_policy(k2, LoraConfig(4, 8.0, targets), 0, reference=True)
    policy, reference = probe(k2, POLICY), probe(k2, None)
    drift = float((policy - reference).square().sum() / reference.square().sum())
    assert drift == 0.0 if form in ("dora", "lokr") else drift < 1e-12
    wanted, plain = probe(with_weights(model, whole), None), probe(K2.load(model), None)
    assert distance(reference, wanted) < 1e-5 * wanted.abs().max() and distance(wanted, plain) > 1e-2
    assert [entry["path"][-16:] for entry in k2.origin["merged"]] == [str(file)[-16:]]


@pytest.mark.parametrize("rank", [5, 8])
def test_continued_the_role_begins_at_the_factors(files, model, rank):
    """And the reference is the bare base, to the last bit; ranks beyond the file's have no effect yet."""
    file, whole = files["lora"]
    k2 = load_model(settings(model, start=str(file), start_as="continue"), "cpu")
    add_policy(k2, LoraConfig(rank, 3.0, TARGETS), 0, reference=True)
    wanted, fresh = probe(with_weights(model, whole), None), K2.load(model)
    assert distance(probe(k2, POLICY), wanted) < 1e-5 * wanted.abs().max()
    add_policy(fresh, LoraConfig(rank, 3.0, TARGETS), 0, reference=True)
    assert torch.equal(probe(k2, None), probe(fresh, None))
    assert k2.origin["merged"] == [] and k2.origin["continued"]["path"].endswith("lora.safetensors")
    state = k2.role_state_dict(POLICY)
    assert all(value[5:].any() for key, value in state.items() if "lora_A" in key and rank > 5)
    assert not k2.begins_with


@pytest.mark.parametrize(
    ("form", "lora", "says"),
    [
        ("lora", LoraConfig(4, 4.0, TARGETS), r"lora\.rank: is 4, and model\.start has rank 5; use at least that"),
        ("lora", LoraConfig(8, 8.0, ["to_q", "img_in"]),
         r"lora\.targets: model\.start adapts .*ff\.down, txt_in\.linear_2 too; name also ff\.down, txt_in\.linear_2"),
        ("dora", LoraConfig(8, 8.0), r"continue needs a LoRA, and .*dora\.safetensors is DoRA; use merge"),
        ("mixed", LoraConfig(8, 8.0), r"continue needs a LoRA, and .*mixed\.safetensors is LoKr; use merge"),
    ],
)  # fmt: skip
def test_what_cannot_be_continued(files, model, form, lora, says):
    with pytest.raises(UserError, match=says):
        add_policy(load_model(settings(model, start=str(files[form][0]), start_as="continue"), "cpu"), lora, 0, True)


def test_what_cannot_be_continued_is_said_before_the_base_is_read(files, model, monkeypatch):
    monkeypatch.setattr(policy, "read_base", lambda *_: pytest.fail("the base is read"))
    with pytest.raises(UserError, match="continue needs a LoRA"):
        load_model(settings(model, start=str(files["dora"][0]), start_as="continue"), "cpu")


def test_continued_from_a_run_on_another(files, model, tmp_path):
    """What the run stood on stays below the policy; only its own adapter is continued."""
    config = runs.config(tmp_path, model)
    config.steps, config.optim.lr, config.model.start = 1, 0.02, str(files["lokr"][0])
    grpo.train(config)
    first = load_checkpoint(runs.latest(config.output))
    k2 = load_model(settings(model, start=config.output, start_as="continue"), "cpu")
    add_policy(k2, LoraConfig(4, 16.0), 3, reference=True)
    assert torch.equal(probe(k2, None), probe(first, None))
    assert distance(probe(k2, POLICY), probe(first, POLICY)) < 1e-5 * probe(first, POLICY).abs().max()
    assert len(k2.origin["merged"]) == 1


@pytest.fixture(scope="module", params=["lora", "mixed", "continue"])
def run(request, files, model, tmp_path_factory):
    """A GRPO run of two steps from a file."""
    folder = tmp_path_factory.mktemp(request.param)
    file = shutil.copy(files["mixed" if request.param == "mixed" else "lora"][0], folder / "theirs.safetensors")
    config = runs.config(folder, model)
    config.model.start, config.steps, config.checkpoint.every = str(file), 2, 1
    config.lora.targets = TARGETS
    if request.param == "continue":
        config.model.start_as, config.lora.rank = "continue", 6
    grpo.train(config)
    return request.param, config


def test_a_run_from_a_file_resumes_bit_for_bit(run, tmp_path):
    _, config = run
    whole, config.output = config.output, str(tmp_path / "again")
    shutil.copytree(whole, config.output, symlinks=True)
    shutil.rmtree(Path(config.output) / "checkpoints/step-000002")
    try:
        grpo.train(config, resume=True)
        for name in ("adapter", "optimizer"):
            runs.assert_equal(runs.latest(whole).tensors[name], runs.latest(config.output).tensors[name])
    finally:
        config.output = whole


def test_resuming_with_another_start_is_refused(run, tmp_path):
    form, config = run
    shutil.copytree(config.output, tmp_path / "again", symlinks=True)
    whole, before = config.output, config.model.start_as
    config.output, config.model.start_as = str(tmp_path / "again"), "merge" if form == "continue" else "continue"
    config.steps = 3
    try:
        with pytest.raises(UserError, match=f"start_as.*{before}"):
            grpo.train(config, resume=True)
    finally:
        config.output, config.model.start_as, config.steps = whole, before, 2


def test_exports_of_a_run_from_a_file(run, model, tmp_path):
    """Stock diffusers draws with them what the policy draws; what was merged is in no LoRA."""
    form, config = run
    policy = load_checkpoint(runs.latest(config.output))
    expected = ours(policy, 1.5, POLICY)
    export(ExportConfig(config.output, str(tmp_path / "out")))
    assert distance(stock_latents(Krea2Pipeline.from_pretrained(tmp_path / "out"), policy, 1.5), expected) < 1e-4
    card = (tmp_path / "out/README.md").read_text()
    if form == "mixed":
        assert "1. an adapter's file: LoKr (`theirs.safetensors`)" in card
        with pytest.raises(UserError, match=r"format: .*theirs\.safetensors is LoKr; use diffusers or original"):
            export(ExportConfig(config.output, str(tmp_path / "a.safetensors"), "lora"))
        return
    assert (form == "continue") != ("an adapter's file: an adapter of rank 5 (`theirs.safetensors`)" in card)
    export(ExportConfig(config.output, str(tmp_path / "a.safetensors"), "lora-original"))
    pipe = Krea2Pipeline.from_pretrained(model)
    pipe.load_lora_weights(tmp_path / "a.safetensors")
    assert distance(stock_latents(pipe, policy, 1.5), expected) < 1e-4


def test_a_file_that_has_changed_or_is_gone_is_refused(run, tmp_path):
    form, config = run
    if form == "continue":
        return
    file = Path(config.model.start)
    saved, kept = runs.latest(config.output), file.read_bytes()
    try:
        tensors = load_file(file)
        save_file({key: value * 1.5 for key, value in tensors.items()}, file)
        with pytest.raises(UserError, match=r"theirs\.safetensors: has changed since .*trained on top of it"):
            load_base(saved)
        file.unlink()
        with pytest.raises(
            UserError, match=r"theirs\.safetensors: is gone, and .* was trained on top of it; put it back"
        ):
            stack_earlier(load_base.__globals__["K2"].load(saved.state["model"]["path"]), saved)
    finally:
        file.write_bytes(kept)


# ---- sample, export, library, tdm, the command line -----------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_images_with_a_file(files, model, tmp_path, form):
    """As the model with the weights that it means."""
    file, whole = files[form]
    config = SampleConfig(
        output=str(tmp_path / "out"), model=settings(model), prompt=tiny.PROMPTS[1], adapter=str(file), size=[32, 32],
        steps=3, guidance=1.5, images=2,
    )  # fmt: skip
    sample(config)
    theirs = with_weights(model, whole)
    theirs.pipe.save_pretrained(tmp_path / "merged")
    config.output, config.adapter, config.model.path = str(tmp_path / "same"), None, str(tmp_path / "merged")
    sample(config)
    for name in ("000.png", "001.png"):
        drawn = [np.asarray(Image.open(tmp_path / folder / name), int) for folder in ("out", "same")]
        assert np.abs(drawn[0] - drawn[1]).max() <= 1
    adapted = pt.load_model(model, adapter=file)
    role = POLICY if form in ("lora", "mixed") else None
    assert [*adapted.roles] == ([POLICY] if role else [])
    assert distance(probe(adapted, role), probe(theirs, None)) < 1e-5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("format", ["diffusers", "original", "lora", "lora-original"])
def test_exports_of_a_file(files, model, tmp_path, form, format):
    """A LoRA's names are changed, or any is merged into the model."""
    file, whole = files[form]
    output = tmp_path / ("out" if format == "diffusers" else "out.safetensors")
    config = ExportConfig(str(file), str(output), format, model=settings(model))
    if format.startswith("lora") and form != "lora":
        kind = {"dora": "DoRA", "lokr": "LoKr", "mixed": "LoKr"}[form]
        with pytest.raises(UserError, match=rf"format: .*{form}\.safetensors is {kind}; use diffusers or original"):
            export(config)
        return
    export(config)
    theirs = with_weights(model, whole)
    expected = ours(theirs, 1.5)
    if format == "diffusers":
        pipe = Krea2Pipeline.from_pretrained(output)
        assert "an adapter's file" in (output / "README.md").read_text()
    elif format == "original":
        pipe = K2.load(model, transformer_file=output).pipe
    else:
        pipe = Krea2Pipeline.from_pretrained(model)
        pipe.load_lora_weights(output)
    assert distance(stock_latents(pipe, theirs, 1.5), expected) < 1e-4


def test_rounding_of_what_is_merged_is_measured(files, model, tmp_path, capsys):
    """In bfloat16 most of a small change is lost, and an export of it is refused."""
    tensors = {f"diffusion_model.{key_names.original_name(f'{LAYERS[0]}.')}diff": torch.randn(128, 128) * 1e-5}
    save_file(tensors, tmp_path / "small.safetensors")
    config = ExportConfig(str(tmp_path / "small.safetensors"), str(tmp_path / "out"), model=ModelConfig(str(model)))
    with pytest.raises(UserError, match=r"merged in bfloat16: 0\.\d+ of what was trained is kept"):
        export(config)
    config.dtype = "float32"
    export(config)
    assert "merged in float32: 1.000 of what was trained is kept" in capsys.readouterr().out


def test_a_student_of_a_teacher_with_a_file(files, model, tmp_path):
    config = runs.tdm_config(tmp_path, model)
    config.model.start, config.steps = str(files["mixed"][0]), 2
    tdm.train(config)
    saved = runs.latest(config.output)
    assert len(saved.state["origin"]["merged"]) == 1
    wanted = probe(with_weights(model, files["mixed"][1]), None)
    assert distance(probe(load_checkpoint(saved), None), wanted) < 1e-5 * wanted.abs().max()


def test_the_command_line(files, model, tmp_path, command):
    """One line and exit code 2, before the model is read."""
    config = runs.config(tmp_path, model)
    config.model.path = str(tmp_path / "none")
    recipe = runs.recipe(config, tmp_path / "r.yaml")
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(files["lora"][0].read_bytes()[:-50])
    (tmp_path / "peft").mkdir()
    shutil.copy(files["lora"][0], tmp_path / "peft/adapter_model.safetensors")
    out = ["--output", tmp_path / "out"]
    for args, says in (
        (["grpo", "--config", recipe, "--model.start_as", "continue"], "start_as: has nothing to continue"),
        (
            [
                "grpo",
                "--config",
                recipe,
                "--model.start",
                files["lora"][0],
                "--model.start_as",
                "continue",
                "--lora",
                "null",
            ],
            "model.start_as: continue needs an adapter to train, and lora is null",
        ),
        (
            ["export", "--source", files["lora"][0], *out],
            "model: is null, and a file does not say which model it is for",
        ),
        (["export", "--source", "runs/a", "--model.path", model, *out], "model: has no meaning here: that of a run is"),
        (["export", "--source", torn, "--model.path", model, *out], "torn.safetensors: not a whole safetensors file"),
        (["export", "--source", tmp_path / "no.safetensors", "--model.path", model, *out], "source: "),
    ):
        result = command(*args)
        assert result.returncode == 2 and says in result.stderr, result.stderr
        assert "Traceback" not in result.stderr and not (tmp_path / "out").exists()
    config.model.path = str(model)
    recipe = runs.recipe(config, tmp_path / "r.yaml")
    for start, says in (
        (
            tmp_path / "no.safetensors",
            "no.safetensors: no such file; give a LoRA file, a run or one of its checkpoints",
        ),
        (torn, "torn.safetensors: not a whole safetensors file"),
        (tmp_path / "peft", "peft/adapter_model.safetensors"),
    ):
        result = command("grpo", "--config", recipe, "--model.start", start)
        assert result.returncode == 2 and "model.start: " in result.stderr and says in result.stderr, result.stderr
    header = json.loads(
        files["lora"][0].read_bytes()[8:][: int.from_bytes(files["lora"][0].read_bytes()[:8], "little")]
    )
    assert "lora_unet_txtmlp_3.alpha" in header
    result = command(
        "sample", "--model.path", model, "--model.dtype", "float32", "--adapter", files["dora"][0], "--size", "[32,32]",
        "--steps", "1", "--prompt", "a fox", *out,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
