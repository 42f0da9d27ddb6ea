"""vLLM servers for judges: one base model each, with LoRA adapters served as further model names.

    with serve(specs, Path("runs/x/servers")) as urls:  # {"vlm": ["http://127.0.0.1:40123/v1"]}
        rewards = load_rewards(reward_specs, urls)

vLLM lives in an environment of its own (rewards/make_vllm_env.sh makes one); `executable` says where. Servers
listen on the loopback interface only. For another machine, print `commands` and put its URL in the recipe; the
command `posttrain serve` does either.
"""

import contextlib
import http.client
import itertools
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import psutil
from pydantic import model_validator

from posttrain.config.types import Each, Port, Positive, Range, refusal, settings
from posttrain.errors import UserError, first_line
from posttrain.loading import adapter_folder, hub_name, is_hub_id, without_revision
from rewards import supervise

LOOPBACK = "127.0.0.1"
LOG_TAIL_LINES = 30
DEFAULT_SHARE = 0.9  # of a GPU's memory, vLLM's own default
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's --max-lora-rank takes
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")

SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)
"""Matches the names of variables whose values no file may hold."""
SECRET_IN_URL = re.compile(r"(key|token|secret|password)=", re.IGNORECASE)

KEY_VARIABLE = "VLLM_API_KEY"
"""vLLM asks for this key where it is set, and the servers of a run inherit it."""


class ServerURL(str):
    """The URL of one of a recipe's servers, which gets the key of `KEY_VARIABLE`."""


def read_key(variable: str, where: str) -> str | None:
    """The key in an environment variable. Raises UserError, without the key, for one that no header can hold."""
    key = os.environ.get(variable) or None
    if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
        raise UserError(
            f"{where}: {variable} holds a line's end, a space or another character that no key has: export it without"
        )
    return key


def refuse_keys(urls: Sequence[str], where: str) -> None:
    """Raises UserError for a URL with a key in it: recipes, logs and messages hold the URL."""
    for url in urls:
        # user:password@ before the host, or a query such as ?api_key=...
        if re.match(r"\w+://[^/]*@", url) or SECRET_IN_URL.search(url):
            raise UserError(f"{where}: a URL holds a key: put that into an environment variable, named by api_key_env")


def check_urls(urls: Sequence[str], where: str) -> None:
    """Raises UserError for a text that is not the URL of a server, comes twice or holds a key."""
    refuse_keys(urls, where)
    for url in urls:
        try:
            parts = urlsplit(url)
            right = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:  # a port that is not a number
            right = False
        if not right:
            raise UserError(f"{where}: '{url}' is not a URL: write http://HOST:PORT/v1")
        if urls.count(url) > 1:
            raise UserError(f"{where}: {url} is there twice: name each server once")


class ServerError(UserError):
    """A server that did not come up or did not stay up. `detail` is the end of its log."""


@settings
class ServerSpec:
    """A vLLM server to start with the run."""

    name: str
    """Rewards reach it as server://NAME; its base model is served under this name."""
    model: str
    """Directory or hub id (OWNER/NAME, or OWNER/NAME@REVISION) of the base model."""
    adapters: dict[str, str] = field(default_factory=dict)
    """LoRA adapters, served as further models: model name to adapter directory, or to a run of posttrain judge."""
    port: Port = 0
    """TCP port on the loopback interface; 0: any free one."""
    gpus: Annotated[list[int], Each(Range(0))] = field(default_factory=list)
    """GPUs it may use, counted among those that CUDA_VISIBLE_DEVICES leaves; several: tensor parallel; none: vLLM
    decides."""
    executable: str = "vllm"
    """The vllm command of its own environment; rewards/make_vllm_env.sh makes one."""
    extra_args: list[str] = field(default_factory=list)
    """More arguments for `vllm serve`."""
    env: dict[str, str] = field(default_factory=dict)
    """More environment variables for it."""
    ready_timeout: Positive = 900.0
    """Seconds until every model must answer."""
    urls: list[str] = field(default_factory=list)
    """Where it is up already, such as http://10.0.0.2:8000/v1; several equal ones are balanced. Nothing is started
    then, and all else but the name is not read. Empty: it is started here."""

    @model_validator(mode="after")
    def _fits(self) -> "ServerSpec":
        if not self.name.strip() or "/" in self.name:
            raise refusal("name", f"is '{self.name}'; give a name without a slash")
        if len({*self.gpus}) < len(self.gpus):
            raise refusal("gpus", f"is {self.gpus}, with one of them twice; name each once")
        self._refuse_keys()
        try:
            check_urls(self.urls, "urls")
        except UserError as error:
            raise refusal("urls", str(error).partition(": ")[2]) from error
        return self

    def _refuse_keys(self) -> None:
        """A run keeps its recipe, so keys come from the environment, which servers inherit."""
        for name, value in self.env.items():
            if SECRET.search(name) and value:
                raise refusal(f"env.{name}", "a run keeps its recipe: export the variable, servers inherit it")
        if any(word.partition("=")[0] == "--api-key" for word in self.extra_args):
            raise refusal("extra_args", "a run keeps its recipe: export VLLM_API_KEY and leave out --api-key")


@dataclass
class Server:
    """A server that runs on this machine."""

    spec: ServerSpec
    port: int
    log: Path
    process: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self.port}"

    def __str__(self) -> str:
        return _description(self.spec, LOOPBACK, self.port)

    def check(self) -> None:
        """Raises a ServerError if it is no longer there."""
        if self.process.poll() is not None:
            raise self.error("died")

    def listens(self) -> bool:
        """Whether it is the server, or a process of it, that has the port: another one may have been faster."""
        try:
            supervisor = psutil.Process(self.process.pid)
            for process in [supervisor, *supervisor.children(recursive=True)]:
                for connection in process.net_connections("tcp"):
                    if connection.status == psutil.CONN_LISTEN and connection.laddr.port == self.port:
                        return True
        except psutil.NoSuchProcess:  # it has ended since
            return False
        except psutil.AccessDenied:  # nobody can tell
            return True
        return False

    def error(self, problem: str) -> ServerError:
        text = self.log.read_text(encoding="utf-8", errors="replace")
        if key := os.environ.get(KEY_VARIABLE):
            text = text.replace(key, "***")
        lines = text.splitlines()[-LOG_TAIL_LINES:]
        return ServerError(f"server {self.spec.name} {problem}; the end of its log {self.log}:", "\n".join(lines))


@contextlib.contextmanager
def serve(specs: Sequence[ServerSpec], log_dir: Path) -> Iterator[dict[str, list[str]]]:
    """The base URLs of each server, by name: of one that is `running` during the block, or that is up elsewhere."""
    elsewhere = {spec.name: spec.urls for spec in specs if spec.urls}
    with running(specs, log_dir) as servers:
        yield elsewhere | {server.spec.name: [f"{server.url}/v1"] for server in servers}


@contextlib.contextmanager
def running(specs: Sequence[ServerSpec], log_dir: Path) -> Iterator[list[Server]]:
    """Starts all servers but those elsewhere, waits until every model answers, and stops them at the end of the block.
    Those that share a GPU are started one after another, the others at once.

    They also stop when this process dies, however it dies.
    """
    specs = [spec for spec in specs if not spec.urls]
    for spec in specs:
        for problem in missing(spec):
            raise UserError(problem)
    try:
        if specs:
            log_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{log_dir}: cannot be made for the servers' logs: {error.strerror}: choose another") from error
    with contextlib.ExitStack() as stack:
        servers = []
        for spec in specs:
            for other in servers:  # vLLM takes what another one allocates while it starts for its own
                if {*spec.gpus} & {*other.spec.gpus}:
                    _wait_until_ready(other)
            server = _start(spec, log_dir / f"{spec.name}.log")
            stack.callback(_stop, server)
            servers.append(server)
        for server in servers:
            _wait_until_ready(server)
        yield servers


def commands(specs: Sequence[ServerSpec], host: str = LOOPBACK) -> list[str]:
    """The same servers as shell commands for another machine, each below a comment with its URL and models."""
    lines = []
    to_start = [spec for spec in specs if not spec.urls]
    for i, spec in enumerate(to_start):
        port = spec.port or 8000 + i
        variables = [f"{name}={shlex.quote(value)}" for name, value in _variables(spec).items()]
        lines.append(f"# {_description(spec, host, port)}")
        lines.append(" ".join([*variables, shlex.join(command(spec, host, port))]))
    return lines


def _description(spec: ServerSpec, host: str, port: int) -> str:
    return f"{spec.name}: base URL http://{host}:{port}/v1, models {', '.join([spec.name, *spec.adapters])}"


def command(spec: ServerSpec, host: str, port: int) -> list[str]:
    words = [os.path.expanduser(spec.executable), "serve", without_revision(spec.model)]
    words += ["--served-model-name", spec.name]
    if is_hub_id(spec.model) and (revision := hub_name(spec.model)[1]):
        words += ["--revision", revision, "--tokenizer-revision", revision]
    words += ["--host", host, "--port", str(port)]
    words += ["--enable-prefix-caching", "--limit-mm-per-prompt", '{"image": 1, "video": 0}']
    if len(spec.gpus) > 1:
        words += ["--tensor-parallel-size", str(len(spec.gpus))]
    if spec.adapters:
        rank = max(_rank(spec, path) for path in spec.adapters.values())
        # All adapters at once, so that none waits. On what may be a CPU an empty place stands behind them: there vLLM
        # (0.32) has a question to the base answered by the adapter in the last place, once adapters have been asked.
        places = len(spec.adapters) + (not spec.gpus)
        words += ["--enable-lora", "--max-loras", str(places), "--max-lora-rank", str(rank)]
        words += ["--lora-modules", *(f"{name}={adapter_folder(path)}" for name, path in spec.adapters.items())]
    return words + spec.extra_args


def _rank(spec: ServerSpec, path: str) -> int:
    """The smallest rank that vLLM offers and the adapter fits."""
    try:
        config = json.loads((adapter_folder(path) / "adapter_config.json").read_text(encoding="utf-8"))
        needed = max([config["r"], *config.get("rank_pattern", {}).values()])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"server {spec.name}: adapters: no LoRA adapter in {path}: {error}") from error
    for rank in LORA_RANKS:
        if rank >= needed:
            return rank
    raise UserError(f"server {spec.name}: adapters: {path} has rank {needed}, vLLM takes at most 512")


def memory_share(spec: ServerSpec) -> float:
    """The share of each of its GPUs that vLLM takes. Raises UserError for a value that is not a number."""
    words: list[str] = []
    for word in spec.extra_args:
        words += word.split("=", 1)  # both `--option value` and `--option=value` are allowed
    for option, value in itertools.pairwise(words):
        if option == "--gpu-memory-utilization":
            try:
                return float(value)
            except ValueError:
                raise UserError(f"server {spec.name}: extra_args: {option} is {value}, not a number") from None
    return DEFAULT_SHARE


def _variables(spec: ServerSpec) -> dict[str, str]:
    gpus = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, spec.gpus))} if spec.gpus else {}
    return gpus | spec.env


def _environment(spec: ServerSpec) -> dict[str, str]:
    """Ours, without what a distributed launcher put there for training: vLLM would join that world."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHER_VARIABLES)}
    visible = {"CUDA_VISIBLE_DEVICES": ",".join(_visible(spec))} if spec.gpus else {}
    # On a CPU engine and worker wait for each other at full speed, unless they are one process, as they are on one GPU.
    together = {} if spec.gpus else {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    return together | inherited | visible | spec.env


def _visible(spec: ServerSpec) -> list[str]:
    """Its GPUs by the numbers or UUIDs that a scheduler's mask has for them. Raises UserError for one beyond it."""
    mask = os.environ.get("CUDA_VISIBLE_DEVICES", "").strip()
    if mask in ("", "-1"):  # no mask, or one that keeps the training on the CPU
        return [str(gpu) for gpu in spec.gpus]
    names = [name.strip() for name in mask.split(",")]
    if max(spec.gpus, default=0) >= len(names):
        raise UserError(
            f"server {spec.name}: gpus: is {spec.gpus}, and CUDA_VISIBLE_DEVICES={mask} leaves {len(names)}, which"
            f" count from 0: name those of 0 to {len(names) - 1}"
        )
    return [names[gpu] for gpu in spec.gpus]


def missing(spec: ServerSpec) -> list[str]:
    """What is not on this machine: the command, a model's directory, an adapter, a GPU."""
    problems = []
    if shutil.which(os.path.expanduser(spec.executable)) is None:
        problems.append(
            f"server {spec.name}: executable: no '{spec.executable}': make an environment with "
            "rewards/make_vllm_env.sh and name its bin/vllm"
        )
    if spec.model.startswith((".", "/")) and not Path(spec.model).is_dir():
        problems.append(f"server {spec.name}: model: {spec.model} is not a directory: correct the path")
    for path in spec.adapters.values():
        try:
            _rank(spec, path)
        except UserError as error:
            problems.append(str(error))
    try:
        _visible(spec)
    except UserError as error:
        problems.append(str(error))
    return problems


def _free_port(spec: ServerSpec) -> int:
    """The spec's port, or one that the kernel names. Between here and vLLM's bind another process could take it."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that has just been closed is free
        try:
            probe.bind((LOOPBACK, spec.port))
        except OSError as error:  # an older server, which would answer in the place of this one
            raise UserError(
                f"server {spec.name}: port: {spec.port}: {error.strerror}: stop what uses it, or give 0 for a free one"
            ) from None
        return probe.getsockname()[1]


def _start(spec: ServerSpec, log: Path) -> Server:
    port = _free_port(spec)
    words = command(spec, LOOPBACK, port)
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, supervise.__file__, *words],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=_environment(spec),
            start_new_session=True,  # supervise.py kills its whole session, with all of vLLM's processes
        )
    return Server(spec, port, log, process)


def _stop(server: Server) -> None:
    server.process.terminate()  # SIGTERM to supervise.py, which ends vLLM's whole process group
    server.process.wait()
    assert server.process.stdin is not None
    server.process.stdin.close()


def _wait_until_ready(server: Server) -> None:
    spec, deadline = server.spec, time.monotonic() + server.spec.ready_timeout
    key = read_key(KEY_VARIABLE, f"server {spec.name}")
    while not (_answers(f"{server.url}/health", key) and server.listens()):
        if server.process.poll() is not None:
            raise server.error("died while starting")
        if time.monotonic() > deadline:
            raise server.error(f"was not up after {spec.ready_timeout:g} s (ready_timeout)")
        time.sleep(0.5)
    try:
        with _open(f"{server.url}/v1/models", key, 10) as response:
            served = {model["id"] for model in json.load(response)["data"]}
    except urllib.error.HTTPError as error:
        raise server.error(f"answers /v1/models with HTTP {error.code} {error.reason}") from None
    except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
        raise server.error(f"does not answer /v1/models: {first_line(error)}") from None
    if missing := {spec.name, *spec.adapters} - served:
        raise server.error(f"does not serve {', '.join(sorted(missing))}")


def _open(url: str, key: str | None, timeout: float) -> Any:
    """Without the proxies of the environment, which are not for this machine's own servers."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    return direct.open(urllib.request.Request(url, headers=headers), timeout=timeout)


def _answers(url: str, key: str | None) -> bool:
    try:
        with _open(url, key, 5) as response:
            return response.status == 200
    except (OSError, http.client.HTTPException):
        return False
