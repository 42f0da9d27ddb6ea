"""The report: one file, everything in it, nothing in it that a prompt could run."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from posttrain.config.sections import ModelConfig, PromptsConfig
from posttrain.errors import UserError
from posttrain.grpo.config import GRPOConfig
from posttrain.report import charts
from posttrain.report.charts import nice_ticks
from posttrain.report.format import number
from posttrain.report.page import summary_tables, write_report
from posttrain.report.render import macro
from posttrain.runs.read import read_metrics
from posttrain.runs.run import Run
from rewards.base import RewardSpec

EVIL = '<script>alert("1")</script> & <img src=x onerror=alert(1)>'


def line_chart(*args, **options):
    return macro("charts.html", "chart")(charts.line_chart(*args, **options))


def make_run(path: Path, steps: int = 40, images: int = 3) -> Run:
    config = GRPOConfig(
        output=str(path),
        model=ModelConfig(path="nano/<k2>"),
        prompts=PromptsConfig(train="a.jsonl", heldout="b.jsonl"),
        rewards=[RewardSpec(name="oracle", function="pkg.mod:score")],
        steps=steps,
    )
    config.track.tensorboard = False
    prompts, seeds = [EVIL, *(f"prompt {i}" for i in range(1, images))], list(range(images))
    with Run.create(config) as run:
        run.samples(0, np.zeros((images, 16, 16, 3), np.uint8), prompts, seeds)
        run.start(steps)
        for step in range(1, steps + 1):
            run.log(step, {"reward": step / 100, "kl": float("nan") if step == 2 else 1e-5, "eval/oracle@0": 0.5})
        run.samples(steps, np.full((images, 16, 16, 3), 255, np.uint8), prompts, seeds)
        run.summary({"before": {"oracle": 0.61}, "after": {"oracle": 0.73}, "seconds": 400.0})
    return run


class Tags(HTMLParser):
    """Collects tags and attributes, and checks that what is opened is closed."""

    VOID = ("meta", "img", "input", "br", "wbr", "line", "path", "circle", "rect")

    def __init__(self, page: str):
        super().__init__()
        self.names: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.names.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_report_is_whole_and_self_contained(tmp_path):
    path = write_report(make_run(tmp_path / "run").path)
    assert path == tmp_path / "run" / "report.html"
    page = path.read_text()
    tags = Tags(page)
    assert tags.open == [] and tags.names.count("script") == 1 and "link" not in tags.names
    assert tags.names.count("img") == 6
    for name, value in tags.attributes:
        assert not name.startswith("on")
        if name in ("src", "href"):
            assert value is not None and value.startswith("data:image/png;base64,")
    assert "url(" not in page and "http://" not in page and "https://" not in page
    assert "&lt;script&gt;alert(&#34;1&#34;)&lt;/script&gt; &amp; &lt;img" in page
    assert "nano/&lt;k2&gt;" in page


def test_report_shows_figures_curves_images_and_settings(tmp_path):
    page = write_report(make_run(tmp_path / "run").path, tmp_path / "elsewhere" / "r.html").read_text()
    text = re.sub(r"<[^>]+>", " ", page)
    for part in ("0.6100 0.7300 +0.1200", "seconds 400", "step 0", "step 40", "seed 2", "40 of 40 steps"):
        assert part in re.sub(r"\s+", " ", text)
    assert "NaN or infinite: 1" in text and "group_size: 16" in text and "oracle@0" in text and "torch" in text


def test_what_it_took_is_costs_alone():
    summary = {"steps": 4, "images": 64, "seconds": 2.5, "peak_ram_gib": 1.5, "judge/repeat": 0.1, "before": {"a": 1}}
    tables = summary_tables(summary)
    assert [name for name, _ in tables["took"]] == ["steps", "images", "seconds", "peak_ram_gib"]
    assert tables["other"] == [["judge/repeat", 0.1]]


def test_settings_changed_on_resuming_are_on_the_page(tmp_path):
    run = make_run(tmp_path / "run", steps=4).path
    row = {"after_step": 2, "setting": "optim.lr", "before": 0.001, "now": 0.0005}
    (run / "changes.json").write_text(json.dumps([row]))
    page = write_report(run).read_text()
    assert "Changed when the run was resumed" in page and "optim.lr" in page and "0.0005" in page
    (run / "changes.json").write_text("[{}]")
    with pytest.raises(UserError, match=r"changes.json: is not what posttrain writes there"):
        write_report(run)


def test_prompts_at_the_ends_of_the_pool(tmp_path):
    run = make_run(tmp_path / "run")
    assert "<h2>Prompts" not in write_report(run.path).read_text()
    row = {"prompt": EVIL, "score": 0.98765, "class": "easy", "rests until": None}
    run.prompts({"easiest": [row, {**row, "rests until": 40}], "hardest": []})
    page = write_report(run.path).read_text()
    assert Tags(page).open == [] and "<h3>hardest" not in page and page.count("0.9877") == 2
    assert '<th class="n">score</th><th>class</th><th class="n">rests until</th>' in page
    assert page.count("&lt;script&gt;alert(&#34;1&#34;)") == 3


def test_unfinished_run(tmp_path):
    run = make_run(tmp_path / "run", steps=1, images=1)
    (run.path / "summary.json").unlink()
    (run.path / "samples/step-000001/000.png").unlink()
    (run.path / "samples/step-000001").rmdir()
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "rew')
    assert Tags(write_report(run.path).read_text()).names.count("img") == 1
    (run.path / "metrics.jsonl").unlink()
    assert "No metrics yet" in write_report(run.path).read_text()


def test_many_and_large_images_are_reduced(tmp_path):
    run = make_run(tmp_path / "run", images=30)
    big = np.random.default_rng(0).integers(0, 255, (1, 1024, 768, 3), dtype=np.uint8)
    for step in (0, 40):
        run.samples(step, big, ["big"], [0])
    page = write_report(run.path).read_text()
    assert "24 of 30 shown" in page and page.count("<img") == 48
    assert page.count("data:image/jpeg") == 2 and len(page) < 1_500_000


def test_bad_input(tmp_path):
    with pytest.raises(UserError, match="is not a run directory"):
        write_report(tmp_path)
    run = make_run(tmp_path / "run", steps=1)
    (run.path / "summary.json").write_text("{")
    with pytest.raises(UserError, match=r"summary\.json: not JSON"):
        write_report(run.path)
    (run.path / "metrics.jsonl").write_text('{"step": 1}\noops\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: not JSON"):
        read_metrics(run.path / "metrics.jsonl")


def test_the_command_writes_it(tmp_path):
    run = make_run(tmp_path / "run")
    command = [sys.executable, "-m", "posttrain.cli", "report", str(run.path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=True)
    assert result.stdout.strip() == str(run.path / "report.html")


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.0, 1.0, [0, 0.5, 1.0]),
        (0.52, 0.86, [0.5, 0.6, 0.7, 0.8, 0.9]),
        (0.0, 0.00019, [0, 0.00005, 0.0001, 0.00015, 0.0002]),
        (-3, 120, [-50, 0, 50, 100, 150]),
        (2.0, 2.0, [1.8, 1.9, 2.0, 2.1, 2.2]),
        (0.0, 0.0, [0, 0.5, 1]),
        (-2.0, -2.0, [-2.2, -2.1, -2.0, -1.9, -1.8]),
    ],
)
def test_nice_ticks(low, high, ticks):
    assert nice_ticks(low, high) == pytest.approx(ticks)


@pytest.mark.parametrize(
    "points",
    [
        [(1, 0.5)],
        [(1, 0.5), (2, None), (3, 0.7)],
        [(i, 1 + 1e-6 * i) for i in range(5)],
        [(i, 1e9 * i) for i in range(2000)],
        [(i, 1e-12 * (-1) ** i) for i in range(50)],
        [(i, -7.0) for i in range(50)],
    ],
)
def test_charts_stay_in_their_box(points):
    svg = re.search(r"<svg.*</svg>", line_chart("a & b", points), re.DOTALL)
    assert svg is not None
    root = ElementTree.fromstring(svg[0])  # well-formed
    for path in root.iter("path"):
        numbers = [float(n) for n in re.findall(r"-?[\d.]+", path.get("d", ""))]
        assert all(0 <= x <= 360 for x in numbers[::2]) and all(0 <= y <= 190 for y in numbers[1::2])
        assert len(numbers) <= 2 * 400


def test_a_series_of_zeros_lies_on_the_foot_of_its_chart():
    svg = line_chart("skipped", [(1, 0.0), (2, 0.0)])
    assert re.findall(r'text-anchor="end">([^<]+)<', svg)[:3] == ["0.0", "0.5", "1.0"] and "-1" not in svg


def test_a_gap_breaks_the_line_and_nothing_finite_is_said():
    assert line_chart("a", [(1, 0.5), (2, None), (3, 0.7)]).count("M") == 2
    assert "no finite value" in line_chart("a", [(1, None)])


def test_number():
    assert [number(v) for v in (0, 5, 12345, 0.123456, 1.5e-5, 2e9)] == [
        "0",
        "5",
        "12,345",
        "0.1235",
        "1.5e-05",
        "2e+09",
    ]


def test_metrics_json_is_read_by_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": 1, "time": 5, "a": 1, "b": None}, {"step": 2, "time": 6, "a": 2}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_metrics(path) == {"a": [(1, 1), (2, 2)], "b": [(1, None)]}


def test_a_report_begins_with_a_verdict(tmp_path):
    """Of all prompts, not of those that are shown; what fell first; and whether a limit was crossed."""
    run = make_run(tmp_path / "run", images=2)
    rows = [{"oracle": {"score": 0.2 + 0.01 * i}, "clean": {"score": 0.9 - 0.01 * i}} for i in range(12)]
    later = [{"oracle": {"score": one["oracle"]["score"] + 0.1 + 0.001 * i}, "clean": {"score": 0.5}}
             for i, one in enumerate(rows)]  # fmt: skip
    later[3] = {"oracle": later[3]["oracle"]}  # one score is missing
    for step, scores in ((0, rows), (40, later)):
        run.samples(step, np.zeros((2, 8, 8, 3), np.uint8), ["a", "b"], [0, 1], scores)
    every = json.loads((tmp_path / "run/samples/step-000040/all_scores.json").read_text())
    assert len(every["oracle"]) == 12 and every["clean"][3] is None
    assert len(json.loads((tmp_path / "run/samples/step-000040/scores.json").read_text())) == 2
    page = write_report(tmp_path / "run").read_text()
    assert re.search(r"Verdict</h2>\s*<p>clean fell by \.34\d ± \.\d+; oracle \+\.10\d ± \.\d+\.</p>", page), page[
        :3000
    ]
    assert "no limit of the recipe was crossed" in page
