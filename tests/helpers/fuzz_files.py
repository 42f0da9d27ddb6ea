"""Malformed files that runs and people leave behind; see fuzz.py."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch

from posttrain.annotate import answers as annotations
from posttrain.expander.config import ExpanderSFTConfig
from posttrain.expander.sft_pairs import read_pairs
from posttrain.judge.config import JudgeConfig
from posttrain.judge.records import read_records
from posttrain.model import lora_file
from posttrain.report.page import write_report
from posttrain.training import checkpoint
from prompts.templates import load_template
from rewards.image import Requirements
from rewards.judge import Judge
from tests.helpers.malformed import jsonl, pictures, refused, spoiled, spoiled_rows, torn


def checkpoint_files(rng: random.Random, folder: Path) -> bool:
    tensors = {"policy": {"a": torch.arange(6.0).view(2, 3)}, "optimizer": {"0.step": torch.tensor(3.0)}}
    made = checkpoint.save(folder / "checkpoints", 7, tensors, {"method": "grpo", "counters": {"updates": 1}}, 1)
    victim = rng.choice([p for p in sorted(made.iterdir()) if p.name != "manifest.json" or rng.random() < 0.8])
    if victim.name == "manifest.json" and rng.random() < 0.7:
        victim.write_text(json.dumps(spoiled(json.loads(victim.read_text()), rng)))
    else:
        victim.write_bytes(torn(victim.read_bytes(), rng))
    return refused(lambda: checkpoint.load(made))


def annotation_store(rng: random.Random, folder: Path) -> bool:
    file = folder / "store.jsonl"
    settings = annotations.Schedule(0, 0.1)
    store = annotations.Store(file, settings)
    for showing in annotations.schedule(["a", "b", "c"], "ann", settings):
        store.add("ann", showing, "left", 1.0)
    store.close()
    lines = file.read_bytes().splitlines()
    if rng.random() < 0.6:
        i = rng.randrange(len(lines))
        lines[i] = json.dumps(spoiled(json.loads(lines[i]), rng)).encode()
        file.write_bytes(b"\n".join([*lines, b""]))
    else:
        file.write_bytes(torn(file.read_bytes(), rng))
    return refused(lambda: annotations.read(file))


def judge_data(rng: random.Random, folder: Path) -> bool:
    rows, file = pictures(folder), folder / "judge.jsonl"
    spoiled_rows(rows, file, rng)
    return refused(lambda: read_records(JudgeConfig("o", "m", str(file), "preference")))


def expander_pairs(rng: random.Random, folder: Path) -> bool:
    rows, file = [{"prompt": f"user {i}", "completion": f"caption {i}"} for i in range(12)], folder / "pairs.jsonl"
    spoiled_rows(rows, file, rng)
    return refused(lambda: read_pairs(ExpanderSFTConfig(output="o", model="m", data=str(file), heldout=0.3)))


def requirements_file(rng: random.Random, folder: Path) -> bool:
    file = folder / "requirements.jsonl"
    rows = [{"prompt": f"p{i}", "requirements": ["a", "b"], "model": "m", "template": "t"} for i in range(3)]
    if rng.random() < 0.6:
        rows[1] = spoiled(rows[1], rng)
        file.write_bytes(jsonl(rows, rng))
    else:
        file.write_bytes(torn(jsonl(rows, rng), rng))

    def read() -> None:
        known = Requirements(Judge("m", "http://127.0.0.1:1/v1"), load_template("aesthetic"), str(file))._known
        for prompt, found in known.items():
            assert isinstance(prompt, str) and found and all(isinstance(text, str) for text in found)

    return refused(read)


def run_directory(rng: random.Random, folder: Path) -> bool:
    """What posttrain report reads."""
    run = folder / "run"
    run.mkdir()
    files = {
        "recipe.yaml": {"model": {"path": "m"}, "output": "o", "steps": 3},
        "metrics.jsonl": {"step": 1, "time": 1.5, "reward": 0.5, "loss": None},
        "summary.json": {"before": {"a": 0.1}, "after": {"a": 0.2}, "steps": 1, "seconds": 2.0},
        "environment.json": {"started": "2026-01-01T00:00:00+0000", "packages": {"torch": "2"}, "gpus": [], "cpus": 2},
        "prompts.json": {"kept": [{"prompt": "a", "visits": 2}]},
    }
    for name, data in files.items():
        (run / name).write_text(json.dumps(data) + "\n")
    victim = run / rng.choice(list(files))
    if rng.random() < 0.6:
        victim.write_text(json.dumps(spoiled(files[victim.name], rng)) + "\n")
    else:
        victim.write_bytes(torn(victim.read_bytes(), rng))
    was_refused = refused(lambda: write_report(run))
    assert not (was_refused and (run / "report.html").exists())
    return was_refused


def lora(rng: random.Random, folder: Path) -> bool:
    from safetensors.torch import save_file

    name, file = "transformer_blocks.0.attn.to_q", folder / "lora.safetensors"
    tensors = {f"{name}.lora_A.weight": torch.ones(2, 4), f"{name}.lora_B.weight": torch.ones(3, 2)}
    if rng.random() < 0.5:
        save_file(tensors, file)
        file.write_bytes(torn(file.read_bytes(), rng))
    else:
        key = rng.choice(list(tensors))
        value = tensors.pop(key)
        how = rng.randrange(4)
        more = [{}, {f"{key}x": value}, {key: value.T.contiguous()}, {key: value[:1, :1].contiguous()}][how]
        save_file(tensors | more, file)
    return refused(lambda: lora_file.read_lora(file, {name: (3, 4)}))
