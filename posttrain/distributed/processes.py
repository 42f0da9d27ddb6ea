"""Several processes that train as one: which groups are whose, and sums and decisions over all of them.

Groups are divided whole, so that all processes have about the same work, and every seed is one of global indices. So
any number of processes draws the same images, and their summed gradients give the same update within rounding.

Messages go over gloo, also where tensors go over NCCL, so that waiting for a process that does not come ends in an
error that names it: after POSTTRAIN_TIMEOUT seconds (1800), or at once where its connection is lost.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor
from torch.distributed.tensor import DTensor

from posttrain.distributed import launch, shards
from posttrain.errors import UserError
from posttrain.log import silence
from posttrain.runs import startup

TIMEOUT = "POSTTRAIN_TIMEOUT"
SPARE = 300.0
"""Seconds that tensors may take longer than messages: who is missing is found out by a message."""
HEARTBEAT = 0.5
"""Seconds between a process's signs of life, which are looked at twice, four of them apart."""


class OutOfMemoryElsewhere(torch.OutOfMemoryError):
    """Another process has run out of memory."""


@dataclass(frozen=True)
class _OutOfMemory:
    """What a process sends in place of its value."""


class Processes:
    """The processes that a launcher started, or the only one."""

    def __init__(self, shardable: bool = False) -> None:
        """`shardable`: the caller uses model/parallelize.py. Raises UserError if the launcher asks for sharding and the
        caller cannot do it."""
        launch.check()
        engine = launch.engine()
        if engine and not shardable:
            raise UserError(
                f"accelerate: {engine} is for commands that train K2: use recipes/launch/ddp.yaml for this one"
            )
        launched, limit, cuda = int(os.environ.get("WORLD_SIZE", "1")) > 1, _timeout(), torch.cuda.is_available()
        if launched and not dist.is_initialized():
            rank, size, longest = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), limit + SPARE
            # torchrun keeps the store in its agent; other launchers leave it to the first process.
            host = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
            store, most = _store(longest, host), timedelta(seconds=longest)
            dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=size, timeout=most)
        self.state = PartialState(cpu=launched and not cuda)
        self.rank, self.size = self.state.process_index, self.state.num_processes
        self.main = self.rank == 0
        if not self.main:
            silence()
        self.shared = 1
        """How many neighbouring processes do the same work together; see `share`."""
        self.summed = False
        """Set when tensors are summed over processes."""
        self.engine = engine if self.size > 1 else None
        """What divides the model between them: FSDP2, ZeRO-2 or ZeRO-3; see model/parallelize.py."""
        self.sharded = self.engine is not None
        self._attend: Callable[[], None] | None = None
        self._messages = Messages(self.rank, self.size, limit) if self.size > 1 else None
        self.all_gather(None)  # nobody ends, and takes the store along, before all are here
        startup.lap("processes")

    @property
    def device(self) -> torch.device:
        device = self.state.device or torch.device("cpu")
        # accelerate numbers a CPU by rank, and a model that was read to `cpu` would be copied to `cpu:0`.
        return device if device.type != "cpu" else torch.device("cpu")

    def alone(self) -> Processes:
        """This process as if it were the only one, for work that the others take no part in."""
        other = copy.copy(self)  # with size 1 nothing is exchanged
        other.rank, other.size, other.shared, other.main = 0, 1, 1, True
        return other

    def share(self, size: int) -> None:
        """From now on, each `size` neighbouring processes do the same work, as one, whose messages are the first one's.
        Gradients are summed over all: each process of a group has a part of the group's."""
        self.shared = size

    def attend_by(self, attend: Callable[[], None]) -> None:
        """From now on, `attend` is called before each exchange of messages, and returns when all others are at it."""
        self._attend = attend

    @property
    def workers(self) -> int:
        """Among how many work is divided."""
        return self.size // self.shared

    @property
    def worker(self) -> int:
        """Which of the workers this process belongs to."""
        return self.rank // self.shared

    def local_indices(self, count: int) -> range:
        """Which of `count` items of equal cost are this process's."""
        return range(self.worker, count, self.workers)

    def local_indices_by_cost(self, costs: Sequence[float], ranks: Sequence[int] | None = None) -> list[int]:
        """Which of these items are this process's, the most expensive first; with equal costs as `local_indices`.

        They are shared by these `ranks`; None: by all. Others have none.
        """
        if ranks is not None and self.rank not in ranks:
            return []
        if self.sharded:
            # All processes go through the model together, and each pass lasts as long as its most expensive input:
            # similar costs in one pass are then worth more than equal sums.
            return by_cost(costs)[self.rank :: self.size]
        if ranks is None or len(ranks) == self.size:
            return deal(costs, self.workers)[self.worker]
        return deal(costs, len(ranks))[ranks.index(self.rank)]

    def gather_in_order(self, own: Sequence[Any], places: Sequence[int] | None = None) -> list[Any]:
        """All processes' items in global order. `places`: the indices of this process's; None: `local_indices`."""
        by_place: dict[int, Any] = {}
        for part in self.all_gather(dict(zip(self.places_of(places, len(own)), own, strict=True))):
            by_place |= part
        return [by_place[place] for place in sorted(by_place)]

    def places_of(self, places: Sequence[int] | None, count: int) -> Sequence[int]:
        return [self.worker + i * self.workers for i in range(count)] if places is None else places

    def owner(self, i: int) -> int:
        """The process that has item `i` by `local_indices`; of a group that shares its work, the first."""
        return i % self.workers * self.shared

    def all_gather(self, value: Any) -> list[Any]:
        """All values, by rank; of processes that share their work, the first one's. Raises OutOfMemoryElsewhere if a
        process has called `tell_out_of_memory`."""
        return self.by_rank(value)[:: self.shared]

    def by_rank(self, value: Any) -> list[Any]:
        """The values of all processes, otherwise as `all_gather`."""
        if self.size == 1 or self._messages is None:
            return [value]
        if self._attend is not None:
            self._attend()
        values: list[Any] = [None] * self.size
        with self._messages.exchange() as group:
            dist.all_gather_object(values, value, group=group)
        # In all processes at once, so that all repeat the step.
        if any(isinstance(v, _OutOfMemory) for v in values):
            raise OutOfMemoryElsewhere("another process has run out of memory")
        return values

    def gather(self, value: Any) -> list[Any] | None:
        """All values, by rank, on the main process; None on the others, to which nothing is sent."""
        received = self.deliver({0: value})  # what a process sends to itself does not travel
        return [received[rank] for rank in range(self.size)] if self.main else None

    def deliver(self, parcels: Mapping[int, Any]) -> dict[int, Any]:
        """Sends `parcels[rank]` to that rank, and returns what was sent to this one, by sender.

        A value travels only to the process that needs it, so images go this way. Raises as `all_gather` does.
        """
        received = {rank: value for rank, value in parcels.items() if rank == self.rank}
        if self.size == 1 or self._messages is None:
            return received
        # Everyone has to know who sends to whom, since a receiver must ask for what is sent to it.
        receivers = self.by_rank([rank for rank in sorted(parcels) if rank != self.rank])
        with self._messages.exchange() as group:
            # All go through the deliveries in one order, so that no two processes wait for each other.
            for sender, receivers_of_sender in enumerate(receivers):
                for receiver in receivers_of_sender:
                    if sender == self.rank:
                        dist.send_object_list([parcels[receiver]], receiver, group=group)
                    elif receiver == self.rank:
                        box: list[Any] = [None]
                        dist.recv_object_list(box, sender, group=group)
                        received[sender] = box[0]
        return dict(sorted(received.items()))

    def tell_out_of_memory(self) -> None:
        """Tells the others, which are in `all_gather`, or will be."""
        with contextlib.suppress(OutOfMemoryElsewhere):
            self.all_gather(_OutOfMemory())

    def from_main(self, value: Any) -> Any:
        """The main process's value, for everyone."""
        return self.all_gather(value if self.main else None)[0]

    def greatest(self, value: int) -> int:
        """Of all processes', at once: without `attend_by`'s."""
        greatest = torch.tensor(value)
        if self._messages is not None:
            with self._messages.exchange() as group:
                dist.all_reduce(greatest, dist.ReduceOp.MAX, group)
        return int(greatest)

    def any(self, flag: bool) -> bool:
        return any(self.by_rank(flag))

    def means_of_sums(self, own: Mapping[str, float], count: int) -> dict[str, float]:
        """Means over `count` things from each process's sums; all must ask at once, and some may have no sums."""
        totals: dict[str, float] = {}
        for part in self.all_gather(dict(own)):
            for name, value in part.items():
                totals[name] = totals.get(name, 0.0) + value
        return {name: total / count for name, total in totals.items()}

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Each parameter's gradient becomes the sum over processes; one that some process lacks counts as zero."""
        if self.size == 1:
            return
        whole = []
        for parameter in parameters:
            if shards.piece_of(parameter):
                continue  # ZeRO's, which it sums itself
            if parameter.grad is None:  # another process may have one, and all must sum the same tensors
                parameter.grad = torch.zeros_like(parameter)
            if not isinstance(parameter.grad, DTensor):
                whole.append(parameter.grad)
        self.sum(whole)
        for parameter in parameters:  # FSDP2 and ZeRO have made means of their parts' gradients
            if isinstance(parameter.grad, DTensor):
                shards.own(parameter.grad).mul_(self.size)
            elif (piece := shards.piece_of(parameter)) and piece.own.grad is not None:
                piece.own.grad.mul_(self.size)

    def sum(self, tensors: Iterable[Tensor]) -> None:
        """Each tensor becomes the sum over processes."""
        if self.size > 1:
            # A message first: NCCL would wait in silence for one that is missing or has run out of memory.
            self.all_gather(None)
            self.summed = True
            for tensor in tensors:
                dist.all_reduce(tensor)


def deal(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """The indices of `costs` that each of `ranks` gets, so that their sums differ little.

    The most expensive goes first, each to the rank with the least so far (longest processing time first, which is at
    most 4/3 of the best possible). Ties go to the first rank, so that all processes compute the same.
    """
    hands: list[list[int]] = [[] for _ in range(ranks)]
    sums = [0.0] * ranks
    for i in by_cost(costs):
        least = sums.index(min(sums))
        hands[least].append(i)
        sums[least] += costs[i]
    return hands


def by_cost(costs: Sequence[float]) -> list[int]:
    """Indices, the most expensive first, those of equal cost in their order."""
    return sorted(range(len(costs)), key=lambda i: -costs[i])


class Messages:
    """Exchanges of messages, in which a process that is missing is named instead of waited for in silence.

    Each process writes a heartbeat into the launcher's store: how many exchanges it has come to, and a count.
    """

    def __init__(self, rank: int, size: int, limit: float):
        self.rank, self.size, self.limit = rank, size, limit
        self.group: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=limit))
        self.exchanges = 0
        self._ended = threading.Event()
        self._signs = _in_background(self._live)
        atexit.register(self._end)

    @contextlib.contextmanager
    def exchange(self) -> Iterator[Any]:
        """The group of all processes, for one exchange. Raises UserError that says who did not take part."""
        self.exchanges += 1
        began = time.monotonic()
        try:
            yield self.group
        except RuntimeError as error:  # gloo has no other
            raise UserError(self._missing(time.monotonic() - began)) from error

    def _missing(self, waited: float) -> str:
        heartbeats: list[list[tuple[int, int, str]]] = []
        """All processes' (exchanges, count, where it runs), looked at twice."""

        def look() -> None:
            store = _store()
            for pause in (0.0, 4 * HEARTBEAT):
                time.sleep(pause)
                seen = []
                for rank in range(self.size):
                    count, beat, where = store.get(str(rank)).decode().split(" ", 2)
                    seen.append((int(count), int(beat), where))
                heartbeats.append(seen)

        # The store itself may be in a process that is stopped, and then never answers.
        asking = _in_background(look)
        asking.join(4 * HEARTBEAT + 10)
        late, remedy = [], f"see its log, and start again with --resume ({TIMEOUT}=SECONDS sets how long to wait)"
        if len(heartbeats) < 2:
            late = ["rank 0 does not answer"]
        else:
            first, second = heartbeats
            for rank, ((_, before, _), (count, beat, where)) in enumerate(zip(first, second)):
                if rank != self.rank and (before == beat or count < self.exchanges):
                    state = "was stopped, killed or cut off" if before == beat else "is alive and busy elsewhere"
                    late.append(f"rank {rank} ({where}) {state}")
        who = "; ".join(late) or "all processes are there, and the network between them failed"
        return f"processes: rank {self.rank} of {self.size} waited {waited:.0f} s for the others: {who}; {remedy}"

    def _live(self) -> None:
        store, where, beat = _store(), f"pid {os.getpid()} on {socket.gethostname()}", 0
        while not self._ended.is_set():
            store.set(str(self.rank), f"{self.exchanges} {beat} {where}")
            beat += 1
            self._ended.wait(HEARTBEAT)

    def _end(self) -> None:
        # A thread that is in the store while Python ends would abort the process.
        self._ended.set()
        self._signs.join(2)


def _store(seconds: float = 10.0, host: bool = False) -> dist.Store:
    """A connection to the store through which processes find each other; `host` makes it.

    torchrun keeps one over restarts, with the addresses of those that are gone, which must not be found.
    """
    address, port, limit = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timedelta(seconds=seconds)
    store = dist.TCPStore(address, port, is_master=host, timeout=limit, multi_tenant=True)
    return dist.PrefixStore(f"posttrain {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _in_background(target: Callable[[], None]) -> threading.Thread:
    """Runs it in a daemon thread; a lost connection ends it."""

    def run() -> None:
        with contextlib.suppress(RuntimeError):
            target()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def _timeout() -> float:
    given = os.environ.get(TIMEOUT, "1800")
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise UserError(f"{TIMEOUT}: is {given}; give the seconds to wait for another process, such as 1800")
    return seconds
