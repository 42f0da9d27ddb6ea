"""Text read by RapidOCR: character error rates of rendered text by font, size and script, and the reward."""

import shutil
from pathlib import Path

import matplotlib
import matplotlib_fontja
import numpy as np
import pytest
import rapidocr
from PIL import Image, ImageDraw, ImageFont

from posttrain.errors import UserError
from rewards.base import Failure, RewardSpec
from rewards.load import check_columns, check_rewards, load_rewards
from rewards.ready import Text
from rewards.ready.text import character_error_rate

FONTS = Path(matplotlib.get_data_path()) / "fonts/ttf"
JAPANESE = Path(matplotlib_fontja.__file__).parent / "fonts/ipaexg.ttf"
LATIN = {
    "pillow": None,
    "sans": FONTS / "DejaVuSans.ttf",
    "serif italic": FONTS / "DejaVuSerif-Italic.ttf",
    "mono bold": FONTS / "DejaVuSansMono-Bold.ttf",
    "stix": FONTS / "STIXGeneral.ttf",
}
SIZES = (14, 24, 48)
SCRIPTS = {
    "latin": (["Fresh bread daily", "OPEN HOUSE"], LATIN["sans"]),
    "digits": (["24/7 555-0134", "$3.50 10:30"], LATIN["sans"]),
    "accents": (["Café crème déjà vu", "Über schöne Grüße"], LATIN["sans"]),
    "japanese": (["東京駅の時刻表", "カフェでコーヒー"], JAPANESE),
    "chinese": (["今日大安", "本店出口在北方"], JAPANESE),  # characters that its font shares
}


def rendered(lines, font, size, side=512):
    chosen = ImageFont.load_default(size) if font is None else ImageFont.truetype(str(font), size)
    image = Image.new("RGB", (side, side), (238, 232, 213))
    draw = ImageDraw.Draw(image)
    for i, line in enumerate(lines):
        draw.text((24, 60 + 2 * size * i), line, fill=(40, 30, 70), font=chosen)
    return image


@pytest.fixture(scope="module")
def reader():
    return Text(threads=1)


def rate(reader, lines, font, size):
    return character_error_rate(lines, reader.read(rendered(lines, font, size)))


@pytest.mark.parametrize("font", LATIN)
def test_fonts_and_sizes(reader, font):
    """At most one character in twenty is wrong."""
    rates = [rate(reader, SCRIPTS["latin"][0], LATIN[font], size) for size in SIZES]
    assert max(rates) <= 0.05, rates


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts(reader, script):
    lines, font = SCRIPTS[script]
    assert rate(reader, lines, font, 32) <= 0.05


def test_the_rate_counts_characters():
    """One wrong of ten, two missing, three more than were asked for; case, spaces and lines do not count."""
    assert character_error_rate(["OPEN HOUSE", "x"], ["open", "hause x"]) == pytest.approx(1 / 10)
    assert character_error_rate(["abcde"], ["abc"]) == pytest.approx(2 / 5)
    assert character_error_rate(["ab"], ["abcde"]) == pytest.approx(3 / 2)
    assert character_error_rate(["ab"], []) == 1.0


def test_the_reward_is_the_judges_measure(reader):
    """A word of three is missing: 1 - 1/3. One is misread by a letter of five: 1 - 1/5 / 3. Two words are extra, of
    three asked for: 1 - 2 * 0.5 / 3."""
    asked = ["Fresh bread daily"]
    shown = [["Fresh bread daily"], ["Fresh daily"], ["Fresh broad daily"], ["Fresh bread daily", "NEW HERE"], []]
    images = [rendered(lines, LATIN["sans"], 32) for lines in shown]
    scores = reader(images, ["a bakery"] * 5, [asked] * 5)
    assert scores == pytest.approx([1, 2 / 3, 1 - 1 / 15, 2 / 3, 0])
    assert scores[2].details["lines"] == ["Fresh broad daily"]
    assert scores[2].details["character_errors"] == pytest.approx(1 / 15)
    # By itself each is scored the same, in whatever order.
    assert [reader([image], ["a bakery"], [asked])[0] for image in images[::-1]] == scores[::-1]


def test_no_score_without_a_text_asked_for(reader):
    image = rendered(["Fresh"], LATIN["sans"], 32)
    assert reader([image] * 3, ["a", "b", "c"], [None, [], ["  "]]) == [None] * 3


@pytest.mark.parametrize("text", ["Свежий хлеб", "서울역", "مرحبا", "Φρέσκο", "phở bò ệ"])
def test_a_script_that_it_cannot_read_is_a_failure(reader, text):
    """It would score 0 whatever the image shows."""
    image = rendered(["Fresh"], LATIN["sans"], 32)
    known, unknown = reader([image] * 2, ["a", "b"], [["Fresh"], ["Fresh", text]])
    assert known == 1 and isinstance(unknown, Failure) and "the recogniser has no letter" in unknown.message


def test_another_recogniser(reader, tmp_path):
    own = Path(rapidocr.__file__).parent / "models/PP-OCRv6_rec_small.onnx"
    shutil.copy(own, tmp_path / "mine.onnx")
    image = rendered(["Fresh bread"], LATIN["sans"], 32)
    assert Text(threads=1, recogniser=str(tmp_path / "mine.onnx")).read(image) == reader.read(image) == ["Fresh bread"]
    (tmp_path / "mine.onnx").write_bytes(own.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"mine\.onnx: cannot be loaded as a recogniser of PP-OCR"):
        Text(recogniser=str(tmp_path / "mine.onnx"))


@pytest.mark.long
def test_an_image_without_text_of_any_mode_scores_nothing(reader):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8))
    for image in (noise, Image.new("RGBA", (64, 64)), Image.new("RGB", (16, 300))):
        assert reader([image], ["a"], [["Fresh"]]) == [0.0]


def test_a_recipe_is_told_that_prompts_lack_texts():
    spec = RewardSpec("text", {"class_path": "rewards.ready.Text", "init_args": {"threads": 2}})
    check_rewards([spec])
    with pytest.raises(UserError, match="takes texts, but the prompts' columns are: tags"):
        check_columns(load_rewards([spec]), {"tags": [None]})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "gpu"}, "device: gpu: use cpu or cuda"),
        ({"device": "cuda"}, "pip install onnxruntime-gpu"),
        ({"threads": 0}, "threads: 0: use 1 or more"),
        ({"sure": 2}, "sure: 2: use a number from 0 to 1"),
        ({"recogniser": "no.onnx"}, "recogniser: no.onnx: no such file"),
    ],
)
def test_mistakes(settings, message):
    with pytest.raises(UserError) as caught:
        Text(**settings)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"rapidocr is not installed: pip install 'posttrain\[ready\]'"):
        Text()


def test_too_many_texts_are_the_users_mistake(reader):
    with pytest.raises(UserError, match="11 texts in one image, at most 10"):
        reader([rendered(["a"], None, 32)], ["many"], [[f"text{i}" for i in range(11)]])
