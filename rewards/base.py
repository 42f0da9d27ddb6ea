"""The reward contract, and the scoring of a batch by all rewards at once.

A reward is a callable `(images, prompts, **columns)`, sync or async, that returns one entry for each image: a finite
float, `None` where the reward does not apply, or a `Failure` where it could not be computed. A float may be a `Scored`,
which carries details for the report. It may return a list, a tuple, or a NumPy array or tensor of shape (N,) in which
NaN stands for None. Columns are the prompt's other fields. Nothing that went wrong becomes a number: a failed score is
missing, and too many of them end the run with the reason.

No reward can touch another: each call gets copies of its own of images and columns, and what it sets for the whole
process (`untouched`) is put back.

Legend: N samples, K rewards. Rows of one group are neighbours.
"""

import asyncio
import copy
import inspect
import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Annotated, Any, Literal

import numpy as np
from PIL import Image
from pydantic import model_validator

from posttrain.config.types import Check, Filled, NonNegative, Number, Positive, Share, refusal, settings
from posttrain.errors import UserError, counted
from rewards.isolation import described, own_directory, untouched

WINDOW = 256  # samples over which a reward's share of failures is taken
ASKED = 16  # scores from which on a share of failures is worth a warning
MOST_UNTOLD = 0.5  # share of failures that is warned of even where it may not end a run
ONE_EACH = "return a list of one float each"

log = logging.getLogger("posttrain")


class RewardError(UserError):
    """A reward that breaks the contract or fails too often. The message names it and carries its reason."""


@dataclass(frozen=True)
class Failure:
    """The place of a score that could not be had."""

    message: str


class Scored(float):
    """A score with what the report should show about it."""

    details: dict[str, Any]

    def __new__(cls, value: float, details: dict[str, Any]) -> "Scored":
        scored = super().__new__(cls, value)
        scored.details = details
        return scored


Score = float | None | Failure

Function = str | dict[str, Any] | Callable[..., Any]


class _Path(Check):
    """An import path of a function or of a class."""

    def problem(self, value: Any) -> str | None:
        if isinstance(value, str) and not all(value.partition(":")):
            return f"'{value}' is not written as package.module:function"
        if isinstance(value, dict):
            named = isinstance(value.get("class_path"), str) and not set(value) - {"class_path", "init_args"}
            named = named and isinstance(value.get("init_args") or {}, dict)
            return None if named else "write package.module:function or {class_path: ..., init_args: ...}"
        return None


@settings
class RewardSpec:
    """One reward of a recipe, or of a program, which may give the callable itself as its function."""

    name: Annotated[str, Filled("give the reward a name")]
    """Name in metrics and reports, unique in the recipe."""
    function: Annotated[Function, _Path()]
    """What is called: `package.module:function`, or {class_path: package.module.Class, init_args: {...}} for an
    object made once. Takes (images, prompts, **columns), returns one float or null for each image."""
    weight: NonNegative = 1.0
    """Weight of the normalised reward in the advantage; relative to the other rewards."""
    gate: Literal["none", "multiply", "mask"] = "none"
    """none: it is summed. multiply: the others are multiplied by it. mask: samples below threshold leave."""
    threshold: Number | None = None
    """Score a gate must reach; null with multiply: the score itself, in [0, 1], is the factor."""
    scale: Number = 1.0
    """Calibration, before anything else: score * scale + offset."""
    offset: Number = 0.0
    """See scale."""
    noise: NonNegative | None = None
    """Largest difference between two scores of one image, before scale; three times it is the floor below which
    a group counts as flat. null: measured for a judge's P(yes), with a floor of at least 0.01; 0 for the others."""
    timeout: Positive = 600.0
    """Seconds for one batch, waiting for its turn included."""
    max_failures: Share = 0.1
    """Share of the last 256 scores that may fail before the run stops; 1: never stop."""
    heldout_only: bool = False
    """Measure at evaluation and never train on it."""
    group: bool = False
    """It sees one whole group a call, to compare its images with each other; evaluation shows it eval.groups."""

    @model_validator(mode="after")
    def _fits(self) -> "RewardSpec":
        if self.gate == "mask" and self.threshold is None:
            raise refusal("threshold", "gate: mask needs one")
        if self.gate == "none" and self.threshold is not None:
            raise refusal("threshold", "has no effect without a gate; set gate or remove it")
        return self

    def __post_init__(self) -> None:
        """A callable is kept beside the fields: those go into recipe.yaml, which gets its import path."""
        self.given: Callable[..., Any] | None = None
        if callable(self.function):
            self.given, named = self.function, self.function
            if not hasattr(named, "__qualname__"):  # an object with __call__
                named = type(named)
            self.function = f"{named.__module__}:{named.__qualname__}"


@dataclass(frozen=True)
class Noise:
    """The noise of one reward, in units of its calibrated score; see noise.py."""

    spread: float
    """Largest difference between two scores of one image, as measured or as the recipe states it."""
    floor: float
    """Groups that span less are flat, and no group is divided by less."""


NO_NOISE = Noise(0.0, 0.0)


@dataclass
class Reward:
    """A spec with its callable and the outcomes of its last samples."""

    spec: RewardSpec
    function: Callable[..., Any]
    parameters: set[str] | None  # columns that the function takes; None: all
    is_async: bool
    required: set[str] = field(default_factory=set)  # columns without which it cannot be called
    by_name: bool = False  # its parameters are named images and prompts, in whatever order
    failed: deque[bool] = field(default_factory=lambda: deque(maxlen=WINDOW))
    warned: bool = False  # of its failures
    lock: threading.Lock = field(default_factory=threading.Lock)
    last_call: threading.Event | None = None  # set when it has ended: a sync reward's calls run one after the other

    def count(self, scores: Sequence[Score]) -> None:
        """Raises when failures exceed their share of the window, or when nothing was scored at all."""
        failures = []
        for score in scores:
            if isinstance(score, Failure):
                failures.append(score.message)
            if score is not None:  # a reward that does not apply has neither failed nor succeeded
                self.failed.append(isinstance(score, Failure))
        if not failures:
            return
        reason = Counter(failures).most_common(1)[0][0]
        bad, asked, limit = sum(self.failed), len(self.failed), self.spec.max_failures
        if not self.warned and asked >= ASKED and bad > min(limit, MOST_UNTOLD) * asked:
            self.warned = True
            ends = f"more than {limit * WINDOW:.0f} of {WINDOW} end the run" if limit < 1 else "no share ends the run"
            log.warning(
                f"reward {self.spec.name}: {bad} of the {counted(asked, 'score')} asked for failed, and {ends}"
                f" (max_failures): {reason}"
            )
        if limit < 1 and (bad > limit * WINDOW or bad == asked):
            raise RewardError(
                f"reward {self.spec.name}: {bad} of the last {counted(asked, 'score')} failed"
                f" (max_failures {limit:g} of {WINDOW}): {reason}"
            )


@dataclass
class Scores:
    """The scores of N samples by all rewards, calibrated; `values_NK` is 0 where `valid_NK` is False."""

    names: list[str]
    values_NK: np.ndarray
    valid_NK: np.ndarray
    failed_NK: np.ndarray  # missing because it failed, and not because it does not apply
    failures: dict[str, Counter[str]]  # reward -> message -> times
    details: dict[str, list[dict[str, Any] | None]]  # reward -> sample -> details of a Scored
    seconds: dict[str, float]  # reward -> time its calls took
    scoring_seconds: float = 0.0  # with a ScoreQueue: time in which any scoring was going on ...
    waited_seconds: float = 0.0  # ... and the part of it that the caller waited for

    @staticmethod
    def concat(parts: Sequence["Scores"]) -> "Scores":
        """The samples of all parts, one part after the other; all have the same rewards."""
        names = parts[0].names
        failures: dict[str, Counter[str]] = {name: Counter() for name in names}
        details: dict[str, list[dict[str, Any] | None]] = {name: [] for name in names}
        seconds = dict.fromkeys(names, 0.0)
        for part in parts:
            for name in names:
                failures[name] += part.failures[name]
                details[name] += part.details[name]
                seconds[name] += part.seconds[name]
        arrays = {}
        for field_name in ("values_NK", "valid_NK", "failed_NK"):
            arrays[field_name] = np.concatenate([getattr(part, field_name) for part in parts])
        return Scores(names, **arrays, failures=failures, details=details, seconds=seconds)

    def take(self, rows: Sequence[int]) -> "Scores":
        """The same scores of some samples, in another order."""
        rows = list(rows)
        details = {}
        for name, of_samples in self.details.items():
            details[name] = [of_samples[row] for row in rows]
        return replace(
            self,
            values_NK=self.values_NK[rows],
            valid_NK=self.valid_NK[rows],
            failed_NK=self.failed_NK[rows],
            details=details,
        )


async def score_all(
    rewards: Sequence[Reward],
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    columns: dict[str, Sequence[Any]] | None = None,
    group_size: int = 1,
) -> Scores:
    """Asks all rewards at once. Every `group_size` neighbouring rows are one group."""
    columns = columns or {}
    for name, column in {"prompts": prompts, **columns}.items():
        if len(column) != len(images):
            raise ValueError(f"{len(images)} images but {len(column)} entries in {name}")
    if len(images) % group_size:
        raise ValueError(f"{len(images)} images are not whole groups of {group_size}")
    tasks = [asyncio.create_task(_ask(reward, images, prompts, columns, group_size)) for reward in rewards]
    try:
        answers = await asyncio.gather(*tasks)
    finally:
        for task in tasks:  # where one reward has ended the run, the others need not answer any more
            task.cancel()
    return _matrix(rewards, answers)


async def _ask(
    reward: Reward,
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    columns: dict[str, Sequence[Any]],
    group_size: int,
) -> tuple[list[Score], float]:
    if reward.spec.group and group_size < 2:
        raise RewardError(f"reward {reward.spec.name}: group: it compares a group, which has one member here")
    if missing := reward.required - columns.keys():
        raise RewardError(no_column(reward.spec.name, missing, columns))
    names = [name for name in columns if reward.parameters is None or name in reward.parameters]
    # A group reward gets a call for each group; any other one call for all images.
    size = group_size if reward.spec.group else max(len(images), 1)
    start = time.perf_counter()
    calls = []
    for first in range(0, len(images), size):
        rows = slice(first, first + size)
        taken = {name: columns[name][rows] for name in names}
        calls.append(_call(reward, images[rows], prompts[rows], taken))
    scores: list[Score] = []
    for part in await asyncio.gather(*calls):
        scores += part
    reward.count(scores)
    return scores, time.perf_counter() - start


def no_column(name: str, missing: set[str], columns: Collection[str]) -> str:
    """The message about a reward that takes columns which the prompts do not have."""
    wanted, known = ", ".join(sorted(missing)), ", ".join(columns) or "none"
    return (
        f"reward {name}: function: takes {wanted}, but the prompts' columns are: {known}; add it, or give it a default"
    )


async def _call(
    reward: Reward, images: Sequence[Any], prompts: Sequence[str], columns: dict[str, Sequence[Any]]
) -> list[Score]:
    """One call of the user's code: its result checked, its exception or time-out made a Failure."""

    def call() -> Any:
        # Each row is copied by itself: rows of a group share their prompt's lists.
        own = [image.copy() if isinstance(image, Image.Image) else image for image in images]
        keywords = {name: list(map(copy.deepcopy, column)) for name, column in columns.items()}
        if reward.by_name:
            return reward.function(images=own, prompts=list(prompts), **keywords)
        return reward.function(own, list(prompts), **keywords)

    limit = asyncio.timeout(reward.spec.timeout)
    try:
        with untouched(reward.spec.name):
            async with limit:
                result = call() if reward.is_async else await _in_thread(reward, call)
                if inspect.isawaitable(result):  # of a partial or a decorator around an async function too
                    result = await result
    except UserError:
        raise
    except Exception as error:  # whatever a user's code raises makes its scores missing, and is counted
        message = described(error)
        if isinstance(error, TimeoutError) and limit.expired():
            message = f"no result within {reward.spec.timeout:g} s"
        return [Failure(message)] * len(images)
    return checked(reward.spec.name, result, len(images))


async def _in_thread(reward: Reward, call: Callable[[], Any]) -> Any:
    """Runs a sync reward in a daemon thread: one that hangs for ever must not keep the process alive."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def settle(result: Any, error: Exception | None) -> None:
        if not future.done():  # a call that ran out of time has been cancelled
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

    ended = threading.Event()
    with reward.lock:
        before, reward.last_call = reward.last_call, ended

    def work() -> None:
        result, error = None, None
        own_directory()
        # A lock would let the threads in as they happen to start, and not in the order of the calls.
        if before:
            before.wait()
        try:
            result = call()
        except Exception as raised:
            error = raised
        finally:
            ended.set()
        if not loop.is_closed():  # a call that hung may return after the run
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=work, daemon=True, name=f"reward {reward.spec.name}").start()
    return await future


def checked(name: str, result: Any, count: int) -> list[Score]:
    """The result as a list if it keeps the contract; a RewardError that names the reward if not."""
    scores = _as_list(name, result, count)
    if len(scores) != count:
        raise RewardError(
            f"reward {name}: returned {counted(len(scores), 'score')} for {counted(count, 'image')}: {ONE_EACH}"
        )
    for i, score in enumerate(scores):
        if getattr(score, "shape", None) == () and hasattr(score, "item"):  # a number of NumPy or a tensor's
            score = scores[i] = score.item()
        if score is None or isinstance(score, Failure):
            continue
        if not isinstance(score, Real):
            raise RewardError(f"reward {name}: score {i} is a {type(score).__name__}: return floats or None")
        if not math.isfinite(score):
            raise RewardError(f"reward {name}: score {i} is {score}: return None where there is no score")
    return scores


def _as_list(name: str, result: Any, count: int) -> list[Any]:
    """Lists and tuples as they are; NumPy arrays and tensors of one dimension with None for NaN."""
    if isinstance(result, list | tuple):
        return list(result)
    # Arrays and tensors of any library have both; importing torch here would slow down every command.
    if not hasattr(result, "tolist") or not hasattr(result, "shape"):
        got = type(result).__name__
        raise RewardError(f"reward {name}: returned a {got} for {counted(count, 'image')}: {ONE_EACH}")
    if len(result.shape) != 1:
        got = f"a {type(result).__name__} of shape {tuple(result.shape)}"
        raise RewardError(
            f"reward {name}: returned {got} for {counted(count, 'image')}: return one of shape ({count},)"
        )
    # An array cannot hold None, so NaN is how it says that a score is missing; in a list it is a bug.
    return [None if isinstance(score, float) and math.isnan(score) else score for score in result.tolist()]


def _matrix(rewards: Sequence[Reward], answers: Sequence[tuple[list[Score], float]]) -> Scores:
    """The table of what each reward has answered: its scores and the seconds it took."""
    shape = (len(answers[0][0]) if answers else 0, len(rewards))
    names = [reward.spec.name for reward in rewards]
    table = Scores(names, np.zeros(shape), np.zeros(shape, bool), np.zeros(shape, bool), {}, {}, {})
    for k, (reward, (scores, seconds)) in enumerate(zip(rewards, answers)):
        failures: Counter[str] = Counter()
        for n, score in enumerate(scores):
            if isinstance(score, Failure):
                table.failed_NK[n, k] = True
                failures[score.message] += 1
            elif score is not None:
                table.valid_NK[n, k] = True
                table.values_NK[n, k] = float(score) * reward.spec.scale + reward.spec.offset
        name = names[k]
        table.failures[name], table.seconds[name] = failures, seconds
        table.details[name] = [score.details if isinstance(score, Scored) else None for score in scores]
    return table
