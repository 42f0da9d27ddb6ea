"""What the report shows beside curves: pictures under one slider, answers, limits, several runs; in a real Chromium."""

import base64
import hashlib
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from playwright.sync_api import Browser

from posttrain.config.sections import StopConfig
from posttrain.nano.world import oracles, scenes, statements
from posttrain.pipeline.plan import Stage
from posttrain.pipeline.report import write_index
from posttrain.report import charts
from posttrain.report.before_after import run_images
from posttrain.report.charts import Limit
from posttrain.report.compare import comparison, different, grouped
from posttrain.report.limits import limits
from posttrain.report.page import write_report
from posttrain.report.render import macro, page
from posttrain.runs.read import RunFiles, read_run
from posttrain.training import early_stopping
from posttrain.training.evaluate import per_image_scores
from rewards.base import RewardSpec, Scored, Scores
from tests.report.test_report import EVIL, Tags, make_run

shares = macro("parts.html", "shares")


def line_chart(*args, **options):
    return macro("charts.html", "chart")(charts.line_chart(*args, **options))


def areas_chart(*args, **options):
    return macro("charts.html", "chart")(charts.areas_chart(*args, **options))


def runs_chart(*args, **options):
    return macro("charts.html", "chart")(charts.runs_chart(*args, **options))


QUESTION = 'the word "<script>alert(2)</script>" is there'
SAID = [
    {"rubric": {"score": 0.25, "requirements": [QUESTION, "it is red"], "answers": [0.1, 0.4]}, "ocr": {"score": 1.0}},
    {"rubric": {"score": 0.9, "requirements": ["it is blue"], "answers": [0.9]}},
    {"mine": {"score": 0.5, "answers": 5, "requirements": None, "box": [1, 2]}},
]


def answered_run(path: Path, images: int = 3) -> Path:
    """With a pool, times, memory, a teacher and what rewards said, so that every part of a report is there."""
    run = make_run(path, images=images)
    prompts, seeds = [EVIL, *(f"prompt {i}" for i in range(1, images))], list(range(images))
    pictures = np.random.default_rng(0).integers(0, 255, (images, 64, 64, 3), dtype=np.uint8)
    for step in (0, 40, "teacher"):
        run.samples(step, pictures, prompts, seeds, SAID)
    rows = []
    for line in (path / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        classes = {"new": 30 - row["step"] // 2, "informative": row["step"] // 2, "easy": 0, "hard": 2, "flat": 0}
        row |= {f"pool/{name}": count for name, count in classes.items()}
        row |= {"seconds/sample": 3.0, "seconds/optimise": 1.0, "grad_norm": 0.3, "eval/a_figure_with_a_long_name": 0.5}
        rows.append(json.dumps(row) + "\n")
    (path / "metrics.jsonl").write_text("".join(rows))
    summary = json.loads((path / "summary.json").read_text())
    summary |= {"peak_ram_gib": 4.0, "memory": {"frozen weights": 2.0, "trained weights": 0.5, "optimiser": 1.0}}
    summary["rewards"] = {"rubric": {"model": "judge", "templates": {"rubric": "0123456789abcdef"}}}
    (path / "summary.json").write_text(json.dumps(summary))
    return path


# ---- what the rewards said ----------------------------------------------------------------------------------------


def test_what_each_reward_said_of_each_picture():
    values, valid = np.array([[0.25, 0.0], [0.5, 1.0]]), np.array([[True, False], [True, True]])
    details = {"rubric": [{"requirements": ["a"], "answers": [0.25]}, None], "ocr": [None, {"lines": ["x"]}]}
    none = {name: Counter() for name in details}
    scores = Scores(["rubric", "ocr"], values, valid, ~valid, none, details, {"rubric": 0, "ocr": 0})
    assert per_image_scores(scores) == [
        {"rubric": {"score": 0.25, "requirements": ["a"], "answers": [0.25]}},  # ocr is missing, which is not 0
        {"rubric": {"score": 0.5}, "ocr": {"score": 1.0, "lines": ["x"]}},
    ]
    details["ocr"][1] = {"score": 7, ("a", 1): float("nan"), "box": np.int64(3), "all": np.arange(2), "answers": 5}
    assert json.loads(json.dumps(per_image_scores(scores)[1]["ocr"], allow_nan=False)) == {
        "score": 1.0, "('a', 1)": None, "box": 3, "all": "[0 1]", "answers": 5,
    }  # fmt: skip


def test_the_oracle_says_which_requirements_are_met():
    rng = np.random.default_rng(3)
    scene = scenes.random_scene(rng)
    asked = [*scenes.describe(scene, rng).requirements, "the style is glowing", "the style is flat"]
    (score,) = oracles.rubric([scenes.render(scene)], [""], [asked])
    assert isinstance(score, Scored) and score.details["requirements"] == asked
    answers = score.details["answers"]
    assert score == pytest.approx(sum(answers) / len(asked)) and 0 < score < 1
    assert answers == [float(statements.meets(oracles.perceive([scenes.render(scene)])[0], one)) for one in asked]


def test_answers_stand_beside_their_pictures(tmp_path):
    section = macro("images.html", "run_images")(run_images(answered_run(tmp_path / "run") / "samples"))
    assert Tags(section).open == []
    assert section.count('class="card"') == 2 * 3 and section.count('tabindex="0"') == 2 * 3
    assert "the teacher" in section.lower() and section.count('type="range"') == 2
    assert (
        section.count(f"<td>{QUESTION.replace('<', '&lt;').replace('>', '&gt;').replace(chr(34), '&#34;')}</td>") == 2
    )
    assert '<td class="n no">0.10</td>' in section and '<td class="n">0.90</td>' in section
    assert "rubric <b>0.25 → 0.25</b>" in section
    assert "<td>box</td><td>1, 2</td>" in section and '<td>answers</td><td class="n">5.00</td>' in section


# ---- limits ---------------------------------------------------------------------------------------------------


def test_the_stop_rule_as_a_line():
    """A tenth off the best so far: 0.9 * 0.5, 0.9 * 0.8, 0.9 * 0.8."""
    recipe = {"eval": {"stop": {"metric": "oracle", "better": "higher", "drop": 0.1, "limit": None, "patience": 2}}}
    series = {"eval/oracle": [(0, 0.5), (5, 0.8), (10, 0.7), (15, None)]}
    (limit,) = limits(recipe, series)["eval/oracle"]
    assert [step for step, _ in limit.points] == [0, 5, 10] and limit.bad == "below"
    assert [value for _, value in limit.points] == pytest.approx([0.45, 0.72, 0.72])
    assert limit.crossed(series["eval/oracle"]) == [10]
    chart = line_chart("eval/oracle", series["eval/oracle"], limits=[limit])
    assert "below it at 1 of 4 points, first at step 10" in chart and chart.count('class="limit"') == 1


@pytest.mark.parametrize("better", ["higher", "lower"])
@pytest.mark.parametrize("limit", [None, 0.5])
def test_the_line_says_what_the_rule_says(better, limit):
    """With a patience of 1 the run ends at the first evaluation that is beyond the line, and at no other."""
    stop = StopConfig("oracle", better, 0.2, limit, 1)
    recipe = {"eval": {"stop": vars(stop)}}
    values = np.random.default_rng(1).uniform(0.2, 1.0, (20, 12)).round(3).tolist()
    for series in values:
        points = list(enumerate(series))
        (line,) = limits(recipe, {"eval/oracle": points})["eval/oracle"]
        ends = [
            n for n in range(12) if early_stopping.regression([(i, {"oracle": v}) for i, v in points[: n + 1]], stop)
        ]
        assert line.crossed(points) == ends


def test_limits_of_a_recipe():
    recipe = {
        "loss": {"clip_low": 1e-4, "clip_high": 2e-4}, "optim": {"max_grad_norm": 1.0},
        "rewards": [{"max_failures": 0.1}, {"max_failures": 1}],
    }  # fmt: skip
    names = ["ratio_error", "ratio", "failed", "fake_grad_norm", "eval/to_teacher/contrast", "eval/pairs/winner", "kl"]
    found = limits(recipe, {name: [(1, 0.0)] for name in names})
    assert {name: [limit.points[0][1] for limit in held] for name, held in found.items()} == {
        "ratio_error": [1e-4], "ratio": [1 - 1e-4, 1 + 2e-4], "failed": [0.1], "fake_grad_norm": [1.0],
        "eval/to_teacher/contrast": [1.0], "eval/pairs/winner": [0.0],
    }  # fmt: skip


def test_a_limit_far_off_does_not_flatten_the_curve():
    points = [(i, 0.001 * i) for i in range(5)]
    far, near = (line_chart("a", points, limits=[Limit("clip", [(0, value)])]) for value in (1.0, 0.005))
    assert 'class="limit"' not in far and "clip 1, off the chart" in far
    assert 'class="limit"' in near and "clip 0.005<" in near


# ---- charts of several -----------------------------------------------------------------------------------------


def test_areas_add_up():
    chart = areas_chart("pool", {"new": [(1, 3), (2, 1)], "easy": [(1, 1), (2, 3)]}, width=360, height=190)
    areas = [re.findall(r"-?[\d.]+", d) for d in re.findall(r'class="fill c\d" d="([^"]+)"', chart)]
    tops = [[float(area[1]), float(area[3])] for area in areas]
    floors = [[float(area[7]), float(area[5])] for area in areas]
    assert floors[1] == tops[0] and floors[0][0] == floors[0][1] > tops[0][0]
    assert tops[1][0] == tops[1][1] < tops[0][0] < tops[0][1]  # both come to 4; y grows downwards


def test_several_runs_are_a_mean_and_a_band():
    line = [[(0, 1.0), (1, 2.0)], [(0, 3.0), (1, 6.0)]]
    chart = runs_chart("a", [line, [[(0, 2.0), (1, 4.0)]]])
    paths = {css: re.findall(r"-?[\d.]+", d) for css, d in re.findall(r'<path class="([^"]+)" d="([^"]+)"', chart)}
    assert paths["own c0"] == paths["own c1"]  # the mean of 1 and 3 is 2, of 2 and 6 is 4
    assert "band c0" in paths and "band c1" not in paths and "at the end 4, 4" in chart


def test_a_line_goes_as_far_as_all_its_runs():
    short, long = [(i, 1.0) for i in range(200)], [(i, 3.0) for i in range(500)]
    (d,) = re.findall(r'class="own c0" d="([^"]+)"', runs_chart("a", [[short, long]]))
    assert len(set(re.findall(r"[ML][\d.]+ ([\d.]+)", d))) == 1  # 2 all the way, and no jump where one run ends


def test_shares_of_a_whole():
    bar = shares({"a": 3.0, "<b>": 1.0}, "s")
    assert 'width="750.0"' in bar and "3 s, 75%" in bar and "&lt;b&gt; <span>1 s, 25%" in bar and shares({}, "s") == ""


# ---- several runs ----------------------------------------------------------------------------------------------


def files(name: str, recipe: dict, oracle: float = 0.5, parent: str = "/runs") -> RunFiles:
    summary = {"before": {"oracle": 0.4}, "after": {"oracle": oracle}, "seconds": 10.0}
    series: dict = {"reward": [(1, oracle - 0.1), (2, oracle)], "eval/oracle": [(0, 0.4), (2, oracle)]}
    return RunFiles(Path(parent) / name, "", recipe, summary, {}, series)


def test_runs_that_differ_in_the_seed_are_one_line():
    runs = [
        files(
            f"stpo-{seed}-lr{rate}",
            {"seed": seed, "output": f"x{seed}", "optim": {"lr": rate}, "model": {"start": start}},
        )
        for seed in (0, 1)
        for rate, start in ((1, f"runs/first-{seed}"), (2, f"runs/first-{seed}"), (1, "runs/other"))
    ]
    lines = grouped(runs)
    assert [[run.name for run in line.runs] for line in lines] == [
        ["stpo-0-lr1", "stpo-1-lr1"], ["stpo-0-lr2", "stpo-1-lr2"], ["stpo-0-lr1", "stpo-1-lr1"],
    ]  # fmt: skip


def test_lines_of_one_name_are_told_apart_by_their_directories():
    lines = grouped([files("grpo", {"steps": n}, parent=f"/runs/{name}") for n, name in enumerate("ab")])
    assert [line.name for line in lines] == ["a/grpo", "b/grpo"]


def test_rewards_are_compared_by_name():
    a, b = ({"rewards": [{"name": "x", "weight": 1}, {"name": "y", "weight": w}][:n]} for w, n in ((2, 2), (3, 2)))
    assert different(a, b) == [("rewards.y.weight", 2, 3)]
    assert different(a, {"rewards": a["rewards"][:1]}) == [("rewards.y", {"name": "y", "weight": 2}, None)]


def test_several_runs_side_by_side():
    recipes = [{"seed": seed, "optim": {"lr": rate}} for rate in (1, 2) for seed in (0, 1)]
    runs = [files(f"r{r['optim']['lr']}-{r['seed']}", r, 0.6 + 0.1 * i) for i, r in enumerate(recipes)]
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page("comparison.html", "runs", **comparison(runs))))
    assert "4 runs, 2 recipes besides the seed" in text and "r1-*, 2 seeds" in text
    assert "oracle 0.4000 0.6500 0.6000 to 0.7000 0.4000 0.8500 0.8000 to 0.9000" in text
    assert "optim.lr 1 2" in text


def test_the_command_compares(tmp_path):
    paths = [str(make_run(tmp_path / name, steps=3).path) for name in ("a", "b")]
    changed = yaml.safe_load(Path(paths[1], "recipe.yaml").read_text()) | {"steps": 4}
    Path(paths[1], "recipe.yaml").write_text(yaml.safe_dump(changed))
    command = [sys.executable, "-m", "posttrain.cli", "report", *paths]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=True)
    assert result.stdout.strip() == str(tmp_path.resolve() / "comparison.html")
    written = (tmp_path / "comparison.html").read_text()
    assert Tags(written).open == [] and "<td>steps</td><td>3</td><td>4</td>" in written
    assert written.count("<img") == 3 * 3 and "&lt;script&gt;alert(&#34;1&#34;)" in written


# ---- in a browser ----------------------------------------------------------------------------------------------


def test_the_policy_names_the_script_that_is_there():
    written = page("page.html", "a")
    script = re.search(r"<script>(.*)</script>", written, re.DOTALL)
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in written and "default-src 'none'" in written


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[str, Path]:
    """A report, a comparison and a pipeline's index."""
    folder = tmp_path_factory.mktemp("runs")
    runs = [answered_run(folder / name) for name in ("first", "second")]
    both = folder / "comparison.html"
    both.write_text(page("comparison.html", "both", **comparison([read_run(run) for run in runs])))
    config: Any = SimpleNamespace(rewards=[RewardSpec("rubric", "a:b")])
    stages = [Stage(run.name, "grpo", config, [], run, {}) for run in runs]
    report = write_report(runs[1])
    state = {run.name: {"finished": "2026-01-01T00:00:00+0000", "seconds": 5.0} for run in runs}
    return {"report": report, "comparison": both, "index": write_index(folder, stages, state)}


@pytest.mark.parametrize("which", ["report", "comparison", "index"])
def test_a_narrow_and_a_wide_window(browser: Browser, written, which):
    said: list[str] = []
    window = browser.new_page()
    window.on("console", lambda message: said.append(message.text))
    window.on("pageerror", lambda error: said.append(str(error)))
    window.on("dialog", lambda dialog: said.append(dialog.message))
    for width in (390, 1400):
        window.set_viewport_size({"width": width, "height": 800})
        window.goto(written[which].as_uri())
        window.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
        assert window.evaluate("document.documentElement.scrollWidth") == width
    assert said == [] and EVIL in window.inner_text("main")
    window.close()


def test_the_pipelines_first_pictures_stand_against_its_last(written):
    index = written["index"].read_text()
    assert "<span>before first</span>" in index and "<span>after second</span>" in index
    assert index.count('type="range"') == 3 and index.count('href="second/report.html"') == 2  # and each stage's own
    assert "<th" in index and "oracle</td>" in index and Tags(index).open == []


def test_before_is_left_of_the_slider_and_after_right(browser: Browser, written):
    window = browser.new_page(viewport={"width": 390, "height": 800})
    window.goto(written["report"].as_uri())
    slider, after = window.locator(".slider input").first, window.locator(".pair .new").first
    assert slider.bounding_box()["height"] >= 44
    before = window.locator(".pair .old").first
    sides = ((before, "inset(0px {right}% 0px 0px)"), (after, "inset(0px 0px 0px {left}%)"))
    for value in (0, 30, 100):
        slider.fill(str(value))
        for side, shape in sides:
            clip = side.evaluate("one => getComputedStyle(one).clipPath")
            assert clip == shape.format(left=value, right=100 - value)
    slider.press("ArrowLeft")
    assert slider.get_attribute("aria-valuetext") == "99 % step 0, then step 40"
    labels = [window.locator(f".pair .{side} .step").first for side in ("old", "new")]
    assert [label.inner_text() for label in labels] == ["step 0", "step 40"]
    left, right = (label.bounding_box() for label in labels)
    assert left["x"] + left["width"] < right["x"]
    old, new = (window.locator(f".pair .{side} img").first.bounding_box() for side in ("old", "new"))
    assert old == new  # one lies on the other
    window.close()


def test_answers_come_up_by_pointer_and_by_keyboard(browser: Browser, written):
    for width in (390, 1400):
        window = browser.new_page(viewport={"width": width, "height": 800})
        window.goto(written["report"].as_uri())
        cards = window.locator(".card[tabindex]")
        answers = cards.nth(0).locator(".answers")
        assert not answers.is_visible()
        cards.nth(0).hover()
        assert answers.is_visible() and QUESTION in answers.inner_text()
        window.mouse.move(1, 1)
        window.locator(".slider input").first.focus()
        assert not answers.is_visible()
        window.keyboard.press("Tab")
        assert answers.is_visible() and not cards.nth(1).locator(".answers").is_visible()
        box = answers.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width
        window.close()


def test_without_script_both_pictures_stand_side_by_side(browser: Browser, written):
    context = browser.new_context(java_script_enabled=False, viewport={"width": 390, "height": 800})
    window = context.new_page()
    window.goto(written["report"].as_uri())
    old, new = (window.locator(f".pair .{side} img").first.bounding_box() for side in ("old", "new"))
    assert old["y"] == new["y"] and old["x"] + old["width"] <= new["x"]
    assert not window.locator(".slider").first.is_visible()
    context.close()


def test_no_other_script_runs(browser: Browser, written, tmp_path):
    planted = tmp_path / "planted.html"
    planted.write_text(written["report"].read_text().replace("<main>", "<main><script>document.title = 'x'</script>"))
    window = browser.new_page()
    window.goto(planted.as_uri())
    assert window.title() != "x" and window.locator(".before-after.on").count() > 0
    window.close()
