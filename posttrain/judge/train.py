"""Trains a judge: a LoRA adapter that makes a Qwen3-VL answer one fixed question about an image with yes or no.

    posttrain judge --config recipes/nano/judge_aesthetic.yaml

The score is rho = logit(yes) - logit(no) of the answer's first token, so vLLM serves the adapter as it is and P(yes)
is sigma(rho). `preference` fits pairs by Bradley-Terry, with the share of votes as label; `artifact` fits labels (or
corruptions of good images) by cross-entropy. Only projections of the language model are adapted; the vision tower is
frozen. In both modes a small term keeps the answer a yes or a no, since a server reads nothing else.

Held-out records are split off by prompt (all images of a prompt are on one side) and, if asked, by generator.
Accuracy, calibration and curves go into the adapter's model card.

A run that was stopped or killed continues with --resume and ends where it would have ended, because the order of the
records and their corruptions follow from the seed and the step alone.

Legend: B records of a micro-batch; a pair is two images, the preferred one first.
"""

from __future__ import annotations

import itertools
import math
import os
import signal
from collections.abc import Iterator, Sequence
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

from posttrain.config.sections import JUDGE_TARGETS
from posttrain.errors import UserError
from posttrain.judge import losses
from posttrain.judge.calibration import auroc, brier, expected_calibration_error, reliability
from posttrain.judge.card import numbers, write_adapter
from posttrain.judge.config import JudgeConfig
from posttrain.judge.records import Record, check_prompts, read_records, split
from posttrain.judge.records import fingerprint as fingerprint_of_records
from posttrain.log import log
from posttrain.model.fingerprint import fingerprint
from posttrain.report.page import write_report
from posttrain.runs import startup
from posttrain.runs.guard import check_run
from posttrain.runs.run import Run, peak_memory
from posttrain.training import checkpoint
from posttrain.training.checkpoint import Checkpoint
from posttrain.training.stepper import Loop, Stepper
from prompts.templates import Template, load_template
from rewards.vlm import VLM, Inputs

MASS_WEIGHT = 0.1
"""Weight of -log(P(yes) + P(no))."""


def train(config: JudgeConfig, resume: bool = False) -> None:
    """Runs a recipe into its run directory. Raises UserError for a mistake that the user can fix."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("posttrain judge: trains in one process; start it without a launcher")
    check_run(config, resume)
    template = load_template(config.template or {"preference": "aesthetic", "artifact": "artifact"}[config.mode])
    saved = checkpoint.load_latest(Path(config.output) / "checkpoints") if resume else None
    records = read_records(config)
    check_prompts(records, template, config.data)
    # What a resumed run must have in common with the one that it continues.
    facts = {"mode": config.mode, "template": template.hash, "data": fingerprint_of_records(records)}
    _check_unchanged(saved, facts)  # before the model is loaded
    training, heldout = split(records, config)
    device = PartialState().device or torch.device("cpu")
    startup.lap("inputs")
    vlm = VLM.load(config.model, getattr(torch, config.dtype), device)
    startup.lap("read")
    facts["model"] = fingerprint(dict(vlm.model.named_parameters()))
    _check_unchanged(saved, facts)
    add_adapter(vlm, config)
    with Run.create(config, resume) as run:
        run.stopped = _train(config, run, vlm, template, training, heldout, saved, facts)
        write_report(run.path)
    if run.stopped is signal.SIGINT:
        raise KeyboardInterrupt


def _train(
    config: JudgeConfig,
    run: Run,
    vlm: VLM,
    template: Template,
    training: Sequence[Record],
    heldout: Sequence[Record],
    saved: Checkpoint | None,
    facts: dict[str, str],
) -> signal.Signals | None:
    adapter = {name: p for name, p in vlm.model.named_parameters() if p.requires_grad}
    stepper = Stepper(list(adapter.values()), config.optim)
    first, seen, before = 0, 0, None
    if saved is not None:
        _restore(saved, adapter, stepper)
        first, seen, before = saved.step, saved.state["records_seen"], saved.state["before"]
    run.start(config.steps, first)
    if 0 < first < config.steps:
        log.info(f"continues after step {first}")
    if before is None:
        before = figures(config.mode, heldout, score(vlm, template, heldout, config), config.seed)

    # Counted in records, as a resumed run may have another batch.
    total = seen + (config.steps - first) * config.batch
    order = list(_epochs(len(training), total, config.seed))[seen:]
    batches = _loader(vlm, template, training, order, config)
    loop = Loop(first, config.steps, config.checkpoint)
    for step in loop:
        run.log(step, update(vlm, stepper, batches, config, step))
        if loop.save_due(step):
            state = {"before": before, "records_seen": seen + (step - first) * config.batch}
            _save(config, step, adapter, stepper, state, facts)
    card: dict[str, Any] = {"figures": None, "before": before, "records": (len(training), len(heldout))}
    with stepper.averaged():
        if loop.stopped is None:  # who was told to stop does not measure for minutes
            card["figures"] = figures(config.mode, heldout, score(vlm, template, heldout, config), config.seed)
        write_adapter(vlm, run.path / "adapter", config, template, loop.done, card)
    after = numbers(card["figures"])
    run.summary({"before": numbers(before), "after": after, "steps": loop.done, **peak_memory()})
    return loop.stopped


def _save(
    config: JudgeConfig,
    step: int,
    adapter: dict[str, Tensor],
    stepper: Stepper,
    state: dict[str, Any],
    facts: dict[str, str],
) -> None:
    optimizer, optimizer_state = stepper.flattened()
    tensors = {"optimizer": optimizer, "live": checkpoint.on_host(adapter)}
    with stepper.averaged():
        tensors["adapter"] = checkpoint.on_host(adapter)
    state = {"method": "judge", "facts": facts, "optimizer": optimizer_state, "counters": stepper.counters(), **state}
    checkpoint.save(Path(config.output) / "checkpoints", step, tensors, state, config.checkpoint.keep)


@torch.no_grad()
def _restore(saved: Checkpoint, adapter: dict[str, Tensor], stepper: Stepper) -> None:
    """Puts back what `_save` wrote. Raises UserError if the adapter is another one."""
    stepper.restore(saved.tensors["optimizer"], saved.state["optimizer"])
    stepper.restore_counters(saved.state["counters"])
    if adapter.keys() != saved.tensors["live"].keys():
        raise UserError(f"{saved.path}: its adapter has other layers than lora.targets names; restore lora")
    with stepper.averaged():
        for name, parameter in adapter.items():
            parameter.copy_(saved.tensors["adapter"][name])
    for name, parameter in adapter.items():
        parameter.copy_(saved.tensors["live"][name])


def _check_unchanged(saved: Checkpoint | None, facts: dict[str, str]) -> None:
    """Raises UserError if a run would go on with other data, another model or another question than it began with."""
    for name, value in facts.items():
        if saved is not None and saved.state["facts"].get(name) != value:
            raise UserError(
                f"{name}: is not what {saved.path} was trained with; restore it (it may lie elsewhere), or choose"
                " another --output"
            )


def update(vlm: VLM, stepper: Stepper, batches: Iterator, config: JudgeConfig, step: int) -> dict[str, float]:
    """One optimiser update; returns the means of its metrics over the records."""
    stepper.rate = 0.5 * (1 + math.cos(math.pi * (step - 1) / config.steps))  # cosine decay, relative to optim.lr
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
        # the penalty keeps the answer's probability on yes and no, where P(yes) is read from
        loss = loss_B.mean() - MASS_WEIGHT * log_mass.mean()
        (loss * len(share_B) / config.batch).backward()
        metrics |= {"loss": loss.detach() * len(share_B), "mass": log_mass.detach().exp().mean() * len(share_B)}
        for name, value in metrics.items():
            totals[name] = totals.get(name, 0.0) + value
    norm = stepper.step()
    means = {name: float(total) / config.batch for name, total in totals.items()}
    return means | {"grad_norm": norm, **stepper.metrics(), "skipped_updates": stepper.skipped}


def add_adapter(vlm: VLM, config: JudgeConfig) -> None:
    """LoRA on the language model's projections; everything else is frozen."""
    torch.manual_seed(config.seed)
    names = "|".join(config.lora.targets or JUDGE_TARGETS)
    settings = LoraConfig(
        r=config.lora.rank, lora_alpha=config.lora.alpha,  # type: ignore[arg-type]
        target_modules=rf".*language_model.*\.({names})", task_type="CAUSAL_LM",
    )  # fmt: skip
    vlm.model = get_peft_model(vlm.model, settings)


# ---- batches ----------------------------------------------------------------------------------------------


def _epochs(n: int, total: int, seed: int) -> Iterator[tuple[int, int]]:
    """(index, epoch) of `total` records: each epoch has all records in a new random order."""
    for epoch in range(math.ceil(total / n)):
        order = np.random.default_rng([seed, epoch]).permutation(n)
        yield from zip(order[: total - epoch * n].tolist(), itertools.repeat(epoch))


@dataclass
class _Batches(Dataset):
    """Micro-batches as model inputs. Item i holds rows i*size to (i+1)*size of `order`, (record, epoch)."""

    vlm: VLM
    template: Template
    records: Sequence[Record]
    order: list[tuple[int, int]]
    size: int
    seed: int = 0

    def __len__(self) -> int:
        return -(-len(self.order) // self.size)

    def __getitem__(self, i: int) -> tuple[Inputs, Tensor] | UserError:
        try:
            return self._batch(i)
        except UserError as error:  # raised in a worker, it would arrive with that worker's traceback
            return error

    def _batch(self, i: int) -> tuple[Inputs, Tensor]:
        columns: list[list[Image.Image]] = []  # first images of all records, then, for pairs, the second images
        questions, shares = [], []
        for r, epoch in self.order[i * self.size : (i + 1) * self.size]:
            record = self.records[r]
            images = self._images(record, r, epoch)
            columns = columns or [[] for _ in images]  # one column for images, two for pairs
            for column, image in zip(columns, images):
                column.append(image)
            questions.append(self.template.render(prompt=record.prompt or ""))
            shares.append(record.share)
        flat = list(itertools.chain(*columns))
        return self.vlm.inputs(flat, questions * len(columns)), torch.tensor(shares)

    def _images(self, record: Record, r: int, epoch: int) -> list[Image.Image]:
        images = record.images.read()
        if record.corrupt:
            # a new fault in each epoch, the same one after a resume
            return [corrupt(image, np.random.default_rng([self.seed, r, epoch])) for image in images]
        return images


def _loader(
    vlm: VLM, template: Template, records: Sequence[Record], order: list[tuple[int, int]], config: JudgeConfig
) -> Iterator[tuple[Inputs, Tensor]]:
    readers = replace(vlm, model=None)  # workers only read and tokenise, so the model is not copied to them
    batches = _Batches(readers, template, records, order, config.micro_batch, config.seed)
    if config.workers:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads can deadlock in a forked process
    for batch in DataLoader(batches, batch_size=None, num_workers=config.workers):
        if isinstance(batch, UserError):
            raise batch
        yield batch


def corrupt(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A copy with one fault at a random place: a part doubled, smeared, broken apart or shuffled in strips."""
    pixels = np.asarray(image).copy()
    height, width = pixels.shape[:2]
    h = max(4, int(height * rng.uniform(0.25, 0.5)))  # the part's size, a quarter to half of each side
    w = max(4, int(width * rng.uniform(0.25, 0.5)))
    y, x = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
    part = pixels[y : y + h, x : x + w].astype(np.float32)
    axis, kind = int(rng.integers(2)), int(rng.integers(4))
    length = max(2, int((h, w)[axis] * rng.uniform(0.15, 0.35)))
    if kind == 0:  # doubled
        part = 0.5 * part + 0.5 * np.roll(part, length, axis)
    elif kind == 1:  # smeared
        part = np.mean([np.roll(part, s, axis) for s in range(-length // 2, length // 2 + 1)], axis=0)
    elif kind == 2:  # broken apart
        first, second = np.array_split(part, 2, axis)
        part = np.concatenate([np.roll(first, length, 1 - axis), np.roll(second, -length, 1 - axis)], axis)
    else:  # shuffled
        strips = np.array_split(part, max(3, (h, w)[axis] // 4), axis)
        part = np.concatenate([strips[i] for i in rng.permutation(len(strips))], axis)
    pixels[y : y + h, x : x + w] = part.astype(np.uint8)
    return Image.fromarray(pixels)


# ---- evaluation -------------------------------------------------------------------------------------------


@torch.no_grad()
def score(vlm: VLM, template: Template, records: Sequence[Record], config: JudgeConfig) -> np.ndarray:
    """rho, (N, images of a record). Corruptions are those of epoch 0, so that evaluations can be compared."""
    vlm.model.eval()
    rows = []
    order = [(i, 0) for i in range(len(records))]
    for inputs, share in _loader(vlm, template, records, order, config):
        rows.append(vlm.answers(inputs)[0].view(-1, len(share)).T.cpu())
    return torch.cat(rows).double().numpy()


def figures(mode: str, records: Sequence[Record], rho: np.ndarray, seed: int) -> dict[str, Any]:
    """Held-out figures of scores rho, (N, 2) for pairs or (N, 1) for images."""
    share = np.array([r.share for r in records])
    if mode == "preference":
        difference = rho[:, 0] - rho[:, 1]
        right = np.where(difference > 0, share, 1 - share)  # share of the votes that agree with the judge
        # calibration needs both outcomes, so half of the pairs are turned round: the chosen image comes first in all
        flip = np.random.default_rng(seed).random(len(share)) < 0.5
        p = _sigmoid(np.where(flip, -difference, difference))
        y = np.where(flip, 1 - share, share)
        result = _preference_figures(records, difference, right)
    else:
        p, y = _sigmoid(rho[:, 0]), share
        right = np.where(p > 0.5, share, 1 - share)
        result = _fault_figures(p, y, right)
    result |= {"brier": brier(p, y), "ece": expected_calibration_error(p, y), "reliability": reliability(p, y)}
    result["by_source"] = {}
    sources = set(itertools.chain.from_iterable(r.sources for r in records))
    for source in sorted(sources):
        own = np.array([source in r.sources for r in records])
        result["by_source"][source] = (float(right[own].mean()), int(own.sum()))
    result["heldout"] = len(records)
    return result


def _preference_figures(records: Sequence[Record], difference: np.ndarray, right: np.ndarray) -> dict[str, Any]:
    result: dict[str, Any] = {"accuracy": float(right.mean())}
    chances = [r.chance for r in records if r.chance is not None]
    if len(chances) == len(records):
        # simulated choices are random: even a perfect judge agrees only with the likelier one
        ceiling = np.maximum(chances, 1 - np.array(chances)).mean()
        result |= {"noise_ceiling": float(ceiling), "of_ceiling": float(right.mean() / ceiling)}
    result["by_margin"] = []
    for quarter in np.array_split(np.argsort(abs(difference)), 4):  # from the least to the most certain pairs
        if len(quarter):
            margin, accuracy = abs(difference[quarter]).mean(), right[quarter].mean()
            result["by_margin"].append((float(margin), float(accuracy), len(quarter)))
    return result


def _fault_figures(p: np.ndarray, y: np.ndarray, right: np.ndarray) -> dict[str, Any]:
    result = {"accuracy": float(right.mean()), "auroc": auroc(p, y)}
    good, bad = p[y <= 0.5], p[y > 0.5]
    if len(good) and len(bad):
        threshold = float(np.quantile(good, 0.99))  # one in a hundred good images is called faulty
        result |= {"threshold": threshold, "found_at_threshold": float((bad > threshold).mean())}
    return result


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))
