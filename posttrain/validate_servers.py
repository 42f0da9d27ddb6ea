"""Ranges of `servers`, and whether they can be up together; see validate.py."""

from __future__ import annotations

from collections.abc import Sequence

from posttrain.config.ranges import ConfigError, at_least, no_keys, positive
from posttrain.errors import UserError
from rewards.serve import ServerSpec, memory_share
from rewards.urls import check_urls


def validate_servers(servers: Sequence[ServerSpec]) -> None:
    names: set[str] = set()
    ports: dict[int, str] = {}
    for i, server in enumerate(servers):
        path = f"servers[{i}]"
        if not server.name.strip() or "/" in server.name:
            raise ConfigError(f"{path}.name", f"is '{server.name}'; give a name without a slash")
        if server.name in names:
            raise ConfigError(f"{path}.name", f"'{server.name}' is used twice; give each its own name")
        names.add(server.name)
        if not 0 <= server.port <= 65535:
            raise ConfigError(f"{path}.port", f"is {server.port}; use 1 to 65535, or 0 for any free one")
        if not server.urls and server.port in ports:
            raise ConfigError(f"{path}.port", f"is {server.port}, as that of {ports[server.port]}; give each its own")
        if server.port and not server.urls:
            ports[server.port] = server.name
        for gpu in server.gpus:
            at_least(f"{path}.gpus", gpu, 0)
        if len({*server.gpus}) < len(server.gpus):
            raise ConfigError(f"{path}.gpus", f"is {server.gpus}, with one of them twice; name each once")
        positive(f"{path}.ready_timeout", server.ready_timeout)
        no_keys(path, server.env, server.extra_args)
        try:
            check_urls(server.urls, f"{path}.urls")
        except UserError as error:
            raise ConfigError(f"{path}.urls", str(error).partition(": ")[2]) from error
    _check_gpus([server for server in servers if not server.urls])


def _check_gpus(servers: Sequence[ServerSpec]) -> None:
    """vLLM takes nine tenths of each GPU unless it is told otherwise."""
    for i, server in enumerate(servers):
        for other in servers[:i]:
            shared = {*server.gpus} & {*other.gpus}
            if shared and (memory_share(server) + memory_share(other)) > 1:
                raise ConfigError(
                    "servers",
                    f"{other.name} and {server.name} want more than all memory of GPU {min(shared)}; name others in"
                    " gpus, or give each its part: extra_args: [--gpu-memory-utilization, '0.4']",
                )
