"""Comparisons of checkpoints picture by picture, and the figure of several runs."""

import xml.etree.ElementTree as ET

import numpy as np
import pytest
from PIL import Image

from posttrain.nano.bench.compare import ensemble, wins
from posttrain.nano.bench.stpo import figure, table
from posttrain.nano.world import judge_data, scenes
from posttrain.nano.world.choices import tasteful
from posttrain.report.charts import panels_svg
from rewards.base import Scores


def test_a_tie_is_half_a_win_and_a_missing_score_none():
    """Two wins, a loss and a tie of four: 2.5 / 4. The fifth and the sixth lack one score and do not count."""
    nan = float("nan")
    ours, theirs = np.array([1.0, 0.9, 0.1, 0.5, nan, 0.7]), np.array([0.0, 0.8, 0.2, 0.5, 0.0, nan])
    assert wins(ours, theirs) == 0.625
    assert wins(theirs, ours) == 0.375


def test_the_ensemble_is_of_the_judges_that_scored_both():
    """Row 0: (0.2 + 0.6) / 2 against (0.4 + 0.2) / 2. Row 1: the second judge lacks one side, so only the first counts.
    The oracle is no judge. Row 2: nobody scored both."""

    def scores(values, valid):
        none = np.zeros((3, 3), bool)
        return Scores(["rubric", "ocr", "oracle"], np.array(values), np.array(valid), none, {}, {}, {})

    ours = scores([[0.2, 0.6, 0.9], [0.3, 0.9, 0.9], [0.5, 0.5, 0.9]], [[True] * 3, [True] * 3, [False, True, True]])
    theirs = scores(
        [[0.4, 0.2, 0.0], [0.7, 0.0, 0.0], [0.5, 0.5, 0.0]], [[True] * 3, [True, False, True], [True, False, True]]
    )
    mine, other = ensemble(ours, theirs, ["rubric", "ocr"])
    assert mine[:2] == pytest.approx([0.4, 0.3]) and other[:2] == pytest.approx([0.3, 0.7])
    assert np.isnan(mine[2]) and np.isnan(other[2])


def test_the_taste_is_the_hidden_one_and_sees_nothing_in_an_empty_picture():
    rng = np.random.default_rng(3)
    scene = scenes.random_scene(rng)
    pictures = [Image.fromarray(scenes.render(scene)), Image.new("RGB", (64, 64), (200, 200, 200))]
    known, nothing = tasteful(pictures, ["", ""])
    assert known == pytest.approx(judge_data.taste(scene), abs=0.15)  # the oracle reads places to a pixel
    assert nothing is None


def test_table_names_the_least_and_the_greatest():
    rows = {"a": [{"x": 0.5, "y": None}, {"x": 0.25, "y": None}], "b": [{"x": 1.0, "y": 2.0}]}
    assert table(rows, ["x", "y"]).splitlines()[2:] == ["| a | 0.250 to 0.500 | - |", "| b | 1.000 | 2.000 |"]


def test_a_figure_has_a_line_for_each_run_in_its_variants_colour():
    series = {
        "loss <w>": {"a": [[(0, 1.0), (10, 3.0)], [(0, 1.0), (10, None)]], "b": [[(0, 2.0), (10, 2.0)]]},
        "accuracy": {"b": [[(0, 0.5), (10, 0.9)]]},
    }
    root = ET.fromstring(panels_svg(series))
    space = "{http://www.w3.org/2000/svg}"
    paths = root.findall(f".//{space}path")
    assert len(paths) == 4
    colours = [path.get("class") for path in paths]
    assert colours[0] == colours[1] and colours[2] == colours[3] != colours[0]
    first = [float(n) for n in paths[0].get("d", "").replace("M", " ").replace("L", " ").split()]
    assert first[0] < first[2] and first[1] > first[3]  # later is further right, more is further up
    assert "L" not in paths[1].get("d", "")  # a missing value breaks the line
    titles = [text.text for text in root.findall(f"{space}text") if text.get("class") == "title"]
    assert titles == ["loss <w>", "accuracy"]


def test_curves_begin_before_the_first_step():
    run = [{"step": 0.0, "pairs/accuracy": 0.5, "oracle": 0.5}, {"step": 5.0, "pairs/accuracy": 0.8, "oracle": 0.6}]
    run.append({"step": 10.0, "pairs/accuracy": 0.9, "oracle": 0.7})
    drawn = [path.get("d", "").count("L") for path in ET.fromstring(figure({"stpo": [run]})).iter() if path.get("d")]
    assert drawn == [2, 2]  # pairs/accuracy and oracle, three points each
