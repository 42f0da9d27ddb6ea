"""Sampling: images of prompts from a model, with or without what a run has trained.

posttrain sample --model.path posttrain/nano/weights/k2-nano --prompt "two red stars" --size [64,64] --output out
"""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import PartialState

from posttrain.config.sections import ModelConfig
from posttrain.errors import UserError, counted
from posttrain.expander.model import Expander, resolve
from posttrain.log import log
from posttrain.model import sampler
from posttrain.model.k2 import K2, Text, to_pil
from posttrain.references.draw import check_strengths
from posttrain.references.shown import MOST, Drawer, Named, named, of_record
from posttrain.runs.guard import check_new
from posttrain.sample_config import SampleConfig
from posttrain.training.evaluate import SamplingSettings
from posttrain.training.policy import (
    FILE,
    add_stage,
    apply_runtime_options,
    earlier_of,
    first_device,
    is_file,
    load_stage,
)
from prompts.records import PromptRecord, read_prompts


def loaded(model: ModelConfig, adapter: str | None, shows: bool) -> tuple[K2, str | None]:
    """The model, and the role to draw under. `shows`: references are drawn with. Raises UserError for what the model
    cannot take, before its weights are read."""
    saved = None if adapter is None else load_stage(adapter, asdict(model))
    if saved is not None and not is_file(saved):
        earlier_of(saved)  # each is there, and as it was
    device = PartialState().device or "cpu"
    dtype, place = getattr(torch, model.dtype), first_device(model, device)
    k2 = K2.load(model.path, model.transformer_file, dtype, place, model.transformer_format)
    role = None if saved is None else add_stage(k2, saved)
    apply_runtime_options(k2, model, device)
    if shows and (saved is None or saved.state["method"] not in ("style", FILE)):
        log.warning("references: no adapter of posttrain style is given, and without one their content is copied")
    k2.blocks.compiled = bool(model.compile)  # a few images are drawn sooner than blocks are compiled
    return k2, role


def sample(config: SampleConfig) -> None:
    """Writes 000.png, 001.png, ... and prompts.json into `config.output`."""
    output = Path(config.output)
    check_new(output)
    if config.prompt is not None:
        records = [PromptRecord(config.prompt)]
    else:
        records = read_prompts(config.prompts or "", references=True)
    if config.expand is not None:
        resolve(config.expand)  # refused before the model is read
    shown = _references(config, records)
    k2, role = loaded(config.model, config.adapter, any(shown))
    steps = sampler.STEPS[k2.is_distilled] if config.steps is None else config.steps
    guidance = sampler.GUIDANCE[k2.is_distilled] if config.guidance is None else config.guidance
    height, width = config.size
    shape = (k2.image_tokens(height, width), k2.latent_channels)
    jobs = _jobs(config, records)
    prompts = [record.prompt for record in records]
    if config.expand is not None:
        prompts = expansions(config, prompts)  # one for each image
    encoding = k2.encode(prompts)
    cuts = list(filter(None, encoding.cut))
    if cuts:
        log.warning(f"too long: {counted(len(cuts), 'prompt')}, of which up to {counted(max(cuts), 'token')} are cut")
    fused = [k2.text_tokens(features) for features in encoding.features]
    null = k2.text([""]) if guidance > 0 else None
    # Only now, so that a model that cannot be read leaves no empty directory behind.
    try:
        output.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"output: {output} cannot be made: {error.strerror}; choose another name") from error
    # Without expansions the images of a prompt share its text.
    text_of = range(len(jobs)) if config.expand is not None else [job.record for job in jobs]
    with k2.role(role):
        size = (height, width)
        draw = Drawer.of(k2, shown, size, config.reference_size, config.strength) if any(shown) else None
        for first in range(0, len(jobs), config.micro_batch):
            part = slice(first, first + config.micro_batch)
            text = Text.of([fused[i] for i in text_of[part]])
            noise = sampler.noise([job.seed for job in jobs[part]], shape)
            if draw is None:
                latents = k2.sample(text, noise, steps, height, width, guidance, null)
            else:
                own = [job.record for job in jobs[part]]
                latents = draw(own, text, noise, SamplingSettings(steps, guidance), null)
            for n, image in enumerate(to_pil(k2.decode(latents, height, width)), start=first):
                image.save(output / f"{n:03d}.png")
    table: list[dict] = []
    for n, job in enumerate(jobs):
        row = {"prompt": records[job.record].prompt, "seed": job.seed}
        if config.expand is not None:
            row["expansion"] = prompts[n]
        table.append(row)
    (output / "prompts.json").write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n")
    settings = f"{counted(steps, 'step')}, guidance {guidance:g}"
    print(f"posttrain: wrote {counted(len(jobs), 'image')} to {output} ({settings})")


def _references(config: SampleConfig, records: list[PromptRecord]) -> list[list[Named]]:
    """Those of each prompt: its line's own, or the ones that all have. Raises UserError before a model is read."""
    shared = [named(text, Path(), "references") for text in config.references]
    folder = Path(config.prompts or ".").parent
    found = [of_record(record, folder) or shared for record in records]
    # Before the model is read: the number of a prompt's references, and whether strengths suit how they act.
    for own in found:
        check_strengths([one.strength for one in own], config.strength, len(own))
        if len(own) > MOST:
            raise UserError(f"references: {counted(len(own), 'image')}; give at most {MOST}")
    return found


class _Job(NamedTuple):
    """An image to draw."""

    record: int
    """Index of its prompt."""
    seed: int


def _jobs(config: SampleConfig, records: list[PromptRecord]) -> list[_Job]:
    """All images of the first prompt, then those of the second, ..."""
    jobs = []
    for index, image in itertools.product(range(len(records)), range(config.images)):
        # Its own stream, so that an image is the same whatever else is drawn.
        jobs.append(_Job(index, sampler.seed_for(config.seed, index, image)))
    return jobs


def expansions(config: SampleConfig, prompts: list[str]) -> list[str]:
    """`config.images` expansions of each prompt, in order. Raises UserError if one is empty."""
    assert config.expand is not None
    expander = Expander.load(config.expand, None, getattr(torch, config.model.dtype), PartialState().device or "cpu")
    texts: list[str] = []
    for group in expander.expand(prompts, config.images, config.seed):
        texts += [expansion.text for expansion in group]
    if not all(texts):
        empty = prompts[texts.index("") // config.images]
        raise UserError(f"expand: {config.expand} answered '{empty}' with nothing; train it further, or change seed")
    return texts
