"""Trains a judge: a LoRA adapter that makes a Qwen3-VL answer one fixed question about a picture with yes or no.

    posttrain judge --config recipes/nano/judge_aesthetic.yaml

The score is rho = logit(yes) - logit(no) of the answer's first token, so vLLM serves the adapter as it is and P(yes)
is sigma(rho). `preference` fits pairs by Bradley-Terry, `artifact` labels (or corruptions of good pictures) by
cross-entropy. Only projections of the language model are adapted; the eye stays as it is. In both, a small term
keeps the answer a yes or a no, for a server reads nothing else.

What is held out is split by prompt (pictures of one prompt are on one side), and, if asked, by generator. Accuracy,
calibration and curves go into the adapter's model card.

Legend: B records of a micro-batch; a pair is two pictures, the preferred one first.
"""

from __future__ import annotations

import hashlib
import math
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from posttrain import losses, startup
from posttrain.calibration import auroc, brier, expected_calibration_error, reliability
from posttrain.config import CheckpointConfig, JudgeConfig
from posttrain.judge_card import numbers, write_adapter
from posttrain.loop import Loop, Stepper
from posttrain.track import Run, peak_memory
from posttrain.validate import JUDGE_TARGETS
from prompts.errors import UserError
from prompts.parse import parse_json
from prompts.templates import Template, load_template
from rewards.vlm import VLM, Inputs

MASS_WEIGHT = 0.1
"""Weight of -log(P(yes) + P(no))."""
IMAGES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass
class Record:
    """One picture, or a pair with the preferred one first."""

    images: list[Path]
    share: float
    """Of votes for the first picture (preference) or for a fault (artifact), in [0, 1]."""
    prompt: str | None = None
    source: str | None = None
    """Who drew it."""
    chance: float | None = None
    """Where choices are simulated: how probable this one was. Only for the noise ceiling."""
    corrupt: bool = False
    """The picture is corrupted when it is read."""

    @property
    def group(self) -> str:
        return self.prompt if self.prompt is not None else self.images[0].name


def train(config: JudgeConfig) -> None:
    """Runs a recipe into its run directory. Raises UserError for what the user can mend."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("posttrain judge: trains in one process; start it without a launcher")
    template = load_template(config.template or {"preference": "aesthetic", "artifact": "artifact"}[config.mode])
    records = read_records(config.data, config.mode)
    check_prompts(records, template, config.data)
    training, heldout = split(records, config)
    device = PartialState().device or torch.device("cpu")
    startup.lap("inputs")
    vlm = VLM.load(config.model, getattr(torch, config.dtype), device)
    startup.lap("read")
    run = Run.create(config, resume=None)
    add_adapter(vlm, config)
    stepper = Stepper([p for p in vlm.model.parameters() if p.requires_grad], config.optim)
    card: dict[str, Any] = {"figures": None, "before": None, "records": (len(training), len(heldout))}

    def save(step: int) -> None:
        with stepper.averaged():
            write_adapter(vlm, run.path / "adapter", config, template, step, card)

    with run:
        run.start(config.steps)
        card["before"] = figures(config.mode, heldout, score(vlm, template, heldout, config), config.seed)
        order = [(r, epoch) for epoch, r in _epochs(len(training), config.steps * config.batch, config.seed)]
        batches = iter(_loader(vlm, template, training, order, config))
        loop = Loop(0, config.steps, CheckpointConfig(every=0), save)
        for step in loop:
            metrics = update(vlm, stepper, batches, config, step)
            run.log(step, metrics)
        if loop.stopped is None:
            with stepper.averaged():
                card["figures"] = figures(config.mode, heldout, score(vlm, template, heldout, config), config.seed)
            save(config.steps)
        run.summary({"before": numbers(card["before"]), "after": numbers(card["figures"]), "steps": loop.done,
                     **peak_memory()})  # fmt: skip
    if loop.stopped is signal.SIGINT:
        raise KeyboardInterrupt


def update(vlm: VLM, stepper: Stepper, batches: Iterator, config: JudgeConfig, step: int) -> dict[str, float]:
    """One optimiser update; returns means over its records."""
    stepper.rate = 0.5 * (1 + math.cos(math.pi * (step - 1) / config.steps))
    totals: dict[str, Tensor] = {}
    for _ in range(config.batch // config.micro_batch):
        inputs, share_B = next(batches)
        rho, log_mass = vlm.answers(inputs)
        share_B = share_B.to(rho.device)
        if config.mode == "preference":
            rho_w, rho_l = rho.chunk(2)
            loss_B, metrics = losses.bradley_terry(rho_w, rho_l, share_B)
        else:
            loss_B, metrics = losses.faulty(rho, share_B)
        loss = loss_B.mean() - MASS_WEIGHT * log_mass.mean()
        (loss * len(share_B) / config.batch).backward()
        metrics |= {"loss": loss.detach() * len(share_B), "mass": log_mass.detach().exp().mean() * len(share_B)}
        for name, value in metrics.items():
            totals[name] = totals.get(name, 0.0) + value
    norm = stepper.step()
    return {**{k: float(v) / config.batch for k, v in totals.items()}, "grad_norm": norm,
            "skipped_updates": stepper.skipped}  # fmt: skip


def add_adapter(vlm: VLM, config: JudgeConfig) -> None:
    """LoRA on the language model's projections; everything else is frozen."""
    torch.manual_seed(config.seed)
    names = "|".join(config.lora.targets or JUDGE_TARGETS)
    settings = LoraConfig(
        r=config.lora.rank, lora_alpha=config.lora.alpha,  # type: ignore[arg-type]
        target_modules=rf".*language_model.*\.({names})", task_type="CAUSAL_LM",
    )  # fmt: skip
    vlm.model = get_peft_model(vlm.model, settings)


# ---- data -------------------------------------------------------------------------------------------------


def read_records(path: str, mode: str) -> list[Record]:
    """The records of a JSONL file, or of a directory of good pictures. Raises UserError with file and line."""
    root = Path(path)
    if root.is_dir():
        if mode != "artifact":
            raise UserError(f"data: {path} is a directory: preferences need a JSONL file")
        files = sorted(p for p in root.iterdir() if p.suffix.lower() in IMAGES)
        if not files:
            raise UserError(f"data: {path} holds no image ({', '.join(IMAGES)})")
        for file in files:
            _check_image(file, str(file))
        return [Record([f], float(corrupt), corrupt=corrupt) for f in files for corrupt in (False, True)]
    try:
        lines = root.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data: {path} cannot be read as a JSONL file: {error}") from None
    records = [_record(line, f"{path}:{n}", root.parent, mode) for n, line in enumerate(lines, 1) if line.strip()]
    if not records:
        raise UserError(f"data: {path} holds no record; write one JSON object a line")
    return records


def _record(line: str, where: str, root: Path, mode: str) -> Record:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: is not an object")
    images = []
    for name in ("chosen", "rejected") if mode == "preference" else ("image",):
        if not isinstance(row.get(name), str):
            raise UserError(f"{where}: {name}: missing; write the path of an image file")
        images.append(root / row[name])
        _check_image(images[-1], f"{where}: {name}")
    key = "share" if mode == "preference" else "fault"
    share = _unit(row, key, where)
    if share is None:
        if mode == "artifact":
            raise UserError(f"{where}: fault: missing; write true, false or the share of people who saw one")
        share = 1.0
    for name in ("prompt", "source"):
        if not isinstance(row.get(name), str | None):
            raise UserError(f"{where}: {name}: is not text; put it in quotes")
    return Record(images, share, row.get("prompt"), row.get("source"), _unit(row, "chance", where))


def _unit(row: dict, name: str, where: str) -> float | None:
    value = row.get(name)
    if value is not None and not (isinstance(value, int | float) and 0 <= value <= 1):
        raise UserError(f"{where}: {name}: is {value!r}; use a number from 0 to 1")
    return None if value is None else float(value)


def _check_image(path: Path, where: str) -> None:
    try:
        with Image.open(path):
            pass
    except OSError as error:
        raise UserError(f"{where}: {path} is no image that can be read ({type(error).__name__})") from None


def check_prompts(records: list[Record], template: Template, path: str) -> None:
    if template.fields - {"prompt"}:
        raise UserError(f"template {template.name}: a judge's question may hold $prompt and no other field")
    if template.fields and any(r.prompt is None for r in records):
        raise UserError(f"data: {path}: template {template.name} asks about $prompt, but a record has no prompt")


def split(records: list[Record], config: JudgeConfig) -> tuple[list[Record], list[Record]]:
    """(training, held out): by the hash of the prompt, so that a prompt is on one side; and by generator."""

    def kept_back(record: Record) -> bool:
        digest = hashlib.sha256(f"{config.seed}:{record.group}".encode()).digest()
        return int.from_bytes(digest[:8], "big") < config.heldout * 2**64

    foreign = set(config.heldout_sources)
    if missing := foreign - {r.source for r in records}:
        raise UserError(f"heldout_sources: no record is from {sorted(missing)[0]}: correct the name")
    training = [r for r in records if not kept_back(r) and r.source not in foreign]
    heldout = [r for r in records if kept_back(r) or r.source in foreign]
    if not training or not heldout:
        raise UserError(
            f"data: {config.data}: {len(training)} records to train on and {len(heldout)} held out; "
            "give more prompts or change heldout"
        )
    return training, heldout


def _epochs(n: int, total: int, seed: int) -> Iterator[tuple[int, int]]:
    """(epoch, index) of `total` records: all in a random order, then all in another."""
    for epoch in range(-(-total // n)):
        order = np.random.default_rng([seed, epoch]).permutation(n)
        yield from ((epoch, int(i)) for i in order[: total - epoch * n])


@dataclass
class _Batches(Dataset):
    """Micro-batches as model inputs. Item i is rows i*size .. of `order`: (record, epoch)."""

    vlm: VLM
    template: Template
    records: list[Record]
    order: list[tuple[int, int]]
    size: int
    seed: int = 0

    def __len__(self) -> int:
        return -(-len(self.order) // self.size)

    def __getitem__(self, i: int) -> tuple[Inputs, Tensor]:
        rows = [(self.records[r], r, epoch) for r, epoch in self.order[i * self.size : (i + 1) * self.size]]
        images, texts = [], []
        for place in range(len(rows[0][0].images)):
            for record, r, epoch in rows:
                image = Image.open(record.images[place]).convert("RGB")
                if record.corrupt:
                    image = corrupt(image, np.random.default_rng([self.seed, r, epoch]))
                images.append(image)
                texts.append(self.template.render(**({"prompt": record.prompt or ""} if self.template.fields else {})))
        return self.vlm.inputs(images, texts), torch.tensor([record.share for record, _, _ in rows])


def _loader(vlm: VLM, template: Template, records: list[Record], order: list[tuple[int, int]], config: JudgeConfig):
    readers = replace(vlm, model=None)  # workers read and tokenise; the model stays here
    batches = _Batches(readers, template, records, order, config.micro_batch, config.seed)
    if config.workers:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # what a forked process needs
    return DataLoader(batches, batch_size=None, num_workers=config.workers)


def corrupt(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A copy with one fault somewhere: a part doubled, smeared, broken apart or shuffled in strips."""
    pixels = np.asarray(image).copy()
    height, width = pixels.shape[:2]
    h, w = (max(4, int(side * rng.uniform(0.25, 0.5))) for side in (height, width))
    y, x = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
    part = pixels[y : y + h, x : x + w].astype(np.float32)
    axis, kind = int(rng.integers(2)), int(rng.integers(4))
    length = max(2, int((h, w)[axis] * rng.uniform(0.15, 0.35)))
    if kind == 0:
        part = 0.5 * part + 0.5 * np.roll(part, length, axis)
    elif kind == 1:
        part = np.mean([np.roll(part, s, axis) for s in range(-length // 2, length // 2 + 1)], axis=0)
    elif kind == 2:
        first, second = np.array_split(part, 2, axis)
        part = np.concatenate([np.roll(first, length, 1 - axis), np.roll(second, -length, 1 - axis)], axis)
    else:
        strips = np.array_split(part, max(3, (h, w)[axis] // 4), axis)
        part = np.concatenate([strips[i] for i in rng.permutation(len(strips))], axis)
    pixels[y : y + h, x : x + w] = part.astype(np.uint8)
    return Image.fromarray(pixels)


# ---- how good it is ---------------------------------------------------------------------------------------


@torch.no_grad()
def score(vlm: VLM, template: Template, records: list[Record], config: JudgeConfig) -> np.ndarray:
    """(N, pictures of a record): rho. Corruptions are always the same."""
    vlm.model.eval()
    rows = []
    for inputs, share in _loader(vlm, template, records, [(i, 0) for i in range(len(records))], config):
        rows.append(vlm.answers(inputs)[0].view(-1, len(share)).T.cpu())
    return torch.cat(rows).double().numpy()


def figures(mode: str, records: list[Record], rho: np.ndarray, seed: int) -> dict[str, Any]:
    """Held-out figures of scores (N, 2) or (N, 1)."""
    share = np.array([r.share for r in records])
    if mode == "preference":
        difference = rho[:, 0] - rho[:, 1]
        right = np.where(difference > 0, share, 1 - share)
        flip = np.random.default_rng(seed).random(len(share)) < 0.5  # the chosen one is not always first
        p = 1 / (1 + np.exp(np.where(flip, difference, -difference)))
        y = np.where(flip, 1 - share, share)
        result: dict[str, Any] = {"accuracy": float(right.mean())}
        if all(r.chance is not None for r in records):
            chance = np.array([r.chance for r in records])
            ceiling = np.maximum(chance, 1 - chance)
            result |= {"noise_ceiling": float(ceiling.mean()), "of_ceiling": float(right.mean() / ceiling.mean())}
        quarters = np.array_split(np.argsort(abs(difference)), 4)
        result["by_margin"] = [(float(abs(difference[q]).mean()), float(right[q].mean()), len(q)) for q in quarters]
    else:
        p, y = 1 / (1 + np.exp(-rho[:, 0])), share
        right = np.where(p > 0.5, share, 1 - share)
        good, bad = p[y <= 0.5], p[y > 0.5]
        result = {"accuracy": float(right.mean()), "auroc": auroc(p, y)}
        if len(good) and len(bad):
            threshold = float(np.quantile(good, 0.99))
            result |= {"threshold": threshold, "found_at_threshold": float((bad > threshold).mean())}
    result |= {"brier": brier(p, y), "ece": expected_calibration_error(p, y), "reliability": reliability(p, y)}
    sources = np.array([r.source or "" for r in records])
    result["by_source"] = {s: (float(right[sources == s].mean()), int((sources == s).sum())) for s in {*sources} if s}
    result["heldout"] = len(records)
    return result
