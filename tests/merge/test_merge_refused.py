"""What cannot be merged or extracted: one line and exit code 2, before a model is read, and nothing is left behind."""

import dataclasses
import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from posttrain import cli
from posttrain.config.sections import ModelConfig
from posttrain.merge import weights
from posttrain.model import load
from posttrain.training import checkpoint
from tests.helpers import runs, tiny
from tests.training.test_stages import stage


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """Runs a and b on the base, c on a, and one on another base; LoRA files; another K2."""
    folder = tmp_path_factory.mktemp("refused")
    base = ModelConfig(str(model), dtype="float32")
    for seed, name in enumerate("ab", 1):
        stage(folder / name, base, 0.2, seed)
    stage(folder / "c", ModelConfig(str(model), dtype="float32", start=str(folder / "a")), 0.2, 3)
    other = tiny.save(folder / "other", seed=9)
    stage(folder / "elsewhere", ModelConfig(str(other), dtype="float32"), 0.2, 4)
    tiny.save(folder / "turbo", distilled=True, seed=1)
    name = "transformer.transformer_blocks.0.attn.to_q"
    for file, width in (("fits", 128), ("wide", 160)):
        factors = {f"{name}.lora_A.weight": torch.ones(2, width), f"{name}.lora_B.weight": torch.ones(128, 2)}
        save_file(factors, folder / f"{file}.safetensors")
    factors = {
        "transformer.img_out.lora_A.weight": torch.ones(2, 64),
        "transformer.img_out.lora_B.weight": torch.ones(128, 2),
    }
    save_file(factors, folder / "outside.safetensors")
    begun = checkpoint.load(checkpoint.find(folder / "b"))
    entry = {"path": str(checkpoint.find(folder / "a")), "sha256": ""}
    origin = begun.state["origin"] | {"continued": entry}
    checkpoint.save(folder / "on/checkpoints", 1, begun.tensors, begun.state | {"origin": origin}, 1)
    zero = checkpoint.load(checkpoint.find(folder / "a"))
    empty = {key: torch.zeros_like(value) for key, value in zero.tensors["adapter"].items()}
    checkpoint.save(folder / "zero/checkpoints", 1, {"adapter": empty}, zero.state, 1)
    student = zero.state | {"method": "tdm"}
    checkpoint.save(folder / "student/checkpoints", 1, zero.tensors, student, 1)
    (folder / "old:0.5").mkdir()
    shutil.copytree(folder / "a/checkpoints", folder / "old:0.5/checkpoints")
    return folder


CASES = [
    ("{f}/a:half {f}/b", "parents[0]: is '{f}/a:half': 'half' is not a number; write NAME:WEIGHT"),
    ("{f}/a:nan", "a weight of nan is not a finite number other than 0"),
    ("{f}/a:0 {f}/b", "a weight of 0 is not a finite number"),
    (":2", "parents[0]: is ':2': has no name before the colon"),
    ("{f}/a:1 {f}/a:2", "parents[1]: {f}/a is named twice; name it once, with the sum of its weights"),
    ("{f}/a {f}/a/checkpoints/step-000001", "are the same; name it once, with the sum of the weights"),
    ("{f}/a {f}/none", "parents: {f}/none: holds no whole checkpoint; give a run directory or one of its checkpoints"),
    ("{f}/a {f}/none.safetensors:2", "parents: {f}/none.safetensors: no such file; give a LoRA file"),
    (
        "{f}/a {f}/elsewhere",
        "parents: {f}/elsewhere was trained on another base than {f}/a (their",
    ),
    ("{f}/c {f}/a", "parents: {f}/c was trained on top of {f}/a and holds it already; leave {f}/a out"),
    ("{f}/on {f}/a", "parents: {f}/on has continued {f}/a and holds it already; leave {f}/a out"),
    ("{f}/a {f}/student", "parents: {f}/student is a student of posttrain tdm; merge first, and distil the merge"),
    ("{f}/a {f}/zero", "every B factor is 0, so it does nothing; give a trained adapter"),
    ("{f}/fits.safetensors", "model: no parent is a run, which would say what its base is; give it as --model.path"),
    ("{f}/a {f}/wide.safetensors", "factors of [2, 160] and [128, 2] do not fit a layer of [128, 128]"),
    ("{f}/a {f}/outside.safetensors", "none of its 2 keys binds to a layer of this model"),
    ("{f}/a {f}/b --rank 9", "rank: is 9, and the ranks of all parents together are 8; leave it out to keep all"),
    ("{f}/a {f}/b --rank 0", "rank: is 0; use 1 or more"),
    ("{f}/a {f}/b --density 0", "density: is 0.0; use a number above 0, up to 1"),
    ("{f}/a {f}/b --density 1.5", "density: is 1.5; use a number above 0, up to 1"),
    ("{f}/a {f}/b --density 0.2", "density: is of ties, and method is linear; use method ties, or weights"),
    ("{f}/a {f}/b --scale 0.5", "scale: is of ties, and method is linear; use method ties, or weights (NAME:WEIGHT)"),
    ("{f}/a:-1 {f}/b --method ties", "ties takes a mean, so weights are above 0; use linear"),
    ("{f}/a {f}/turbo", "parents: {f}/turbo: is_distilled differs from that of the base"),
    ("{f}/a {f}/other --rank 4", "rank: is for adapters, and there is a whole model among the parents"),
    ("{f}/a {f}/b --dtype float32", "dtype: is of a whole model; an adapter is in float32 anyway: leave it out"),
    ("{f}/a {f}/b --keep 2", "keep: is 2.0; use 0 to 1"),
    ("{f}/a --model.path {f}/none", "{f}/none: no such directory; give a K2 pipeline directory"),
    ("{f}/a --output {f}/b", "output: {f}/b exists; choose another name"),
    ("{f}/a --output {f}/fits.safetensors/m", "output: {f}/fits.safetensors/m: {f}/fits.safetensors takes no file"),
    ("", "parents: missing; give it: posttrain merge PARENTS"),
]


@pytest.fixture
def nothing_is_read(monkeypatch):
    """Neither a whole model nor one of its tensors."""

    def refused(*_, **__):
        raise AssertionError("a model is read")

    monkeypatch.setattr(load, "load_model", refused)
    monkeypatch.setattr(weights.Weights, "__getitem__", refused)


@pytest.mark.parametrize(("words", "says"), CASES)
def test_parents_that_cannot_be_merged(words, says, folder, tmp_path, capsys, nothing_is_read):
    words = words.format(f=folder).split()
    output = [] if not words or "--output" in words else ["--output", str(tmp_path / "m")]
    assert cli.main(["merge", *words, *output]) == 2
    error = capsys.readouterr().err
    line = error.splitlines()[-1]
    assert line.startswith("posttrain: error: ") and says.format(f=folder) in line, error
    assert list(tmp_path.iterdir()) == []


def test_a_path_may_have_a_colon(folder, tmp_path):
    """What exists is the path, and not a weight."""
    words = ["merge", f"{folder}/old:0.5", "--output", str(tmp_path / "m"), "--evaluate", "false"]
    assert cli.main(words) == 0
    (parent,) = json.loads((tmp_path / "m/merge.json").read_text())["parents"]
    assert parent["weight"] == 1 and parent["name"] == f"{folder}/old:0.5"


def test_another_base_on_disk_is_refused(folder, tmp_path, capsys):
    """A whole model is made from the base that the runs were trained on; its files say whether they are that."""
    words = ["merge", f"{folder}/a", "--method", "ties", "--model.path", f"{folder}/other", "--evaluate", "false"]
    assert cli.main([*words, "--output", str(tmp_path / "m")]) == 2
    assert f"{folder}/other: is not the model that {folder}/a was trained on" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_tensor_is_named(folder, model, tmp_path, capsys):
    broken = shutil.copytree(folder / "other", tmp_path / "broken")
    file = broken / "transformer/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["img_in.weight"] = tensors["img_in.weight"] / 0
    save_file(tensors, file)
    words = ["merge", str(broken), "--model.path", str(model), "--output", str(tmp_path / "m")]
    assert cli.main(words) == 2
    assert f"{broken}: img_in.weight holds numbers that are not finite" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"prompts": {"train": "x", "heldout": "none.jsonl"}}, "run: none.jsonl"),
        ({"sampling": {}}, "run: it does not say the size of its images; give it as --size"),
        ({"rewards": [{"name": "r", "function": "tests.helpers.runs:nowhere"}]}, "reward r: function"),
    ],
)
def test_a_recipe_that_cannot_be_measured(changes, says, folder, model, tmp_path, capsys, nothing_is_read):
    run = shutil.copytree(folder / "a", tmp_path / "run")
    recipe = dataclasses.asdict(runs.config(run, model)) | changes
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert cli.main(["merge", str(run), "--output", str(tmp_path / "m")]) == 2
    assert says in capsys.readouterr().err.splitlines()[-1] and not (tmp_path / "m").exists()


EXTRACTS = [
    ("{f}/turbo --from {m}", "rank: give either rank, such as 64, or error, such as 0.3"),
    ("{f}/turbo --from {m} --rank 4 --error 0.1", "rank: give either rank"),
    ("{f}/turbo --from {m} --error 1.5", "error: is 1.5; use a number between 0 and 1"),
    ("{m} --from {m} --rank 4", "as the base; give the model that differs from it"),
    ("{f}/none --from {m} --rank 4", "none: no such directory"),
    ("{f}/turbo --from {f}/none --rank 4", "{f}/none: no such directory"),
    ("{f}/none.safetensors --from {m} --rank 4", "target: {f}/none.safetensors: no such file"),
    (
        "{f}/a --from {m} --rank 4",
        "target: {f}/a trained an adapter: posttrain export --format lora",
    ),
    ("{f}/fits.safetensors --from {m} --rank 4", "keys do not match this model"),
    ("{f}/turbo --from {m} --rank 4 --output x", "output: is x; it is one file: end it in .safetensors"),
    ("{f}/turbo --from {m} --rank 4 --output {f}/fits.safetensors", "fits.safetensors exists; choose another name"),
    ("{f}/turbo --from {m} --rank 4 --prompts {f}/few.jsonl", "few.jsonl has 1 prompt; give 8 or more"),
    ("{f}/turbo --rank 4", "base: missing"),
]


@pytest.mark.parametrize(("words", "says"), EXTRACTS)
def test_models_that_cannot_be_extracted(words, says, folder, model, tmp_path, capsys, nothing_is_read):
    (folder / "few.jsonl").write_text('{"prompt": "a red circle"}\n')
    words = words.format(f=folder, m=model).split()
    output = [] if "--output" in words else ["--output", str(tmp_path / "x.safetensors")]
    assert cli.main(["extract", *words, *output]) == 2
    error = capsys.readouterr().err
    assert says.format(f=folder, m=model) in error and error.count("\n") == 1, error
    assert list(tmp_path.iterdir()) == []


def test_models_that_are_the_same_have_no_difference(model, tmp_path, capsys):
    copy = shutil.copytree(model, tmp_path / "copy")
    words = ["extract", str(copy), "--from", str(model), "--rank", "4", "--output", str(tmp_path / "x.safetensors")]
    assert cli.main(words) == 2
    assert f"target: {copy} equals {model} in all layers that a LoRA could hold" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]
