"""Merges of adapters through the command: exact sums, shared stages, ranks, TIES, and what reads the result."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from posttrain import cli
from posttrain.config.sections import ModelConfig
from posttrain.export.config import ExportConfig
from posttrain.export.export import export, load_checkpoint
from posttrain.merge import algebra
from posttrain.model.k2 import K2
from posttrain.model.load import keeps_fp32
from posttrain.model.lora_file import add_lora, linear_shapes, read_lora
from posttrain.training import checkpoint
from posttrain.training.policy import POLICY, load_model, saved_tensors
from tests.helpers import runs, tiny
from tests.training.test_stages import stage, velocity


def config(model: Path, start: Path | None = None) -> ModelConfig:
    return ModelConfig(str(model), dtype="float32", start=start and str(start))


@pytest.fixture(scope="module")
def parents(model, tmp_path_factory):
    """Two adapters on the base, of rank 4 with alpha 8."""
    folder = tmp_path_factory.mktemp("parents")
    return [stage(folder / name, config(model), 0.2, seed) for seed, name in enumerate("ab", 1)]


def merge(*words, quiet: bool = True) -> int:
    return cli.main(["merge", *map(str, words), *(["--evaluate", "false"] if quiet else [])])


def updates(saved: Path) -> dict[str, torch.Tensor]:
    """What a checkpoint adds to each layer, with the stages that it stands on, fp64."""
    factors = load_checkpoint(checkpoint.load(checkpoint.find(saved))).active_factors(POLICY)
    found = {}
    for key, a in factors.items():
        if "lora_A" in key:
            found[key.removesuffix(".lora_A.weight")] = factors[key.replace("lora_A", "lora_B")].double() @ a.double()
    return found


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], error: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert (found[key] - value).norm() <= error * value.norm(), key


def policy_velocity(saved: Path) -> torch.Tensor:
    k2 = load_checkpoint(checkpoint.load(checkpoint.find(saved)))
    with k2.role(POLICY):
        return velocity(k2)


# ---- sums -----------------------------------------------------------------------------------------------------


def test_concatenation_is_the_sum_of_the_updates(parents, tmp_path, model, capsys):
    """To 1e-6, with weights and alpha / rank = 2; in the factors, in the velocity, and in what merge.json says."""
    output, (a, b) = tmp_path / "m", parents
    assert merge(f"{a}:0.5", f"{b}:0.7", "--output", output) == 0
    first, second, found = updates(a), updates(b), updates(output)
    assert_close(found, {key: 0.5 * first[key] + 0.7 * second[key] for key in first})
    saved = checkpoint.load(checkpoint.find(output))
    assert saved.state["lora"]["rank"] == 8 and saved.state["origin"]["merged"] == []
    # As a base to which the sum is added.
    k2 = load_model(config(model), "cpu")
    weights = k2.base_state_dict()
    for layer, change in found.items():
        weights[f"{layer}.weight"] += change.float()
    assert (policy_velocity(output) - velocity(k2)).abs().max() < 1e-5

    written = json.loads((output / "merge.json").read_text())
    assert [parent["weight"] for parent in written["parents"]] == [0.5, 0.7]
    layer = "transformer_blocks.1.ff.up"
    row, pair = written["layers"][layer], [0.5 * first[layer], 0.7 * second[layer]]
    assert row["rank"] == 8 and row["error"] == 0 and len(written["layers"]) == 24
    assert row["norms"] == pytest.approx([float(first[layer].norm()), float(second[layer].norm())], rel=1e-5)
    cosine = float((first[layer] * second[layer]).sum() / first[layer].norm() / second[layer].norm())
    assert row["cosines"]["1-2"] == pytest.approx(cosine, abs=1e-6)
    assert row["conflict"] == pytest.approx(algebra.overlap(pair, [1, 1]).conflict, rel=1e-5)
    told = capsys.readouterr().out
    assert "an adapter of rank 8" in told and "sign conflict: 0.1" in told and "cosines of the changes" in told


def test_lora_files_merge_with_runs(parents, tmp_path, model):
    """A file with other ranks and fewer layers, in the original names, counts on the bare base; its layers alone have
    more ranks, and those of the others are padded."""
    a, name = parents[0], "diffusion_model.blocks.1.attn.wq"
    generator = torch.Generator().manual_seed(5)
    shape = K2.load(model).base_state_dict()["transformer_blocks.1.attn.to_q.weight"].shape
    file = tmp_path / "other.safetensors"
    factors = torch.randn(3, shape[1], generator=generator), torch.randn(shape[0], 3, generator=generator)
    save_file(
        {f"{name}.lora_A.weight": factors[0], f"{name}.lora_B.weight": factors[1], f"{name}.alpha": torch.tensor(6.0)},
        file,
    )
    assert merge(a, f"{file}:-0.25", "--output", tmp_path / "m") == 0
    expected = updates(a)
    expected["transformer_blocks.1.attn.to_q"] -= 0.25 * (6 / 3) * (factors[1].double() @ factors[0].double())
    assert_close(updates(tmp_path / "m"), expected)
    assert checkpoint.load(checkpoint.find(tmp_path / "m")).state["lora"]["rank"] == 7

    # Files alone need a base; the result is the same LoRA at half its strength.
    assert merge(f"{file}:0.5", "--output", tmp_path / "n", "--model.path", model) == 0
    found = {key: value for key, value in updates(tmp_path / "n").items() if value.any()}
    assert_close(found, {"transformer_blocks.1.attn.to_q": factors[1].double() @ factors[0].double()})


def test_a_file_that_is_no_lora_goes_into_a_whole_model(parents, tmp_path, model):
    """DoRA, as .5 of what it makes of the weight: m (W + B A) / |W + B A| of each output. A LoRA goes beside it."""
    name, base = "transformer_blocks.1.attn.to_q", K2.load(model).base_state_dict()
    weight, generator = base[f"{name}.weight"], torch.Generator().manual_seed(5)
    a, b = torch.randn(3, weight.shape[1], generator=generator), torch.randn(weight.shape[0], 3, generator=generator)
    magnitude = torch.rand(weight.shape[0], generator=generator)
    file = tmp_path / "dora.safetensors"
    start = f"transformer.{name}.lora"
    save_file({f"{start}_A.weight": a, f"{start}_B.weight": b, f"{start}_magnitude_vector": magnitude}, file)
    assert merge(f"{file}:0.5", parents[0], "--output", tmp_path / "m") == 0
    changed = weight + b @ a
    dora = magnitude[:, None] * changed / changed.norm(dim=1, keepdim=True) - weight
    found, own = K2.load(tmp_path / "m").base_state_dict(), updates(parents[0])
    for key, value in base.items():
        expected = value + own.get(key.removesuffix(".weight"), torch.zeros(())).float()
        expected = expected + 0.5 * dora if key == f"{name}.weight" else expected
        assert (found[key] - expected).abs().max() < 1e-5, key


def test_stages_that_all_share_are_there_once(parents, tmp_path, model):
    """Of two runs on `a`: base + a + .5 b + .7 c. The merge stands on a, as its parents do."""
    a = parents[0]
    b, c = (stage(tmp_path / name, config(model, a), 0.2, seed) for seed, name in enumerate("bc", 3))
    assert merge(f"{b}:0.5", f"{c}:0.7", "--output", tmp_path / "m") == 0
    own, first, second = updates(a), updates(b), updates(c)  # b's and c's hold a
    expected = {key: own[key] + 0.5 * (first[key] - own[key]) + 0.7 * (second[key] - own[key]) for key in own}
    assert_close(updates(tmp_path / "m"), expected)
    state = checkpoint.load(checkpoint.find(tmp_path / "m")).state
    assert [entry["path"] for entry in state["origin"]["merged"]] == [str(a)] and state["lora"]["rank"] == 8
    # What starts from it has all of it as its reference.
    k2 = load_model(config(model, tmp_path / "m"), "cpu")
    assert (velocity(k2) - policy_velocity(tmp_path / "m")).abs().max() < 1e-5


def test_stages_of_one_parent_alone_are_a_part_of_its_change(parents, tmp_path, model):
    a, b = parents
    c = stage(tmp_path / "c", config(model, a), 0.2, 3)
    assert merge(f"{b}:0.5", f"{c}:0.5", "--output", tmp_path / "m") == 0
    first, second = updates(b), updates(c)
    assert_close(updates(tmp_path / "m"), {key: 0.5 * (first[key] + second[key]) for key in first})
    assert checkpoint.load(checkpoint.find(tmp_path / "m")).state["origin"]["merged"] == []
    # One run alone is scaled: what it stands on stays whole.
    assert merge(f"{c}:0.25", "--output", tmp_path / "n") == 0
    own = updates(a)
    assert_close(updates(tmp_path / "n"), {key: own[key] + 0.25 * (second[key] - own[key]) for key in own})


# ---- ranks and TIES ---------------------------------------------------------------------------------------------


def test_a_rank_keeps_the_best_of_the_sum(parents, tmp_path, capsys):
    """The error of each layer is that of the whole matrix; above .1 it is warned of."""
    a, b = parents
    assert merge(a, b, "--rank", 5, "--output", tmp_path / "m") == 0
    said = capsys.readouterr()
    first, second, found = updates(a), updates(b), updates(tmp_path / "m")
    written = json.loads((tmp_path / "m/merge.json").read_text())
    left = whole = 0.0
    for key in first:
        total = first[key] + second[key]
        sigma = torch.linalg.svdvals(total)
        expected = float(sigma[5:].norm() / sigma.norm())
        assert written["layers"][key]["error"] == pytest.approx(expected, rel=1e-5) and expected > 0.1
        assert float((total - found[key]).norm() / total.norm()) == pytest.approx(expected, rel=1e-4)
        left, whole = left + float(sigma[5:].square().sum()), whole + float(sigma.square().sum())
    assert written["overall"]["error"] == pytest.approx((left / whole) ** 0.5, rel=1e-5)
    worst = max(written["layers"], key=lambda key: written["layers"][key]["error"])
    assert f"in {worst}" in said.out.split("worst: ")[1].split(",")[0]
    assert "posttrain: warning: rank 5 loses 0." in said.err

    # All ranks are no loss, and neither is one run at its own.
    assert merge(a, b, "--rank", 8, "--output", tmp_path / "n") == 0
    assert json.loads((tmp_path / "n/merge.json").read_text())["overall"]["error"] == 0
    assert merge(a, "--rank", 4, "--output", tmp_path / "o") == 0
    assert_close(updates(tmp_path / "o"), first)


def test_ties_of_adapters(parents, tmp_path):
    """With a rank the SVD of TIES' result, layer by layer; without one a whole model that holds it exactly."""
    a, b = parents
    ties = ["--method", "ties", "--density", 0.3, "--scale", 0.8]
    first, second = updates(a), updates(b)
    expected = {}
    for key in first:
        expected[key] = algebra.ties([first[key].float(), second[key].float()], [1, 3], 0.3, 0.8)
    assert merge(a, f"{b}:3", *ties, "--rank", 16, "--output", tmp_path / "m") == 0
    written = json.loads((tmp_path / "m/merge.json").read_text())
    for key, found in updates(tmp_path / "m").items():
        sigma = torch.linalg.svdvals(expected[key])
        error = float(sigma[16:].norm() / sigma.norm())
        assert written["layers"][key]["error"] == pytest.approx(error, rel=1e-3)
        assert float((expected[key] - found).norm() / expected[key].norm()) == pytest.approx(error, rel=1e-3)
    assert written["method"] == "ties" and written["density"] == 0.3 and written["scale"] == 0.8

    assert merge(a, f"{b}:3", *ties, "--output", tmp_path / "n") == 0
    base = load_checkpoint(checkpoint.load(a)).base_state_dict()
    whole = K2.load(tmp_path / "n").base_state_dict()
    for key, value in whole.items():
        change = expected.get(key.removesuffix(".weight"))
        if change is None:
            assert torch.equal(value, base[key])
        else:
            assert (value - base[key] - change).abs().max() < 1e-5


# ---- what reads it ----------------------------------------------------------------------------------------------


def test_export_sample_and_training_read_a_merge(parents, tmp_path, model, capsys):
    """The LoRA that is exported does what the merge does, and its card names the parents."""
    output, file = tmp_path / "m", tmp_path / "m.safetensors"
    assert merge(f"{parents[0]}:0.5", parents[1], "--output", output) == 0
    assert cli.main(["export", "--source", str(output), "--output", str(file), "--format", "lora"]) == 0
    k2 = K2.load(model)
    add_lora(k2, POLICY, read_lora(file, linear_shapes(k2.base_state_dict())), file)
    with k2.role(POLICY):
        assert (velocity(k2) - policy_velocity(output)).abs().max() < 1e-5
    card = file.with_suffix(".md").read_text()
    assert "merge (linear) of 0.5 x step-000001" in card and "0 steps" not in card
    drawn = ["--model.path", str(model), "--model.dtype", "float32", "--prompt", "a red circle", "--size", "[32, 32]"]
    for adapter in (output, file):
        words = ["sample", *drawn, "--steps", "2", "--guidance", "0", "--adapter", str(adapter)]
        assert cli.main([*words, "--output", str(tmp_path / f"drawn-{adapter.name}")]) == 0
    assert (tmp_path / "drawn-m/000.png").read_bytes() == (tmp_path / "drawn-m.safetensors/000.png").read_bytes()
    (tmp_path / "r").mkdir()
    made = runs.config(tmp_path / "r", model)
    made.model.start, made.steps = str(output), 1
    assert cli.main(["grpo", "--config", str(runs.recipe(made, tmp_path / "r.yaml"))]) == 0
    assert runs.latest(made.output).state["origin"]["merged"][0]["path"] == str(checkpoint.find(output))


# ---- whole models -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(model, tmp_path_factory):
    """The tiny pipeline with every transformer weight moved a little, in two files with an index."""
    pipe = tiny.pipeline()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in pipe.transformer.parameters():
            parameter += 0.02 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    path = tmp_path_factory.mktemp("tuned") / "tuned"
    pipe.save_pretrained(path, safe_serialization=True)
    pipe.transformer.save_pretrained(path / "transformer", max_shard_size="1MB")
    return path


def test_whole_models_merge_tensor_by_tensor(model, tuned, parents, tmp_path, capsys):
    """Two pipelines and an adapter: base + .5 (tuned - base) + 2 B A, everywhere; all other parts are the base's."""
    assert merge(f"{tuned}:0.5", f"{parents[0]}:2", "--output", tmp_path / "m") == 0
    base, other = K2.load(model).base_state_dict(), K2.load(tuned).base_state_dict()
    found, adapter = K2.load(tmp_path / "m").base_state_dict(), updates(parents[0])
    for key, value in base.items():
        expected = value.double() + 0.5 * (other[key].double() - value.double())
        expected += 2 * adapter.get(key.removesuffix(".weight"), torch.zeros(()))
        assert found[key].dtype == value.dtype and (found[key] - expected).abs().max() < 1e-6, key
    for part in ("text_encoder", "vae"):
        name = next((model / part).glob("*.safetensors")).name
        assert (tmp_path / "m" / part / name).read_bytes() == (model / part / name).read_bytes()
    written = json.loads((tmp_path / "m/merge.json").read_text())
    assert [parent["kind"] for parent in written["parents"]] == ["weights", "adapter"]
    assert written["rounding"]["kept"] == pytest.approx(1, abs=1e-4) and written["peak_ram_gib"] > 0
    assert "a whole model; peak memory" in capsys.readouterr().out
    # What is left are the norms, tables and biases, in one row.
    assert len(written["layers"]) == 1 + sum(value.ndim == 2 and key.endswith(".weight") for key, value in base.items())
    drawn = ["sample", "--model.path", str(tmp_path / "m"), "--model.dtype", "float32", "--prompt", "a red circle"]
    drawn += ["--size", "[32, 32]", "--steps", "1", "--output", str(tmp_path / "drawn")]
    assert cli.main(drawn) == 0


def test_the_base_among_the_parents_adds_nothing(model, parents, tmp_path, capsys):
    words = ["merge", str(parents[0]), f"{model}:0.5", "--output", str(tmp_path / "m"), "--evaluate", "false"]
    assert cli.main(words) == 0
    assert f"parents: {model} changes no weight of the base, so it adds nothing" in capsys.readouterr().err


def test_a_base_in_several_files_and_bfloat16(tuned, tmp_path, capsys):
    """Types stay those of the base's files, with an index; rounding is told, and float32 keeps all."""
    half = tmp_path / "half"
    pipe = tiny.pipeline()
    pipe.transformer.to(torch.bfloat16)
    for name, parameter in pipe.transformer.named_parameters():
        if keeps_fp32(name):
            parameter.data = parameter.data.float()
    pipe.save_pretrained(half, safe_serialization=True)
    (half / "transformer/diffusion_pytorch_model.safetensors").unlink()
    pipe.transformer.save_pretrained(half / "transformer", max_shard_size="600KB")
    assert len([*(half / "transformer").glob("*.safetensors")]) > 1
    base, other = K2.load(half).base_state_dict(), K2.load(tuned).base_state_dict()
    for name, options in (("m", []), ("n", ["--dtype", "float32"])):
        words = [f"{tuned}:0.01", "--model.path", half, "--output", tmp_path / name]
        assert merge(*words, *options) == 0
        said = capsys.readouterr()
        share = json.loads((tmp_path / name / "merge.json").read_text())["rounding"]["kept"]
        assert (share < 0.9) == ("warning: rounding keeps" in said.err) == (name == "m")
        assert f"rounding keeps {share:.3f}" in said.out
        index = json.loads((tmp_path / name / "transformer/diffusion_pytorch_model.safetensors.index.json").read_text())
        size = 0
        for file in (tmp_path / name / "transformer").glob("*.safetensors"):
            for key, value in load_file(file).items():
                wanted = torch.float32 if name == "n" or keeps_fp32(key) else torch.bfloat16
                expected = base[key].float() + 0.01 * (other[key] - base[key].float())
                assert index["weight_map"][key] == file.name and value.dtype == wanted
                # The sum is fused on some processors, which may round the other way.
                near = 2**-8 if wanted == torch.bfloat16 else 1e-6
                torch.testing.assert_close(value.float(), expected, rtol=near, atol=1e-8)
                size += value.nbytes
        assert index["metadata"]["total_size"] == size


def test_a_run_of_all_weights_and_original_names(model, tuned, tmp_path):
    """A checkpoint without the weights that fuse the text leaves those of the base; a single file may have the original
    names."""
    k2 = load_model(config(model), "cpu")
    k2.add_full_role(POLICY)
    for parameter in k2.role_parameters(POLICY):
        parameter.data *= 1.01
    state = {"lora": None, "model": vars(config(model)), "origin": k2.origin, "method": "stpo"}
    run = checkpoint.save(tmp_path / "run/checkpoints", 1, saved_tensors(k2), state, 1)
    single = tmp_path / "single.safetensors"
    export(ExportConfig(str(run), str(single), "original"))
    for name, parent in (("m", run), ("n", single)):
        base = [] if parent == run else ["--model.path", model]
        assert merge(f"{parent}:0.5", "--output", tmp_path / name, *base) == 0
        whole, before = K2.load(tmp_path / name).base_state_dict(), K2.load(model).base_state_dict()
        changed = [key for key, value in before.items() if not torch.equal(whole[key], value)]
        fuses = [key for key in before if key.startswith(("text_fusion", "txt_in"))]
        assert {*changed} == {key for key in before if key not in fuses}
        for key in changed:
            assert (whole[key] - 1.005 * before[key]).abs().max() <= 1e-6 * before[key].abs().max() + 1e-9
