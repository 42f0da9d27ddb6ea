"""The command line without a minute of imports: processes that are forked from one that has imported everything."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

TRAINING = """
import posttrain.expander.gdpo, posttrain.expander.sft, posttrain.export.export, posttrain.grpo.train
import posttrain.mopd.train, posttrain.nft.train, posttrain.pairs.make
import posttrain.preflight.run, posttrain.preflight.grpo
import posttrain.report.page
import posttrain.sample_images, posttrain.sft.train, posttrain.stpo.train
import posttrain.tdm.train
import tests.helpers.runs
import os
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed looks for one when it is imported
import deepspeed.runtime.zero.parameter_offload, deepspeed.runtime.zero.stage3
"""
"""What the commands would import one after another: once, before they are forked."""
SERVE = """
import gc, json, os, pkgutil, resource, signal, sys, traceback
from posttrain import cli
gc.collect()
gc.freeze()  # a collection in a child would copy all pages of what was imported
for line in sys.stdin:
    call = json.loads(line)
    files = [os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) for file in call["files"]]
    children = []
    for environment in call["environments"]:
        child = os.fork()
        if child == 0:
            os.environ |= environment
            signal.alarm(240)  # processes that wait for each other for ever end as a failure
            for number in (1, 2):
                os.dup2(files[number - 1], number)
            if call["limit"]:
                resource.setrlimit(resource.RLIMIT_FSIZE, (call["limit"], call["limit"]))
            try:
                code = pkgutil.resolve_name(call["function"])(call["args"]) or 0
            except BaseException:
                traceback.print_exc()
                code = 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        children.append(child)
    print(json.dumps(children), flush=True)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)
    for file in files:
        os.close(file)
"""


class Commands:
    """`posttrain ...` in processes of its own each time, forked from one that has run `prepare`, mostly imports, and
    loaded `model`."""

    def __init__(self, folder: Path, prepare: str, model: Path | None = None):
        self.files = [str(folder / name) for name in ("stdout", "stderr")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        if model is not None:
            prepare += f"\nfrom tests.helpers import kept\nkept.warm({str(model)!r})\n"
        self.server = subprocess.Popen(
            [sys.executable, "-c", prepare + SERVE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
            env=environment,
        )  # fmt: skip

    def __call__(self, *args, **how: Any) -> subprocess.CompletedProcess:
        """Runs a command line; see `start`."""
        self.start(*args, **how)
        return self.wait()

    def start(
        self, *args, limit: int = 0, processes: int = 1, function: str = "posttrain.cli:main", **environment: str
    ) -> list[int]:
        """Begins a command and returns its process ids, by rank; `wait` must follow before the next one.

        Several processes have the environment that a launcher such as torchrun gives them. Files it writes may be
        `limit` bytes long, which stands in for a full disk. `function` gets the arguments.
        """
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), **environment}
        world["WORLD_SIZE"] = world["LOCAL_WORLD_SIZE"] = str(processes)
        ranks = [{**world, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
        call = {"args": [str(arg) for arg in args], "files": self.files, "limit": limit, "function": function}
        assert self.server.stdin is not None
        self.server.stdin.write(json.dumps(call | {"environments": ranks if processes > 1 else [environment]}) + "\n")
        self.server.stdin.flush()
        return self._answer()

    def wait(self) -> subprocess.CompletedProcess:
        """Output of all processes; the exit code is the first that is not 0, and `args` are those of all."""
        codes = self._answer()
        code = next(filter(None, codes), 0)
        return subprocess.CompletedProcess(
            [str(code) for code in codes], code, *(Path(file).read_text() for file in self.files)
        )

    def _answer(self) -> list[int]:
        assert self.server.stdout is not None
        return json.loads(self.server.stdout.readline())

    def close(self) -> None:
        assert self.server.stdin is not None
        self.server.stdin.close()
        self.server.wait(60)
