"""Judges behind the real vLLM: POSTTRAIN_VLLM names its executable (rewards/make_vllm_env.sh makes one)."""

import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from openai import AsyncOpenAI
from peft import PeftModel
from PIL import Image

from posttrain.errors import UserError
from posttrain.grpo import train as grpo
from posttrain.nano.world import damage, scenes
from posttrain.nano.world.prompts import HELDOUT_WORDS
from prompts.templates import load_template
from rewards import serve as serve_module
from rewards import traffic
from rewards.background import ScoreQueue
from rewards.base import RewardSpec
from rewards.encode import encode
from rewards.endpoints import JudgeError
from rewards.judge import Judge, spread
from rewards.load import load_rewards
from rewards.serve import Server, ServerError, ServerSpec, commands, serve
from rewards.vlm import VLM
from tests.helpers import runs, tiny

VLLM = os.environ.get("POSTTRAIN_VLLM", "")
CPU_ARGS = ["--max-model-len", "2048", "--max-num-seqs", "64", "--dtype", "float32", "--enforce-eager"]
CPU_ENV = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}

needs_vllm = pytest.mark.skipif(not VLLM, reason="POSTTRAIN_VLLM names no vLLM executable")


def an_image(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8))


WEIGHTS = Path(__file__).parents[2] / "posttrain/nano/weights"


def server_spec(name: str = "vlm", **options) -> ServerSpec:
    """judge-nano and its two adapters."""
    adapters = {name: str(WEIGHTS / f"judge-{name}") for name in ("aesthetic", "artifact")}
    settings = {"adapters": adapters, "executable": VLLM, "extra_args": CPU_ARGS, "env": CPU_ENV}
    return ServerSpec(name, str(WEIGHTS / "judge-nano"), **(settings | options))


@pytest.fixture(scope="session")
def urls(tmp_path_factory) -> Iterator[dict[str, list[str]]]:
    with serve([server_spec()], tmp_path_factory.mktemp("logs")) as urls:
        yield urls


def descendants_alive(marker: str) -> list[str]:
    """Command lines of processes that mention `marker`; vLLM's own children are found by their group."""
    lines = subprocess.run(["ps", "-ww", "-eo", "pgid,args"], capture_output=True, text=True, check=True).stdout
    groups = {line.split()[0] for line in lines.splitlines() if marker in line}
    return [line for line in lines.splitlines() if line.split()[0] in groups and "ps -ww" not in line]


REQUIREMENT = "there is exactly one shape"


def heldout_scenes() -> list[scenes.Scene]:
    """Twelve scenes that judge-nano was never trained on, six of them with a word."""
    rng = np.random.default_rng(5)
    kinds = ["text", "single", "text", "pair", "text", "trio"] * 2
    return [scenes.random_scene(rng, HELDOUT_WORDS, kind) for kind in kinds]


@pytest.mark.vllm
@needs_vllm
def test_four_rewards_from_one_server(urls):
    """On true scenes, and on the same with a fault: judge-nano behind vLLM says what the scene's graph says."""

    def spec(kind: str, model: str) -> RewardSpec:
        judge = {"model": model, "base_urls": "server://vlm", "max_text_tokens": 24}
        return RewardSpec(kind.lower(), {"class_path": f"rewards.image.{kind}", "init_args": {"judge": judge}})

    specs = [spec("Aesthetic", "aesthetic"), spec("Artifact", "artifact"), spec("Rubric", "vlm"), spec("OCR", "vlm")]
    drawn, rng = heldout_scenes(), np.random.default_rng(6)
    said = [scenes.describe(scene, rng) for scene in drawn]
    true = [scenes.render(scene) for scene in drawn]
    faulty = [damage.damage(image, scene, rng, "broken") for image, scene in zip(true, drawn)]
    wrong = [scenes.render(scenes.random_scene(rng, kind="single")) for _ in drawn]
    images = [Image.fromarray(i) for i in (*true, *faulty, *wrong)]
    columns = {"requirements": [d.requirements for d in said] * 3, "texts": [d.texts for d in said] * 3}
    with ScoreQueue(load_rewards(specs, urls)) as queue:
        queue.submit(images, [d.prompt for d in said] * 3, columns)
        scores = queue.gather()
    assert not scores.failed_NK.any() and scores.valid_NK[:, :3].all()
    wordy = np.array([bool(d.texts) for d in said])
    assert (scores.valid_NK[:, 3] == np.tile(wordy, 3)).all()  # no text asked for: does not apply
    aesthetic, artifact, rubric, ocr = scores.values_NK.T
    assert aesthetic.std() > 0.1  # it looks at the picture
    assert artifact[:12].min() > 0.5 > np.median(artifact[12:24])
    assert rubric[:12].min() > 0.9 and rubric[24:].max() < 0.8
    assert (ocr[:12][wordy] == 1).all() and (ocr[24:][wordy] == 0).all()
    detail = scores.details["rubric"][0]
    assert detail is not None and len(detail["answers"]) == len(said[0].requirements)


@pytest.mark.vllm
@needs_vllm
def test_an_images_bytes_travel_to_vllm_once(urls, monkeypatch):
    """By its id it has the scores that its bytes have; one that vLLM does not hold is sent again."""
    [url] = urls["vlm"]
    images = [Image.fromarray(scenes.render(scene)) for scene in heldout_scenes()[:4]]
    bodies: list[bytes] = []
    post = AsyncOpenAI.post

    async def noted(self, path, **options):
        bodies.append(options["content"])
        return await post(self, path, **options)

    async def ask(missing: Image.Image | None = None) -> list[float]:
        base, taste = Judge("vlm", url), Judge("aesthetic", url)
        if missing is not None:
            traffic.state_of(url)._held[encode(missing).hash] = None
            return [await taste.p_yes(missing, load_template("aesthetic"))]
        rubric = [base.p_yes(i, load_template("rubric"), requirement=r) for i in images for r in (REQUIREMENT, "x")]
        return await asyncio.gather(*rubric, *(taste.p_yes(i, load_template("aesthetic")) for i in images))

    monkeypatch.setattr(AsyncOpenAI, "post", noted)
    monkeypatch.setattr(traffic, "NAMED", 0)  # those of the nano world are small
    monkeypatch.setitem(traffic._names_images, url, False)
    whole = asyncio.run(ask())
    assert len(bodies) == 12 and all(b"base64" in body and b"uuid" not in body for body in bodies)
    del traffic._names_images[url], bodies[:]
    np.testing.assert_allclose(asyncio.run(ask()), whole, atol=1e-3)
    assert traffic._names_images[url] and len(bodies) == 12
    assert sum(b"base64" in body for body in bodies) == 1 + 4  # the first question shows what server it is
    bodies.clear()
    assert asyncio.run(ask(an_image(77)))[0] > 0 and [b"base64" in body for body in bodies] == [False, True]


@pytest.mark.vllm
@needs_vllm
def test_in_process_and_behind_vllm_agree(urls):
    """P(yes) within 1e-3 for the base and both adapters, and the same words read."""
    rng = np.random.default_rng(6)
    arrays = [scenes.render(scene) for scene in heldout_scenes()]
    arrays += [damage.damage(image, scene, rng, "broken") for image, scene in zip(arrays, heldout_scenes())]
    images = [Image.fromarray(array) for array in arrays]
    ask = {
        "vlm": load_template("rubric").render(requirement=REQUIREMENT),
        "aesthetic": load_template("aesthetic").render(),
        "artifact": load_template("artifact").render(),
    }

    async def served(name: str) -> list[float]:
        template = load_template("rubric" if name == "vlm" else name)
        fields = {"requirement": REQUIREMENT} if name == "vlm" else {}
        judge = Judge(name, urls["vlm"])
        return await asyncio.gather(*(judge.p_yes(image, template, **fields) for image in images))

    async def read() -> list[list[str]]:
        judge = Judge("vlm", urls["vlm"], max_text_tokens=24)
        return await asyncio.gather(*(judge.transcribe(image, load_template("transcribe")) for image in images))

    for name, text in ask.items():
        vlm = VLM.load(str(WEIGHTS / "judge-nano"))
        if name != "vlm":
            vlm.model = PeftModel.from_pretrained(vlm.model, str(WEIGHTS / f"judge-{name}")).eval()
        mine = vlm.p_yes(images, [text] * len(images))
        difference = np.abs(np.subtract(mine, asyncio.run(served(name)))).max()
        print(f"{name}: in process and served differ by at most {difference:.1e}")
        assert difference < 1e-3 and np.ptp(mine) > 0.1
    vlm = VLM.load(str(WEIGHTS / "judge-nano"))
    texts = vlm.complete(images, [load_template("transcribe").render()] * len(images), 24)
    assert [json.loads(text)["lines"] for text in texts] == asyncio.run(read())


@pytest.mark.vllm
@needs_vllm
def test_the_base_answers_alike_beside_its_adapters(urls):
    """Images between two, whose answers are not certain: an adapter in the base's place would change most of them."""
    drawn = [scenes.render(scene).astype(float) for scene in heldout_scenes()]
    blends = [Image.fromarray(((a + b) / 2).astype(np.uint8)) for a, b in zip(drawn, drawn[1:])]
    template = load_template("rubric")
    needs = [REQUIREMENT, "there are exactly two shapes", "the background is black", "the style is outline"]

    questions = list(itertools.product(blends, needs))

    async def scores(beside: bool) -> list[float]:
        base, others = Judge("vlm", urls["vlm"]), [Judge(name, urls["vlm"]) for name in ("artifact", "aesthetic")]
        asked = [base.p_yes(image, template, requirement=need) for image, need in questions]
        count = len(asked)
        if beside:
            for judge in others:
                asked += [judge.p_yes(image, load_template(judge.model)) for image in blends]
        return (await asyncio.gather(*asked))[:count]

    vlm = VLM.load(str(WEIGHTS / "judge-nano"))
    mine = []
    for image, need in questions:
        mine += vlm.p_yes([image], [template.render(requirement=need)])
    assert sum(0.02 < p < 0.98 for p in mine) >= 4
    # Alone, beside others, and alone after them.
    for beside in (False, True, True, False):
        np.testing.assert_allclose(asyncio.run(scores(beside)), mine, atol=2e-3)


@pytest.mark.vllm
@needs_vllm
def test_adapters_are_bound_and_scores_repeat(urls):
    template = load_template("aesthetic")

    async def main() -> None:
        scores = {}
        for name in ("vlm", "aesthetic", "artifact"):
            judge = Judge(name, urls["vlm"])
            scores[name] = await asyncio.gather(*(judge.p_yes(an_image(i), template) for i in range(4)))
            images = [an_image(i) for i in range(4)]
            alone = await judge.asked_alone(images, template, 10)
            differ = spread(alone, await judge.asked_together(images, template, 10))
            print(f"{name}: repeatability {differ:.2e}")
            assert differ < 1e-3
        assert np.abs(np.subtract(scores["vlm"], scores["aesthetic"])).max() > 1e-3
        assert np.abs(np.subtract(scores["artifact"], scores["aesthetic"])).max() > 1e-3
        with pytest.raises(JudgeError, match=r"HTTP 404.*nobody"):
            await Judge("nobody", urls["vlm"]).p_yes(an_image(0), template)

    asyncio.run(main())


@pytest.mark.vllm
@needs_vllm
def test_a_run_says_how_far_its_judges_repeat_themselves(urls, tmp_path, capsys):
    """Three rewards ask two judges: two lines before the first step, two metrics of step 0, two in the summary."""
    config = runs.config(tmp_path, tiny.save(tmp_path / "k2"))
    config.steps = 1
    kinds = [("Aesthetic", "aesthetic", 1), ("Rubric", "vlm", 1), ("OCR", "vlm", 0)]
    config.rewards = [
        RewardSpec(
            kind, {"class_path": f"rewards.image.{kind}", "init_args": {"judge": judge}}, weight, max_failures=1.0
        )
        for kind, model, weight in kinds
        for judge in [{"model": model, "base_urls": urls["vlm"], "max_text_tokens": 24}]
    ]
    for name in ("train", "heldout"):
        (tmp_path / f"{name}.jsonl").write_text('{"prompt": "a red cube", "requirements": ["a cube is there"]}\n')
    grpo.train(config)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("posttrain: judge ")]
    assert [line.split(":")[1] for line in lines] == [" judge aesthetic", " judge vlm"]
    assert all("20 scores of one image differ by at most" in line and "P(yes)" in line for line in lines)
    logged = [row for row in runs.rows(config.output) if "repeatability/vlm" in row]
    summary = json.loads((Path(config.output) / "summary.json").read_text())
    assert len(logged) == 1 and logged[0]["step"] == 0
    assert all(f"injection/image/{name}" in logged[0] for name, _, _ in kinds)
    for judge in ("aesthetic", "vlm"):
        assert 0 <= logged[0][f"repeatability/{judge}"] < 1e-3
        assert summary[f"repeatability/{judge}"] == logged[0][f"repeatability/{judge}"]
    assert "repeatability/vlm" in (Path(config.output) / "report.html").read_text()


@pytest.mark.vllm
@needs_vllm
def test_dead_server_shows_its_log(tmp_path):
    broken = server_spec(extra_args=["--no-such-option"])
    with pytest.raises(ServerError, match=r"vlm died while starting") as error:
        serve([broken], tmp_path).__enter__()
    assert "no-such-option" in error.value.detail
    with pytest.raises(ServerError, match=r"not up after 1 s"):
        serve([server_spec("brief", ready_timeout=1)], tmp_path).__enter__()
    assert not descendants_alive("--served-model-name brief")


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
    # A shell that starts the tests in the background has them ignore SIGINT.
    code = f"""if True:
        import signal
        from pathlib import Path
        from rewards import supervise
        signal.signal(signal.SIGINT, signal.default_int_handler)
        from rewards.serve import ServerSpec, serve
        serve([{spec}], Path({str(tmp_path / "logs")!r})).__enter__()
    """
    parent = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    log = tmp_path / "logs" / "x.log"
    wait_for(lambda: log.exists() and "loading" in log.read_text())
    assert len(descendants_alive(str(tmp_path / "vllm"))) >= 3  # supervisor, command, its child
    parent.send_signal(signal.Signals[how])
    parent.wait(30)
    wait_for(lambda: not descendants_alive(str(tmp_path / "vllm")), seconds=20)


def wait_for(condition, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_commands_for_another_machine(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"r": 12, "rank_pattern": {"q": 20}}')
    spec = ServerSpec("vlm", "org/base", {"nice": str(tmp_path)}, gpus=[2, 3], extra_args=["--seed", "1"])
    comment, line = commands([spec], host="10.0.0.2")
    assert comment == "# vlm: base URL http://10.0.0.2:8000/v1, models vlm, nice"
    assert line.startswith("CUDA_VISIBLE_DEVICES=2,3 vllm serve org/base --served-model-name vlm --host 10.0.0.2")
    assert "--tensor-parallel-size 2" in line and "--max-lora-rank 32" in line
    assert f"--lora-modules nice={tmp_path} --seed 1" in line
    pinned = commands([ServerSpec("vlm", "org/base@v1")], host="10.0.0.2")[1]
    assert "vllm serve org/base --served-model-name vlm --revision v1 --tokenizer-revision v1 --host" in pinned


def test_servers_on_one_gpu_are_started_one_after_another(tmp_path, monkeypatch):
    """vLLM takes for its own what another one allocates while it starts."""
    said: list[str] = []

    def start(spec, log):
        said.append(f"start {spec.name}")
        return Server(spec, 1, log, subprocess.Popen(["true"], stdin=subprocess.PIPE))

    monkeypatch.setattr(serve_module, "missing", lambda spec: [])
    monkeypatch.setattr(serve_module, "_start", start)
    monkeypatch.setattr(serve_module, "_wait_until_ready", lambda server: said.append(f"up {server.spec.name}"))
    specs = [ServerSpec("a", "m", gpus=[7]), ServerSpec("b", "m", gpus=[0, 1]), ServerSpec("c", "m", gpus=[7])]
    with serve(specs, tmp_path):
        assert said == ["start a", "start b", "up a", "start c", "up a", "up b", "up c"]


@pytest.mark.parametrize(
    ("mask", "gpus", "seen"),
    [
        (None, [2, 3], "2,3"),
        ("4,5,6,7", [0], "4"),
        ("4,5,6,7", [3, 1], "7,5"),
        ("GPU-aa,GPU-bb", [1], "GPU-bb"),
        ("", [1], "1"),  # training on the CPU, a judge on a GPU
        ("4,5", [], "4,5"),
    ],
)
def test_gpus_count_within_the_mask(monkeypatch, mask, gpus, seen):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if mask is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", mask)
    assert serve_module._environment(ServerSpec("a", "m", gpus=gpus))["CUDA_VISIBLE_DEVICES"] == seen


def test_a_gpu_beyond_the_mask_is_refused_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    problem = "server a: gpus: is [0, 2], and CUDA_VISIBLE_DEVICES=4,5 leaves 2, which count from 0: name those of 0 to"
    spec = ServerSpec("a", "m", gpus=[0, 2], executable=fake_executable(tmp_path))
    assert serve_module.missing(spec) == [f"{problem} 1"]
    mine = ServerSpec("a", "m", gpus=[0, 2], env={"CUDA_VISIBLE_DEVICES": "1"}, executable=spec.executable)
    assert commands([mine])[1].startswith("CUDA_VISIBLE_DEVICES=1 ")  # of another machine, whose mask is not known


def test_mistakes_are_user_errors(tmp_path):
    fake = fake_executable(tmp_path)
    for spec, message in [
        (ServerSpec("a", "m", executable="no-such-vllm"), "executable: no 'no-such-vllm'"),
        (ServerSpec("a", "./nowhere", executable=fake), "model: ./nowhere is not a directory: correct the path"),
        (ServerSpec("a", "m", {"x": "/nowhere"}, executable=fake), "adapters: no LoRA adapter in /nowhere"),
    ]:
        with pytest.raises(UserError, match=message):
            serve([spec], tmp_path / "logs").__enter__()
    with pytest.raises(UserError, match=r"vllm/logs: cannot be made for the servers' logs: Not a directory"):
        serve([ServerSpec("a", "m", executable=fake)], Path(fake) / "logs").__enter__()


def test_a_server_that_is_up_elsewhere_is_not_started(tmp_path):
    urls = ["http://10.0.0.2:8000/v1", "http://10.0.0.3:8000/v1"]
    with serve([ServerSpec("a", "m", executable="no-such-vllm", urls=urls)], tmp_path / "logs") as found:
        assert found == {"a": urls}
    assert not (tmp_path / "logs").exists()
    specs = [ServerSpec("a", "m", urls=urls), ServerSpec("b", "m")]
    assert [line[:1] for line in commands(specs, "10.0.0.4")] == ["#", "v"]
