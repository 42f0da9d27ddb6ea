"""What the benchmarks of runs share."""

import json

import pytest
import torch

from posttrain.nano.bench import common, grpo, merge, methods, reward_weighted
from tests.helpers import runs


def test_a_process_gets_its_folder_and_variables_and_a_failed_one_names_its_log(tmp_path):
    (tmp_path / "says.py").write_text("import os, sys; print(os.getcwd(), os.environ['WORD'], *sys.argv[1:])")
    jobs = common.Jobs(tmp_path / "runs")
    assert jobs("good", "says", ["a", "b"], cwd=tmp_path, WORD="x") > 0
    assert (tmp_path / "runs/good.log").read_text().split() == [str(tmp_path), "x", "a", "b"]
    with pytest.raises(SystemExit, match=r"bad: failed; see .*runs/bad\.log"):
        jobs("bad", "no_such_module", [])
    assert "no_such_module" in (tmp_path / "runs/bad.log").read_text()


def test_calls_side_by_side_come_back_in_their_order_and_a_failure_comes_through():
    assert common.side_by_side(divmod, [(7, 2), (9, 4)]) == [(3, 1), (2, 1)]
    with pytest.raises(ZeroDivisionError):
        common.side_by_side(divmod, [(7, 2), (9, 0)])


def test_options_after_two_dashes_are_the_commands():
    args = common.parser("About.", "grpo", "r.yaml").parse_args(["--output", "o", "--seeds", "4", "--", "--steps", "3"])
    assert (args.recipe, args.seeds, args.jobs, args.options) == ("r.yaml", [4], 1, ["--steps", "3"])


def test_a_stopped_run_is_not_finished_and_goes_on(tmp_path):
    """It has a summary, whose figures are those of before."""
    calls = []

    class Called(common.Jobs):
        def __call__(self, name, module, arguments, *rest, **variables):
            calls.append(arguments)
            return 0.0

    jobs = Called(tmp_path)
    folder = jobs.run("a", ["grpo"])
    folder.mkdir()
    (folder / "recipe.yaml").write_text("steps: 64\n")
    for summary, again in (({"steps": 20}, True), ({"steps": 64}, False), ({"steps": 20, "stopped": "x"}, False)):
        (folder / "summary.json").write_text(json.dumps(summary))
        calls.clear()
        jobs.run("a", ["grpo"])
        assert calls == ([["grpo", "--resume", "--output", str(folder)]] if again else [])


def test_cells():
    assert common.mean_and_extent([0.5, None, 0.25]) == "0.375 (0.250 to 0.500)"
    assert common.mean_and_extent([0.5], "+.1f") == "+0.5" and common.mean_and_extent([None]) == "-"
    assert common.markdown(["a", ""], [["", 1], [2, "x"]]).splitlines() == [
        "| a | |",
        "|---|---|",
        "| | 1 |",
        "| 2 | x |",
    ]


class Finished(common.Jobs):
    """Writes what a run of GRPO would."""

    def __call__(self, name, module, arguments, cwd=None, **variables):
        folder = self.folder / name
        folder.mkdir()
        reward = 0.5 + int(name[-1]) / 10
        (folder / "summary.json").write_text(
            json.dumps({"before": {"ocr": 0.5}, "after": {"ocr": reward}, "images": 16})
        )
        rows = [
            {"step": 0, "eval/ocr": 0.5},
            {"step": 1, "images": 16, "ratio_error": 1e-3},
            {"step": 1, "eval/ocr": reward},
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return 7.0


def test_a_row_of_grpo_and_its_table(tmp_path):
    rows = [grpo.run(Finished(tmp_path), "demo", ["r.yaml"], seed, []) for seed in (1, 3)]
    assert rows[0]["curve"] == [{"step": 0, "ocr": 0.5, "images": 0}, {"step": 1, "ocr": 0.6, "images": 16}]
    assert grpo.table(rows, ["ocr"]).splitlines()[-1] == "| demo | 0.500 -> 0.700 (0.600 to 0.800) | 16 | 7 | 1e-03 |"


def test_methods_at_equal_images_and_at_equal_seconds(tmp_path):
    """grpo takes 2 s a step and nft 4: after grpo's 4 s nft has made one of its two steps. Runs that are there are
    read, so the command makes none of its own."""
    for name, seconds, gain in (("grpo", 2.0, 0.1), ("nft", 4.0, 0.2)):
        for seed in (0, 1):
            folder = tmp_path / f"{name}-{seed}"
            folder.mkdir()
            rows = [{"step": 0, "eval/graded": 0.5}]
            for step in (1, 2):
                rows.append({"step": step, "images": 32 * step, "reward": 0.5, "seconds/sample": seconds / 2,
                             "seconds/optimise": seconds / 2})  # fmt: skip
                rows.append({"step": step, "eval/graded": 0.5 + gain * step + 0.1 * seed})
            (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            (folder / "summary.json").write_text("{}")
    jobs = common.Jobs(tmp_path)
    found = [methods.run(jobs, name, seed, []) for name in ("grpo", "nft") for seed in (0, 1)]
    assert [point["seconds"] for point in found[2]["curve"]] == [0, 4, 8]
    assert methods.table(found).splitlines()[2:] == [
        "| base | 0 | | 0.500 (0.500 to 0.500) |",
        "| grpo | 64 | 4 (4 to 4) | 0.750 (0.700 to 0.800) |",
        "| nft | 64 | 8 (8 to 8) | 0.950 (0.900 to 1.000) |",
        "| grpo, equal seconds | 64 | 4 | 0.750 (0.700 to 0.800) |",
        "| nft, equal seconds | 32 | 4 | 0.750 (0.700 to 0.800) |",
    ]


def test_weights_of_a_group():
    """Advantages of 0, 1 and 2 are -1, 0 and 1 deviations: e^-2, 1 and e^2 of 8.524 at a temperature of 0.5."""
    weights = reward_weighted.weights_of(torch.tensor([0.0, 1.0, 2.0]))
    assert weights.tolist() == pytest.approx([0.0159, 0.1173, 0.8668], abs=1e-4)
    weights = reward_weighted.weights_of(torch.tensor([0.0, float("nan"), 1.0, 2.0]))
    assert weights.tolist() == pytest.approx([0.0159, 0.0, 0.1173, 0.8668], abs=1e-4)
    for flat in ([0.5, 0.5], [float("nan"), 0.5], [float("nan")] * 2):
        assert reward_weighted.weights_of(torch.tensor(flat)).tolist() == [0, 0]


def test_reward_weighted_runs_from_a_recipe_of_grpo(tmp_path, model):
    """It draws as many images as GRPO would, is evaluated alike, and moves the weights."""
    config = runs.config(tmp_path, model)
    config.steps = 2
    recipe = runs.recipe(config, tmp_path / "r.yaml")
    settings = reward_weighted.settings(["--config", str(recipe)])
    assert settings.size == list(config.sampling.sizes[0]) and settings.optim == config.optim
    reward_weighted.train(settings, config.sampling.steps)
    rows = runs.rows(tmp_path / "run")
    drawn = config.groups.prompts_per_step * config.groups.group_size
    assert [row["images"] for row in rows if "images" in row] == [drawn, 2 * drawn]
    assert all(row["grad_norm"] > 0 for row in rows if "grad_norm" in row)
    assert runs.latest(tmp_path / "run").step == 2


def test_a_domain_with_fewer_prompts_than_wanted_gives_those_it_has():
    assert [len(merge.prompts_of(name, 64)) for name in ("words", "dim", "bright")] == [64, 48, 48]
