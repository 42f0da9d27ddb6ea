"""What every model and adapter is loaded through: hub ids become directories, and what is read is checked.

The libraries only warn about what is missing, rename nothing they do not know, and take 8-bit numbers without their
scales for values. Here each is a UserError, whoever loads: training, sampling, judges, the expander, its renderer.

    folder = local("krea/Krea-2-Raw@main", PIPELINE)
    vae = load_model(AutoencoderKLQwenImage, folder / "vae", "krea/Krea-2-Raw@main/vae", "cpu", dtype=torch.float32)

Imports torch and the libraries where they are needed alone, so that paths can be checked before.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from posttrain.errors import UserError, first_line

if TYPE_CHECKING:
    from torch import Tensor

HUB_ID = re.compile(r"([\w-][\w.-]*/[\w.-]+)(?:@([\w./-]+))?")
"""OWNER/NAME, or OWNER/NAME@REVISION with a branch, a tag or a commit."""
PIPELINE = ("model_index.json", "scheduler/*", "tokenizer/*", "text_encoder/*", "vae/*", "transformer/*")
MODEL = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")
"""Files of a diffusers pipeline and of a transformers model that are downloaded."""
TYPES = ("F32", "F16", "BF16")
"""Types of numbers, as safetensors names them, that mean what they say without a scale."""
SCALARS = (*TYPES, "F64", "I64", "I32")
"""Types of a tensor of a single number, such as a LoRA's alpha or a count of batches."""
SECONDS = 10
"""The hub has this long to say whether it knows a repository."""
HEAD = "lm_head.weight"
"""The output layer of a language model, which an encoder's files may hold and nothing of it asks for."""


# ---- where it is ----------------------------------------------------------------------------------------------------


def is_hub_id(path: str) -> bool:
    """Whether a path means a repository of the hub. What exists here comes first, and a folder of the owner's name does
    not hide the repository."""
    return HUB_ID.fullmatch(path) is not None and not Path(path).exists()


def hub_name(path: str) -> tuple[str, str | None]:
    """(OWNER/NAME, revision or None) of a hub id."""
    match = HUB_ID.fullmatch(path)
    assert match is not None
    return match[1], match[2]


def without_revision(path: str) -> str:
    """A hub id as other tools write it; any other path as it is."""
    return hub_name(path)[0] if is_hub_id(path) else path


def check_source(path: str) -> None:
    """Raises UserError, within seconds, unless the path exists here or the hub knows it."""
    if is_hub_id(path):
        _commit(path)
    elif not Path(path).exists():
        raise UserError(
            f"{path}: no such directory; give a directory, or a hub id as OWNER/NAME or OWNER/NAME@REVISION"
        )


def local(path: str, patterns: Sequence[str] = MODEL) -> Path:
    """The directory itself, or that of the downloaded files of a hub id. Raises UserError if there is neither."""
    if not is_hub_id(path):
        check_source(path)
        return Path(path)
    from huggingface_hub import snapshot_download

    name, revision = hub_name(path)
    commit = _commit(path)
    ignored = ["*.fp16.*", "*.bf16.*"]
    # fnmatch's * crosses folders, and a repository often has other copies of its weights in some.
    if not any("/" in pattern for pattern in patterns):
        ignored.append("*/*")
    try:
        folder = snapshot_download(
            name, revision=commit or revision, local_files_only=commit is None, allow_patterns=list(patterns),
            ignore_patterns=ignored,
        )  # fmt: skip
    except Exception as error:
        raise UserError(
            f"{path}: cannot be downloaded: {first_line(error)}; accept its licence on its page, log in with"
            " `hf auth login`, or give a directory"
        ) from error
    return Path(folder)


def _commit(path: str) -> str | None:
    """The commit that a hub id stands for; None if the hub cannot be reached and the cache has it."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    name, revision = hub_name(path)
    try:
        return HfApi().model_info(name, revision=revision, timeout=SECONDS).sha
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status == 404 or (status in (401, 403) and not _is_cached(name, revision)):
            raise UserError(
                f"{path}: no such directory here, and the hub has no such repository or revision, or does not show it"
                f" (status {status}); correct it, or log in with `hf auth login`"
            ) from error
        reason = first_line(error)
    except Exception as error:  # its HTTP client has errors of its own
        reason = first_line(error)
    if not _is_cached(name, revision):
        raise UserError(
            f"{path}: no such directory here, and the hub cannot be asked for it ({reason}); correct the path, or"
            " download it where there is a connection"
        )
    return None


def _is_cached(name: str, revision: str | None) -> bool:
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(name, revision=revision, local_files_only=True)
    except Exception:  # its HTTP client has errors of its own
        return False
    return True


# ---- files of weights -----------------------------------------------------------------------------------------------


def weight_files(folder: Path, where: str) -> list[Path]:
    """The safetensors files of a model that are loaded. Raises UserError if there is none or one is gone."""
    files: list[Path] = []
    for stem in ("model", "diffusion_pytorch_model"):
        index, single = folder / f"{stem}.safetensors.index.json", folder / f"{stem}.safetensors"
        if index.is_file():
            try:
                names = set(json.loads(index.read_text())["weight_map"].values())
                files += [folder / str(name) for name in sorted(names)]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{index}: not an index of weights ({error!r}); copy or download it again") from error
        if single.is_file():
            files.append(single)
    if not files:
        raise UserError(f"{where}: has no weights as safetensors, and nothing else is read; download or convert them")
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: is missing, and its folder's index names it; copy or download it again")
    return files


def check_file(file: Path, where: str | Path = "", also: Sequence[str] = ()) -> int:
    """Returns how many numbers a safetensors file has, from its header. Raises UserError, beginning with `where`,
    unless it is whole and all of them are float32, float16, bfloat16 or of the types in `also`."""
    where = where or file
    total = 0
    wrong: dict[str, str] = {}
    # Opening compares the header with the file's length, so a download that was cut off is found at once.
    try:
        with safe_open(file, framework="np") as opened:
            for key in opened.keys():  # noqa: SIM118
                part = opened.get_slice(key)
                kind, size = str(part.get_dtype()), math.prod(part.get_shape())
                total += size
                if kind not in (*also, *(SCALARS if size == 1 else TYPES)):
                    wrong[key] = kind
    except (OSError, SafetensorError) as error:
        raise UserError(f"{where}: not a whole safetensors file ({error}); copy or download it again") from error
    if wrong:
        first, kind = next(iter(wrong.items()))
        bits = " (8 bits)" if "8" in kind else ""
        raise UserError(
            f"{where}: {first} is stored as {kind}{bits}, with {len(wrong) - 1} more: quantised weights are not"
            " read, as they mean nothing without their scales; give float32, float16 or bfloat16"
        )
    return total


def check_json(folder: Path) -> None:
    """Raises UserError for a .json file of a directory that is none, such as a pointer of Git LFS."""
    for file in sorted(folder.glob("*.json")):
        try:
            held = json.loads(file.read_bytes())
        except ValueError as error:
            raise UserError(f"{file}: not JSON ({error}); copy or download it again") from error
        if isinstance(held, dict) and held.get("quantization_config"):
            raise UserError(f"{file}: quantization_config: quantised models are not read; give float32 or bfloat16")


def check_keys(where: str | Path, remedy: str, **keys: Sequence[Any]) -> None:
    """Raises UserError if there are any missing, unexpected or misshapen keys, with their numbers and the first of
    each. An entry is a name, or a tuple that begins with one."""
    problems = []
    for what, entries in keys.items():
        names = [entry if isinstance(entry, str) else str(entry[0]) for entry in entries]
        if names:
            problems.append(f"{len(names)} {what.replace('_', ' ')} ({some(names)})")
    if problems:
        raise UserError(f"{where}: keys do not match this model: {'; '.join(problems)}; {remedy}")


def check_tensors(
    where: str | Path,
    expected: Mapping[str, Tensor],
    got: Mapping[str, Tensor],
    remedy: str,
    name: Callable[[str], str] = str,
) -> None:
    """Raises UserError for missing, unexpected and misshapen tensors; `name` is what messages call a key."""
    missing, misshapen = [], []
    for key, value in expected.items():
        if key not in got:
            missing.append(name(key))
        elif got[key].shape != value.shape:
            misshapen.append(name(key))
    unexpected = [name(key) for key in got if key not in expected]
    check_keys(where, remedy, missing=missing, unexpected=unexpected, of_another_shape=misshapen)


def check_finite(where: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Raises UserError for a tensor with a number that is not finite."""
    for name, value in tensors.items():
        # Minimum and maximum are many times faster than isfinite on each number, and are not finite if one is not.
        if value.numel() and not all(bool(end.isfinite()) for end in value.aminmax()):
            raise UserError(f"{where}: {name} holds numbers that are not finite; copy or download it again")


# ---- models and adapters ------------------------------------------------------------------------------------------


def load_model(
    kind: Any, folder: Path, where: str, device: Any, trial: Callable[[Any], object] | None = None, **options: Any
) -> Any:
    """`kind.from_pretrained(folder, **options)` of diffusers or transformers on `device`, with every check.

    `trial` runs the model once on the meta device, before weights are read: settings that do not fit together fail
    there. Raises UserError, which begins with `where`, for damaged or quantised files, keys that are missing,
    unexpected or of another shape, and numbers that are not finite.
    """
    check_json(folder)
    numbers = sum(map(check_file, weight_files(folder, where)))
    with quiet(), reading(where, f"a {kind.__name__}"):
        # Settings of another size would fill the memory with random numbers for all that is not in the files.
        empty = empty_model(kind, folder)
        described = sum(parameter.numel() for parameter in empty.parameters())
        if described > 2 * numbers:
            raise UserError(
                f"{where}: config.json describes a model of {described:,} numbers, and its files have {numbers:,}; copy"
                " or download it again"
            )
        if trial is not None:
            trial(empty)
        model, info = kind.from_pretrained(
            str(folder), use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    remedy = "give a whole checkpoint, or copy or download it again"
    misshapen = sorted(info["mismatched_keys"])
    # A misshapen key counts as missing too in transformers.
    named = {entry if isinstance(entry, str) else entry[0] for entry in misshapen}
    missing, extra = sorted(set(info["missing_keys"]) - named), sorted(set(info["unexpected_keys"]) - {HEAD})
    check_keys(where, remedy, missing=missing, unexpected=extra, of_another_shape=misshapen)
    if errors := info.get("error_msgs"):
        raise UserError(f"{where}: cannot be loaded: {str(errors[0]).splitlines()[0]}; {remedy}")
    model.to(device)
    check_finite(where, model.state_dict())
    return model


def model_type(folder: Path, where: str) -> str:
    """What transformers calls the architecture in a directory, such as qwen3_vl."""
    from transformers import AutoConfig

    check_json(folder)
    with quiet(), reading(where, "a model"):
        return str(AutoConfig.from_pretrained(str(folder)).model_type)


def empty_model(kind: Any, folder: Path) -> Any:
    """A model of diffusers or transformers on the meta device: names and shapes without values."""
    import torch
    from transformers import AutoConfig

    with torch.device("meta"):
        if hasattr(kind, "load_config"):  # diffusers
            return kind.from_config(kind.load_config(str(folder)))
        config = AutoConfig.from_pretrained(str(folder))
        return kind.from_config(config) if hasattr(kind, "from_config") else kind(config)


def adapter_folder(path: str | Path) -> Path:
    """Where the LoRA lies that a path names: the directory itself, `adapter` in that of a run of posttrain judge, or
    the directory of PEFT's file, whose settings lie beside it. Raises UserError for a judge's checkpoint."""
    path = Path(path)
    if path.name == "adapter_model.safetensors":
        return path.parent
    if path.parent.name == "checkpoints" and (path / "manifest.json").is_file():
        raise UserError(
            f"{path}: is a checkpoint to resume from, not an adapter to load; name its run, whose adapter/ is"
            " what it trained"
        )
    inner = path / "adapter"
    is_run = not (path / "adapter_config.json").is_file() and (inner / "adapter_config.json").is_file()
    return inner if is_run else path


def load_adapter(model: Any, folder: str | Path, where: str, trainable: bool = False) -> Any:
    """`PeftModel.from_pretrained(model, folder)` with the checks of `load_model`."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import load_file

    folder = adapter_folder(folder)
    file = folder / "adapter_model.safetensors"
    if not (folder / "adapter_config.json").is_file() or not file.is_file():
        raise UserError(
            f"{where}: has no adapter_config.json or no adapter_model.safetensors; give a LoRA directory,"
            " or a run of posttrain judge that has ended"
        )
    check_file(file)
    with quiet(), reading(where, "an adapter of this model"):
        adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
    got = load_file(file)
    check_tensors(where, get_peft_model_state_dict(adapted), got, "give an adapter of this model")
    check_finite(where, got)
    return adapted


# ---- libraries ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def reading(where: str, what: str) -> Iterator[None]:
    """Makes a UserError of whatever a library raises inside while it reads files: for damaged ones that is anything."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's
            raise
        raise UserError(f"{where}: cannot be loaded as {what}: {first_line(error)}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hides the libraries' progress bars, reports and warnings, which bury the messages of a run."""
    before: list[tuple[Any, bool, int]] = []
    for name in ("diffusers.utils.logging", "transformers.utils.logging"):
        log: Any = sys.modules.get(name)
        if log is not None:  # what is not imported yet says nothing
            before.append((log, log.is_progress_bar_enabled(), log.get_verbosity()))
            log.disable_progress_bar()
            log.set_verbosity(log.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        # Only bars that were on are put back: the user may have switched them off.
        for log, bar, verbosity in before:
            log.set_verbosity(verbosity)
            if bar:
                log.enable_progress_bar()


def some(names: Sequence[str]) -> str:
    """The first three names."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
