"""Stages without a minute of imports: `warm.py SOCKET ARGUMENTS` is `posttrain ARGUMENTS`, in a process forked from a
server that has imported everything and loaded the model; signals to it are passed on, and it ends as that process does.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]


def brightness(images, prompts):
    """As in runs.py, which a pipeline would import torch with."""
    return [float(np.asarray(image).mean()) / 255 for image in images]


def nothing(images, prompts):
    return [None] * len(images)


class Script:
    """Scores every image with the next of these values at each call: a figure of the evaluation as planned."""

    def __init__(self, values: list[float]):
        self.values = iter(values)

    def __call__(self, images, prompts):
        return [next(self.values)] * len(images)


class Bright:
    def __init__(self, scale: float):
        raise AssertionError("a pipeline only looks at what it names")


def main(path: str, args: list[str]) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        socket.send_fds(connection, [json.dumps(args).encode()], [1, 2])
        lines = connection.makefile()
        process = int(lines.readline())
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: os.kill(process, number))
        code = lines.readline()
    if not code:
        os.kill(os.getpid(), signal.SIGKILL)  # as the process was
    sys.exit(int(code))


def serve(path: str, model: str) -> None:
    import posttrain.export.export
    import posttrain.grpo.train
    import posttrain.pairs.make
    import posttrain.sft.train
    import posttrain.stpo.train  # noqa: F401
    from posttrain import cli
    from tests.helpers import kept

    kept.warm(model)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        print("ready", flush=True)
        while True:
            connection = listening.accept()[0]
            message, files, *_ = socket.recv_fds(connection, 2**16, 2)
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for number, file in enumerate(files, start=1):
                    os.dup2(file, number)
                connection.sendall(f"{os.getpid()}\n".encode())
                try:
                    code = cli.main(json.loads(message))
                except BaseException:
                    traceback.print_exc()
                    code = 1
                sys.stdout.flush()
                sys.stderr.flush()
                connection.sendall(f"{code}\n".encode())
                os._exit(code)
            connection.close()
            for file in files:
                os.close(file)


class Warm:
    """The server; `launch` is what a pipeline starts its stages with."""

    def __init__(self, folder: Path, model: Path):
        path = str(folder / "socket")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, __file__, "serve", path, str(model)]
        self.server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
        assert self.server.stdout is not None and self.server.stdout.readline() == "ready\n"
        self.launch = [sys.executable, __file__, path]

    def close(self) -> None:
        self.server.terminate()
        self.server.wait(10)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2], sys.argv[3])
    main(sys.argv[1], sys.argv[2:])
