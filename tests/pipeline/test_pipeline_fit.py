"""Whether a pipeline fits its machine: processes, servers, memory; and the recipes of real K2, by their dry runs."""

import json
import re

import pytest
import yaml

from posttrain import cli
from posttrain.config.load import load_config
from posttrain.errors import UserError
from posttrain.pipeline.fit import processes
from prompts import make_k2
from prompts.records import read_prompts
from tests.helpers import runs

K2 = sorted((runs.ROOT / "recipes/k2").glob("*.yaml"))
PIPELINES = [path for path in K2 if path.name.startswith("pipeline")]
ORDER = ["pairs", "stpo", "grpo", "tdm", "export", "export", "expander data", "expander sft", "expander gdpo"]


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path):
    monkeypatch.chdir(runs.ROOT)
    monkeypatch.setenv("HOME", str(tmp_path))  # where no ~/vllm is


def dry(path, *options: str) -> int:
    return cli.main(["run", str(path), "--dry-run", *options])


@pytest.mark.parametrize("path", PIPELINES, ids=lambda path: path.name)
def test_a_pipeline_of_k2_resolves_without_weights(path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert dry(path) == 0
    plan, time, memory, missing = capsys.readouterr().out.split("\n\n")
    data = yaml.safe_load(path.read_text())
    assert [stage["command"] for stage in data["stages"]] == ORDER
    assert [line.split()[1] for line in plan.splitlines()] == [stage["name"] for stage in data["stages"]]
    for wired in ("pairs.train from pairs", "model.start from stpo", "model.start from grpo", "source from tdm"):
        assert wired in plan
    assert plan.splitlines()[-1].endswith("model.path from expander_sft, renderer.path from turbo")
    assert time.startswith("Time, estimated from NVIDIA H200 measured on ")
    lines = memory.splitlines()
    assert lines[0].startswith("Memory of each GPU, estimated and not measured")
    assert [line.split()[0] for line in lines[1:]] == ["pairs", "stpo", "grpo", "tdm", "expander"]
    assert all("GiB of 80, 8 of which stay free" in line and "not fit" not in line for line in lines[1:])
    assert "expander_data: server llm: executable: no '~/vllm/bin/vllm'" in missing
    assert ("server vlm: adapters: no LoRA adapter in judges/" in missing) is (path.name != "pipeline_64.yaml")


def test_an_export_that_could_be_refused_in_the_end_is_refused_at_once(tmp_path, capsys):
    """What is merged into bfloat16 is rounded, and by how much is known only when all is trained."""
    data = yaml.safe_load(PIPELINES[0].read_text())
    turbo = next(stage for stage in data["stages"] if stage["name"] == "turbo")
    for change, code in (({}, 2), ({"allow_rounding": True}, 0), ({"format": "lora"}, 0)):
        turbo["set"] = {"source": "${tdm}"} | change
        kept = [stage for stage in data["stages"] if stage["command"] in ("pairs", "stpo", "grpo", "tdm", "export")]
        (tmp_path / "p.yaml").write_text(json.dumps(data | {"stages": kept}))
        assert dry(tmp_path / "p.yaml") == code
    says = "error: stage turbo: format: diffusers merges what tdm trains into bfloat16. This may round too much"
    assert says in capsys.readouterr().err


def test_each_k2_recipe_belongs_to_a_pipeline():
    used = {recipe: stage["command"] for path in PIPELINES for stage in yaml.safe_load(path.read_text())["stages"]
            for recipe in stage.get("recipes", [])}  # fmt: skip
    alone = {
        "recipes/k2/mopd.yaml": "mopd", "recipes/k2/nft.yaml": "nft", "recipes/k2/nft_published.yaml": "nft",
        "recipes/k2/sft.yaml": "sft", "recipes/k2/sft_full.yaml": "sft", "recipes/k2/style.yaml": "style",
        "recipes/k2/stpo_human.yaml": "stpo", "recipes/k2/judges.yaml": "serve",
        "recipes/k2/grpo_ready.yaml": "grpo", "recipes/k2/judge_aesthetic.yaml": "judge",
        "recipes/k2/judge_artifact.yaml": "judge",
        "recipes/k2/expander_mine.yaml": "expander mine", "recipes/k2/evaluate.yaml": "evaluate",
    }  # fmt: skip
    others = {str(path.relative_to(runs.ROOT)) for path in K2 if path not in PIPELINES}
    assert others == {*used, *alone}
    for path, command in (used | alone).items():
        config, _ = load_config(command, ["--config", path])
        if command in ("sft", "pairs", "stpo", "grpo", "nft", "mopd", "tdm"):
            assert config.model.path == "krea/Krea-2-Raw"


def test_the_estimate_is_that_of_the_table_of_what_fits(capsys):
    """docs/performance.md, rank 64 on 80 GB at 512 x 512: grpo and stpo "8; 2 again; no option; 71 GiB"; grpo stands on
    an adapter, of 0.8 GiB."""
    dry(PIPELINES[0])
    memory = {line.split()[0]: line for line in capsys.readouterr().out.split("\n\n")[2].splitlines()}
    for stage, gib in (("stpo", 71), ("grpo", 72)):
        assert memory[stage].split(maxsplit=1)[1].startswith(f"about {gib} GiB of 80,")
        assert memory[stage].endswith("with 2 blocks recomputed")


def test_a_policy_that_is_kept_takes_memory(tmp_path, capsys):
    """The copy of an adapter of rank 64 is as large as the adapter: 0.8 GiB."""
    needs = []
    for ahead in (0, 1):
        settings = {"rollout.ahead": ahead, "model.recompute": 4, "lora": {"rank": 640}}  # ten times as much shows
        stage = {"name": "grpo", "command": "grpo", "recipes": ["recipes/k2/grpo.yaml"], "set": settings}
        (tmp_path / "p.yaml").write_text(json.dumps({"output": str(tmp_path / "out"), "stages": [stage]}))
        dry(tmp_path / "p.yaml", "--gpu_gib", "200")
        needs.append(int(re.search(r"about (\d+) GiB", capsys.readouterr().out)[1]))  # type: ignore[index]
    assert needs[1] - needs[0] == 8


def test_what_does_not_fit_is_a_failed_check(capsys):
    assert dry("recipes/k2/pipeline.yaml", "--gpu_gib", "40") == 1
    memory = capsys.readouterr().out.split("\n\n")[2].splitlines()
    assert "grpo" in memory[3] and "does not fit; lower micro_batch or sizes" in memory[3]
    assert "28 blocks recomputed" in memory[3]


def test_a_server_on_a_gpu_that_trains_needs_its_part_of_it(tmp_path, capsys):
    elsewhere = {"name": "heldout", "model": "m", "urls": ["http://judges/v1"]}
    for given, code, says in (
        ([], 1, "no room: its servers take 0.9 of a GPU that it trains on; set their gpus to others"),
        (["--gpu-memory-utilization", "0.15"], 0, "8 of which stay free and 12 belong to its servers"),
    ):
        servers = [{"name": "vlm", "model": "m", "extra_args": given}, elsewhere]
        data = {
            "output": str(tmp_path / "out"),
            "gpu_gib": 80,
            "launch": ["torchrun", "--nproc-per-node", "8", "-m", "posttrain.cli"],
            "stages": [{
                "name": "grpo", "command": "grpo", "recipes": ["recipes/k2/grpo.yaml"],
                "set": {"groups.micro_batch": 4, "servers": servers},
            }],
        }  # fmt: skip
        (tmp_path / "p.yaml").write_text(json.dumps(data))
        assert dry(tmp_path / "p.yaml") == code
        assert says in capsys.readouterr().out


def test_a_run_begins_only_where_its_servers_can(tmp_path, capsys):
    assert cli.main(["run", "recipes/k2/pipeline.yaml", "--output", str(tmp_path / "out")]) == 2
    assert "error: stage pairs: server vlm: executable: no '~/vllm/bin/vllm'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("stage", "settings", "says"),
    [
        ("grpo", {"servers": [{"name": "other", "model": "m"}]}, "no server 'vlm': the recipe's servers are: other"),
        ("grpo", {"eval.best": "rubric"}, "eval.best: 'rubric' is trained on, so it rises while it is being cheated"),
        ("grpo", {"servers": [{"name": "vlm", "model": "m", "urls": ["judges"]}]},
         "'judges' is not a URL: write http://HOST:PORT/v1"),
        ("grpo", {"groups.prompts_per_step": 2000}, "prompts.train: has 1,024 prompts, but a step takes 2000"),
        ("grpo", {"rollout.ahead": 1, "rollout.gpus": 7}, "rollout.gpus: is 7 of 7 processes, which leaves none to"),
        ("tdm", {"batch": 2000, "model.start": None}, "prompts.train: has 1,024 prompts, but a step takes 2000"),
        ("expander_gdpo", {"groups.prompts_per_step": 8}, "8 is not divisible by 7 processes; use a multiple"),
        ("expander_gdpo", {"groups.micro_batch": 7}, "micro_batch: 7 does not divide the 32 expansions of a process"),
        ("expander_gdpo", {"renderer.urls": ["host"]}, "renderer.urls: 'host' is not a URL: write http://HOST:PORT/v1"),
        ("expander_gdpo", {"servers": []}, "no server 'vlm'"),
        ("expander_sft", {"batch": 32}, "batch: 32 is not a multiple of micro_batch times 7 processes"),
        ("expander_data", {"writer.base_urls": "server://x"}, "writer.base_urls: no server 'x'"),
        ("expander_data", {"writer.base_urls": ["x"]}, "writer.base_urls: 'x' is not a URL: write http://HOST:PORT/v1"),
    ],
)  # fmt: skip
def test_a_dry_run_finds_what_does_not_fit(tmp_path, capsys, stage, settings, says):
    here = {"expander_gdpo": {"model.path": "Qwen/Qwen3-4B-Instruct-2507"}, "expander_sft": {"data": str(tmp_path)}}
    only = {"name": stage, "command": stage.replace("_", " "), "recipes": [f"recipes/k2/{stage}.yaml"]}
    data = {"output": str(tmp_path / "out"), "stages": [only | {"set": here.get(stage, {}) | settings}]}
    data["launch"] = ["torchrun", "--nproc-per-node", "7", "-m", "posttrain.cli"]
    (tmp_path / "p.yaml").write_text(json.dumps(data))
    assert dry(tmp_path / "p.yaml") == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and f"stage {stage}: " in error


@pytest.mark.parametrize(
    ("launch", "count"),
    [
        ("", (1, 1)),
        ("torchrun --nproc-per-node 7 -m posttrain.cli", (7, 7)),
        ("torchrun --nproc_per_node=8 --max-restarts 3 -m posttrain.cli", (8, 8)),
        ("srun --nodes=7 torchrun --nnodes=7 --nproc-per-node=8 -m posttrain.cli", (56, 8)),
        ("accelerate launch --config_file c.yaml --num_processes 8 -m posttrain.cli", (8, 8)),
        ("accelerate launch --num_machines 2 --num_processes 16 -m posttrain.cli", (16, 8)),
    ],
)
def test_processes_of_a_launch(launch, count):
    assert processes(launch.split()) == count


def test_no_process_at_all():
    with pytest.raises(UserError, match="launch: nproc_per_node is 0; give at least 1"):
        processes("torchrun --nproc-per-node 0 -m posttrain.cli".split())


def test_a_gpu_has_its_own_servers_alone(tmp_path, capsys):
    """Of two servers that take half of a GPU each, on different ones; and blocks that are not compiled keep 2.4 times
    as much, so that more of them must be recomputed."""
    half = ["--gpu-memory-utilization", "0.5"]
    servers = [{"name": n, "model": "m", "gpus": [i], "extra_args": half} for i, n in enumerate(("a", "b"))]
    rewards, again = [{"name": "text", "function": "posttrain.nano.world.oracles:text"}], []
    for changed in ({}, {"model.compile": False}):
        data = {
            "output": str(tmp_path / "out"), "gpu_gib": 141,
            "launch": ["torchrun", "--nproc-per-node", "8", "-m", "posttrain.cli"],
            "stages": [{
                "name": "grpo", "command": "grpo", "recipes": ["recipes/k2/grpo.yaml"],
                "set": {"servers": servers, "rewards": rewards, "eval.best": None, "eval.stop.metric": None, **changed},
            }],
        }  # fmt: skip
        (tmp_path / "p.yaml").write_text(json.dumps(data))
        dry(tmp_path / "p.yaml")
        out, err = capsys.readouterr()
        assert not err
        assert "70.5 belong to its servers" in out
        again.append(int(re.search(r"with (\d+) blocks recomputed", out)[1]))  # pyright: ignore
    assert 0 < again[0] < again[1]


def test_starter_prompts_are_those_of_their_script(tmp_path, monkeypatch):
    kept = make_k2.FOLDER
    monkeypatch.setattr(make_k2, "FOLDER", tmp_path)
    make_k2.main()
    made = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert made == {path.name: path.read_text() for path in kept.iterdir()} and len(made) == 4
    train, heldout = (read_prompts(str(kept / f"{name}.jsonl")) for name in ("train", "heldout"))
    assert not {r.prompt for r in train} & {r.prompt for r in heldout}
    assert not {text for r in train for text in r.texts or []} & {text for r in heldout for text in r.texts or []}
    assert all(r.requirements for r in train + heldout)
