"""Commands in processes of their own, several at once, on all GPUs in turn: what the benchmarks of runs share."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch


class Jobs:
    """Runs `python -m MODULE ...` with a log each under a folder."""

    def __init__(self, folder: Path, at_once: int) -> None:
        self.folder = folder
        self._slots = threading.Semaphore(at_once)
        self._gpus = itertools.cycle(_gpus()) if torch.cuda.is_available() else None
        self._mutex = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, name: str, module: str, arguments: Sequence[str]) -> float:
        """Seconds it took. Exits with the log's name if it failed."""
        log = self.folder / f"{name}.log"
        with self._slots, log.open("w") as file:
            environment = dict(os.environ)
            with self._mutex:
                if self._gpus is not None:
                    environment["CUDA_VISIBLE_DEVICES"] = next(self._gpus)
            start = time.time()
            command = [sys.executable, "-m", module, *arguments]
            if subprocess.run(command, env=environment, stdout=file, stderr=file).returncode:
                raise SystemExit(f"{name}: failed; see {log}")
            return time.time() - start


def _gpus() -> list[str]:
    """The GPUs that this process may use, by the names that its children know them by."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return seen.split(",") if seen else [str(i) for i in range(torch.cuda.device_count())]
