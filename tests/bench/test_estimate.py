"""Plans from measurements: they count what steps do, and give back the speeds that they were made from."""

import dataclasses
import itertools
import json
import math
import re

import pytest
import torch
from torch import Tensor

from posttrain.bench import counts, measurement
from posttrain.bench.config import BenchConfig
from posttrain.bench.estimate import GPUs, of_command, of_pairs, of_training
from posttrain.bench.run import Forwards, bench
from posttrain.bench.steps import Steps
from posttrain.config.load import load_config
from posttrain.distributed.processes import Processes
from posttrain.errors import UserError
from posttrain.model import flops
from posttrain.model.k2 import K2
from posttrain.pairs.config import PairsConfig

RANK, TEXT = 4, 8


@pytest.fixture(scope="module")
def h200():
    return measurement.load("h200")


def recipe(method: str, *words: str):
    name = "stpo_synthetic" if method == "stpo" else method
    return load_config(method, ["--config", f"recipes/k2/{name}.yaml", *words])[0]


def steps_of(**settings) -> Steps:
    config = BenchConfig(scale="tiny", batch=4, group=4, text=TEXT, rank=RANK, steps=4, stock=False, **settings)
    steps = Steps(K2.random("cpu", torch.float32, "tiny", text=False), config, (64, 64), Processes())
    fused: Tensor = steps.k2.fuse(steps.k2.random_features(TEXT))
    steps._texts = [fused]
    # one length of text, as a plan assumes
    steps._encode = lambda prompts, *_: type("E", (), {"features": [steps.k2.random_features(TEXT)] * len(prompts)})()
    return steps


@pytest.mark.parametrize("method", ["grpo", "stpo"])
def test_a_plan_counts_what_steps_do(method):
    """grpo over all starts of its window; stpo over two steps, of which the first measures its terms, with the hinge's
    pass, which bench's one micro-batch does not need."""
    steps = steps_of(window=2)
    config = {"grpo": steps._grpo_config, "stpo": steps._stpo_config}[method]
    config.model.compile = False
    if method == "stpo":
        config.steps, config.loss.terms_every, config.micro_batch = 2, 25, 1
        steps.micro_batch = lambda size, make=steps.micro_batch: make(1)
    forwards, number = Forwards(steps.k2, RANK), steps.starts if method == "grpo" else 2
    for index in range(number):
        steps.run(method, index, lambda stage: None)
    done = forwards.take()["flop"] / number
    cost = counts.Cost(flops.Shape.of(steps.k2), steps.k2.pixel_multiple, TEXT, RANK)
    assert counts.step(config, cost, 1, (64, 64)).flop == pytest.approx(done, rel=1e-9)
    steps.close()


def test_tdm_counts_the_expected_trajectory():
    steps, number = steps_of(), 40
    config, forwards = steps._tdm_config, Forwards(steps.k2, RANK)
    for index in range(number):
        steps.run("tdm", index, lambda stage: None)
    cost = counts.Cost(flops.Shape.of(steps.k2), steps.k2.pixel_multiple, TEXT, RANK)
    done = forwards.take()["flop"] / number
    assert counts.step(config, cost, 1, (64, 64)).flop == pytest.approx(done, rel=0.03)  # 160 random trajectories
    steps.close()


@pytest.mark.parametrize(
    ("method", "words", "images", "within"),
    [
        ("grpo", ("--groups.prompts_per_step", "1"), 16, 0.01),
        (
            "stpo",
            ("--batch", "4", "--loss.terms_every", "0", "--pairs.size", "[512, 512]"),
            8,
            0.02,
        ),  # making noise is no network work
        # The bench drew a few trajectories, a plan takes the expected ones.
        ("tdm", ("--batch", "8", "--sizes", "[[512, 512]]", "--fake.warmup", "0"), 8, 0.1),
    ],
)
def test_a_plan_gives_back_the_measured_speed(h200, method, words, images, within):
    found = of_training(recipe(method, *words), h200, GPUs())
    assert images / found.step == pytest.approx(h200.row(method)["images_per_second"], rel=within)


def test_images_of_pairs_take_as_long_as_the_measured_rollout(h200):
    """16 pairs of two images in 8 steps each, times what drawing takes beyond its forwards."""
    draws = {"stronger": {"steps": 8, "noise": 0.1}, "weaker": {"steps": 8}}
    source = [{"name": "a", "delta": draws}]
    config, _ = load_config("pairs", ["--config", "recipes/k2/pairs.yaml", f"--sources={json.dumps(source)}",
                                      "--pairs=16", "--steps=8", "--sizes=[[512, 512]]"])  # fmt: skip
    assert isinstance(config, PairsConfig)
    seconds = 32 / h200.row("rollout", (512, 512))["images_per_second"] * h200.command("pairs")["overhead"]
    assert of_pairs(config, h200, GPUs()).step == pytest.approx(seconds, rel=0.01)
    assert of_pairs(config, h200, GPUs(count=4)).step == pytest.approx(seconds / 4, rel=0.01)


def test_what_is_scaled_says_so(h200):
    small = of_training(recipe("grpo"), h200, GPUs())
    large = of_training(recipe("grpo", "--sampling.sizes", "[[1536, 1536]]"), h200, GPUs())
    assert small.notes == []
    scaled = "at 1536 x 1536 scaled from 1024 x 1024 by operations"
    assert large.notes == [f"grpo {scaled}", f"rollout {scaled}"]
    assert 10 < large.step / small.step < 12.5  # nine times the tokens, and attention


def test_groups_are_divided_whole(h200):
    """28 groups: 4 on each of 7 GPUs, and on 8 still 4 on some."""
    seven, eight = (of_training(recipe("grpo"), h200, GPUs(count)).step for count in (7, 8))
    one = of_training(recipe("grpo"), h200, GPUs()).step
    assert seven == eight == pytest.approx(one / 7)


def test_a_smaller_gpu_recomputes_and_takes_longer(h200):
    config = recipe("tdm", "--sizes", "[[1024, 1024]]", "--fake.warmup", "0")
    large, small = (of_training(config, h200, GPUs(gib=gib)) for gib in (1000, 80))
    assert 1.1 < small.step / large.step < 1.3  # 25 of 28 blocks, in two of some eleven forwards
    half = of_training(config, h200, GPUs(gib=1000, tflops=h200.row("tdm")["tflops"] / h200.row("tdm")["share"] / 2))
    assert half.step == pytest.approx(2 * large.step)


def test_what_was_not_measured_is_not_planned(h200, tmp_path):
    assert of_command("expander data", 1, 1, h200) is None
    found = dict(h200.result, rows=[row for row in h200.result["rows"] if row["method"] != "tdm"])
    (tmp_path / "bench.json").write_text(json.dumps(found))
    other = measurement.load(str(tmp_path / "bench.json"))
    with pytest.raises(UserError, match="the plan needs tdm, which was not measured on NVIDIA H200"):
        of_training(recipe("tdm"), other, GPUs())
    with pytest.raises(UserError, match="lora: is null, but adapters were measured"):
        of_training(recipe("grpo", "--lora", "null"), h200, GPUs())


@pytest.mark.parametrize(("text", "says"), [(None, "no such file; .* that was measured: h200"), ("[]", "has no rows"),
                                            ("{", "not a bench.json")])  # fmt: skip
def test_a_measurement_that_cannot_be_read(tmp_path, text, says):
    if text is not None:
        (tmp_path / "m.json").write_text(text)
    with pytest.raises(UserError, match=rf"measured: .*{says}"):
        measurement.load(str(tmp_path / "m.json"))


@pytest.mark.long
def test_the_shipped_form_of_a_bench_gives_the_same_plan(tmp_path, monkeypatch, capsys):
    """Two sizes of every method in one call, and what is planned from the file and from its shipped form."""
    config = BenchConfig(output=str(tmp_path), scale="tiny", batch=4, group=4, text=TEXT, rank=RANK, steps=4, repeats=1,
                         stock=False, sizes=[[64, 64], [128, 64]])  # fmt: skip
    assert bench(config) == 0
    source, target = tmp_path / "bench.json", tmp_path / "card.json"
    rows = json.loads(source.read_text())["rows"]
    measured = [(row["method"], row["size"]) for row in rows]
    assert measured == list(itertools.product(config.methods, config.sizes or []))
    for small, large in zip(rows[::2], rows[1::2]):
        assert large["useful_tflop"] > 1.5 * small["useful_tflop"], small["method"]
    target.write_text(json.dumps({"commands": {"grpo": {"startup": {"import": 7.0}}}}))
    monkeypatch.setattr("sys.argv", ["measurement", str(source), str(target)])
    measurement.main()
    settings = recipe("grpo", "--sampling.sizes", "[[128, 64]]")
    plans = [of_training(settings, measurement.load(str(path)), GPUs()) for path in (source, target)]
    assert dataclasses.replace(plans[0], start=0, notes=[]) == dataclasses.replace(plans[1], start=0, notes=[])
    assert math.isclose(plans[1].start - plans[0].start, 7.0)
    assert plans[0].notes == ["the start was not measured"] and plans[1].notes == []
    assert not re.search(r"stock|error", target.read_text())
