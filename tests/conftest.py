"""What several test files begin with."""

import gc
import os
import shutil
import signal

# A shell that starts tests in the background has them ignore SIGINT, and with them the commands that they interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Before torch reads it: with AVX-512, MKL's products depend on where in memory a matrix lies, in their last bits.
os.environ.setdefault("MKL_CBWR", "AVX2")

import pytest

import posttrain.log  # noqa: F401  messages go to stderr, also where a test runs alone
from tests.helpers.commands import TRAINING, Commands

LONGEST = (
    "docs sharding pipeline targets bench estimate blocks expander_rl preflight policy stpo tdm grpo_stops grpo pairs"
    " stages processes averages elastic stpo_step exports_checked muon_processes export carryover project examples"
    " expander commands judge_client preflight_methods sequence loading"
).split()
"""Files that take longest, the longest first: begun at the end, one of them would keep one process busy alone."""


def pytest_collection_modifyitems(items):
    places = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))


def pytest_collection_finish():
    gc.freeze()  # Each collection would look at all that was imported, which takes a quarter of a second.


@pytest.fixture(scope="session")
def command(tmp_path_factory, raw_model):
    commands = Commands(tmp_path_factory.mktemp("commands"), TRAINING, raw_model)
    yield commands
    commands.close()


@pytest.fixture(scope="session")
def model(raw_model):
    """The tiny pipeline, which no test may write to: all share it."""
    return raw_model


@pytest.fixture(scope="session")
def raw_model(tmp_path_factory):
    """`model` where a file of tests has a `model` of its own."""
    from accelerate import PartialState

    from tests.helpers import kept, tiny

    PartialState(cpu=True)  # runs must be the same bit for bit, also on a machine with a GPU
    folder = tiny.save(tmp_path_factory.mktemp("tiny") / "raw")
    kept.keep(folder)
    return folder


@pytest.fixture(scope="module")
def browser():
    """A Chromium without a window; tests that need one are left out where there is none."""
    from playwright.sync_api import sync_playwright

    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no chromium, chromium-browser or google-chrome is on the path")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync"]  # fmt: skip
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=chromium, args=flags)
        yield launched
        launched.close()


@pytest.fixture
def no_pickle(monkeypatch):
    """Whatever would unpickle a file fails."""
    import pickle

    import torch

    def refused(*_, **__):
        raise AssertionError("a pickle is loaded")

    for module, name in ((torch, "load"), (pickle, "load"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, refused)
