"""Where recipes, prompts, rewards and K2-nano are, in a checkout and where a wheel was installed.

In a checkout, `recipes/`, `prompts/` and `rewards/` stand beside this package. A wheel carries them in
`posttrain/bundled/`, so that it takes no name but `posttrain` in an environment. The code imports `prompts` and
`rewards` under these names in both. A user's `rewards.py` or `prompts/` in the working directory has the same names and
often comes first on sys.path, so `bind_packages` imports ours from where they are, before any other module does.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

PACKAGE = Path(__file__).resolve().parent
BUNDLED = PACKAGE / "bundled"
ROOT = BUNDLED if BUNDLED.is_dir() else PACKAGE.parent
"""Holds recipes/, prompts/ and rewards/."""
WEIGHTS = PACKAGE / "nano/weights"
NANO = WEIGHTS / "k2-nano"
"""A Krea2Pipeline directory of 6 M parameters, for 64 x 64 pixels."""
PLACES = {"recipes/": ROOT, "prompts/": ROOT, "posttrain/nano/weights/": PACKAGE.parent}
"""What a path from a checkout's root begins with, and the folder where the package has it."""

_told: set[Path] = set()


def bind_packages() -> None:
    """Makes the names `prompts` and `rewards` those of this project, whatever else on sys.path has them."""
    for name in ("prompts", "rewards"):
        module = sys.modules.get(name)
        if module is None or Path(module.__file__ or "").resolve().parent != ROOT / name:
            spec = PathFinder.find_spec(name, [str(ROOT)])
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = module
            spec.loader.exec_module(module)
        # Names that ours does not have are looked up in the user's file, which it hides.
        vars(module)["__getattr__"] = _UserModule(name)


class _UserModule:
    """Attributes of a user's own `rewards.py` or `prompts.py`, and of a package of that name."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self, attribute: str) -> Any:
        # `from rewards import judge` asks here for a module of ours before it is imported.
        ours = ROOT / self.name / attribute
        if not attribute.startswith("__") and not ours.is_dir() and not ours.with_suffix(".py").is_file():
            module = self._load()
            if module is not None and hasattr(module, attribute):
                return getattr(module, attribute)
        raise AttributeError(f"module {self.name!r} has no attribute {attribute!r}")

    def _load(self) -> ModuleType | None:
        for folder in dict.fromkeys([os.getcwd(), *sys.path]):
            for file in (Path(folder, f"{self.name}.py"), Path(folder, self.name, "__init__.py")):
                if file.is_file() and file.resolve().parent != ROOT / self.name:
                    return self._load_file(file)
        return None

    def _load_file(self, file: Path) -> ModuleType:
        alias = f"user_{self.name}"
        loaded = sys.modules.get(alias)
        if loaded is not None and loaded.__file__ == str(file):
            return loaded
        spec = importlib.util.spec_from_file_location(alias, file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[alias] = module  # before it runs, as the import system does: it may import itself
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[alias]
            raise
        return module


def see_user_modules() -> None:
    """Lets modules in the working directory be imported: after installed ones, and in folders named as ours too."""
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)
    for name in ("prompts", "rewards"):
        folder, path = Path(here, name), list(sys.modules[name].__path__)
        if folder.is_dir() and folder.resolve() != ROOT / name and str(folder) not in path:
            sys.modules[name].__path__ = [*path, str(folder)]


def packaged(path: str) -> str:
    """The path, or that of the package's own file, where there is no such file from the working directory.

    `recipes/nano/demo.yaml` is found from any directory, and so is what a recipe names in `prompts/` and
    `posttrain/nano/weights/`. Says once, on stderr, that the package's recipes or prompts are taken; that its weights
    are is plain from their path.
    """
    # What lies in the working directory comes first: a project of `posttrain init` has its own recipes/.
    start = next((start for start in PLACES if path.startswith(start)), None)
    if start is None or Path(path).exists():
        return path
    place = PLACES[start]
    found = place / path
    if not found.exists():
        return path
    if place == ROOT and place not in _told and not start.startswith("posttrain/"):
        _told.add(place)
        print(f"posttrain: {path} is not in this directory; taking the package's, {found}", file=sys.stderr)
    return str(found)


def packaged_all(value: Any) -> Any:
    """The same of every text in a recipe's data."""
    if isinstance(value, str):
        return packaged(value)
    if isinstance(value, list):
        return [packaged_all(item) for item in value]
    if isinstance(value, dict):
        return {key: packaged_all(item) for key, item in value.items()}
    return value
