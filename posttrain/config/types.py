"""Types of settings: a range stands on its field, and a value outside is refused with the field and the remedy.

`@settings` makes a class a pydantic dataclass. Values are checked where a recipe is read and where a program makes one;
both raise ConfigError. Needs neither torch nor the rest of this project, so that rewards and prompts can use it too.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import ipaddress
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar, dataclass_transform, get_args, get_origin

from pydantic import BeforeValidator, ConfigDict, ValidationError
from pydantic import dataclasses as pydantic_dataclasses
from pydantic_core import PydanticCustomError, core_schema

from posttrain.config.fields import alternatives, bare, describe, hints, section, show, suggestion
from posttrain.errors import UserError

T = TypeVar("T")


class ConfigError(UserError):
    """A setting that is missing, unknown, of the wrong type or out of range. `field` is its path: `optim.lr`."""

    def __init__(self, field: str, problem: str, kind: str = "range", expected: str = ""):
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem
        self.kind = kind
        """unknown, type, missing or range."""
        self.expected = expected
        """Of kind type: the right type in words."""
        self.others: list[ConfigError] = []
        """Further problems of the same settings, to be told with this one."""


# ---- the decorator --------------------------------------------------------------------------------------------

# Strict: YAML's `true` is not 1, and 7 is not text. An extra key is a typing error.
CONFIG = ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=True)


@dataclass_transform(field_specifiers=(dataclasses.field,))
def settings(cls: type[T]) -> type[T]:
    """Makes a section of a recipe: a dataclass that checks itself, from a recipe's data and from Python."""
    return _checked(cls, False)


@dataclass_transform(kw_only_default=True, field_specifiers=(dataclasses.field,))
def keyword_settings(cls: type[T]) -> type[T]:
    """The same, with arguments by name only: a class may then add required settings to those that it inherits."""
    return _checked(cls, True)


def _checked(cls: type[T], keywords: bool) -> type[T]:
    def schema(made: type, source: Any, handler: Any) -> Any:
        built = handler(source)
        inner = handler.resolve_ref_schema(built)
        while inner["type"] != "dataclass":  # validators of the whole class are wrapped around it
            inner = inner["schema"]
        inner["strict"] = False  # a section may be given as a mapping; what is in it stays strict
        return built

    cls.__get_pydantic_core_schema__ = classmethod(schema)  # type: ignore[attr-defined]
    made: Any = pydantic_dataclasses.dataclass(config=CONFIG, kw_only=keywords)(cls)
    init = made.__init__

    # A program that makes one gets the errors that a recipe's user gets.
    @functools.wraps(init)
    def checked_init(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            init(self, *args, **kwargs)
        except ValidationError as error:
            raise explain(type(self), error) from None

    made.__init__ = checked_init
    return made


def refusal(field: str, problem: str) -> PydanticCustomError:
    """What a validator of a whole section raises. `field` counts from that section; empty: the section itself."""
    return PydanticCustomError("setting", "{problem}", {"field": field, "problem": problem})


def changed(config: T, **values: Any) -> T:
    """A copy with other values, which are not checked: a command's own use of a part of what a recipe gave."""
    copied = copy.copy(config)  # dataclasses.replace would check it
    for name, value in values.items():
        setattr(copied, name, value)
    return copied


# ---- ranges ---------------------------------------------------------------------------------------------------


class Check(ABC):
    """Marks a type in `Annotated`: `problem` says what is wrong with a value, None if nothing is."""

    words = ""
    """The range, for --help."""

    @abstractmethod
    def problem(self, value: Any) -> str | None: ...

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        return core_schema.no_info_after_validator_function(self._checked, handler(source))

    def _checked(self, value: Any) -> Any:
        problem = self.problem(value)
        if problem is not None:
            raise refusal("", problem)
        return value


class Range(Check):
    """Finite numbers from `least` to `most`, or from `above` to `below` without these two.

    `use` is the remedy where the usual one does not say enough, and `why` what the range is for.
    """

    def __init__(
        self,
        least: float | None = None,
        most: float | None = None,
        *,
        above: float | None = None,
        below: float | None = None,
        use: str = "",
        why: str = "",
    ):
        self.least, self.most, self.above, self.below = least, most, above, below
        self.why = f", {why}" if why else ""
        if least is not None and most is not None:
            self.words, remedy = f"{least:g} to {most:g}", f"use {least:g} to {most:g}"
        elif above is not None and below is not None:
            self.words, remedy = f"between {above:g} and {below:g}", f"use a number between {above:g} and {below:g}"
        elif least is not None and below is not None:
            self.words, remedy = f"{least:g} to below {below:g}", f"use at least {least:g} and below {below:g}"
        elif above is not None and most is not None:
            self.words, remedy = f"above {above:g}, up to {most:g}", f"use a number above {above:g}, up to {most:g}"
        elif above is not None:
            self.words, remedy = f"> {above:g}", f"use a number above {above:g}"
        else:
            self.words, remedy = f">= {least:g}", f"use {least} or more"
        self.remedy = use or remedy

    def problem(self, value: float) -> str | None:
        inside = math.isfinite(value)
        inside = inside and (self.least is None or value >= self.least) and (self.most is None or value <= self.most)
        inside = inside and (self.above is None or value > self.above) and (self.below is None or value < self.below)
        return None if inside else f"is {value}{self.why}; {self.remedy}"


class Each(Check):
    """Of a list or a mapping whose entries have one range: the message names the list."""

    def __init__(self, range: Range):
        self.range, self.words = range, f"each {range.words}"

    def problem(self, value: Sequence[float]) -> str | None:
        # A range on the entries' own type would name an entry, such as betas[0].
        for entry in value:
            if self.range.problem(entry):
                return f"holds {entry}; {self.range.remedy}"
        return None


class Filled(Check):
    """Text or a list that is not empty."""

    def __init__(self, remedy: str = "name one", why: str = ""):
        self.remedy, self.why = remedy, f", {why}" if why else ""

    def problem(self, value: str | Sequence[Any]) -> str | None:
        empty = not (value.strip() if isinstance(value, str) else value)
        return f"is empty{self.why}; {self.remedy}" if empty else None


class Pixels(Check):
    """[height, width]. K2's latents are 8 times smaller and its patches 2 x 2, hence multiples of 16."""

    words = "multiples of 16"

    def problem(self, value: Sequence[int]) -> str | None:
        if len(value) != 2:
            return f"is {list(value)}; write [height, width] in pixels"
        for side in value:
            if side < 16 or side % 16:
                return f"{side} pixels is not a multiple of 16; use {max(16, round(side / 16) * 16)}"
        return None


class Unless(Range):
    """A range, and one value besides that turns the thing off."""

    def __init__(self, off: float, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.off, self.words = off, f"{self.words}, or {off:g}"

    def problem(self, value: float) -> str | None:
        return None if value == self.off else super().problem(value)


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-4, without a point, as text."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


class Finite(Check):
    def __init__(self, remedy: str = "use a number"):
        self.remedy = remedy

    def problem(self, value: float) -> str | None:
        return None if math.isfinite(value) else f"is {value}; {self.remedy}"


Float = Annotated[float, BeforeValidator(_number)]
Number = Annotated[Float, Finite()]
Positive = Annotated[Float, Range(above=0)]
NonNegative = Annotated[Float, Range(0)]
Share = Annotated[Float, Range(0, 1)]
OpenShare = Annotated[Float, Range(above=0, below=1)]
BelowOne = Annotated[Float, Range(0, below=1)]
AtLeast0 = Annotated[int, Range(0)]
AtLeast1 = Annotated[int, Range(1)]
AtLeast2 = Annotated[int, Range(2)]
Port = Annotated[int, Range(0, 65535, use="use 1 to 65535, or 0 for any free one")]
Size = Annotated[list[int], Pixels()]
Sizes = Annotated[list[Size], Filled("give at least one [height, width], such as [[512, 512]]")]
Text = Annotated[str, Filled()]
Run = Annotated[str, Filled("name a directory for the run")]


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches that address. A name other than localhost may mean any machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


# ---- pydantic's errors in our words -----------------------------------------------------------------------------

ORDER = ("unknown", "type", "range", "missing")
"""Which problem is told first: a misspelt key also makes another one missing."""


def explain(config: type, error: ValidationError) -> ConfigError:
    """The problem to tell first, with the others. Settings that are missing are told together, where nothing else is
    wrong: a misspelt key makes one missing too."""
    problems: dict[str, ConfigError] = {}
    for entry in error.errors(include_url=False):
        problem = _problem(config, entry)
        known = problems.get(problem.field)
        # Each member of a union says no in its own way. A range is nearer to what was meant than another type.
        if known is None or (known.kind == "type" and problem.kind == "range"):
            problems[problem.field] = problem
    first, *rest = sorted(problems.values(), key=lambda problem: ORDER.index(problem.kind))
    if first.kind != "missing":
        first.others = [problem for problem in rest if problem.kind != "missing"]
        return first
    fields = ", ".join(problems)
    return ConfigError(fields, "missing", "missing")


def _problem(config: type, entry: Any) -> ConfigError:
    path, kind = _place(config, entry["loc"])
    if entry["type"] == "setting":
        context = entry["ctx"]
        field = ".".join(filter(None, (path, context["field"])))
        return ConfigError(field.replace(".[", "["), context["problem"])  # an entry: rewards[0].name
    if entry["type"] == "unexpected_keyword_argument":
        return ConfigError(path, f"unknown key{_near(config, path)}", "unknown")
    if entry["type"] in ("missing", "missing_argument"):
        # Nothing can be added to an entry of a list from the command line.
        if "]." in path:
            return ConfigError(path, f"is missing; expected {describe(kind)}", "type")
        return ConfigError(path, "missing", "missing")
    return ConfigError(path, f"is {show(entry['input'])}, expected {describe(kind)}", "type", describe(kind))


def _near(config: type, path: str) -> str:
    """The suggestion for an unknown key, with the path of its section."""
    around, dot, name = path.rpartition(".")
    kind: Any = config
    # `teachers.a.tags[0]` is walked as teachers, a, tags, 0.
    for part in around.replace("]", "").replace("[", ".").split(".") if around else ():
        kind = _inner(kind, int(part) if part.isdigit() else part)
    inner = section(kind)
    return suggestion(name, list(hints(inner)) if inner else [], around + dot)


def _place(config: type, places: Sequence[str | int]) -> tuple[str, Any]:
    """pydantic's place as a path, and the type there. What it adds for the members of a union is left out."""
    path, kind = "", config
    for i, part in enumerate(places):
        if i == 0 and isinstance(part, int):  # an argument without a name
            part = list(hints(config))[part]
        inner = _inner(kind, part)
        if inner is None:
            break
        kind = inner
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    return path.lstrip("."), kind


def _inner(kind: Any, part: str | int) -> Any:
    """The type of a part of a value, None if it has no such part. A key that a section does not have is Any's."""
    members = [member for member in alternatives(kind) if member is not type(None)]
    if len(members) > 1:  # then `part` is pydantic's name for one of them
        return None
    member = bare(members[0])
    origin, args = get_origin(member), get_args(member)
    if isinstance(part, int) and origin in (list, tuple):
        return args[part] if origin is tuple and part < len(args) else args[0]
    if isinstance(part, str) and dataclasses.is_dataclass(member):
        return hints(member).get(part, Any)  # type: ignore[arg-type]
    return args[1] if isinstance(part, str) and origin is dict else None
