"""`posttrain serve`: runs a recipe's judge servers until it is stopped, or prints commands for another machine."""

import time
from pathlib import Path

from posttrain.judge.config import ServeConfig
from posttrain.log import log
from posttrain.runs.stop import until_terminated
from rewards.serve import commands, running


def serve(config: ServeConfig) -> None:
    """Prints each server's base URL and models once all answer. Raises ServerError when a server dies."""
    if config.print_for is not None:
        print("\n".join(commands(config.servers, config.print_for)))
        return
    with until_terminated():
        names = ", ".join(server.name for server in config.servers)
        log.info(f"starting {names}; logs are in {config.logs}")
        with running(config.servers, Path(config.logs)) as servers:
            for server in servers:
                print(server, flush=True)
            log.info("serving until Ctrl-C or SIGTERM")
            while True:
                for server in servers:
                    server.check()
                time.sleep(1)
