"""What is evaluated, and its images: drawn by a model or a server, or found in a folder.

OUTPUT/images/NAME/0007-1.png is image 1 of prompt 7. Beside them drawn.json says what decided them, so that a directory
is only ever gone on with as it was begun.
"""

from __future__ import annotations

import itertools
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
from posttrain.expander.model import Expander, read_system, resolve
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
    system: str | None = None
    """File with the expander's system text; None: posttrain's own."""

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
                earlier_of(saved)  # for its errors: what the checkpoint stands on must still be there
        draws = kind not in ("folder", "endpoint")
        settings = config.guidance if draws and config.guidance else [None]
        for guidance in settings:
            own = f"{name}@{guidance:g}" if len(settings) > 1 else name
            if own in found:
                raise UserError(f"subjects: {own} is there twice; give each its own name, as NAME=PLACE")
            asked = config.expand.get(name), config.expand_system.get(name)
            found[own] = Subject(own, place, kind, guidance, *asked)
        if name in config.expand:
            if kind == "folder":
                raise UserError(f"expand: {name} is a folder of images, whose prompts are drawn already; leave it out")
            base, adapter = resolve(config.expand[name])
            if name in config.expand_system:
                read_system(config.expand_system[name], base, adapter)
    names = {named(text)[0] for text in config.subjects}
    # By name and not by subject: a subject with several guidances has one expander.
    for name in config.expand:
        if name not in names:
            raise UserError(f"expand: {name} is no subject; there are {', '.join(sorted(names))}")
    for name in config.expand_system:
        if name not in config.expand:
            raise UserError(f"expand_system: {name} has no expander; name it in expand too")
    folders = {subject.folder for subject in found.values()}
    if len(folders) < len(found):
        raise UserError("subjects: two names differ only in characters that no file name has; give plainer ones")
    return list(found.values())


def named(text: str) -> tuple[str, str]:
    """Name and place of NAME=PLACE, or of a place, whose last part is its name."""
    match = re.match(r"([\w .+-]+)=(.+)", text)
    if match:
        return match[1].strip(), match[2].strip()
    if "://" in text:
        host = re.sub(r"^\w+://", "", text).split("/")[0]
        return host, text
    return Path(text).name or text, text


def kind_of(place: str) -> Kind:
    if re.match(r"https?://", place):
        return "endpoint"
    if place == "base":
        return "base"
    path = Path(place)
    if (path / "model_index.json").is_file():
        return "model"
    # A run and a checkpoint come before a folder of images: people leave images in their directories too.
    holds_run = (path / "checkpoints").is_dir() or (path / "manifest.json").is_file()
    if path.is_dir() and not holds_run and _images_in(path):
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
        self.prompts = [record.prompt for record in records]
        self.jobs = list(itertools.product(range(len(records)), range(config.images)))
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
        # The others wait here, so that none looks for images before the directory has been checked.
        self.procs.from_main(None)
        prompts = self._prompts()
        due = [job for job in self.jobs if not self.paths[job].is_file()]
        if due:
            log.info(f"{self.subject.name}: {counted(len(due), 'image')} to draw")
            own = [due[i] for i in self.procs.local_indices(len(due))]
            began, first, warm = time.perf_counter(), 0.0, 0
            for done in self._drawn(own, prompts):
                # The first batch is not timed: it waits for the model to be read and compiled.
                if warm == 0:
                    first, warm = time.perf_counter(), len(done)
                for job, image in done:
                    with replacing(self.paths[job]) as temporary:
                        image.save(temporary, "png")
            ended = time.perf_counter()
            timed = len(own) - warm
            seconds = (ended - first) / timed if timed > 0 else (ended - began) / max(1, len(own))
            everyone = self.procs.all_gather(seconds if own else None)
            drawing = [value for value in everyone if value is not None]
            # Processes draw at the same time, and all is done when the slowest is.
            self.facts["seconds_image"] = max(drawing) / len(drawing)
        if self.procs.main:
            self._write_facts()

    def _drawn(self, jobs: Sequence[tuple[int, int]], prompts: Sequence[str]) -> Iterator[list[Any]]:
        """(job, image) of these, some at a time."""
        if not jobs:
            return
        own = dict(zip(self.jobs, prompts))
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
        # Encoded once, after the adapter is in place; kept on the host, as there may be thousands of prompts.
        fused = [k2.text_tokens(features).cpu() for features in k2.encode(prompts, config.max_tokens).features]
        null = k2.text([""]) if guidance > 0 else None
        with k2.role(role):
            for first in range(0, len(jobs), config.micro_batch):
                part = slice(first, first + config.micro_batch)
                noise = sampler.noise(self._seeds(jobs[part]), shape)
                text = Text.of([tokens.to(k2.device) for tokens in fused[part]])
                latents = k2.sample(text, noise, steps, height, width, guidance, null)
                yield list(zip(jobs[part], to_pil(k2.decode(latents, height, width))))

    def _by_server(self, jobs: Sequence[tuple[int, int]], prompts: Sequence[str]) -> Iterator[list[Any]]:
        renderer = EndpointRenderer(endpoint_config(self.subject, self.config))
        for first in range(0, len(jobs), PART):
            part = slice(first, first + PART)
            rendering = renderer(prompts[part], self._seeds(jobs[part]))
            yield [(job, image) for job, image in zip(jobs[part], rendering.images) if image is not None]
            # After those that came have been written: the command, given again, asks only for the others.
            if rendering.failures:
                reason, times = rendering.failures.most_common(1)[0]
                raise UserError(f"subjects: {self.subject.place}: {counted(times, 'image')} missing: {reason}")

    def _seeds(self, jobs: Sequence[tuple[int, int]]) -> list[int]:
        # Of prompt and image alone, so that every subject gets the same noise, whatever is drawn already.
        return [sampler.seed_for(self.config.seed, *job) for job in jobs]

    # ---- what was drawn with ----------------------------------------------------------------------------------

    def _settings(self) -> dict[str, Any]:
        """What decides the images."""
        config, subject = self.config, self.subject
        settings: dict[str, Any] = {
            "place": subject.place, "size": list(config.size), "seed": config.seed, "steps": config.steps,
            "guidance": subject.guidance, "images": config.images, "max_tokens": config.max_tokens,
            "prompts": self.prompts, "expand": subject.expander,
        }  # fmt: skip
        if subject.kind in ("base", "adapter"):
            settings["model"] = config.model.path
        if subject.kind == "adapter":
            # A run that trains on names another checkpoint later, whose images must not be mixed with these.
            settings["checkpoint"] = str(_load_stage(subject.place, config.model).path)
        # Also where there is none, so that images of another one are not gone on with. Its file was read before.
        settings["system"] = (
            None if subject.system is None else Path(subject.system).read_text(encoding="utf-8").strip()
        )
        return json.loads(json.dumps(settings))  # as it is read back, with lists for tuples, to be compared with that

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
                long = {"prompts": "are others", "system": "is another text"}
                told = long.get(name, f"{now[name]}, and was {before.get(name)}")
                raise UserError(
                    f"{self.folder}: {name}: {told} when these images were begun; choose another output, or remove them"
                )

    def _write_facts(self) -> None:
        replace_text(
            self.folder / DRAWN, json.dumps({"settings": self._settings(), "facts": self.facts}, indent=1) + "\n"
        )

    def _prompts(self) -> list[str]:
        """The text that each job is drawn from; expansions are made once, and kept."""
        if self.subject.expander is None:
            return [self.prompts[i] for i, _ in self.jobs]
        path = self.folder / "expansions.json"
        texts = None
        if self.procs.main:
            texts = json.loads(path.read_text()) if path.is_file() else self._expanded(path)
        return self.procs.from_main(texts)

    def _expanded(self, path: Path) -> list[str]:
        subject, device = self.subject, self.procs.device
        assert subject.expander is not None
        dtype = getattr(torch, self.config.model.dtype)
        expander = Expander.load(subject.expander, None, dtype, device, system=subject.system)
        texts = []
        for group in expander.expand(self.prompts, self.config.images, self.config.seed):
            texts += [expansion.text for expansion in group]
        # An empty prompt draws an image of anything, which would count as the expander's.
        if "" in texts:
            empty = self.prompts[texts.index("") // self.config.images]
            raise UserError(
                f"expand: {self.subject.expander} answered '{empty}' with nothing; train it, or change seed"
            )
        replace_text(path, json.dumps(texts, indent=1, ensure_ascii=False) + "\n")
        return texts


def load(subject: Subject, model: ModelConfig, device: torch.device) -> tuple[K2, str | None]:
    """The subject's model, and the role to draw under."""
    saved = _load_stage(subject.place, model) if subject.kind == "adapter" else None
    dtype, first = getattr(torch, model.dtype), first_device(model, device)
    if subject.kind == "model":
        # A whole model brings its own transformer; the recipe's file belongs to the base.
        k2 = K2.load(subject.place, None, dtype, first)
    else:
        k2 = K2.load(model.path, model.transformer_file, dtype, first, model.transformer_format)
    role = None if saved is None else add_stage(k2, saved)
    # After the adapter: weights that are merged into the base have to be there before it is quantised.
    apply_runtime_options(k2, model, device)
    return k2, role


def endpoint_config(subject: Subject, config: EvaluateConfig) -> RendererConfig:
    url, _, model = subject.place.partition("#")
    # max_failures 1: here every missing image is an error, with the server's own message (see _by_server).
    return RendererConfig(
        path=config.model.path, urls=[url], model=model or None, size=list(config.size), steps=config.steps,
        guidance=config.guidance[0] if len(config.guidance) == 1 else None, max_failures=1.0,
    )  # fmt: skip


def _images_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)


def in_folder(folder: Path, records: Sequence[PromptRecord], images: int) -> dict[tuple[int, int], Path]:
    """The folder's images by (prompt, image): by prompts.json, as `posttrain sample` writes it, or in the order of
    their names. Raises UserError for a prompt that has too few."""
    found = _images_in(folder)
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
        for j in range(images):
            paths[i, j] = own[j]
    for path in list(paths.values())[:1]:
        read_image(path)  # so that another kind of file is told at once
    return paths
