"""What finetuning refuses or leaves out: bad images and captions, a distilled base, settings that do not fit."""

import json
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from posttrain import cli
from posttrain.errors import UserError
from posttrain.sft import train as sft
from tests.helpers import runs, tiny
from tests.sft.test_sft import table


@pytest.fixture
def config(tmp_path, model):
    return runs.sft_config(tmp_path, model)


def test_every_image_has_its_fate(config, tmp_path, capsys):
    """Of 20 images: one cut off, one whose caption is a link to nothing, one of 1 pixel, one too narrow, one there
    twice, one turned by EXIF, which is cropped. max_bad counts the first two alone."""
    place = Path(config.images.train)
    (place / "000.png").write_bytes((place / "000.png").read_bytes()[:-30])
    (place / "001.txt").unlink()
    (place / "001.txt").symlink_to("gone.txt")
    Image.new("RGB", (1, 1)).save(place / "002.png")
    Image.new("RGB", (2000, 100)).save(place / "003.png")
    Image.open(place / "004.png").save(place / "005.png", compress_level=0)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (100, 160, 3), np.uint8)).save(
        place / "006.png", exif=turned
    )
    sft.train(config)
    said = capsys.readouterr().err
    assert "captioned: bad and left out: 2 of 20 rows: " in said
    assert "000.png: image: cannot be read: " in said and "001.png: 001.txt: cannot be read: No such" in said
    assert "too small for images.resolutions and left out: 1 of 20 images" in said
    assert "cut by more than images.max_cut and left out: 1 of 20 images" in said
    assert "there twice and left out: 1 of 20 images" in said
    assert "captioned: 15 images in 2 buckets; 1 of 15 crops cut something off" in said
    assert "1 bucket cannot fill a batch (6) in one epoch; " in said and "the smallest, 40x24, has 1 image" in said
    uses = {Path(row["image"]).name: row for row in table(config.output)}
    assert uses["002.png"]["use"].startswith("too small") and uses["003.png"]["use"].startswith("cut by more")
    assert uses["005.png"]["use"] == "there twice" and uses["004.png"]["use"] in ("trained", "held out")
    assert uses["000.png"]["use"].startswith("image: cannot be read")
    # 160 high and 100 wide in a bucket of 40 x 24: 96 wide
    row = uses["006.png"]
    assert (row["height"], row["width"], row["left"], row["right"], row["cut"]) == ("160", "100", "2.0", "98.0", "0.04")
    config.images.max_bad, config.output = 0.05, str(tmp_path / "other")
    with pytest.raises(
        UserError, match=r"captioned: more than 0\.05 of 20 rows are bad \(max_bad\): .*000\.png: image"
    ):
        sft.train(config)
    assert not Path(config.output).exists()


def test_too_large_an_image_is_named(config, capsys):
    """20,000 x 20,000 pixels, which would be 1.2 GB, are refused by the file's header."""
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n"
    for kind, body in chunks:
        data += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    (Path(config.images.train) / "000.png").write_bytes(data)
    sft.train(config)
    says = "bad and left out: 1 of 20 rows: .*000.png: image: cannot be read: Image size .400000000 pixels. exceeds"
    assert re.search(says, capsys.readouterr().err)


def test_images_that_are_all_too_small(config):
    config.images.resolutions, config.images.multiple = [64, 128], 64
    says = r"of 20 images 0 can be trained on \(20 too small for images\.resolutions\), and one at least is held"
    with pytest.raises(UserError, match=says):
        sft.train(config)
    config.images.max_enlarge = 2.0
    sft.train(config)
    assert {row["bucket_height"] for row in table(config.output)} == {"64"}


def test_one_image_is_too_few(config):
    for file in sorted(Path(config.images.train).iterdir())[2:]:
        file.unlink()
    with pytest.raises(UserError, match="captioned: of 1 image 1 can be trained on, and one at least is held out; add"):
        sft.train(config)


def test_other_images_cannot_be_resumed(config):
    sft.train(config)
    (Path(config.images.train) / "000.txt").write_text("another caption")
    with pytest.raises(UserError, match=r"images: not those that .*step-000002 was trained on"):
        sft.train(config, resume=True)


@pytest.mark.parametrize(("setting", "now"), [("images.heldout", 0.5), ("images.measured", 4)])
def test_what_is_held_out_stays_so(config, tmp_path, capsys, setting, now):
    """An image that was trained on must not be held out later, nor the other way round."""
    sft.train(config)
    recipe = runs.recipe(config, tmp_path / "recipe.yaml")
    assert cli.main(["sft", "--config", str(recipe), "--resume", "--steps", "3", f"--{setting}", str(now)]) == 2
    assert f"cannot be resumed with {setting} " in capsys.readouterr().err


def test_a_distilled_base_is_refused(config, tmp_path, capsys):
    config.model.path = str(tiny.save(tmp_path / "turbo", distilled=True))
    path = str(runs.recipe(config, tmp_path / "recipe.yaml"))
    assert cli.main(["sft", "--config", path]) == 2
    assert "model_index.json: is_distilled is true: " in capsys.readouterr().err
    assert cli.main(["sft", "--config", path, "--model.allow_distilled", "true"]) == 2
    assert "model.allow_distilled: finetuning blurs a distilled model; give the Raw" in capsys.readouterr().err


def test_a_layer_that_stays_without_effect_is_an_error(config, monkeypatch):
    """As if its gradient were lost."""
    step = sft.Stepper.step

    def lossy(self):
        norm = step(self)
        with torch.no_grad():
            self.parameters[1].zero_()  # the first layer's B
        return norm

    monkeypatch.setattr(sft.Stepper, "step", lossy)
    with pytest.raises(UserError, match=r"lora\.targets: not moved in 2 updates: 1 layer, such as transformer_bl"):
        sft.train(config)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"images__resolutions": [4]}, "images.resolutions: 4 has no bucket with sides that are multiples of 8, "),
        ({"images__resolutions": [32, 32]}, "images.resolutions: is [32, 32]; name each once"),
        ({"images__columns__captions": {}}, "images.columns.captions: is empty; name a column, such as {caption: 1}"),
        ({"images__columns__captions": {"a": 0}}, "images.columns.captions"),
        ({"images__max_enlarge": 0.5}, "images.max_enlarge: is 0.5; use 1 or more"),
        ({"turbo": "runs/t", "lora": None}, "turbo: stands beside an adapter, and lora is null; set one of the two"),
        ({"turbo_steps": 4}, "turbo_steps: is of turbo, which is null; name a Turbo, or leave it out"),
        ({"optim__passes": 2}, "optim.passes: is 2; each update draws its own times and noise; use 1"),
        ({"eval__best": "heldout/accuracy"}, "eval.best: 'heldout/accuracy' is no metric of the evaluation"),
        ({"rewards": [{"name": "far", "function": "tests.helpers.runs:contrast", "group": True}], "eval__best": "far"},
         "eval.best: 'far' is no metric of the evaluation"),
        ({"eval__best": "heldout/loss"},
         "eval.best: takes the highest, and heldout/loss is better the lower it is; name another"),
        ({"eval__best": "heldout/loss_t3"}, "eval.best: takes the highest, and heldout/loss_t3 is better the lower it"),
        ({"eval__best": "heldout/gain", "eval__stop__metric": "heldout/loss", "eval__every": 1},
         "eval.stop.better: is higher, and heldout/loss is better the lower it is; set lower"),
        ({"images__train": "none.jsonl"}, "images.train: none.jsonl: no such file or directory; correct the path"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_before_anything_is_loaded(config, tmp_path, capsys, monkeypatch, change, says):
    monkeypatch.setattr(sft, "load_model", lambda *_: pytest.fail("the model is read"))
    data = json.loads(runs.recipe(config, tmp_path / "recipe.yaml").read_text())
    for path, value in change.items():
        *sections, last = path.split("__")
        section = data
        for name in sections:
            section = section[name]
        section[last] = value
    (tmp_path / "recipe.yaml").write_text(json.dumps(data))
    assert cli.main(["sft", "--config", str(tmp_path / "recipe.yaml")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and says in err


def test_a_multiple_that_the_model_cannot_have(config):
    config.images.multiple = 12
    with pytest.raises(UserError, match=r"images\.multiple: is 12; this model wants a multiple of 8"):
        sft.train(config)


def test_long_captions_are_cut_with_a_warning(config, capsys):
    config.images.max_tokens = 16
    sft.train(config)
    assert "longer than images.max_tokens (16): 1 caption, of which up to" in capsys.readouterr().err
