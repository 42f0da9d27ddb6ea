"""Style references with a tiny real K2: whole runs, and drawing."""

import functools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from posttrain import cli
from posttrain.config.types import ConfigError
from posttrain.distributed.processes import Processes
from posttrain.errors import UserError
from posttrain.model.k2 import K2
from posttrain.references.shown import Drawer, Named, named, scaled
from posttrain.sample_config import SampleConfig
from posttrain.sample_images import sample
from posttrain.sft import train as sft
from posttrain.sft.cache import encode_images
from posttrain.style import train as style
from posttrain.style.batches import LAST, batches_of, job_of
from posttrain.style.dataset import StyleSet
from posttrain.training.evaluate import SamplingSettings
from tests.helpers import runs, style_runs, tiny
from tests.helpers.settings import validate
from tests.helpers.style_runs import image

# ---- whole runs -------------------------------------------------------------------------------------------------


def test_run_directory(config, monkeypatch):
    seen = runs.watch_loading(sft, monkeypatch)
    config.eval.every = 1
    style.train(config)
    run = Path(config.output)
    runs.assert_metrics_are_defined(run, "brightness")
    for row in runs.training_rows(run):
        assert row["loss"] > 0 and row["grad_norm"] > 0 and 0 < row["references"] < 2
        assert (row["reference_size"], row["image_tokens"]) == (32, 16)
    rows = [row for row in runs.rows(run) if "eval/heldout/loss" in row]
    assert rows[0]["eval/heldout/gain"] == 0 and rows[-1]["eval/heldout/drift"] > 0
    summary = json.loads((run / "summary.json").read_text())
    assert summary["before"].keys() == set(config.metric_names())
    # The references of three prompts above four strengths; the third has none, so nothing changes it.
    with Image.open(run / "grids/sweep-step-000002.png") as sheet:
        assert sheet.width >= 3 * 32 and sheet.height >= 5 * 32
    assert 'alt="sweep"' in (run / "report.html").read_text()
    ((k2, base),) = seen
    runs.assert_equal(dict(k2.base_state_dict()), base)
    assert runs.latest(run).state["method"] == "style"


def test_resumed_equals_uninterrupted(config, tmp_path):
    whole = style_runs.whole_and_in_parts(config, tmp_path / "parts")
    a, b = runs.latest(whole), runs.latest(config.output)
    runs.assert_equal(a.tensors["adapter"], b.tensors["adapter"])
    assert runs.untimed(whole)[-1] == runs.untimed(config.output)[-1]


def test_two_processes_equal_one(command, config, tmp_path):
    config.batch, config.sweep = 5, []
    found = []
    for processes in (1, 2):
        config.output = str(tmp_path / f"run-{processes}")
        result = command("style", "--config", runs.recipe(config, tmp_path / "recipe.yaml"), processes=processes)
        assert result.returncode == 0, result.stderr[-3000:]
        found.append(runs.flat(runs.latest(config.output).tensors["adapter"]))
    assert (found[0] - found[1]).norm() < 1e-3 * found[0].norm()


def test_what_references_show_is_learnt(config, monkeypatch):
    """Two styles, dark and light, and one caption for all: only the reference says which it is."""

    def encode(k2, images, batch=16):
        """Latents as bright as the images: the VAE of the tiny model is random, and hardly tells them apart."""
        images = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
        height, width = images.shape[1:3]
        bright = images.float().mean((1, 2, 3)) / 64 - 2
        return bright[:, None, None].expand(-1, k2.image_tokens(height, width), k2.latent_channels).clone()

    monkeypatch.setattr(K2, "encode_images", encode)
    folder = Path(config.heldout).parent
    for i, file in enumerate(sorted(Path(config.images.train).glob("*.png"))):
        image = Image.new("RGB", (32, 32), (20, 20, 20) if i % 2 else (230, 230, 230))
        image.putpixel((i, 0), (100, 100, 100))  # images that are alike would be one
        image.save(file)
        row = {"caption": "a fox", "full": "a fox", "style": "dark" if i % 2 else "light", "box": None}
        file.with_suffix(".json").write_text(json.dumps(row))
    lines = []
    for name, value in (("light", 230), ("dark", 20)):
        Image.new("RGB", (32, 32), (value,) * 3).save(folder / f"{name}.png")
        lines.append(json.dumps({"prompt": "a fox", "id": name, "references": [f"{name}.png"]}) + "\n")
    Path(config.heldout).write_text("".join(lines))
    config.heldout_styles, config.steps, config.optim.lr, config.sweep = [], 60, 1e-2, []
    config.images.drop_caption, config.batch, config.micro_batch, config.optim.ema = 0.0, 8, 8, 0.0
    seen = runs.watch_loading(sft, monkeypatch)
    style.train(config)
    ((k2, _),) = seen
    drawer = Drawer.of(k2, [[Named(folder / f"{name}.png", 1.0)] for name in ("light", "dark")], (32, 32), 32)
    noise = torch.randn(2, 16, k2.latent_channels, generator=torch.Generator().manual_seed(0))
    with k2.role("policy"):
        drawn = drawer([0, 1], k2.text(["a fox"]), noise, SamplingSettings(4), None)
    light, dark = drawn.mean((1, 2)).tolist()
    assert light > dark + 1


# ---- data -------------------------------------------------------------------------------------------------------


def test_shares_of_what_is_dropped(made, config):
    """Self-check 6: without references .15, without caption .15, both .05, all there .75."""
    _, views = made
    config.references.drop, config.references.drop_both, config.images.drop_caption = 0.1, 0.05, 0.1
    views.draw = lambda entry, size, rng: np.zeros((size, size, 3), np.uint8)
    counts, twice = Counter(), 0
    for i in range(4000):
        job = job_of(views, config, views.train[0], 1, i, 32)
        counts[len(job.views) > 0, job.job.dropped] += 1
        assert bool(job.views) != (job.job.choice == LAST)
        twice += len(job.views) == 2
    shares = {key: count / 4000 for key, count in counts.items()}
    expected = {(True, False): 0.75, (False, False): 0.1, (True, True): 0.1, (False, True): 0.05}
    assert shares == pytest.approx(expected, abs=0.02) and twice / 4000 == pytest.approx(0.85 * 0.25, abs=0.02)


def test_captions_with_and_without_the_style(made):
    """Silent where references are shown, full where none is."""
    k2, views = made
    entry = views.train[0]
    row = views.row(entry)
    silent, full = (k2.text([text]).tokens[0] for text in (json.loads(json_of(views, row))[key] for key in KEYS))
    # Alone and among others a text has the same features within rounding.
    for place, text in ((0.0, silent), (0.999, silent), (LAST, full)):
        torch.testing.assert_close(views.images.read(entry, place)[1], text.cpu(), rtol=1e-5, atol=1e-5)
    assert len(full) != len(silent)


KEYS = ("caption", "full")


def json_of(views, row):
    return Path(views.source.name(row)).with_suffix(".json").read_text()


def test_held_out_styles_are_never_shown(made, config):
    """Neither to train on nor as the other image of a style."""
    _, views = made
    styles = {views.source.style_of(views.row(entry)) for entry in views.train}
    assert styles == {"oil", "ink"}
    config.references.tiles = config.references.crop = 0.0
    config.references.other = 1.0
    drawn = {views.draw(views.train[0], 32, np.random.default_rng(i)).tobytes() for i in range(40)}
    own = views.source.style_of(views.row(views.train[0]))
    known = {}
    for entry in views.train:
        row = views.row(entry)
        if views.source.style_of(row) == own and entry != views.train[0]:
            known[np.asarray(views.source[row].image).tobytes()] = row
    assert drawn <= known.keys() and len(drawn) > 1


def test_batches_have_one_number_of_references(made, config):
    k2, views = made
    jobs = [job_of(views, config, views.train[i % len(views.train)], 1, i, 32) for i in range(12)]
    batches = batches_of(k2, views, jobs, 4, 0.0, 1.0, 0.0)
    assert sorted(j for batch in batches for j in batch.jobs) == list(range(12))
    for batch in batches:
        count = len(batch.shown.latents) if batch.shown else 0
        assert {len(jobs[j].views) for j in batch.jobs} == {count}
        if batch.shown:
            first = torch.from_numpy(jobs[batch.jobs[0]].views[0][None].copy())
            assert torch.allclose(batch.shown.latents[0][:1], k2.encode_images(first), atol=1e-5)


# ---- drawing ----------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(config):
    config.sweep = []
    style.train(config)
    return config


def drawn(config, name, **values):
    output = Path(config.output).parent / name
    made = SampleConfig(str(output), config.model, prompt=tiny.PROMPTS[0], adapter=config.output)
    made.size, made.steps, made.guidance = [32, 32], 3, 1.0
    for key, value in values.items():
        setattr(made, key, value)
    sample(made)
    return np.asarray(Image.open(output / "000.png"), int)


def test_strengths(trained):
    """Strength 0 is no reference, bit for bit; the others differ, by attention and on the velocity."""
    a, b = (str(Path(trained.heldout).parent / f"{name}.png") for name in "ab")
    none = drawn(trained, "none")
    assert (drawn(trained, "zero", references=[f"{a}:0"]) == none).all()
    assert (drawn(trained, "zeros", references=[f"{a}:0", f"{b}:0"], strength="velocity") == none).all()
    one = drawn(trained, "one", references=[a])
    assert (one != none).any() and (drawn(trained, "half", references=[f"{a}:0.5"]) != one).any()
    # A reference of strength 0 takes no part, wherever it stands.
    assert np.abs(drawn(trained, "with", references=[a, f"{b}:0"]) - one).max() <= 1
    # One reference at 1 on the velocity is the same as by attention.
    assert np.abs(drawn(trained, "velocity", references=[a], strength="velocity") - one).max() <= 1
    assert (drawn(trained, "away", references=[f"{a}:-1"], strength="velocity") != none).any()


def test_lines_of_a_file_name_their_own(trained):
    folder = Path(trained.heldout).parent
    made = SampleConfig(str(folder / "all"), trained.model, prompts=trained.heldout, adapter=trained.output)
    made.size, made.steps, made.guidance = [32, 32], 3, 1.0
    sample(made)
    first = drawn(trained, "first", references=[str(folder / "a.png")])
    assert np.abs(np.asarray(Image.open(folder / "all/000.png"), int) - first).max() <= 1


def test_a_merge_is_measured_with_the_references_of_the_run(trained):
    """By the run's own held-out prompts and size: its score is that of its own last evaluation."""
    output = Path(trained.output).parent / "merged"
    assert cli.main(["merge", f"{trained.output}:1", "--output", str(output)]) == 0
    [row] = json.loads((output / "merge.json").read_text())["kept"]
    after = json.loads((Path(trained.output) / "summary.json").read_text())["after"]
    assert row["run"] == pytest.approx(after["brightness@1"], abs=1e-5)
    assert row["merge"] == pytest.approx(row["run"], abs=1e-4) and row["images"] == 3


def test_without_an_adapter_of_style_it_is_warned(config, capsys):
    a = str(Path(config.heldout).parent / "a.png")
    config.output = None
    made = SampleConfig(str(Path(a).parent / "plain"), config.model, prompt="a fox", references=[a])
    made.size, made.steps, made.guidance = [32, 32], 1, 0.0
    sample(made)
    assert "no adapter of posttrain style is given" in capsys.readouterr().err


# ---- mistakes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["{a}:high"], "references: {a}:high: 'high' is not a number; write IMAGE:STRENGTH"),
        (["{a}:nan"], "references: a strength of nan: use at most 4 either way"),
        (["{a}:2"], "references: a strength of 2 by attention must lie in 0 to 1; use --strength velocity"),
        (["{a}:-5", "--strength", "velocity"], "references: a strength of -5: use at most 4 either way"),
        (["{f}/none.png"], "references: {f}/none.png: no such file; correct the path"),
        (["{f}/small.png"], "references: {f}/small.png: is 16 x 64 pixels; a reference has 32 or more each way"),
        (["{f}/cut.png"], "references: {f}/cut.png: "),
        (["{a}"] * 11, "references: 11 images; give at most 10"),
    ],
)
def test_references_that_cannot_be_shown(config, tmp_path, capsys, words, says):
    image(3, 64).resize((16, 64)).save(tmp_path / "small.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    at = {"a": tmp_path / "a.png", "f": tmp_path}
    own = ["--references", *(word.format(**at) for word in words)]
    model = ["--model.path", config.model.path, "--model.dtype", "float32", "--prompt", "a fox", "--size", "[32,32]"]
    assert cli.main(["sample", *model, *own, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert says.format(**at) in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"references.tiles": 0.0, "references.crop": 0.0, "references.other": 0.0}, "references.tiles"),
        ({"references.crop_least": 0.6}, "references.crop_least"),
        ({"references.sizes": []}, "references.sizes"),
        ({"references.tile_counts": [64]}, "references.sizes"),
        ({"references.drop": 0.8}, "references.drop"),
        ({"sweep": [5.0]}, "sweep"),
        ({"images.columns.style_of": None}, "heldout_styles"),
        ({"model.allow_distilled": True}, "model.allow_distilled"),
        ({"model.sequence_parallel": 2}, "model.sequence_parallel"),
    ],
)
def test_mistakes(config, changes, field):
    for path, value in changes.items():
        *parts, name = path.split(".")
        setattr(functools.reduce(getattr, parts, config), name, value)
    with pytest.raises(ConfigError) as error:
        validate(config)
    assert error.value.field == field


def test_a_style_that_is_not_there(config):
    config.heldout_styles = ["fresco"]
    with pytest.raises(UserError, match=r"heldout_styles: 'fresco' is not in .*; it has: chalk, ink, oil"):
        style.train(config)


def test_a_subject_that_is_no_box(config):
    path = Path(config.images.train) / "00.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"box": [20, 4, 4, 20]}))
    with pytest.raises(UserError, match=r"box: is \[20, 4, 4, 20\]; write \[left, top, right, bottom\] in pixels"):
        StyleSet(config.images).subject(0)


def test_prompts_without_references(config):
    Path(config.heldout).write_text(json.dumps({"prompt": "a fox"}) + "\n")
    with pytest.raises(UserError, match=r"heldout: .* names no references; add references"):
        style.train(config)


def test_captions_of_held_out_images(config, capsys):
    config.heldout, config.steps = None, 1
    style.train(config)
    assert "each in the style of another one" in capsys.readouterr().err


def test_no_caption_is_drawn_in_the_style_of_its_own_image(config):
    """Not with two entries an image either, one for each resolution."""
    config.images.resolutions = [16, 32]
    source, k2 = StyleSet(config.images), K2.load(config.model.path)
    images = encode_images(k2, source, config.images, Processes())
    rows = list(map(images.row, images.heldout.tolist()))
    records, drawer = style.of_heldout_images(k2, source, images, config, (32, 32))
    for record, shown in zip(records, drawer.own, strict=True):
        own = next(row for row in rows if source.captions(row)[0].text == record.prompt)
        assert shown is not None and (shown.images[0] != np.asarray(source[own].image)).any()


def test_names(tmp_path):
    image(0).save(tmp_path / "a:1.png")
    assert named("a:1.png", tmp_path, "x").strength == 1.0
    assert named({"image": "a:1.png", "strength": 0.25}, tmp_path, "x").strength == 0.25
    with pytest.raises(UserError, match="x: is None; name an image"):
        named(None, tmp_path, "x")


def test_references_keep_their_shape():
    image = Image.new("RGB", (1000, 500))
    assert scaled(image, 512, 16, "x").shape == (256, 512, 3) and scaled(image, 4000, 16, "x").shape == (496, 992, 3)
