"""Every command with the shipped recipes/k2 files, started as a user would start it, on K2 at true size.

    make gpu                                        # all of it: some forty minutes on one GPU of 80 GB
    python -m pytest tests/gpu -k stpo              # a piece; each test stands alone and ends within eight minutes
    POSTTRAIN_GPU_SCALE=tiny python -m pytest tests/gpu    # the same on a tiny model and two CPU cores

Weights are random, so nothing is said about quality: only that commands end well, that what was trained has moved, and
what it took. Each test adds a row to runs/gpu.jsonl; `python -m tests.gpu.table` prints them as a table.
"""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from posttrain.training import checkpoint
from tests.gpu.measure import metrics
from tests.gpu.pairs import write_captioned
from tests.gpu.recipes import EVALUATION, ROOT, SCALE, cut, local
from tests.helpers import fake_writer

SIZE = (512, 512) if SCALE == "k2" else (64, 64)
SHORT = {"every": 1, "minutes": 0}


def trained(run: Path, steps: int) -> checkpoint.Checkpoint:
    """The newest checkpoint of a run, which must be of step `steps`, with an adapter that has moved."""
    saved = checkpoint.load(checkpoint.find(run))
    assert saved.step == steps
    moved = [value.abs().max() for key, value in saved.tensors["adapter"].items() if key.endswith("lora_B.weight")]
    assert min(moved) > 0, "an adapter's B factor has not moved"
    assert all(value.isfinite().all() for value in saved.tensors["adapter"].values())
    for row in metrics(run):
        assert row.get("non_finite", 0) == 0, row
    return saved


def test_sample(command, parts, tmp_path):
    out = tmp_path / "out"
    result = command.ok(
        "sample", "--model.path", parts / "k2", "--prompt", "a fox in the snow", "--images", 4, "--output", out,
        "--size", list(SIZE),
    )  # fmt: skip
    images = [np.asarray(Image.open(path)) for path in sorted(out.glob("*.png"))]
    assert len(images) == 4 and images[0].shape == (*SIZE, 3)
    assert all((images[0] != other).any() for other in images[1:]), "images of different seeds are equal"
    command.row("sample", "28 steps, guidance 4.5, 4 images", result)


@pytest.mark.parametrize("judge", ["judge on the same GPU", "no judge"])
def test_pairs(command, parts, tmp_path, judge):
    """A judge in the same process takes the GPU from drawing; without one its overhead is drawing's own."""
    alone = {"rewards": []} if judge == "no judge" else {}  # `cut` adds a reward that needs no model
    recipe = cut("k2/pairs", parts, tmp_path, output=str(tmp_path / "run"), pairs=16, block=8, steps=8,
                 min_margin=0.0, min_distance=0.0, tolerance=1.0, **alone)  # fmt: skip
    result = command.ok("pairs", "--config", recipe)
    card = json.loads((tmp_path / "run/preferences.json").read_text())
    assert card["rows"] == 16
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    facts = {key: value for key, value in summary.items() if key.endswith(("seconds", "overhead"))}
    command.row(f"pairs, {judge}", "k2/pairs", result, **facts)


@pytest.mark.parametrize("side", [512, 1024])
def test_sft(command, parts, tmp_path, side):
    """Three buckets, of which a batch takes one. Encoding is a part of the start."""
    run = tmp_path / "run"
    set_of = {"train": str(write_captioned(tmp_path / "images", side if SCALE == "k2" else 64)), "measured": 4,
              "cache": str(tmp_path / "cache"), "heldout": 0.2}  # fmt: skip
    recipe = cut("k2/sft", parts, tmp_path, output=str(run), steps=4, batch=4, eval=EVALUATION, checkpoint=SHORT,
                 images=set_of)  # fmt: skip
    words = ["--images.resolutions", [side]] if SCALE == "k2" else []
    result = command.ok("sft", "--config", recipe, *words, "--optim.warmup_steps", 0)
    trained(run, 4)
    rows = metrics(run)
    assert len({row["image_tokens"] for row in rows}) > 1 and max(row["cropped"] for row in rows) == 1
    command.row(f"sft, {side} px", "k2/sft", result, run, images=4, **{"seconds/image": rows[-1]["seconds/image"]})


def test_style(command, parts, tmp_path):
    """References of three sizes, and images drawn with one and two of them, cached."""
    run, folder = tmp_path / "run", write_captioned(tmp_path / "images", 512 if SCALE == "k2" else 64)
    for i, caption in enumerate(sorted(folder.glob("*.txt"))):
        row = {"caption": caption.read_text(), "full": f"{caption.read_text()}, an etching", "style": f"style {i % 2}"}
        caption.with_suffix(".json").write_text(json.dumps(row))
        caption.unlink()
    set_of = {"train": str(folder), "measured": 4, "cache": str(tmp_path / "cache"), "heldout": 0.2}
    small = {} if SCALE == "k2" else {"sizes": [64], "tile_counts": [2]}
    recipe = cut("k2/style", parts, tmp_path, output=str(run), steps=4, batch=4, eval=EVALUATION, checkpoint=SHORT,
                 images=set_of, references=small)  # fmt: skip
    result = command.ok("style", "--config", recipe, "--optim.warmup_steps", 0, "--sweep", [1])
    assert trained(run, 4).state["method"] == "style"
    rows = metrics(run)
    command.row("style, 512 px", "k2/style", result, run, images=4, **{"seconds/image": rows[-1]["seconds/image"]})
    shown = sorted(folder.glob("*.jpg"))[:2]
    for count in range(3):
        words = ["--model.path", parts / "k2", "--adapter", run, "--prompt", "a fox", "--output", tmp_path / f"{count}"]
        words += ["--references", *shown[:count]] if count else []
        result = command.ok("sample", *words, "--size", list(SIZE), "--images", 4)
        command.row(f"sample, {count} references", "28 steps, guidance 4.5, 4 images", result)


@pytest.mark.parametrize("guard", ["output", "exact"])
@pytest.mark.parametrize("name", ["stpo_synthetic", "stpo_human"])
def test_stpo(command, parts, tmp_path, name, guard):
    if (name, guard) == ("stpo_human", "exact"):
        pytest.skip("the guard is the same code for both recipes")
    run = tmp_path / "run"
    recipe = cut(f"k2/{name}", parts, tmp_path, output=str(run), steps=3, batch=8, eval=EVALUATION, checkpoint=SHORT,
                 pairs={"train": str(parts / "pairs"), "measured": 4, "heldout": 0.2})  # fmt: skip
    words = ["--model.start", "null", "--loss.guard", guard, "--optim.warmup_steps", 0]
    result = command.ok("stpo", "--config", recipe, *words)
    trained(run, 3)
    first = metrics(run)[0]
    assert {f"gradient/{term}" for term in ("winner", "loser", "anchor")} <= set(first), "step 1 has no shares of terms"
    assert first["margin"] == pytest.approx(0, abs=1e-4)  # but for rounding in bf16
    command.row(f"stpo, guard {guard}", f"k2/{name}", result, run, images=16)


@pytest.mark.parametrize("killed", [False, True], ids=["whole", "killed"])
def test_grpo(command, parts, tmp_path, killed):
    """Ends as it would have, whenever it was killed; the bits of that are tested on a CPU (tests/chaos)."""
    run = tmp_path / "run"
    recipe = cut("k2/grpo", parts, tmp_path, output=str(run), steps=3, eval=EVALUATION, checkpoint=SHORT,
                 groups={"prompts_per_step": 1, "micro_batch": 8}, pool={"kind": "uniform"})  # fmt: skip
    words = ["--config", recipe, "--optim.warmup_steps", 0]
    if killed:
        first = run / "checkpoints/step-000001/manifest.json"
        ended = command.run("grpo", *words, kill_when=first.is_file)
        assert ended.code == -9, ended.output[-3000:]
        words.append("--resume")
    result = command.ok("grpo", *words)
    trained(run, 3)
    rows = metrics(run)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["ratio_error"] < 4e-5 for row in rows)
    scores = [row["reward/rubric"] for row in rows]
    assert all(0 <= score <= 1 for score in scores)
    seconds = {key.replace("seconds/", ""): rows[-1][key] for key in rows[-1] if key.startswith("seconds/")}
    facts = {
        key: value for key, value in rows[-1].items() if key in ("grad_norm", "sqrt_v", "eps_share", "noise_share")
    }
    command.row("grpo, killed and resumed" if killed else "grpo", "k2/grpo", result, run, images=16, **seconds, **facts)


@pytest.mark.parametrize(("side", "times"), [(512, 9), (1024, 9), (1024, 4)])
def test_nft(command, parts, tmp_path, side, times):
    """recipes/k2/nft.yaml: its old policy lags from the second step on. Four levels as it is cheapest: no old policy
    and no reference."""
    run = tmp_path / "run"
    size = [side, side] if SCALE == "k2" else [side // 8, side // 8]
    recipe = cut("k2/nft", parts, tmp_path, output=str(run), steps=3, eval={**EVALUATION, "steps": 4}, checkpoint=SHORT,
                 groups={"prompts_per_step": 1}, pool={"kind": "uniform"})  # fmt: skip
    words = ["--sampling.sizes", [size], "--optim.warmup_steps", 0, "--loss.times", times]
    cheap = ["--loss.levels", "noisier", "--loss.kl", 0, "--old.max", 0] if times == 4 else []
    result = command.ok("nft", "--config", recipe, *words, *cheap)
    saved = trained(run, 3)
    assert saved.state["method"] == "nft" and ("old" in saved.tensors) == (times == 9)
    rows = metrics(run)
    assert rows[0]["old_error"] < 1e-2
    # The first updates may be below what a velocity in bf16 can show, but not below what an adapter holds.
    assert ["old_distance" in row for row in rows] == [False, times == 9, times == 9]
    if times == 9:
        key = "transformer_blocks.0.attn.to_q.lora_B.weight"
        assert (saved.tensors["old"][key] != saved.tensors["adapter"][key]).any()
    seconds = {key.replace("seconds/", ""): rows[-1][key] for key in rows[-1] if key.startswith("seconds/")}
    command.row(f"nft, {side} px, {times} levels", "k2/nft", result, run, images=8, **seconds)


@pytest.mark.parametrize(("side", "teachers"), [(512, 1), (512, 2), (1024, 2)])
def test_mopd(command, parts, tmp_path, side, teachers):
    """recipes/k2/mopd.yaml with one teacher twice: peak memory grows by an adapter alone."""
    run, size = tmp_path / "run", [side, side] if SCALE == "k2" else [side // 8, side // 8]
    own = {"text": {"run": str(parts / "trained"), "guidance": 3.5, "tags": ["text"]},
           "relation": {"run": str(parts / "trained"), "tags": ["relation"]}}  # fmt: skip
    recipe = cut("k2/mopd", parts, tmp_path, output=str(run), steps=3, images=4, eval=EVALUATION, checkpoint=SHORT)
    data = json.loads(recipe.read_text())
    data["teachers"] = dict(list(own.items())[:teachers])
    data["eval"] |= {"steps": 4, "best": None, "stop": {}}
    recipe.write_text(json.dumps(data))
    words = ["--sampling.sizes", [size], "--optim.warmup_steps", 0, "--cosines_every", 2]
    result = command.ok("mopd", "--config", recipe, *words)
    saved = trained(run, 3)
    assert saved.state["method"] == "mopd" and len(saved.state["teachers"]) == teachers
    assert all(row["distance/text"] > 0 for row in metrics(run))
    command.row(f"mopd, {side} px, {teachers} teachers", "k2/mopd", result, run, images=4 * (teachers + 1))


def test_tdm(command, parts, tmp_path):
    run = tmp_path / "run"
    recipe = cut("k2/tdm", parts, tmp_path, output=str(run), steps=4, batch=8, micro_batch=4, eval=EVALUATION,
                 checkpoint=SHORT, fake={"warmup": 1})  # fmt: skip
    result = command.ok("tdm", "--config", recipe, "--model.start", "null", "--optim.warmup_steps", 0)
    saved = trained(run, 4)
    assert saved.state["method"] == "tdm" and saved.state["student"]["steps"] == [8]
    command.row("tdm", "k2/tdm", result, run, images=8)


def test_judge(command, parts, tmp_path):
    run = tmp_path / "run"
    words = ["--config", "recipes/nano/judge_aesthetic.yaml", "--model", parts / "judge", "--data", parts / "pairs"]
    words += ["--dtype", "bfloat16", "--batch", 8, "--micro_batch", 4, "--workers", 0, "--steps", 3]
    result = command.ok("judge", *words, "--output", run, "--optim.lr", "1e-4", "--optim.warmup_steps", 0)
    adapter = load_file(run / "adapter/adapter_model.safetensors")
    assert min(value.abs().max() for key, value in adapter.items() if "lora_B" in key) > 0
    command.row("judge, 2 B", "nano/judge_aesthetic", result, run, images=16)


def expander_pairs(folder: Path) -> Path:
    """Prompts of prompts/k2 as pairs of a short prompt and a caption."""
    rows = [json.loads(line) for line in (ROOT / "prompts/k2/train.jsonl").read_text().splitlines()[:200]]
    made = [{"prompt": row["prompt"].split(",")[0], "completion": row["prompt"]} for row in rows]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "expander.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in made))
    return file


def test_expander_sft(command, parts, tmp_path):
    run = tmp_path / "run"
    recipe = cut("k2/expander_sft", parts, tmp_path, output=str(run), model=str(parts / "chat"), steps=3, batch=8,
                 data=str(expander_pairs(tmp_path)), heldout=0.1, measured=8, checkpoint={"every": 3})  # fmt: skip
    result = command.ok("expander", "sft", "--config", recipe, "--optim.warmup_steps", 0)
    adapter = load_file(run / "adapter/adapter_model.safetensors")
    assert min(value.abs().max() for key, value in adapter.items() if "lora_B" in key) > 0
    command.row("expander sft, 3.6 B", "k2/expander_sft", result, run, images=8)


def test_expander_gdpo(command, parts, tmp_path):
    run = tmp_path / "run"
    recipe = cut("k2/expander_gdpo", parts, tmp_path, output=str(run), model={"path": str(parts / "chat")}, steps=2,
                 diversity={"path": str(parts / "dinov3")}, eval={"every": 2, "prompts": 2, "group_size": 4},
                 groups={"prompts_per_step": 2, "micro_batch": 8}, checkpoint={"every": 2})  # fmt: skip
    result = command.ok("expander", "gdpo", "--config", recipe, "--optim.warmup_steps", 0)
    adapter = load_file(run / "adapter/adapter_model.safetensors")
    assert max(value.abs().max() for key, value in adapter.items() if "lora_B" in key) > 0
    command.row("expander gdpo, K2 renders", "k2/expander_gdpo", result, run, images=16)


def test_preflight(command, parts, tmp_path):
    recipe = cut("k2/grpo", parts, tmp_path, output=str(tmp_path / "run"), pool={"kind": "uniform"})
    words = ["--groups.prompts_per_step", 2, "--groups.micro_batch", 4]
    result = command.run("preflight", "--config", recipe, *words)
    (tmp_path / "preflight.txt").write_text(result.output)
    print(result.output[-6000:])
    # With random weights an image may fail to be told apart by a random judge, which preflight then says.
    assert result.code in (0, 1) and "Traceback" not in result.output, result.output[-6000:]
    command.row("preflight", "k2/grpo", result)


def test_exports(command, parts, tmp_path):
    """Each format, of a stage whose change is 0.05 % of the weights: that is not merged into bf16 without a word."""
    run = parts / "trained"
    refused = command.run("export", "--source", run, "--output", tmp_path / "no.safetensors", "--format", "original")
    assert refused.code == 2 and "allow_rounding" in refused.output, refused.output[-3000:]
    for name, format, words in (
        ("lora.safetensors", "lora", []),
        ("lora-original.safetensors", "lora-original", []),
        ("original.safetensors", "original", ["--allow_rounding", "true"]),
        ("diffusers", "diffusers", ["--allow_rounding", "true"]),
    ):
        result = command.ok("export", "--source", run, "--output", tmp_path / name, "--format", format, *words)
        kept = re.search(r"([0-9.]+) of what was trained is kept", result.output)
        assert (kept is None) == format.startswith("lora"), result.output[-3000:]
        command.row(f"export {format}", "0.05 % of the weights", result, kept=kept and float(kept[1]))
        if not format.startswith("lora"):  # 26 to 34 GB
            path = tmp_path / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    saved = checkpoint.load(checkpoint.find(run))
    written = load_file(tmp_path / "lora.safetensors")
    for key, value in saved.tensors["adapter"].items():
        assert torch.equal(written[f"transformer.{key}"], value), key  # alpha is the rank, so the scale is 1


def test_sample_with_an_adapter(command, parts, tmp_path):
    words = ["--model.path", parts / "k2", "--prompt", "a fox in the snow", "--steps", 4, "--size", list(SIZE)]
    command.ok("sample", *words, "--output", tmp_path / "base")
    result = command.ok("sample", *words, "--adapter", parts / "trained", "--output", tmp_path / "tuned")
    first, second = (np.asarray(Image.open(tmp_path / name / "000.png"), int) for name in ("base", "tuned"))
    assert (first != second).any(), "the adapter changes nothing"
    command.row("sample with an adapter", "4 steps, guidance 4.5", result)


CUTS = {
    "pairs": {"pairs": 24, "block": 8, "min_margin": 0.0, "min_distance": 0.0, "tolerance": 1.0, "steps": 8,
              "sizes": [list(SIZE)]},
    "stpo": {"steps": 2, "batch": 4, "pairs.measured": 4, "pairs.heldout": 0.2},
    "grpo": {"steps": 1, "groups.prompts_per_step": 1, "pool": {"kind": "uniform"}},
    "tdm": {"steps": 2, "batch": 4, "micro_batch": 2, "fake.warmup": 1, "sizes": [list(SIZE)]},
    "expander_data": {"captions": "prompts/k2/train.jsonl", "count": 100},
    "expander_sft": {"steps": 2, "batch": 8, "measured": 8, "checkpoint.every": 2},
    "expander": {"steps": 1, "eval.prompts": 1, "eval.every": 1, "groups.prompts_per_step": 1,
                 "generation.max_tokens": 64},
}  # fmt: skip
"""What each stage of pipeline_1.yaml is cut to."""


def pipeline_1(parts: Path, folder: Path, names: list[str], url: str) -> Path:
    """recipes/k2/pipeline_1.yaml with these of its stages, as a file. `url` answers as a language model."""
    data = local(yaml.safe_load((ROOT / "recipes/k2/pipeline_1.yaml").read_text()), parts)
    short = {f"eval.{key}": value for key, value in EVALUATION.items()} | {"eval.steps": 4}
    short |= {"checkpoint.every": 1, "optim.warmup_steps": 0, "track.tensorboard": False}
    data["output"] = str(folder / "pipeline")
    data["stages"] = [stage for stage in data["stages"] if stage["name"] in names]
    for stage in data["stages"]:
        name, settings = stage["name"], stage.setdefault("set", {})
        settings.pop("servers", None)
        settings |= (short if name in ("stpo", "grpo", "tdm") else {}) | CUTS.get(name, {})
        for field, value in settings.items():
            for other, made in (("grpo", "trained"), ("turbo", "turbo")):  # of a stage that is in another part
                if value == f"${{{other}}}" and other not in names:
                    settings[field] = str(parts / made)
        if name == "expander_data":
            settings["writer"] = {"model": "m", "base_urls": url}
        if name == "expander_sft":
            settings["model"] = str(parts / "chat")
        if name == "expander":
            settings["diversity.path"] = str(parts / "dinov3")
        if "recipes" in stage:
            shipped = [file.removeprefix("recipes/").removesuffix(".yaml") for file in stage["recipes"]]
            stage["recipes"] = [str(cut(file, parts, folder / name)) for file in shipped]
    path = folder / "pipeline.yaml"
    path.write_text(json.dumps(data, indent=1))
    return path


PARTS = {
    "raw to grpo": ["pairs", "stpo", "grpo"],
    "tdm to exports": ["tdm", "turbo", "turbo_lora"],
    "expander": ["expander_data", "expander_sft", "expander"],
}


@pytest.mark.parametrize("part", PARTS)
def test_pipeline_1(command, parts, tmp_path, part):
    """The stages of recipes/k2/pipeline_1.yaml in parts that are short enough; the first is killed and resumed."""
    folder = tmp_path / "pipeline"
    with fake_writer.serving() as url:
        path = pipeline_1(parts, tmp_path, PARTS[part], url)
        words = []
        if part == "raw to grpo":
            killed = command.run("run", path, kill_when=(folder / "pairs/candidates.jsonl").is_file)
            assert killed.code == -9, killed.output[-3000:]
            words = ["--resume"]
        result = command.ok("run", path, *words)
    state = json.loads((folder / "stages.json").read_text())
    assert sorted(state) == sorted(PARTS[part]) and all(entry["finished"] for entry in state.values())
    assert (folder / "index.html").is_file()
    if part == "tdm to exports":
        assert json.loads((folder / "turbo/model_index.json").read_text())["is_distilled"]
    seconds = {name: entry["seconds"] for name, entry in state.items()}
    command.row(f"run, {part}", "k2/pipeline_1", result, **seconds)
