"""Judges behind the real vLLM: POSTTRAIN_VLLM names its executable (rewards/make_vllm_env.sh makes one)."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prompts.errors import UserError
from prompts.templates import load_template
from rewards.background import ScoreQueue
from rewards.base import RewardSpec
from rewards.endpoints import JudgeError
from rewards.judge import Judge
from rewards.load import load_rewards
from rewards.serve import ServerError, ServerSpec, commands, serve
from tests import tiny_vlm

VLLM = os.environ.get("POSTTRAIN_VLLM", "")
CPU_ARGS = ["--max-model-len", "2048", "--max-num-seqs", "64", "--dtype", "float32", "--enforce-eager"]
CPU_ENV = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}

needs_vllm = pytest.mark.skipif(not VLLM, reason="POSTTRAIN_VLLM names no vLLM executable")


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8))


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("vlm")
    tiny_vlm.build_model(directory / "base")
    for seed, name in enumerate(["aesthetic", "artifact"], 1):
        tiny_vlm.build_adapter(directory / "base", directory / name, seed)
    return directory


def server_spec(model: Path, **options) -> ServerSpec:
    adapters = {name: str(model / name) for name in ("aesthetic", "artifact")}
    settings = {"adapters": adapters, "executable": VLLM, "extra_args": CPU_ARGS, "env": CPU_ENV}
    return ServerSpec("vlm", str(model / "base"), **(settings | options))


@pytest.fixture(scope="session")
def urls(model) -> Iterator[dict[str, list[str]]]:
    with serve([server_spec(model)], model / "logs") as urls:
        yield urls


def descendants_alive(marker: str) -> list[str]:
    """Command lines of processes that mention `marker`; vLLM's own children are found by their group."""
    lines = subprocess.run(["ps", "-eo", "pgid,args"], capture_output=True, text=True, check=True).stdout
    groups = {line.split()[0] for line in lines.splitlines() if marker in line}
    return [line for line in lines.splitlines() if line.split()[0] in groups and "ps -eo" not in line]


@pytest.mark.vllm
@needs_vllm
def test_four_rewards_from_one_server(urls):
    def judge(name: str) -> dict:
        return {"judge": {"model": name, "base_urls": "server://vlm", "max_text_tokens": 24}}

    specs = [
        RewardSpec("aesthetic", {"class_path": "rewards.image.Aesthetic", "init_args": judge("aesthetic")}),
        RewardSpec("artifact", {"class_path": "rewards.image.Artifact", "init_args": judge("artifact")}),
        RewardSpec("rubric", {"class_path": "rewards.image.Rubric", "init_args": judge("vlm")}),
        RewardSpec("ocr", {"class_path": "rewards.image.OCR", "init_args": judge("vlm")}, max_failures=1),
    ]
    rewards = load_rewards(specs, urls)
    columns = {"requirements": [["a red cube", "two dogs"]] * 8, "texts": [["sale"]] * 4 + [[]] * 4}
    with ScoreQueue(rewards) as queue:
        queue.submit([picture(i) for i in range(8)], ["a picture"] * 8, columns)
        scores = queue.gather()
    assert scores.valid_NK[:, :3].all()
    assert ((scores.values_NK >= 0) & (scores.values_NK <= 1)).all()
    assert scores.values_NK[:, :3].std(0).min() > 1e-3  # it looks at the picture
    assert not (scores.valid_NK | scores.failed_NK)[4:, 3].any()  # no text asked for: does not apply
    assert (scores.valid_NK | scores.failed_NK)[:4, 3].all()  # a random model may ramble, but that is said
    detail = scores.details["rubric"][0]
    assert detail is not None and len(detail["answers"]) == 2


@pytest.mark.vllm
@needs_vllm
def test_adapters_are_bound_and_scores_repeat(urls):
    template = load_template("aesthetic")

    async def main() -> None:
        scores = {}
        for name in ("vlm", "aesthetic", "artifact"):
            judge = Judge(name, urls["vlm"])
            scores[name] = await asyncio.gather(*(judge.p_yes(picture(i), template) for i in range(4)))
            spread = await judge.repeatability([picture(i) for i in range(4)], template, n=20)
            print(f"{name}: repeatability {spread:.2e}")
            assert spread < 1e-3
        assert np.abs(np.subtract(scores["vlm"], scores["aesthetic"])).max() > 1e-3
        assert np.abs(np.subtract(scores["artifact"], scores["aesthetic"])).max() > 1e-3
        with pytest.raises(JudgeError, match=r"HTTP 404.*nobody"):
            await Judge("nobody", urls["vlm"]).p_yes(picture(0), template)

    asyncio.run(main())


@pytest.mark.vllm
@needs_vllm
def test_dead_server_shows_its_log(model, tmp_path):
    broken = server_spec(model, extra_args=["--no-such-option"])
    with pytest.raises(ServerError, match=r"(?s)vlm died while starting.*no-such-option"):
        serve([broken], tmp_path).__enter__()
    with pytest.raises(ServerError, match=r"(?s)not up after 1 s"):
        serve([server_spec(model, ready_timeout=1)], tmp_path).__enter__()
    assert not descendants_alive(str(tmp_path))


def fake_executable(directory: Path, stubborn: bool = False) -> str:
    """A command with a child of its own, both of which may ignore SIGTERM, as a server's engine can."""
    trap = "trap '' TERM\n" if stubborn else ""
    path = directory / "vllm"
    path.write_text(f'#!/bin/sh\n{trap}sleep 987 &\necho "loading $*"\nwait\n')
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("how, stubborn", [("SIGKILL", True), ("SIGTERM", False), ("SIGINT", False)])
def test_no_orphans_when_the_parent_dies(tmp_path, how, stubborn):
    spec = f"ServerSpec('x', {str(tmp_path)!r}, executable={fake_executable(tmp_path, stubborn)!r})"
    code = f"""if True:
        from pathlib import Path
        from rewards import supervise
        from rewards.serve import ServerSpec, serve
        serve([{spec}], Path({str(tmp_path / "logs")!r})).__enter__()
    """
    parent = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    log = tmp_path / "logs" / "x.log"
    wait_for(lambda: log.exists() and "loading" in log.read_text())
    assert len(descendants_alive(str(tmp_path / "vllm"))) >= 3  # supervisor, command, its child
    parent.send_signal(signal.Signals[how])
    parent.wait()
    wait_for(lambda: not descendants_alive(str(tmp_path / "vllm")), seconds=20)


def wait_for(condition, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_commands_for_another_machine(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"r": 12, "rank_pattern": {"q": 20}}')
    spec = ServerSpec("vlm", "org/base", {"nice": str(tmp_path)}, gpus=[2, 3], extra_args=["--seed", "1"])
    (line,) = commands([spec], host="10.0.0.2")
    assert line.startswith("CUDA_VISIBLE_DEVICES=2,3 vllm serve org/base --served-model-name vlm --host 10.0.0.2")
    assert "--tensor-parallel-size 2" in line and "--max-lora-rank 32" in line
    assert f"--lora-modules nice={tmp_path} --seed 1" in line


def test_mistakes_are_user_errors(tmp_path):
    fake = fake_executable(tmp_path)
    for spec, message in [
        (ServerSpec("a", "m", executable="no-such-vllm"), "executable: no 'no-such-vllm'"),
        (ServerSpec("a", "./nowhere", executable=fake), "model: ./nowhere is no directory"),
        (ServerSpec("a", "m", {"x": "/nowhere"}, executable=fake), "adapters: no LoRA adapter in /nowhere"),
    ]:
        with pytest.raises(UserError, match=message):
            serve([spec], tmp_path / "logs").__enter__()
