"""K2-nano, and the nano world's captions and prompt sets, which keep apart."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import Krea2Pipeline

from posttrain.model import sampler
from posttrain.model.k2 import K2
from posttrain.nano.build import build
from posttrain.nano.world import oracles, prompts, scenes, statements
from posttrain.nano.world.font import WORDS
from prompts.records import columns, read_prompts
from tests.helpers.tiny import rotary_axes, swiglu_width
from tests.nano.test_nano import draw, one_thread  # noqa: F401


def outside_quotes(prompt):
    return set(prompt.split('"')[0].replace(",", "").split()) | set(prompt.split('"')[-1].replace(",", "").split())


def test_detail_decides_what_a_caption_leaves_open():
    rng = np.random.default_rng(11)
    optional = {*scenes.STYLES, *scenes.BACKGROUNDS, *scenes.SIZES, "style", "background", "at"}
    for scene in draw(100, 12):
        short, long = (scenes.describe(scene, rng, detail) for detail in (0.0, 1.0))
        kinds = {statements.parse(statement)[0] for statement in short.requirements}
        assert not kinds & {"style", "background", "size", "place"}
        assert not outside_quotes(short.prompt) & optional
        assert f"{scene.style} style" in long.prompt and f"{scene.background} background" in long.prompt
        assert {"style", "background", "size"} <= {statements.parse(s)[0] for s in long.requirements}
        assert set(short.requirements) < set(long.requirements)
        for said in (short, long):
            assert all(o.colour in said.prompt and o.shape in said.prompt for o in scene.objects)
            assert f'"{scene.text}"' in said.prompt or not scene.text


def caption(scene):
    return scenes.describe(scene, np.random.default_rng(0)).prompt


def test_mutation_changes_captions():
    rng = np.random.default_rng(13)
    drawn = draw(100, 14)
    assert all(scenes.mutate(scene, rng, 0.0) == scene for scene in drawn)
    share = [np.mean([caption(scenes.mutate(scene, rng, rate)) != caption(scene) for scene in drawn])
             for rate in (0.02, 0.2, 1.0)]  # fmt: skip
    assert 0 < share[0] < 0.4 < share[1] < share[2] and share[2] >= 0.99
    words = [scene for scene in drawn if scene.text]
    assert all(scenes.mutate(scene, rng, 1.0, text_rate=0.0).text == scene.text for scene in words)
    changed = [scenes.mutate(scene, rng, 0.0, text_rate=1.0) for scene in words]
    assert np.mean([a.text != b.text for a, b in zip(words, changed)]) > 0.8
    assert all(replace(b, text=a.text) == a for a, b in zip(words, changed))


# the committed weights


@pytest.fixture(scope="module")
def nano():
    return Path(build.__file__).parents[1] / "weights" / "k2-nano"


def test_nano_obeys_the_official_rules(nano):
    """Widths, rotary axes and depths that the official repository's code would choose for these head counts."""
    config = json.loads((nano / "transformer" / "config.json").read_text())
    width = config["num_attention_heads"] * config["attention_head_dim"]
    text_width, widths = config["text_hidden_dim"], (config["intermediate_size"], config["text_intermediate_size"])
    assert any((swiglu_width(width, m), swiglu_width(text_width, m)) == widths for m in range(1, 9))
    assert tuple(config["axes_dims_rope"]) == rotary_axes(config["attention_head_dim"])
    assert config["rope_theta"] == 1000 and config["in_channels"] == 4 * 16
    assert config["num_layerwise_text_blocks"] == config["num_refiner_text_blocks"] == 2


@torch.no_grad()
def test_nano_latents_equal_stock(nano):
    """With and without guidance, prompts of different lengths, two sizes, in fp32."""
    k2, pipe = K2.load(nano), Krea2Pipeline.from_pretrained(nano, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    texts = ["a red circle", 'the word "HI" and a large blue star at the bottom left, dark style']
    for guidance, height, width in ((0.0, 64, 64), (1.5, 48, 64)):
        noise = sampler.noise([1, 2], (k2.image_tokens(height, width), k2.latent_channels))
        expected = pipe(
            texts, height=height, width=width, num_inference_steps=8, guidance_scale=guidance, latents=noise.clone(),
            output_type="latent", max_sequence_length=48,
        ).images  # fmt: skip
        ours = k2.sample(k2.text(texts), noise, 8, height, width, guidance, k2.text([""]))
        assert (ours - expected).abs().max() < 1e-4 and (ours - noise).abs().max() > 1


# prompt sets

SETS = ("train", "heldout", "open", "short", "short_heldout")


@pytest.fixture(scope="module")
def sets():
    return {name: read_prompts(prompts.FOLDER / f"{name}.jsonl") for name in SETS}


def test_prompt_sets_keep_apart(sets):
    assert [len(sets[name]) for name in SETS] == [2000, 500, 40, 500, 160]
    words = {name: {text for record in records for text in record.texts} for name, records in sets.items()}
    texts = {name: {record.prompt for record in records} for name, records in sets.items()}
    for name in ("heldout", "open", "short_heldout"):
        for training in ("train", "short"):
            assert not texts[training] & texts[name]
            assert not words[training] & words[name]
    assert words["train"] <= set(prompts.TRAIN_WORDS) and words["heldout"] <= set(prompts.HELDOUT_WORDS)
    assert len(words["train"]) > 100 and len(words["heldout"]) > 20
    assert not set(prompts.TRAIN_WORDS) & set(prompts.HELDOUT_WORDS)
    assert {*prompts.TRAIN_WORDS, *prompts.HELDOUT_WORDS} == set(WORDS)


def test_prompt_sets_can_be_scored(sets):
    for records in sets.values():
        for record in records:
            assert record.requirements and record.tags[0] in scenes.KINDS
            assert all(statements.parse(statement) for statement in record.requirements)
            assert bool(record.texts) == (record.tags == ["text"])
            assert all(f'"{word}"' in record.prompt for word in record.texts)
    for name in ("open", "short_heldout"):
        kinds = {statements.parse(s)[0] for record in sets[name] for s in record.requirements}
        assert not kinds & {"style", "background", "size", "place"}
    assert columns(sets["open"])["texts"] == [record.texts for record in sets["open"]]


def test_prompt_sets_are_what_the_script_writes(tmp_path, monkeypatch):
    committed = prompts.FOLDER
    monkeypatch.setattr(prompts, "FOLDER", tmp_path)
    prompts.main()
    for path in tmp_path.iterdir():
        assert path.read_text() == (committed / path.name).read_text()


def test_grades_give_partial_credit():
    rng = np.random.default_rng(21)
    drawn = [scenes.random_scene(rng) for _ in range(60)]
    images = [scenes.render(s) for s in drawn]
    needs = [scenes.describe(s, rng).requirements for s in drawn]
    percepts = oracles.perceive(images)
    grades = [[statements.grade(p, r) for r in need] for p, need in zip(percepts, needs)]
    assert all(0 <= g <= 1 for row in grades for g in row)
    assert np.mean([g for row in grades for g in row]) > 0.93
    # Another scene's requirements are met less, and nearly met more often than met.
    others = [needs[i - 1] for i in range(len(needs))]
    wrong = np.mean([statements.grade(p, r) for p, need in zip(percepts, others) for r in need])
    met = np.mean([statements.meets(p, r) for p, need in zip(percepts, others) for r in need])
    assert met < wrong < 0.5
    scores = oracles.graded(images, [""] * 60, requirements=needs)
    assert scores == pytest.approx([np.mean(row) for row in grades])
    assert oracles.graded(images[:1], [""], requirements=[[]]) == [None]
