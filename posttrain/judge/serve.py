"""`posttrain serve`: runs a recipe's judge servers until it is stopped, or prints commands for another machine."""

import signal
import sys
import time
from pathlib import Path
from types import FrameType

from posttrain.config.sections import ServeConfig
from rewards.serve import commands, running


class _Terminated(Exception):
    """Raised by SIGTERM, so that the servers are stopped as after Ctrl-C but the exit code is 0."""


def serve(config: ServeConfig) -> None:
    """Prints each server's base URL and models once all answer. Raises ServerError when a server dies."""
    if config.print_for is not None:
        print("\n".join(commands(config.servers, config.print_for)))
        return
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        names = ", ".join(server.name for server in config.servers)
        print(f"posttrain: starting {names}; logs are in {config.logs}", file=sys.stderr)
        with running(config.servers, Path(config.logs)) as servers:
            for server in servers:
                print(server, flush=True)
            print("posttrain: serving until Ctrl-C or SIGTERM", file=sys.stderr)
            while True:
                for server in servers:
                    server.check()
                time.sleep(1)
    except _Terminated:
        pass
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise _Terminated
