"""The bench on a tiny K2: what it counts against torch's own counter, what it writes, and its plans."""

import dataclasses
import functools
import json
import re
import sys

import pytest
import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from posttrain import cli
from posttrain.bench import references as bench_references
from posttrain.bench.config import BenchConfig
from posttrain.bench.run import Forwards, bench, measured
from posttrain.bench.steps import Steps
from posttrain.bench.tiers import Parts, fit, need, parts_of
from posttrain.config.load import make
from posttrain.config.sections import OptimConfig
from posttrain.config.types import ConfigError
from posttrain.distributed.processes import Processes
from posttrain.model import blocks, flops
from posttrain.model.k2 import K2, Text
from posttrain.stpo import train as stpo
from posttrain.training.policy import POLICY
from tests.helpers import runs

N, L, B, RANK = 12, 7, 2, 4


@pytest.fixture(scope="module")
def k2():
    made = K2.random("cpu", torch.float32, "tiny", text=False)
    made.add_role(POLICY, RANK, 4.0)
    return made


def counted(k2, role, backward):
    x, text = torch.randn(B, N, k2.latent_channels), Text(k2.fuse(k2.random_features(L))[None])
    k2.train_role(POLICY)
    # The math kernel is made of products that the counter knows on every device.
    with FlopCounterMode(display=False) as counter, k2.role(role), sdpa_kernel(SDPBackend.MATH):
        with torch.set_grad_enabled(backward):
            v = k2.velocity(x, 0.5, text, 3 * k2.pixel_multiple, 4 * k2.pixel_multiple)
        if backward:
            v.square().mean().backward()
    return counter.get_total_flops()


def test_forward_is_what_torch_counts(k2):
    shape = flops.Shape.of(k2)
    assert counted(k2, None, False) == B * flops.forward(shape, N, L)
    assert counted(k2, POLICY, False) == B * flops.forward(shape, N, L, RANK)


def test_backward_is_what_torch_counts(k2):
    shape = flops.Shape.of(k2)
    assert counted(k2, POLICY, True) == B * (flops.forward(shape, N, L, RANK) + flops.backward(shape, N, L, RANK))


def test_text_that_is_fused_in_every_forward_is_what_torch_counts():
    """One text for all samples, adapters on all linears of the blocks and of the text's layers."""
    made = K2.random("cpu", torch.float32, "tiny", text=False)
    made.add_role(POLICY, RANK, 4.0, ["blocks", "text_fusion", "txt_in"])
    made.train_role(POLICY)
    text = Text.of([made.text_tokens(made.random_features(L))])
    shape, of_text = flops.Shape.of(made), flops.TextShape.of(made)
    for role, rank, backward in ((None, 0, False), (POLICY, RANK, False), (POLICY, RANK, True)):
        x = torch.randn(B, N, made.latent_channels)
        with FlopCounterMode(display=False) as counter, made.role(role), sdpa_kernel(SDPBackend.MATH):
            with torch.set_grad_enabled(backward):
                v = made.velocity(x, 0.5, text, 3 * made.pixel_multiple, 4 * made.pixel_multiple)
            if backward:
                v.square().mean().backward()
        expected = B * flops.forward(shape, N, L, rank) + flops.fuse(of_text, L, rank)
        if backward:
            expected += B * flops.backward(shape, N, L, rank, before=True) + flops.fuse_backward(of_text, L, rank)
        assert counter.get_total_flops() == expected


def test_text_at_true_size():
    """Of 105 tokens: the released model's own sizes; 0.48 TFLOP, 1.7 % of the forward of an image of 512 x 512."""
    text, shape = flops.TextShape(), flops.Shape(28, 6144, 1536, 16384, 64, 256)
    blocks = 2 * 105 * 26 * (5 * 2560**2 + 3 * 2560 * 6912) + 4 * (2 * 144 * 105 + 2 * 105**2) * 2560
    assert flops.fuse(text, 105) == blocks + 2 * 105 * (12 * 2560 + 2560 * 6144 + 6144**2)
    assert flops.fuse(text, 105) / flops.forward(shape, 1024, 105) == pytest.approx(0.017, abs=0.0005)


def test_backward_of_all_weights_is_what_torch_counts():
    made = K2.random("cpu", torch.float32, "tiny", text=False)
    made.add_full_role(POLICY)
    shape = flops.Shape.of(made)
    x, text = torch.randn(1, N, made.latent_channels), Text(made.fuse(made.random_features(L))[None])
    made.train_role(POLICY)
    with FlopCounterMode(display=False) as counter, made.role(POLICY), sdpa_kernel(SDPBackend.MATH):
        made.velocity(x, 0.5, text, 3 * made.pixel_multiple, 4 * made.pixel_multiple).square().mean().backward()
    assert counter.get_total_flops() == flops.forward(shape, N, L) + flops.backward(shape, N, L, None)


def test_earlier_stages_and_the_trained_one_are_one_product():
    """Of all their ranks; the reference's is of the earlier ones."""
    made = K2.random("cpu", torch.float32, "tiny", text=False)
    Steps(made, BenchConfig(scale="tiny", rank=RANK, stages=3), (32, 32), Processes())
    shape = flops.Shape.of(made)
    for role, ranks in ((POLICY, 3 * RANK), (None, 2 * RANK)):
        assert counted(made, role, False) == B * flops.forward(shape, N, L, ranks)


def test_true_size():
    """512 x 512 has 1024 image tokens: T = 1129, d = 6144, d_kv = 1536, f = 16384, 28 blocks.

    Linears 2 T (3 d^2 + 2 d d_kv + 3 d f) = 2 * 1129 * 434,110,464 = 980.2 G, attention 4 T^2 d = 31.3 G.
    """
    k2_size = flops.Shape(28, 6144, 1536, 16384, 64, 256)
    assert flops.forward(k2_size, 1024, 105) == pytest.approx(28 * (980.22e9 + 31.33e9) + 2.14e9, rel=1e-4)


# the bench


@pytest.fixture
def settings():
    made = BenchConfig(scale="tiny", batch=4, group=4, text=8, rank=RANK, steps=4, repeats=1, stock=False)
    return made


@pytest.mark.parametrize("method", ["step", "sft", "stpo", "tdm"])
def test_counts_what_a_step_does(method, settings):
    """Texts are of one length here: torch counts padding too. In stpo's first step the shares of its terms are due:
    velocities without gradient first, then chosen and rejected images twice each (the hinge has nothing to pull)."""
    fresh = K2.random("cpu", torch.float32, "tiny", text=False)
    steps = Steps(fresh, settings, (64, 64), Processes())
    steps._texts = [fresh.fuse(fresh.random_features(8))]
    forwards = Forwards(fresh, RANK)
    expected, found = {"step": [(0, 4), (0, 4)], "sft": [(0, 4), (0, 4)], "stpo": [(8, 8), (4, 4)]}, {}
    for index in range(2):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            steps.run(method, index, lambda stage: None)
        found = forwards.take()
        assert found["flop"] == counter.get_total_flops()
        if method in expected:
            assert (found["forwards"], found["backwards"]) == expected[method][index]
    if (
        method == "tdm"
    ):  # fake score and student are trained; one forward of the fake score and two of the teacher; trajectories
        assert found["backwards"] == 8 and 12 + 4 <= found["forwards"] <= 12 + 16
    assert forwards.take()["flop"] == 0


def test_what_is_recomputed_is_counted_apart(settings):
    """One of two blocks, once for each of four pictures; torch counts it as well."""
    fresh = K2.random("cpu", torch.float32, "tiny", text=False)
    steps, fresh.blocks.recompute = Steps(fresh, settings, (64, 64), Processes()), 1
    steps._texts = [fresh.fuse(fresh.random_features(8))]
    forwards = Forwards(fresh, RANK)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        steps.run("step", 0, lambda stage: None)
    found = forwards.take()
    again = counter.get_total_flops() - found["flop"]
    assert found["again"] == 4 * flops.block(forwards.shape, 64 + 8, RANK)
    assert 0.8 * found["again"] < again <= found["again"]  # torch stops where nothing more is missing


def test_padding_is_not_counted(k2):
    forwards = Forwards(k2, RANK)
    text = Text.of([k2.fuse(k2.random_features(length)) for length in (3, 9)])
    with torch.no_grad():
        k2.velocity(torch.randn(2, N, k2.latent_channels), 0.5, text, 3 * k2.pixel_multiple, 4 * k2.pixel_multiple)
    shape = flops.Shape.of(k2)
    assert forwards.take()["flop"] == flops.forward(shape, N, 3) + flops.forward(shape, N, 9)


@pytest.mark.long
def test_bench_and_plans(tmp_path, capsys, model):
    argv = "bench --scale tiny --batch 4 --group 4 --text 8 --rank 4 --steps 4 --repeats 1 --output"
    assert cli.main([*argv.split(), str(tmp_path / "bench")]) == 0
    printed = capsys.readouterr().out
    assert (tmp_path / "bench/bench.md").read_text() in printed + "\n"
    result = json.loads((tmp_path / "bench/bench.json").read_text())
    rows = {row["method"]: row for row in result["rows"]}
    assert list(rows) == ["rollout", "step", "sft", "stpo", "grpo", "nft", "tdm", "mopd", "expander"]
    for row in rows.values():
        network = sum(ms for stage, ms in row["ms"].items() if stage not in ("decode", "prepare"))
        assert row["share"] == pytest.approx(row["tflops"] / result["matmul"]["tflops"])
        assert row["images_per_second"] == pytest.approx(1e3 * row["images"] / sum(row["ms"].values()))
        assert row["peak_gib"] is None and row["recompilations"] == 0
        stock = row["stock"]["forward_ms"] * row["forwards"] + (row["stock"]["step_ms"] or 0) * row["backwards"]
        assert row["stock"]["ratio"] == pytest.approx(stock / network)
    # Each of four images of nft takes four forwards to draw and four with gradient.
    assert (rows["nft"]["forwards"], rows["nft"]["backwards"]) == (16, 16)
    # A group of four takes one forward in each step up to the window's first, four in each later one. Half of the
    # windows begin at the first step, half at the second. The window's first step is trained by one forward too.
    assert rows["rollout"]["forwards"] == 16 and rows["grpo"]["backwards"] == 5
    assert rows["grpo"]["forwards"] == (13 + 10) / 2 + 5
    assert rows["expander"]["forwards"] == 16 and rows["expander"]["images"] == 4
    assert rows["expander"]["adapter_parameters"] == 0 and rows["expander"]["error"] == {}

    recipe = runs.config(tmp_path, model)
    (tmp_path / "grpo.yaml").write_text(yaml.safe_dump(dataclasses.asdict(recipe)))
    one, two = (_plan(tmp_path, capsys, gpus) for gpus in (1, 2))
    assert "as a recipe of grpo" in one and "2 steps" in one and "measured on a CPU" in one
    assert _seconds(two) == pytest.approx(_seconds(one) / 2, rel=0.02)

    # Decoding alone takes 2^20 pixels at 3.3 kB: 3.2 GiB.
    for gib, verdict in ((24.0, "; fits"), (3.0, "; does not fit: lower micro_batch")):
        result["gpu_gib"] = gib
        (tmp_path / "bench/bench.json").write_text(json.dumps(result))
        told = _plan(tmp_path, capsys, 1)
        assert re.search(rf"Memory: 3\.\d+ GiB of {gib:g} on each GPU, .*{verdict}", told)
    assert "| estimated, rank 4 | 24 GB | 48 GB | 80 GB | 141 GB |" in told
    assert "| grpo, 32 x 32 | 8; 0 again; no option;" in told

    recipe.rollout.ahead, recipe.rollout.gpus = 1, 1
    (tmp_path / "grpo.yaml").write_text(yaml.safe_dump(dataclasses.asdict(recipe)))
    assert "rollout.gpus: not counted" in _plan(tmp_path, capsys, 2)

    result["rows"] = [row for row in result["rows"] if row["method"] != "grpo"]
    (tmp_path / "bench/bench.json").write_text(json.dumps(result))
    argv = ["bench", "--plan", str(tmp_path / "grpo.yaml"), "--measured", str(tmp_path / "bench/bench.json")]
    assert cli.main(argv) == 2 and "needs grpo, which was not measured" in capsys.readouterr().err


@pytest.mark.long
def test_compiled(settings, monkeypatch):
    """With torch's tracing alone, which is exact, and takes seconds where its compiler takes minutes."""
    traced = functools.cache(lambda function, device: torch.compile(function, backend="eager", fullgraph=True))
    monkeypatch.setattr(blocks, "_compiled", traced)
    settings.model.compile, settings.stock, settings.repeats = True, True, 2
    row = measured(settings, "step", (64, 64), Processes(), 1.0)
    assert row["graphs"] == 2 and row["recompilations"] == 0  # the first block's input has no gradient
    assert row["error"] == {"velocity": 0.0, "gradient": 0.0} and row["stock"]["ratio"] > 0
    row = measured(settings, "stpo", (64, 64), Processes(), 1.0)
    assert row["recompilations"] == 0  # nor are other graphs needed where terms are apart, as in the first step
    assert row["error"] == {"velocity": 0.0, "gradient": 0.0}  # though the adapter has been trained meanwhile


def test_what_is_compiled_after_the_second_step_fails_the_bench(settings, tmp_path, monkeypatch):
    settings.output, settings.methods = str(tmp_path), ["rollout"]
    for graphs, code in (([0, 3, 3], 0), ([0, 3, 4], 1)):  # at the beginning, after the second step, at the end
        monkeypatch.setattr("posttrain.bench.run.graphs", iter(graphs).__next__)
        assert bench(settings) == code
        (row,) = json.loads((tmp_path / "bench.json").read_text())["rows"]
        assert (row["graphs"], row["recompilations"]) == (3, code)


def test_a_step_that_does_not_fit_is_a_failed_row(settings, monkeypatch):
    """And is not begun again with half of micro_batch, as in a run."""
    calls = []

    def optimise(*_):
        calls.append(1)
        raise torch.OutOfMemoryError

    monkeypatch.setattr(stpo, "optimise", optimise)
    assert measured(settings, "stpo", (64, 64), Processes(), 1.0) == {"failed": "out of memory"} and len(calls) == 1


def test_expansions_are_of_many_lengths_and_only_real_tokens_count(settings):
    """Of 8 tokens, a group of four has 4, 6, 9 and 12 of them, in two forwards of two; four steps; 64 image tokens."""
    fresh = K2.random("cpu", torch.float32, "tiny", text=False)
    steps = Steps(fresh, dataclasses.replace(settings, batch=2, rank=0, methods=["expander"]), (64, 64), Processes())
    forwards = Forwards(fresh, 0)
    steps.run("expander", 0, lambda stage: None)
    found = forwards.take()
    expected = sum(flops.forward(forwards.shape, 64, length) for length in (4, 6, 9, 12))
    assert found["flop"] == 4 * expected and found["forwards"] == 16 and found["backwards"] == 0


def test_options_are_measured_against_the_exact_path(settings, eager):
    """Rank 32: factors of 32 x 128, which are large enough for 8-bit moments."""
    for name, value in {"rank": 32, "encode": True, "group": 2}.items():
        setattr(settings, name, value)
    settings.model.quantize, settings.optim = "fp8", OptimConfig(kind="adamw8bit")
    settings.model.compile, settings.stock, settings.model.offload = False, True, ["text_encoder", "vae"]
    row = measured(settings, "grpo", (64, 64), Processes(), 1.0)
    error = row["error"]
    assert error.keys() == {"ratio", "velocity", "gradient", "features", "pixels", "update"}
    assert error["features"] == error["pixels"] == 0.0
    assert 1e-3 < error["velocity"] < 0.1 and 1e-3 < error["gradient"] < 0.3 and 1e-4 < error["update"] < 0.05
    assert "encode" in row["ms"] and row["stock"]["ratio"] > 0


@pytest.mark.parametrize("recipe", [None, "tensorwise", "rowwise"])
def test_a_step_of_all_weights(settings, recipe):
    """Forward and backward without an optimiser; in fp8 the row has its distance from the exact step."""
    settings.rank, settings.methods, settings.model.float8, settings.model.compile = None, ["step"], recipe, False
    row = measured(settings, "step", (64, 64), Processes(), 1.0)
    # A time for the whole batch is one row, for which its embedding is counted as often as there are samples.
    shape = flops.Shape(**row["shape"])
    each = flops.forward(shape, 64, 8) + flops.backward(shape, 64, 8, None)
    assert row["useful_tflop"] == pytest.approx(4 * each / 1e12, rel=0.1) and row["backwards"] == 4
    assert row["adapter_parameters"] == 0 and row["images_per_second"] > 0
    if recipe is None:
        assert row["error"] == {}
    else:
        assert row["error"].keys() == {"velocity", "gradient"}
        assert all(1e-4 < value < 0.1 for value in row["error"].values())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rank": None}, "rank: is null, and all weights are measured by methods [step] alone"),
        ({"model": {"float8": "rowwise"}}, "rank: is 64, and model.float8 and muon are for all weights"),
        ({"optim": {"kind": "muon"}}, "rank: is 64, and model.float8 and muon are for all weights"),
        (
            {"rank": None, "methods": ["step"], "model": {"float8": "auto"}},
            "model.float8: is auto; write tensorwise or rowwise",
        ),
    ],
)
def test_what_the_bench_cannot_measure(changes, words):
    with pytest.raises(ConfigError) as error:
        make(BenchConfig, changes)
    assert words in str(error.value)


# what fits


def test_parts_are_those_of_the_model(k2):
    parts = parts_of("tiny")
    weights = [p.numel() for name, p in k2.transformer.named_parameters() if ".lora_" not in name]
    assert parts.block_weights + parts.other_weights == sum(weights) and parts.blocks == 2 and parts.width == 128
    assert parts.vae == sum(p.numel() for p in k2.vae.parameters())
    assert RANK * parts.adapter == sum(p.numel() for p in k2.role_parameters(POLICY))


def test_what_a_step_needs():
    """In units of 2^30: blocks of 3 weights, 1 other, encoder 2, VAE 1, an adapter of 1/2 a rank, a token 1 in a block.

    2 x 1 + 2 x 3 + 2 x (2 + 1) = 14; two adapters of rank 2 (4 + 8) x 2 = 24, an average 4; training 3 tokens by (1
    kept + 2) = 9 and the input of the other block, 3 x 2 x 4 bytes, and gradients 4. In all 55.
    """
    unit = 2**30
    parts = Parts(2, 3 * unit, unit, 2 * unit, unit, 4, unit // 2)
    given = {"adapters": 2, "rank": 2, "tokens": 3, "pixels": 1, "recomputed": 1, "block_bytes": unit}
    assert need(parts, (), **given) == pytest.approx(55, rel=1e-6)
    assert need(parts, ("offload",), **given) == pytest.approx(55 - 6, rel=1e-6)
    assert need(parts, ("fp8",), **given) == pytest.approx(55 - 3, rel=1e-6)
    assert need(parts, ("adamw8bit",), **given) == pytest.approx(55 - 12, rel=1e-6)
    few = given | {"tokens": 0, "adapters": 0}  # then it is decoding, with a VAE of 2 and 2^20 pixels by 3.3 kB: 3.22
    assert need(parts, ("offload",), **few) == pytest.approx(8 + 4 + 2 + 3300 / 2**10, rel=1e-6)


def test_what_fits_is_near_what_was_measured():
    """At 512 x 512, batch 8 and rank 64 on an H200, with none, some or all blocks computed again; compiled, and not
    (360 kB). Without text encoder and VAE (7.7), an optimiser (1.6) or an average (0.8)."""
    parts, aside = parts_of("k2"), 7.7 + 1.6 + 0.8
    for recomputed, kept, gib in ((0, 150e3, 62.5), (7, 150e3, 55.6), (0, 360e3, 115), (28, 360e3, 36)):
        told = need(parts, (), 1, 64, 8 * 1129, 512 * 512, recomputed, kept) - aside
        assert told == pytest.approx(gib, rel=0.05), recomputed


def test_options_are_taken_where_they_must_be():
    parts = parts_of("k2")
    found = [fit(parts, gpu, 1, 32, (512, 512), 105) for gpu in (12, 24, 48, 80, 141)]
    assert found[0] is None
    assert all(one is not None and one.gib <= 0.9 * gpu for one, gpu in zip(found[1:], (24, 48, 80, 141)))
    assert [one.options for one in found[1:] if one] == [("offload", "adamw8bit", "fp8"), (), (), ()]
    again = [one.recomputed / one.micro_batch for one in found[1:] if one]
    assert again == sorted(again, reverse=True) and again[-1] == 0


@pytest.fixture
def eager():
    with torch.compiler.set_stance("force_eager"):
        yield


def _plan(folder, capsys, gpus):
    measured = str(folder / "bench/bench.json")
    argv = ["bench", "--plan", str(folder / "grpo.yaml"), "--measured", measured, "--gpus", str(gpus)]
    assert cli.main(argv) == 0
    return capsys.readouterr().out


def _seconds(text):
    (found,) = re.findall(r"Training step: .*?, (\S+) s", text)
    return float(found)


def test_what_references_cost(tmp_path, monkeypatch, capsys):
    """A row without, and two for each count: cached, the step has fewer operations than with the references along."""
    words = ["references", "--scale", "tiny", "--size", "64", "--reference", "32", "--counts", "1", "2"]
    monkeypatch.setattr(sys, "argv", [*words, "--rank", "2", "--repeats", "2", "--output", str(tmp_path)])
    bench_references.main()
    found = json.loads((tmp_path / "references.json").read_text())["rows"]
    assert [(row["references"], row["way"]) for row in found] == [
        (0, "none"), (1, "cached"), (1, "joint"), (2, "cached"), (2, "joint"),
    ]  # fmt: skip
    assert all(row["ratio"] == row["ms"] / found[0]["ms"] for row in found)
    one_cached, one, two_cached, two = (row["by_operations"] for row in found[1:])
    assert 1 < one_cached < two_cached < one < two
    assert "| 2 | joint |" in capsys.readouterr().out
