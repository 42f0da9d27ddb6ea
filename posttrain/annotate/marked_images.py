"""Single images that people mark as faulty or fine, and their marks as data for `posttrain judge --mode artifact`.

An image's `fault` is the share of people who called it faulty: one vote a person, unsure half a vote. Images that they
leave undecided are left out.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from posttrain.annotate import agreement
from posttrain.annotate.answers import Annotations
from posttrain.errors import UserError, counted
from posttrain.image_reader import SUFFIXES, read_image
from posttrain.judge.records import MARKS
from posttrain.runs.files import replace_text, replacing_directory
from posttrain.runs.progress import reading
from prompts.parse import parse_json

PROMPTS = "prompts.json"


@dataclass(frozen=True)
class Found:
    """An image file."""

    path: Path
    prompt: str | None
    source: str | None
    """For an image of a run: which of its samples it is, such as step-000100."""


class Images:
    """Images by id. Reads every image once at the start, so that a bad one is named before anyone waits."""

    def __init__(self, path: str):
        """`path`: a run directory, an output of `posttrain sample`, or a directory of images. Raises UserError if it
        is none of them, or an image cannot be read."""
        self.path = path
        self.prompts: dict[str, str] = {}
        """Id -> prompt, in order; the empty string where no prompt is known."""
        self.files: dict[str, Found] = {}
        for found in reading(find(Path(path)), "images"):
            name = _id(found, _read(found.path))
            self.files.setdefault(name, found)  # an image that is there twice is asked about once
            self.prompts.setdefault(name, found.prompt or "")

    def __getitem__(self, name: str) -> Image.Image:
        """The image in RGB. Raises UserError if it cannot be read any more."""
        found = self.files[name]
        image = _read(found.path)
        if _id(found, image) != name:
            raise UserError(f"{found.path}: has changed; restore it as it was at the start")
        return image

    def require(self, names: set[str], store: str) -> None:
        """Raise UserError if the store knows images that are not here."""
        if missing := sorted(names - self.files.keys()):
            raise UserError(
                f"{store}: {len(missing)} of the {counted(len(names), 'image')} in it cannot be found in {self.path}"
                f" (such as {missing[0]}); give the images that it was started with"
            )


def find(root: Path) -> list[Found]:
    """The image files of a directory or a run, sorted by name, with prompts where prompts.json has them."""
    if not root.is_dir():
        raise UserError(
            f"images: {root} is no directory; give a run, an output of posttrain sample or a directory of images"
        )
    is_run = (root / "samples").is_dir()
    folders = sorted(p for p in (root / "samples").iterdir() if p.is_dir()) if is_run else [root]
    found = []
    for folder in folders:
        within_run = folder.parent.name == "samples"  # one folder of a run's samples may be given by itself, too
        prompts = _prompts((folder.parent if within_run else folder) / PROMPTS)
        for path in sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES):
            found.append(Found(path, prompts.get(path.stem), folder.name if within_run else None))
    if not found:
        raise UserError(f"images: {root} holds no image ({', '.join(SUFFIXES)}) and no run with samples; give another")
    return found


def write(stored: Annotations, images_path: str, store: str, output: str | None) -> None:
    """Print the report and, with an output, write artifacts.jsonl, the images it names and agreement.json there."""
    images = Images(images_path)
    images.require(stored.items(), store)
    figures = agreement.report_marks(stored.choices, len(images.prompts))
    print("\n".join(agreement.mark_lines(figures)))
    if output is None:
        return
    votes = {name: share for name, share in agreement.votes(stored.choices).items() if share != 0.5}
    if not votes:
        raise UserError(f"{store}: decides about no image, so there is nothing to write; mark some first")
    target = Path(output)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: is not empty; choose another directory")
    try:
        _write(images, votes, figures, target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error.strerror}; choose another directory") from None
    print(f"posttrain: wrote {target} ({counted(len(votes), 'image')}, {figures['undecided']} undecided left out)")


def _write(images: Images, votes: dict[str, float], figures: dict[str, Any], target: Path) -> None:
    # The whole directory at once, so that nobody trains on a part of it.
    with replacing_directory(target) as folder:
        (folder / "images").mkdir()
        rows = []
        for name in images.prompts:  # in the order of the files, whoever answered first
            if name not in votes:
                continue
            found, file = images.files[name], f"images/{name}.png"
            images[name].save(folder / file)
            row = {"image": file, "fault": votes[name], "prompt": found.prompt, "source": found.source}
            known = {key: value for key, value in row.items() if value is not None}
            rows.append(json.dumps(known, ensure_ascii=False) + "\n")
        replace_text(folder / "agreement.json", json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
        replace_text(folder / MARKS, "".join(rows))


def _prompts(path: Path) -> dict[str, str]:
    """Prompts by the stem of the image's file, 000, 001, ...; none if there is no such file."""
    if not path.is_file():
        return {}
    try:
        rows = parse_json(path.read_bytes())
        # The names that runs and posttrain sample give their images.
        return {f"{i:03d}": str(row["prompt"]) for i, row in enumerate(rows)}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: is not a list of prompts ({error!r}); repair or remove it") from None


def _read(path: Path) -> Image.Image:
    try:
        return read_image(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; repair or remove it") from None
    except ValueError as error:
        raise UserError(f"{error}; repair or remove it") from None


def _id(found: Found, image: Image.Image) -> str:
    # Of pixels, not of files: an image that was copied or saved again is the same image.
    digest = hashlib.blake2b((found.prompt or "").encode(), digest_size=16)
    digest.update(repr(image.size).encode() + image.tobytes())
    return digest.hexdigest()
