"""What is evaluated, and its images: drawn by a model or a server, or found in a folder.

OUTPUT/images/NAME/0007-1.png is image 1 of prompt 7. Beside them drawn.json says what decided them, so that a directory
is only ever gone on with as it was begun.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from posttrain.config.sections import ModelConfig
from posttrain.distributed.processes import Processes
from posttrain.errors import UserError, counted
from posttrain.evaluate.config import EvaluateConfig
from posttrain.expander.gdpo_config import RendererConfig
from posttrain.expander.model import Expander, resolve
from posttrain.expander.renderer import EndpointRenderer
from posttrain.image_reader import SUFFIXES, read_image
from posttrain.log import log
from posttrain.model import files, sampler
from posttrain.model.k2 import K2, Text, to_pil
from posttrain.runs.files import replace_text, replacing
from posttrain.training.policy import add_stage, apply_runtime_options, earlier_of, first_device, is_file, load_stage
from prompts.records import PromptRecord

Kind = Literal["base", "adapter", "model", "folder", "endpoint"]
DRAWN = "drawn.json"
PART = 64
"""Images that a server is asked for before they are written."""


@dataclass(frozen=True)
class Subject:
    name: str
    place: str
    kind: Kind
    guidance: float | None = None
    """None: the model's own, or whatever a server or a folder has."""
    expander: str | None = None

    @property
    def folder(self) -> str:
        """Of its images, under the evaluation's."""
        return re.sub(r"[^\w.@+-]", "_", self.name)


def read_subjects(config: EvaluateConfig) -> list[Subject]:
    """One for each entry of `subjects` and guidance, in order. Raises UserError for a place that is none of these,
    before anything large is read."""
    found: dict[str, Subject] = {}
    for text in config.subjects:
        name, place = named(text)
        kind = kind_of(place)
        if kind in ("base", "model"):
            files.check_directory(config.model.path if kind == "base" else place)
        if kind == "adapter":
            saved = _load_stage(place, config.model)
            if not is_file(saved):
                earlier_of(saved)
        draws = kind not in ("folder", "endpoint")
        settings = config.guidance if draws and config.guidance else [None]
        for guidance in settings:
            own = f"{name}@{guidance:g}" if len(settings) > 1 else name
            if own in found:
                raise UserError(f"subjects: {own} is there twice; give each its own name, as NAME=PLACE")
            found[own] = Subject(own, place, kind, guidance, config.expand.get(name))
        if name in config.expand:
            if not draws and kind != "endpoint":
                raise UserError(f"expand: {name} is a folder of images, whose prompts are drawn already; leave it out")
            resolve(config.expand[name])
    names = {named(text)[0] for text in config.subjects}
    for name in config.expand:
        if name not in names:
            raise UserError(f"expand: {name} is no subject; there are {', '.join(sorted(names))}")
    if len({subject.folder for subject in found.values()}) < len(found):
        raise UserError("subjects: two names differ only in characters that no file name has; give plainer ones")
    return list(found.values())


def named(text: str) -> tuple[str, str]:
    """Name and place of NAME=PLACE, or of a place, whose last part is its name."""
    match = re.match(r"([\w .+-]+)=(.+)", text)
    if match:
        return match[1].strip(), match[2].strip()
    return (Path(text).name or text) if "://" not in text else re.sub(r"^\w+://", "", text).split("/")[0], text


def kind_of(place: str) -> Kind:
    if re.match(r"https?://", place):
        return "endpoint"
    if place == "base":
        return "base"
    path = Path(place)
    if (path / "model_index.json").is_file():
        return "model"
    holds_run = (path / "checkpoints").is_dir() or (path / "manifest.json").is_file()
    if path.is_dir() and not holds_run and any(file.suffix.lower() in SUFFIXES for file in path.iterdir()):
        return "folder"
    if not path.exists():
        raise UserError(
            f"subjects: {place}: no such file or directory; give base, a run, an adapter, a model or images"
        )
    return "adapter"


def _load_stage(place: str, model: ModelConfig) -> Any:
    try:
        return load_stage(place, asdict(model))
    except UserError as error:
        raise UserError(f"subjects: {error}") from error


class Images:
    """The images of one subject: `paths`, by (prompt, image), once `draw` has been called."""

    def __init__(self, subject: Subject, config: EvaluateConfig, records: Sequence[PromptRecord], procs: Processes):
        self.subject, self.config, self.records, self.procs = subject, config, records, procs
        self.folder = Path(config.output) / "images" / subject.folder
        self.jobs = [(i, j) for i in range(len(records)) for j in range(config.images)]
        self.paths: dict[tuple[int, int], Path] = {}
        self.facts: dict[str, Any] = {}
        """What was drawn with, and seconds an image."""

    def draw(self) -> None:
        """Draws what is not there yet. Raises UserError for images that were begun with other settings, and for a
        folder or a server that does not give what is asked."""
        if self.subject.kind == "folder":
            self.paths = in_folder(Path(self.subject.place), self.records, self.config.images)
            return
        self.paths = {job: self.folder / f"{job[0]:04d}-{job[1]}.png" for job in self.jobs}
        if self.procs.main:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._check_begun()
        self.procs.from_main(None)
        prompts = self._prompts()
        due = [job for job in self.jobs if not self.paths[job].is_file()]
        if due:
            log.info(f"{self.subject.name}: {counted(len(due), 'image')} to draw")
            own = [due[i] for i in self.procs.local_indices(len(due))]
            began, first = time.perf_counter(), 0.0
            for count, done in enumerate(self._drawn(own, prompts)):
                first = time.perf_counter() if count == 0 else first  # it compiles and warms up
                for job, image in done:
                    with replacing(self.paths[job]) as temporary:
                        image.save(temporary, "png")
            ended = time.perf_counter()
            timed = len(own) - self.config.micro_batch
            seconds = (ended - first) / timed if timed > 0 else (ended - began) / max(1, len(own))
            everyone = [one for one in self.procs.all_gather((seconds, len(own))) if one[1]]
            self.facts["seconds_image"] = max(one[0] for one in everyone) / len(everyone)
        if self.procs.main:
            self._write_facts()

    def _drawn(self, jobs: Sequence[tuple[int, int]], prompts: Sequence[str]) -> Iterator[list[Any]]:
        """(job, image) of these, some at a time."""
        if not jobs:
            return
        own = {job: prompts[place] for place, job in enumerate(self.jobs)}
        drawn = self._by_server if self.subject.kind == "endpoint" else self._by_model
        yield from drawn(jobs, [own[job] for job in jobs])

    def _by_model(self, jobs: Sequence[tuple[int, int]], prompts: Sequence[str]) -> Iterator[list[Any]]:
        config, subject, procs = self.config, self.subject, self.procs
        model = config.model
        k2, role = load(subject, model, procs.device)
        steps = sampler.STEPS[k2.is_distilled] if config.steps is None else config.steps
        guidance = sampler.GUIDANCE[k2.is_distilled] if subject.guidance is None else subject.guidance
        self.facts |= {"steps": steps, "guidance": guidance}
        height, width = config.size
        shape = (k2.image_tokens(height, width), k2.latent_channels)
        fused = [k2.text_tokens(features).cpu() for features in k2.encode(prompts, config.max_tokens).features]
        null = k2.text([""]) if guidance > 0 else None
        with k2.role(role):
            for first in range(0, len(jobs), config.micro_batch):
                part = range(first, min(first + config.micro_batch, len(jobs)))
                noise = sampler.noise([sampler.seed_for(config.seed, *jobs[n]) for n in part], shape)
                text = Text.of([fused[n].to(k2.device) for n in part])
                latents = k2.sample(text, noise, steps, height, width, guidance, null)
                yield [(jobs[n], image) for n, image in zip(part, to_pil(k2.decode(latents, height, width)))]

    def _by_server(self, jobs: Sequence[tuple[int, int]], prompts: Sequence[str]) -> Iterator[list[Any]]:
        renderer = EndpointRenderer(endpoint_config(self.subject, self.config))
        for first in range(0, len(jobs), PART):
            part = range(first, min(first + PART, len(jobs)))
            seeds = [sampler.seed_for(self.config.seed, *jobs[n]) for n in part]
            rendering = renderer([prompts[n] for n in part], seeds)
            yield [(jobs[n], image) for n, image in zip(part, rendering.images) if image is not None]
            if rendering.failures:
                reason, times = rendering.failures.most_common(1)[0]
                raise UserError(f"subjects: {self.subject.place}: {counted(times, 'image')} missing: {reason}")

    # ---- what was drawn with ----------------------------------------------------------------------------------

    def _settings(self) -> dict[str, Any]:
        """What decides the images."""
        config, subject = self.config, self.subject
        settings: dict[str, Any] = {
            "place": subject.place, "size": list(config.size), "seed": config.seed, "steps": config.steps,
            "guidance": subject.guidance, "images": config.images, "max_tokens": config.max_tokens,
            "prompts": [record.prompt for record in self.records], "expand": subject.expander,
        }  # fmt: skip
        if subject.kind in ("base", "adapter"):
            settings["model"] = config.model.path
        if subject.kind == "adapter":
            settings["checkpoint"] = str(_load_stage(subject.place, config.model).path)
        return json.loads(json.dumps(settings))

    def _check_begun(self) -> None:
        path, now = self.folder / DRAWN, self._settings()
        if not path.is_file():
            replace_text(path, json.dumps({"settings": now}, indent=1) + "\n")
            return
        saved = json.loads(path.read_text())
        self.facts = saved.get("facts") or {}
        before = saved["settings"]
        for name in now:
            if before.get(name) != now[name]:
                told = "are others" if name == "prompts" else f"{now[name]}, and was {before.get(name)}"
                raise UserError(
                    f"{self.folder}: {name}: {told} when these images were begun; choose another output, or remove them"
                )

    def _write_facts(self) -> None:
        replace_text(
            self.folder / DRAWN, json.dumps({"settings": self._settings(), "facts": self.facts}, indent=1) + "\n"
        )

    def _prompts(self) -> list[str]:
        """The text that each job is drawn from; expansions are made once, and kept."""
        plain = [self.records[i].prompt for i, _ in self.jobs]
        if self.subject.expander is None:
            return plain
        path = self.folder / "expansions.json"
        texts = None
        if self.procs.main:
            texts = json.loads(path.read_text()) if path.is_file() else self._expanded(path)
        return self.procs.from_main(texts)

    def _expanded(self, path: Path) -> list[str]:
        assert self.subject.expander is not None
        dtype = getattr(torch, self.config.model.dtype)
        expander = Expander.load(self.subject.expander, None, dtype, self.procs.device)
        prompts = [record.prompt for record in self.records]
        texts = []
        for group in expander.expand(prompts, self.config.images, self.config.seed):
            texts += [expansion.text for expansion in group]
        if "" in texts:
            empty = prompts[texts.index("") // self.config.images]
            raise UserError(
                f"expand: {self.subject.expander} answered '{empty}' with nothing; train it, or change seed"
            )
        replace_text(path, json.dumps(texts, indent=1, ensure_ascii=False) + "\n")
        return texts


def load(subject: Subject, model: ModelConfig, device: torch.device) -> tuple[K2, str | None]:
    """The subject's model, and the role to draw under."""
    saved = _load_stage(subject.place, model) if subject.kind == "adapter" else None
    path = subject.place if subject.kind == "model" else model.path
    own = (None, None) if subject.kind == "model" else (model.transformer_file, model.transformer_format)
    k2 = K2.load(path, own[0], getattr(torch, model.dtype), first_device(model, device), own[1])
    role = None if saved is None else add_stage(k2, saved)
    apply_runtime_options(k2, model, device)
    return k2, role


def endpoint_config(subject: Subject, config: EvaluateConfig) -> RendererConfig:
    url, _, model = subject.place.partition("#")
    return RendererConfig(
        path=config.model.path, urls=[url], model=model or None, size=list(config.size), steps=config.steps,
        guidance=config.guidance[0] if len(config.guidance) == 1 else None, max_failures=1.0,
    )  # fmt: skip


def in_folder(folder: Path, records: Sequence[PromptRecord], images: int) -> dict[tuple[int, int], Path]:
    """The folder's images by (prompt, image): by prompts.json, as `posttrain sample` writes it, or in the order of
    their names. Raises UserError for a prompt that has too few."""
    found = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
    table = folder / "prompts.json"
    by_prompt: dict[str, list[Path]] = {}
    if table.is_file():
        rows = json.loads(table.read_text())
        if len(rows) != len(found):
            raise UserError(f"{table}: names {counted(len(rows), 'image')}, and {folder} has {len(found)}; restore it")
        for row, file in zip(rows, found):
            by_prompt.setdefault(row["prompt"], []).append(file)
    else:
        for i, record in enumerate(records):
            by_prompt[record.prompt] = found[i * images : (i + 1) * images]
    paths = {}
    for i, record in enumerate(records):
        own = by_prompt.get(record.prompt, [])
        if len(own) < images:
            raise UserError(
                f"{folder}: has {counted(len(own), 'image')} of '{record.prompt}', and images is {images}; draw"
                " more, or set first or images"
            )
        paths |= {(i, j): own[j] for j in range(images)}
    for path in list(paths.values())[:1]:
        read_image(path)  # so that another kind of file is told at once
    return paths
