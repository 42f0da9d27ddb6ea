"""The commands, one row each: the help, the checks before a run, pipelines and shell completion are read from here.

A new method touches its package, one row here, a recipe, a page of docs/ and a test. A method of another package needs
no row: it declares an entry point of the group `posttrain.methods`, whose name is the command and whose value is a
`Command`. Imports nothing of the project, so that every module may read it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

GROUP = "posttrain.methods"
HUB = ("chat model", "expander", "K2")
"""Kinds of inputs that may also be a hub id."""


@dataclass(frozen=True)
class Command:
    """A command: the class of its settings and the function that takes them, both by import path.

    The function may return an exit code. Settings are named by their path, such as `prompts.train`.
    """

    config: str
    function: str
    help: str
    about: str = ""
    """What else it does, for its own --help, where the settings are another command's."""
    title: str = ""
    """What the method does, for the card of an exported checkpoint."""
    resumable: bool = False
    """Its function takes `resume`."""
    output: Literal["run", "new", ""] = ""
    """What `output` is: a run directory that is guarded on resume, a path that must not exist, or neither."""
    gpu: bool = False
    """It uses a GPU if there is one, so that the machine is checked beforehand."""
    model: Literal["raw", "any", ""] = ""
    """Its section `model` is a K2: one to train, which must be Raw, or any."""
    prompts: tuple[str, ...] = ()
    """Settings that name files of prompts."""
    kept_prompts: tuple[str, ...] = ()
    """Those of them that must hold the same prompts when a run is resumed."""
    reads: dict[str, str] = field(default_factory=dict)
    """Settings that name what another command makes, and the kind of that; see `makes`. Of a list, each entry may have
    `:WEIGHT` behind its path; `*` is each key of a mapping."""
    makes: str = ""
    """The kind of thing that the output is, for commands that can be a stage of a pipeline."""
    frozen: tuple[str, ...] = ()
    """Settings that a resumed run cannot change: what is trained, all that is drawn, and what evaluations draw, which
    are compared over the whole run. The base may lie elsewhere, if it is the same: load_model sees to that."""
    aliases: dict[str, str] = field(default_factory=dict)
    """Further names of options, such as `from`, which no setting can be called in Python, with the setting's own."""
    positional: str = ""
    """The option that takes a first argument without --; if it is a list, all such arguments."""
    dry: bool = False
    """It has --dry-run."""
    learns: bool = False
    """It trains on its rewards that are not held out; others only measure rewards."""
    any_recipe: bool = False
    """It takes another command's recipe and reads only the keys that it knows."""
    recipes_of: tuple[str, ...] = ()
    """Commands whose recipes it takes: the one that knows the keys best."""

    def settings(self) -> type:
        return load(self.config)

    def call(self) -> Callable[..., Any]:
        return load(self.function)


TrainsK2 = partial(Command, resumable=True, output="run", gpu=True, model="raw", makes="checkpoint")
"""A command that trains Raw and leaves checkpoints of a run."""
EVALUATED = ("eval.prompts", "eval.steps", "eval.seed", "eval.groups", "eval.group_size")
IMAGES = ("lora", "seed", "heldout", "images.heldout", "images.measured", "turbo", "turbo_steps", *EVALUATED)
"""What a run on images with captions keeps."""
CHECK = "export --check"

COMMANDS: dict[str, Command] = {
    "init": Command(
        "posttrain.project:InitConfig",
        "posttrain.project:init",
        "write a project: recipes, prompts and a reward",
        positional="directory",
    ),
    "demo": Command(
        "posttrain.project:DemoConfig", "posttrain.project:demo", "carry out the whole of post-training on K2-nano"
    ),
    "sft": TrainsK2(
        "posttrain.sft.config:SFTConfig",
        "posttrain.sft.train:train",
        "finetune on images with captions and write a run directory",
        title="supervised finetuning on images with captions",
        prompts=("heldout",),
        kept_prompts=("heldout",),
        reads={"model.start": "checkpoint", "images.train": "set of images", "turbo": "checkpoint"},
        # An image must not be held out now and trained on then.
        frozen=IMAGES,
    ),
    "style": TrainsK2(
        "posttrain.style.config:StyleConfig",
        "posttrain.style.train:train",
        "teach K2 to draw in the style of reference images and write a run directory",
        title="style references: images whose style K2 draws in, without their content",
        prompts=("heldout",),
        kept_prompts=("heldout",),
        reads={"model.start": "checkpoint", "images.train": "set of images", "turbo": "checkpoint"},
        # An image or a style must not be held out now and trained on then; held-out images are shown in these tiles.
        frozen=(*IMAGES, "lanes", "heldout_styles", "references.sizes", "references.tile_counts"),
    ),
    "style play": Command(
        "posttrain.style_page_config:PlayConfig",
        "posttrain.style_page:play",
        "serve a page where strengths of references are dragged",
        gpu=True,
        model="any",
        reads={"adapter": "checkpoint"},
    ),
    "stpo": TrainsK2(
        "posttrain.stpo.config:STPOConfig",
        "posttrain.stpo.train:train",
        "train with STPO on pairs and write a run directory",
        title="preference optimisation on pairs of images (STPO)",
        prompts=("heldout",),
        kept_prompts=("heldout",),
        reads={"model.start": "checkpoint", "pairs.train": "pairs"},
        frozen=("lora", "seed", "heldout", "pairs.heldout", "pairs.measured", *EVALUATED),
    ),
    "grpo": TrainsK2(
        "posttrain.grpo.config:GRPOConfig",
        "posttrain.grpo.train:train",
        "train with GRPO and write a run directory",
        title="reinforcement learning with groups of images (GRPO), without guidance",
        prompts=("prompts.train", "prompts.heldout"),
        kept_prompts=("prompts.heldout",),
        reads={"model.start": "checkpoint"},
        learns=True,
        frozen=("lora", "seed", "prompts.heldout", *EVALUATED),
    ),
    "nft": TrainsK2(
        "posttrain.nft.config:NFTConfig",
        "posttrain.nft.train:train",
        "train with NFT on the forward process and write a run directory",
        title="negative-aware finetuning with groups of images (NFT), without guidance",
        prompts=("prompts.train", "prompts.heldout"),
        kept_prompts=("prompts.heldout",),
        reads={"model.start": "checkpoint"},
        learns=True,
        # Evaluations draw in the steps of training too.
        frozen=("lora", "seed", "prompts.heldout", "sampling.steps", *EVALUATED),
    ),
    "tdm": TrainsK2(
        "posttrain.tdm.config:TDMConfig",
        "posttrain.tdm.train:train",
        "distil with TDM into few steps and write a run directory",
        title="trajectory distribution matching (TDM): steps and guidance distilled into a few-step student",
        prompts=("prompts.train", "prompts.heldout"),
        kept_prompts=("prompts.heldout",),
        reads={"model.start": "checkpoint"},
        # What it draws in, and what it is compared with.
        frozen=("lora", "seed", "prompts.heldout", "student.steps", "teacher", *EVALUATED),
    ),
    "mopd": TrainsK2(
        "posttrain.mopd.config:MOPDConfig",
        "posttrain.mopd.train:train",
        "distil several teachers into one adapter with MOPD and write a run directory",
        title="on-policy distillation of several teachers into one adapter (MOPD)",
        prompts=("prompts.train", "prompts.heldout"),
        kept_prompts=("prompts.heldout",),
        reads={"model.start": "checkpoint", "teachers.*.run": "checkpoint"},
        # What it learns from, and what its retention is measured against.
        frozen=("lora", "seed", "prompts.heldout", "teachers", *EVALUATED),
    ),
    "preflight": Command(
        "posttrain.grpo.config:GRPOConfig",
        "posttrain.preflight.run:preflight",
        "check and time a recipe of grpo, nft, mopd, sft, style, stpo, tdm, pairs or expander gdpo before a run",
        about="Runs a small step with the code of that command and discards it: no run directory is made or changed."
        " Prints a table of what each check measured, with a remedy where one failed, and of the time and memory that"
        " the run will take. Exit code 1 if a check failed.",
        # Also grpo's, whose settings these are.
        recipes_of=("nft", "mopd", "sft", "style", "stpo", "tdm", "pairs", "expander gdpo"),
    ),
    "pairs": Command(
        "posttrain.pairs.config:PairsConfig",
        "posttrain.pairs.make:make",
        "make preference pairs from prompts",
        resumable=True,
        output="run",
        gpu=True,
        model="raw",
        prompts=("prompts",),
        kept_prompts=("prompts",),
        reads={"model.start": "checkpoint", "policy": "checkpoint"},
        makes="pairs",
        # Pairs that are written already follow from the seed.
        frozen=("seed",),
    ),
    "judge": Command(
        "posttrain.judge.config:JudgeConfig",
        "posttrain.judge.train:train",
        "train a judge, as an adapter for vLLM",
        resumable=True,
        output="run",
        gpu=True,
        reads={"data": "records", "model": "chat model"},
        frozen=("lora", "seed", "heldout", "heldout_sources"),
    ),
    # Of any recipe it reads the servers alone.
    "serve": Command(
        "posttrain.judge.config:ServeConfig", "posttrain.judge.serve:serve", "serve a recipe's judges", any_recipe=True
    ),
    "annotate": Command(
        "posttrain.annotate.config:AnnotateConfig",
        "posttrain.annotate.serve:annotate",
        "serve a page where people choose between images or mark faults",
    ),
    "annotations": Command(
        "posttrain.annotate.config:AnnotationsConfig",
        "posttrain.annotate.export:write",
        "report and export what they answered",
    ),
    "expander data": Command(
        "posttrain.expander.config:ExpanderDataConfig",
        "posttrain.expander.data:make",
        "make short prompts for long captions",
        resumable=True,
        makes="captions",
    ),
    "expander sft": Command(
        "posttrain.expander.config:ExpanderSFTConfig",
        "posttrain.expander.sft:train",
        "teach a chat model to expand prompts",
        resumable=True,
        output="run",
        gpu=True,
        reads={"data": "captions", "model": "chat model"},
        makes="expander",
        frozen=("lora", "seed", "heldout"),
    ),
    "expander mine": Command(
        "posttrain.expander.mining.config:ExpanderMineConfig",
        "posttrain.expander.mining.mine:mine",
        "find prompts that are hard but not hopeless",
        resumable=True,
        output="run",
        gpu=True,
        prompts=("traffic",),
        reads={"model.path": "expander", "renderer.path": "K2"},
    ),
    "expander gdpo": Command(
        "posttrain.expander.gdpo_config:ExpanderGDPOConfig",
        "posttrain.expander.gdpo:train",
        "train an expander by the images it makes",
        resumable=True,
        output="run",
        gpu=True,
        prompts=("prompts.train", "prompts.heldout"),
        kept_prompts=("prompts.heldout",),
        reads={"model.path": "expander", "renderer.path": "K2"},
        # Another kind than that of sft: gdpo begins with the model of an sft, not with the adapter of a gdpo.
        makes="tuned expander",
        learns=True,
        frozen=("lora", "seed", "prompts.heldout", *EVALUATED),
    ),
    "expander serve": Command(
        "posttrain.expander.config:ExpanderServeConfig",
        "posttrain.expander.http_server:serve",
        "serve an expander like a chat model of OpenAI",
        gpu=True,
    ),
    "expand": Command(
        "posttrain.expander.config:ExpandConfig",
        "posttrain.expander.expand:main",
        "expand a prompt in several ways",
        gpu=True,
        positional="prompt",
    ),
    "sample": Command(
        "posttrain.sample_config:SampleConfig",
        "posttrain.sample_images:sample",
        "draw images from a checkpoint",
        output="new",
        gpu=True,
        model="any",
        prompts=("prompts",),
        reads={"adapter": "checkpoint"},
    ),
    "bench": Command(
        "posttrain.bench.config:BenchConfig",
        "posttrain.bench.run:bench",
        "measure the methods at true size, or plan a run",
        gpu=True,
    ),
    "export": Command(
        "posttrain.export.config:ExportConfig",
        "posttrain.export.export:export",
        "write a checkpoint for other tools",
        output="new",
        # A renderer can draw with what it writes.
        reads={"source": "checkpoint"},
        makes="K2",
    ),
    CHECK: Command(
        "posttrain.export.config:CarryoverConfig",
        "posttrain.export.lora_transfer:check",
        "measure on Turbo what a LoRA trained on Raw does",
        output="new",
        gpu=True,
        model="any",
        prompts=("prompts",),
        reads={"check": "checkpoint"},
    ),
    "evaluate": Command(
        "posttrain.evaluate.config:EvaluateConfig",
        "posttrain.evaluate.evaluate:evaluate",
        "score models, adapters, endpoints or folders of images on the same prompts",
        prompts=("prompts",),
        positional="subjects",
    ),
    "merge": Command(
        "posttrain.merge.config:MergeConfig",
        "posttrain.merge.merge:merge",
        "merge runs, adapters or whole models of one base",
        title="merge",
        output="new",
        gpu=True,
        reads={"parents": "checkpoint"},
        makes="checkpoint",
        positional="parents",
    ),
    "extract": Command(
        "posttrain.merge.config:ExtractConfig",
        "posttrain.merge.extract:extract",
        "write the difference of two models as a LoRA",
        output="new",
        gpu=True,
        reads={"base": "K2"},
        aliases={"from": "base"},
        positional="target",
    ),
    "run": Command(
        "posttrain.pipeline.config:PipelineConfig",
        "posttrain.pipeline.run:carry_out",
        "carry out a pipeline of stages",
        resumable=True,
        positional="config",
        dry=True,
    ),
    "report": Command(
        "posttrain.report.config:ReportConfig",
        "posttrain.report.page:report",
        "write report.html for a run, or compare runs",
        positional="runs",
    ),
}


def every() -> dict[str, Command]:
    """All commands by name, those of other packages last."""
    found = dict(COMMANDS)
    # Ours win over another package's command of the same name.
    for point in importlib.metadata.entry_points(group=GROUP):
        found.setdefault(point.name, point.load())
    return found


def get(name: str) -> Command | None:
    """None if there is no such command. Other packages are looked through only for names that are not ours."""
    return COMMANDS.get(name) or every().get(name)


def paths(value: Any) -> list[str]:
    """The paths that a setting of `reads` names: none, one, or those of a list."""
    if isinstance(value, list):
        # A path may have a colon of its own.
        return [entry if Path(entry).exists() else re.sub(r":[^:/]*$", "", entry) for entry in value]
    return [] if value is None else [value]


def of(config: Any) -> tuple[str, Command]:
    """The command, and its name, whose settings these are."""
    path = f"{type(config).__module__}:{type(config).__qualname__}"  # as rows name it
    for name, command in every().items():
        # `preflight` takes the settings of others and has none of its own.
        if command.config == path and not command.recipes_of:
            return name, command
    raise LookupError(f"{path} is not the settings of a command")


def load(path: str) -> Any:
    """The object at `package.module:name`."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)
