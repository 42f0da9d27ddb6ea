"""What a command refuses to overwrite, and which changes of a recipe a resumed run refuses."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import netrc
import os
import tempfile
import urllib.parse
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from posttrain import commands
from posttrain.config.diff import as_text, changes
from posttrain.errors import UserError
from posttrain.runs.lock import lock
from prompts.records import read_prompts

PROMPTS = "prompts"
"""Key of environment.json: hashes of the prompts that must stay, by setting."""


def check_new(output: Path, card: bool = False) -> None:
    """Raises UserError if it exists, if, with `card`, the model card beside it does, or if it cannot be written."""
    for path in [output, output.with_suffix(".md")] if card else [output]:
        if path.exists():
            raise UserError(f"output: {path} exists; choose another name")
    folder = next(parent for parent in output.absolute().parents if parent.exists())
    try:
        tempfile.TemporaryFile(dir=folder).close()  # permissions alone do not tell of every file system
    except OSError as error:
        raise UserError(f"output: {output}: {folder} takes no file ({error.strerror}); choose another place") from error


def check_run(config: Any, resume: bool | None = False) -> None:
    """Raise UserError before anything is made or changed: for a directory that holds a run, a tracker that is not
    installed, and, where the run has a checkpoint, for changes of the recipe that resuming cannot honour. `resume` is
    None where the command cannot do that.
    """
    for name in config.track.trackers:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"track.trackers: {name} is not installed; pip install {name} or leave it out")
        if name == "wandb" and not _is_logged_in():
            raise UserError(
                "track.trackers: wandb is not logged in; run `wandb login`, set WANDB_API_KEY, or keep it on this"
                " machine with WANDB_MODE=offline"
            )
    run = Path(config.output)
    recipe = run / "recipe.yaml"
    # Taken and let go of: whether another command writes here is known before anything is loaded.
    if (run / ".lock").is_file() and os.access(run / ".lock", os.W_OK):
        lock(run).close()
    if recipe.exists() and not resume:
        way = "remove the directory" if resume is None else "add --resume"
        raise UserError(f"{run}: holds a run already; {way} or choose another --output")
    # Without a checkpoint the run starts again, and its recipe may be another one.
    if recipe.exists() and any((run / "checkpoints").glob("[!.]*-*")):
        frozen = _frozen(config)
        lost = [change for change in changes(*_recipes(recipe, config)) if _is_kept(frozen, *change)]
        if lost:
            raise UserError(
                f"{run}: cannot be resumed with {as_text(lost)}: restore that (a link can stand in for a file that"
                " was moved), or choose another --output"
            )
        check_prompts(config)


def check_prompts(config: Any) -> None:
    """Raises UserError if a file of prompts, such as those of evaluations, holds others than when the run began."""
    file = Path(config.output) / "environment.json"
    if not file.exists():
        return
    try:
        began = json.loads(file.read_text()).get(PROMPTS, {})
    except (ValueError, AttributeError):
        raise UserError(f"{file}: is damaged; restore it, or choose another --output") from None
    for setting, digest in prompt_digests(config).items():
        if began.get(setting, digest) != digest:
            raise UserError(
                f"{setting}: {_value_at(config, setting)} holds other prompts than when {config.output} began; restore"
                " them, or choose another --output"
            )


def prompt_digests(config: Any) -> dict[str, str]:
    """A hash of the prompts, with all their fields, in each file that a resumed run must find as it was, by setting.

    Of prompts to evaluate on, those beyond `eval.prompts` do not count.
    """
    digests = {}
    for setting in _kept_prompts(config):
        source = _value_at(config, setting)
        # One that is missing is refused by what draws from it.
        if source is None or not (source.startswith("hf:") or os.path.exists(source)):
            continue
        records = read_prompts(source, references=True)
        if setting.endswith("heldout"):
            records = records[: config.eval.prompts]
        digest = hashlib.sha256()
        for record in records:
            fields = {name: getattr(record, name) for name in record.__slots__}
            digest.update(json.dumps(fields, sort_keys=True, default=str).encode() + b"\n")
        digests[setting] = digest.hexdigest()
    return digests


def _is_logged_in() -> bool:
    """Whether wandb will find a key, or needs none, instead of asking for one in the middle of a run."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return True
    host = urllib.parse.urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host or "") is not None
    except (OSError, netrc.NetrcParseError):  # there is none, or none that wandb could read
        return False


def check_unchanged(config: Any, remedy: str, kept: Collection[str] | None = None, free: Collection[str] = ()) -> None:
    """Raises UserError for the first top-level setting that a run cannot go on with, as it began with another.

    Those of `kept` count, or, if None, all but those of `free`. `remedy` ends the message.
    """
    recipe = Path(config.output) / "recipe.yaml"
    if not recipe.exists():
        return
    before, now = _recipes(recipe, config)
    for name in now:
        counts = name not in free if kept is None else name in kept
        if counts and before.get(name) != now[name]:
            raise UserError(f"{name}: differs from {recipe}, with which {config.output} began{remedy}")


def _recipes(recipe: Path, config: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The recipe that a run began with, and the one that it would go on with, both as YAML has them."""
    # Through JSON, which makes lists of tuples, as YAML has them.
    return yaml.safe_load(recipe.read_text()), json.loads(json.dumps(dataclasses.asdict(config)))


def _is_kept(frozen: tuple[str, ...], path: str, old: Any, new: Any) -> bool:
    if path == "optim.ema":  # its value may change, but an average cannot begin or end on the way
        return bool(old) != bool(new)
    if path == "optim.average":  # a path without more is that of a section that begins or ends
        return True
    if path in ("sampling.sizes", "sizes"):  # the first is the size of evaluations
        return old[:1] != new[:1]
    return path.startswith(frozen)


def _kept_prompts(config: Any) -> tuple[str, ...]:
    try:
        return commands.of(config)[1].kept_prompts
    except LookupError:  # a method in a program
        return ("prompts.heldout",)


def _value_at(config: Any, setting: str) -> Any:
    """None where the settings have no such field."""
    for part in setting.split("."):
        config = getattr(config, part, None)
    return config


def _frozen(config: Any) -> tuple[str, ...]:
    """The settings that a resumed run cannot change."""
    try:
        return commands.of(config)[1].frozen
    except LookupError:  # a method in a program, which is not a command
        return ("lora", "seed", "prompts.heldout", "heldout", *commands.EVALUATED)
