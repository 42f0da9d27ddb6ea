"""From a recipe's reward specs to callables: import paths, arguments, and the addresses of servers."""

import importlib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable
from urllib.parse import urlsplit

from posttrain.errors import UserError
from posttrain.resources import see_user_modules
from rewards.base import Reward, RewardSpec

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
            _check_call(spec, str(spec.function), spec.given)
        elif isinstance(spec.function, str):
            _check_call(spec, spec.function, import_object(spec.function, where))
        else:
            path, cls, arguments = _import_class(spec.function, where)
            _bind(cls, arguments, f"{where}: init_args")
            check_addresses(arguments, servers, f"{where}: init_args")
            if isinstance(cls, type):  # what a factory function returns is not known yet
                _check_call(spec, path, _call_method(cls), (None,))


def _call_method(cls: type) -> Any:
    """`__call__` as the class or one of its bases defines it; `cls.__call__` would be the metaclass's at times."""
    for base in cls.__mro__:
        if "__call__" in vars(base):
            return vars(base)["__call__"]
    return None


def _import_class(function: Any, where: str) -> tuple[str, Any, dict[str, Any]]:
    """The `class_path` of a recipe's mapping, what it names, and the arguments for it."""
    path = function["class_path"]
    module, _, name = path.replace(":", ".").rpartition(".")
    return path, import_object(f"{module}:{name}", f"{where}: class_path"), function.get("init_args", {})


def _check_call(spec: RewardSpec, path: str, function: Any, bound: tuple[Any, ...] = ()) -> None:
    """Raises UserError for what cannot be called with images and prompts; `bound` stands for the object of a method."""
    if not callable(function):
        raise UserError(f"reward {spec.name}: {path} cannot be called; give a function or an object with __call__")
    try:
        signature = inspect.signature(function)
    except ValueError:  # some built-in functions have no signature
        return
    try:
        signature.bind_partial(*bound, [], [])
    except TypeError:
        takes = ", ".join(list(signature.parameters)[len(bound) :]) or "nothing"
        raise UserError(
            f"reward {spec.name}: {path} takes {takes}; it is called with images and prompts, and the columns that it"
            " names: give it these parameters"
        ) from None


def check_addresses(value: Any, servers: Sequence[str], where: str) -> None:
    """Raises UserError for a `server://NAME` that names none of the servers, and for base_urls that are not URLs."""
    with_servers(value, dict.fromkeys(servers, ()), where)
    for name, entry in value.items() if isinstance(value, Mapping) else ():
        if name == "base_urls" and entry is not None:
            urls = [entry] if isinstance(entry, str) else entry
            if not isinstance(urls, list) or not all(map(_is_text, urls)):
                raise UserError(f"{where}.{name}: is {entry!r}; give a URL or a list of them")
            check_urls([url for url in urls if not url.startswith(SERVER)], f"{where}.{name}")
        else:
            check_addresses(entry, servers, f"{where}.{name}")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def record(rewards: Sequence[Reward]) -> dict[str, dict[str, Any]]:
    """What decides the scores of each reward that can tell it, for checkpoints, by name."""
    return {reward.spec.name: reward.function.record() for reward in rewards if isinstance(reward.function, Recorded)}


def _load(spec: RewardSpec, servers: Mapping[str, Sequence[str]]) -> Reward:
    where = f"reward {spec.name}: function"
    if spec.given is not None:
        path, function = str(spec.function), spec.given
    elif isinstance(spec.function, str):
        path, function = spec.function, import_object(spec.function, where)
    else:
        path, cls, given = _import_class(spec.function, where)
        arguments = with_servers(given, servers, f"{where}: init_args")
        function = construct(cls, arguments, f"{where}: init_args")
    _check_call(spec, path, function)
    parameters = inspect.signature(function).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    # Of an object, whether it is async is known from its class's method.
    call = function if inspect.isroutine(function) else type(function).__call__
    return Reward(spec, function, None if takes_all else set(parameters), inspect.iscoroutinefunction(call))


def import_object(path: str, where: str) -> Any:
    """The object at `package.module:name`; modules in the current directory can be named too."""
    module, _, name = path.partition(":")
    if not module or not name:
        raise UserError(f"{where}: '{path}' is not an import path: write package.module:name")
    see_user_modules()
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise UserError(f"{where}: cannot import {module}: {error}") from error
    except AttributeError as error:
        raise UserError(f"{where}: {error}: check the name") from error


def construct(cls: Callable[..., Any], arguments: Mapping[str, Any], where: str) -> Any:
    """`cls(**arguments)`; arguments that do not fit are the user's mistake, a TypeError inside is not."""
    _bind(cls, arguments, where)
    try:
        return cls(**arguments)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


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
        return list(servers[name])
    if isinstance(value, list):
        resolved: list[Any] = []  # a server in a list adds all its URLs to it
        for entry in value:
            value_of_entry = with_servers(entry, servers, where)
            resolved += value_of_entry if isinstance(entry, str) and entry.startswith(SERVER) else [value_of_entry]
        return resolved
    if isinstance(value, Mapping):
        return {key: with_servers(entry, servers, f"{where}.{key}") for key, entry in value.items()}
    return value


# ---- addresses of servers ----------------------------------------------------------------------------------------

SECRET = re.compile(r"(key|token|secret|password)=", re.IGNORECASE)


def refuse_keys(urls: Sequence[str], where: str) -> None:
    """Raises UserError for a URL with a key in it: recipes, logs and messages hold the URL."""
    for url in urls:
        # user:password@ before the host, or a query such as ?api_key=...
        if re.match(r"\w+://[^/]*@", url) or SECRET.search(url):
            raise UserError(f"{where}: a URL holds a key: put that into an environment variable, named by api_key_env")


def check_urls(urls: Sequence[str], where: str) -> None:
    """Raises UserError for a text that is not the URL of a server, comes twice or holds a key."""
    refuse_keys(urls, where)
    for url in urls:
        try:
            parts = urlsplit(url)
            right = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:  # a port that is not a number
            right = False
        if not right:
            raise UserError(f"{where}: '{url}' is not a URL: write http://HOST:PORT/v1")
        if urls.count(url) > 1:
            raise UserError(f"{where}: {url} is there twice: name each server once")
