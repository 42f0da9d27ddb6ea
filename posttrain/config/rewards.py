"""Lists of rewards and of servers, with what must fit together in them. Never imports torch. sections.py passes them on
with the sections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from posttrain.config import metric_names
from posttrain.config.types import Check, refusal
from rewards.base import RewardSpec
from rewards.serve import ServerSpec, memory_share


class _RewardNames(Check):
    """Names are keys of metrics, so each is there once and is none of an evaluation's own."""

    def problem(self, value: Any) -> None:
        seen: set[str] = set()
        for i, reward in enumerate(value):
            if reward.name in seen:
                raise refusal(f"[{i}].name", f"'{reward.name}' is used twice; give each its own name")
            if reward.name in (*metric_names.LOOK, metric_names.DIVERSITY):
                raise refusal(f"[{i}].name", f"'{reward.name}' is a metric of every evaluation; choose another")
            seen.add(reward.name)


class _ServersTogether(Check):
    """Servers that are started on one machine share its ports and the memory of its GPUs."""

    def problem(self, value: Any) -> None:
        names: set[str] = set()
        ports: dict[int, str] = {}
        for i, server in enumerate(value):
            # server://NAME must lead to one.
            if server.name in names:
                raise refusal(f"[{i}].name", f"'{server.name}' is used twice; give each its own name")
            names.add(server.name)
            if server.urls:  # it is up elsewhere
                continue
            # 0 is any free port, and never the same.
            if server.port in ports:
                raise refusal(f"[{i}].port", f"is {server.port}, as that of {ports[server.port]}; give each its own")
            if server.port:
                ports[server.port] = server.name
        self._check_gpus([server for server in value if not server.urls])

    def _check_gpus(self, servers: Sequence[ServerSpec]) -> None:
        # vLLM takes nine tenths of each GPU unless an argument says otherwise.
        for i, server in enumerate(servers):
            for other in servers[:i]:
                shared = set(server.gpus).intersection(other.gpus)
                if shared and (memory_share(server) + memory_share(other)) > 1:
                    raise refusal(
                        "",
                        f"{other.name} and {server.name} want more than all memory of GPU {min(shared)}; name others in"
                        " gpus, or give each its part: extra_args: [--gpu-memory-utilization, '0.4']",
                    )


Rewards = Annotated[list[RewardSpec], _RewardNames()]
Servers = Annotated[list[ServerSpec], _ServersTogether()]


def measured(rewards: Sequence[RewardSpec], groups: int) -> list[str]:
    """Names of those that an evaluation has a mean of. One of whole groups has a score only where it draws groups."""
    return [reward.name for reward in rewards if groups or not reward.group]
