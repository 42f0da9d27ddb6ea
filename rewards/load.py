"""From a recipe's reward specs to callables: import paths, arguments, and the addresses of servers."""

import functools
import importlib
import inspect
import operator
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from posttrain.errors import UserError
from posttrain.resources import see_user_modules
from rewards.base import Reward, RewardSpec, no_column
from rewards.isolation import described, untouched
from rewards.serve import ServerURL, check_urls

SERVER = "server://"


@runtime_checkable
class Recorded(Protocol):
    """A reward that adds to the run's record what decides its scores (models, template hashes)."""

    def record(self) -> dict[str, Any]: ...


def load_rewards(
    specs: Sequence[RewardSpec | Callable[..., Any]], servers: Mapping[str, Sequence[str]] | None = None
) -> list[Reward]:
    """Rewards that `score_all` and the library's `score` can ask.

    A plain callable is a reward with its own name and weight 1. In the arguments of the others, `server://NAME` becomes
    that server's list of URLs. Raises UserError for a name given twice and for what cannot be imported or made.
    """
    rewards: dict[str, Reward] = {}
    for given in specs:
        spec = given if isinstance(given, RewardSpec) else _of_callable(given)
        if spec.name in rewards:
            raise UserError(f"reward {spec.name}: name: two rewards have it: give each its own")
        rewards[spec.name] = _load(spec, servers or {})
    return list(rewards.values())


def _of_callable(function: Callable[..., Any]) -> RewardSpec:
    if not callable(function):
        raise UserError(f"rewards: {function!r} is neither a RewardSpec nor a callable; give one of them")
    return RewardSpec(getattr(function, "__name__", type(function).__name__), function)


def check_rewards(specs: Sequence[RewardSpec], servers: Sequence[str] = ()) -> None:
    """Raises UserError for what `load_rewards` would refuse before anything is made: no judge is loaded or asked.

    `servers` are the names of the recipe's servers.
    """
    for spec in specs:
        where = f"reward {spec.name}: function"
        if spec.given is not None:
            _arguments(spec, str(spec.function), spec.given)
        elif isinstance(spec.function, str):
            _arguments(spec, spec.function, _import_function(spec.function, where))
        else:
            path, cls, arguments = _import_class(spec.function, where)
            _bind(cls, arguments, f"{where}: init_args")
            check_addresses(arguments, servers, f"{where}: init_args")
            if isinstance(cls, type):  # what a factory function returns is not known yet
                _arguments(spec, path, cls)


def check_columns(rewards: Sequence[Reward], columns: Mapping[str, Any]) -> None:
    """Raises UserError for a reward that takes a column which is not there."""
    for reward in rewards:
        if missing := reward.required - columns.keys():
            raise UserError(no_column(reward.spec.name, missing, columns))


def _method_of(cls: type) -> Any:
    """What is run when an object of the class is called; `cls.__call__` would be the metaclass's at times."""
    torch = sys.modules.get("torch")
    if torch is not None and issubclass(cls, torch.nn.Module):
        return cls.forward  # its `__call__` takes anything
    for base in cls.__mro__:
        if "__call__" in vars(base):
            return vars(base)["__call__"]
    return None


def _import_function(path: str, where: str) -> Any:
    function = import_object(path, where)
    if isinstance(function, type):
        module, _, name = path.partition(":")
        raise UserError(f"{where}: {path} is a class: write {{class_path: {module}.{name}, init_args: {{}}}}")
    return function


def _import_class(function: Any, where: str) -> tuple[str, Any, dict[str, Any]]:
    """The `class_path` of a recipe's mapping, what it names, and the arguments for it."""
    path = function["class_path"]
    module, _, name = path.replace(":", ".").rpartition(".")
    return path, import_object(f"{module}:{name}", f"{where}: class_path"), function.get("init_args") or {}


def _arguments(spec: RewardSpec, path: str, function: Any) -> dict[str, Any]:
    """How a function, an object or the objects of a class are called: `parameters`, `required` and `by_name` of Reward.

    Raises UserError for what cannot be called with images and prompts.
    """
    where = f"reward {spec.name}: {path}"
    called = function
    if isinstance(function, type):
        called = _method_of(function)
    elif not inspect.isroutine(function) and not isinstance(function, functools.partial):
        called = _method_of(type(function))
    if not callable(function) or called is None:
        raise UserError(f"{where} cannot be called; give a function or an object with __call__")
    if hasattr(function, "cache_info"):
        raise UserError(f"{where} has a cache, which cannot take lists of images; remove functools.lru_cache")
    try:
        parameters = list(inspect.signature(called).parameters.values())
    except (ValueError, TypeError):  # of some built-in functions, and of functools.partialmethod
        raise UserError(f"{where} does not say what it takes; write a function around it") from None
    if called is not function and not isinstance(called, staticmethod):
        parameters = parameters[1:]  # self
    takes = ", ".join(str(p.replace(annotation=p.empty, default=p.empty)) for p in parameters) or "nothing"
    names: set[str] = set()  # of what can be given by name
    places: list[str] = []  # of what can be given by position
    required: set[str] = set()
    several = takes_all = False  # *args, **kwargs
    for p in parameters:
        several = several or p.kind is p.VAR_POSITIONAL
        takes_all = takes_all or p.kind is p.VAR_KEYWORD
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            continue
        if p.kind is not p.POSITIONAL_ONLY:
            names.add(p.name)
        if p.kind is not p.KEYWORD_ONLY:
            places.append(p.name)
        if p.default is p.empty:
            required.add(p.name)
    if parameters and not names and not places:
        raise UserError(f"{where} takes {takes}, so its columns are not known; if it is decorated, use functools.wraps")
    by_name = {"images", "prompts"} <= names
    places = places[:2]
    if not by_name and len(places) < 2 and not (places and several):
        raise UserError(
            f"{where} takes {takes}; it is called with images and prompts, and the columns that it names: give it these"
            " parameters"
        )
    if not by_name and ("prompt" in places[0] or ("image" in places[-1] and len(places) == 2)):
        raise UserError(f"{where} takes {takes}: call its parameters images and prompts, so that their order is known")
    first = {"images", "prompts"} if by_name else {*places}
    return {"parameters": None if takes_all else names - first, "required": required - first, "by_name": by_name}


def check_addresses(value: Any, servers: Sequence[str], where: str) -> None:
    """Raises UserError for a `server://NAME` that names none of the servers, and for base_urls that are not URLs."""
    with_servers(value, dict.fromkeys(servers, ()), where)
    for name, entry in value.items() if isinstance(value, Mapping) else ():
        if name == "base_urls" and entry is not None:
            urls = [entry] if isinstance(entry, str) else entry
            if not isinstance(urls, list) or not all(isinstance(url, str) for url in urls):
                raise UserError(f"{where}.{name}: is {entry!r}; give a URL or a list of them")
            check_urls([url for url in urls if not url.startswith(SERVER)], f"{where}.{name}")
        else:
            check_addresses(entry, servers, f"{where}.{name}")


def record(rewards: Sequence[Reward]) -> dict[str, dict[str, Any]]:
    """What decides the scores of each reward that can tell it, for checkpoints, by name."""
    return {reward.spec.name: reward.function.record() for reward in rewards if isinstance(reward.function, Recorded)}


def _load(spec: RewardSpec, servers: Mapping[str, Sequence[str]]) -> Reward:
    where = f"reward {spec.name}: function"
    if spec.given is not None:
        path, function = str(spec.function), spec.given
    elif isinstance(spec.function, str):
        path, function = spec.function, _import_function(spec.function, where)
    else:
        path, cls, given = _import_class(spec.function, where)
        arguments = with_servers(given, servers, f"{where}: init_args")
        function = construct(cls, arguments, f"{where}: init_args")
    # Of an object, whether it is async is known from its class's method.
    method = function if inspect.isroutine(function) else type(function).__call__
    is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(method)
    return Reward(spec, function, is_async=is_async, **_arguments(spec, path, function))


def import_object(path: str, where: str) -> Any:
    """The object at `package.module:name`; modules in the current directory can be named too."""
    module, _, name = path.rpartition(":")
    if not module or not name:
        raise UserError(f"{where}: '{path}' is not an import path: write package.module:name")
    if "/" in module or module.endswith(".py"):
        named = ".".join(Path(os.path.relpath(module.removesuffix(".py"))).parts)
        raise UserError(f"{where}: '{path}' names a file: write its module, {named}:{name}")
    see_user_modules()
    imported = None
    try:
        with untouched():
            imported = importlib.import_module(module)
            return operator.attrgetter(name)(imported)  # which may read the user's file of the same name as a package
    except (Exception, SystemExit) as error:  # whatever a user's file does when it is read
        if isinstance(error, AttributeError) and imported is not None:
            raise UserError(f"{where}: {error}: check the name") from error
        raise UserError(f"{where}: cannot import {module}: {described(error)}") from error


def construct(cls: Callable[..., Any], arguments: Mapping[str, Any], where: str) -> Any:
    """`cls(**arguments)`. Raises UserError for arguments that do not fit, and for whatever it raises."""
    _bind(cls, arguments, where)
    try:
        with untouched():
            return cls(**arguments)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except Exception as error:
        name = getattr(cls, "__name__", str(cls))
        raise UserError(f"{where}: {name} cannot be made: {described(error)}") from error


def _bind(cls: Callable[..., Any], arguments: Mapping[str, Any], where: str) -> None:
    try:
        inspect.signature(cls).bind(**arguments)
    except TypeError as error:
        known = ", ".join(inspect.signature(cls).parameters)
        raise UserError(f"{where}: {error}: it takes {known}") from error


def with_servers(value: Any, servers: Mapping[str, Sequence[str]], where: str) -> Any:
    """The value with the URLs of a server in the place of each `server://NAME`. Raises UserError for one unknown."""
    if isinstance(value, str) and value.startswith(SERVER):
        name = value.removeprefix(SERVER)
        if name not in servers:
            known = ", ".join(servers) or "none"
            raise UserError(f"{where}: no server '{name}': the recipe's servers are: {known}")
        return list(map(ServerURL, servers[name]))
    if isinstance(value, list):
        resolved: list[Any] = []  # a server in a list adds all its URLs to it
        for entry in value:
            value_of_entry = with_servers(entry, servers, where)
            resolved += value_of_entry if isinstance(entry, str) and entry.startswith(SERVER) else [value_of_entry]
        return resolved
    if isinstance(value, Mapping):
        return {key: with_servers(entry, servers, f"{where}.{key}") for key, entry in value.items()}
    return value
