"""What the tests at true size share: the directory of models, and the file of rows.

Left out where there is no GPU, but for a rehearsal: POSTTRAIN_GPU_SCALE=tiny runs the same commands on two CPU cores.
"""

import fcntl
import os
from pathlib import Path

import pytest
import torch

from tests.gpu import parts as models
from tests.gpu.measure import Commands
from tests.gpu.pairs import write_pairs
from tests.gpu.recipes import SCALE
from tests.gpu.trained import write_trained


def pytest_collection_modifyitems(items):
    if SCALE == "k2" and not torch.cuda.is_available():
        for item in items:
            item.add_marker(pytest.mark.skip(reason="there is no GPU"))


@pytest.fixture(scope="session")
def parts() -> Path:
    """Models of true size, written once: POSTTRAIN_GPU_PARTS, or a directory in memory."""
    folder = Path(os.environ.get("POSTTRAIN_GPU_PARTS", f"/dev/shm/posttrain-{SCALE}"))
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:  # the suite may be run in several processes
        fcntl.flock(lock, fcntl.LOCK_EX)
        models.write(folder, SCALE)
        write_trained(folder / "trained", folder / "k2")
        write_pairs(folder / "pairs", 512 if SCALE == "k2" else 64)
    return folder


@pytest.fixture(scope="session")
def command() -> Commands:
    rows = Path(os.environ.get("POSTTRAIN_GPU_ROWS", "runs/gpu.jsonl"))
    rows.parent.mkdir(parents=True, exist_ok=True)
    return Commands(rows)
