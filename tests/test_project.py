"""`posttrain init`, `posttrain demo`, and both from a wheel, in a directory that is no checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from PIL import Image

from posttrain import cli, project
from tests.helpers import runs


def test_a_project_has_recipes_prompts_and_a_reward(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["init", "p"]) == 0
    assert capsys.readouterr().out == "posttrain: wrote a project into p; its README.md says how to begin\n"
    made = {str(file.relative_to("p")) for file in Path("p").rglob("*") if file.is_file()}
    for name in ("recipes", "prompts"):
        data = [
            file.relative_to(runs.ROOT)
            for file in (runs.ROOT / name).rglob("*.*")
            if file.suffix in (".yaml", ".jsonl", ".txt")
        ]
        assert data and {str(file) for file in data} <= made
    others = {"README.md", "my_rewards.py", "warm.yaml", "make_vllm_env.sh"}
    assert {file for file in made if not file.startswith(("recipes/", "prompts/"))} == others
    assert len(Path("p/README.md").read_text().splitlines()) <= 12 and os.access("p/make_vllm_env.sh", os.X_OK)


def test_each_command_of_a_projects_readme_parses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["init", "p"]) == 0
    monkeypatch.chdir("p")
    lines = [line.split("#")[0].split() for line in project.README.splitlines() if line.startswith("    posttrain")]
    assert len(lines) == 4
    for words in lines:
        parsed = cli.parse(" ".join(words[1:]).replace('"two red stars"', "stars").split())
        name, config = parsed.name, parsed.config
        assert name == words[1]
        if name == "grpo":
            assert [reward.name for reward in config.rewards] == ["warmth", "oracle"] and config.output == "runs/warm"


def test_the_projects_reward_scores():
    scope: dict = {}
    exec(project.REWARD, scope)
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ((200, 0, 0), (0, 0, 200)))
    scores = scope["warmth"]([red, blue, red], ["a room", "a hall", "a blue room"], tags=None)
    assert scores == [pytest.approx(200 / 201), 0, None]


def test_init_leaves_what_is_there(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("p").mkdir()
    Path("p/notes").write_text("mine")
    assert cli.main(["init", "p"]) == 2
    assert capsys.readouterr().err == "posttrain: error: directory: p is not empty; choose another name\n"
    Path("file").write_text("")
    assert cli.main(["init", "file"]) == 2
    assert "directory: file cannot be written: File exists; choose another name" in capsys.readouterr().err
    assert sorted(os.listdir("p")) == ["notes"]


def test_the_demo_runs_the_nano_pipeline_by_torchrun_on_the_cpu(monkeypatch, capsys):
    called, run = [], cli.main
    for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "7")
    monkeypatch.setattr(cli, "main", lambda words: called.append(words) or 5)
    assert run(["demo", "--output", "runs/d", "--processes", "4"]) == 5
    (words,) = called
    parsed = cli.parse(words)
    config, resume = parsed.config, parsed.resume
    assert config.output == "runs/d" and resume and len(config.stages) == 9
    python = [sys.executable, "-m", "torch.distributed.run"]
    assert config.launch == [*python, "--standalone", "--nproc-per-node", "4", "-m", "posttrain.cli"]
    assert (os.environ["OMP_NUM_THREADS"], os.environ["CUDA_VISIBLE_DEVICES"]) == ("1", "")
    assert run(["demo", "--processes", "3"]) == 2
    told = "command line: processes: is '3', expected one of 1, 2, 4"
    assert capsys.readouterr().err == f"posttrain: error: {told}\n"


# ---- from a wheel ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A directory as site-packages, with what the wheel holds."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder / "dist")]
    done = subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = (folder / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder / "site-packages")
    return folder / "site-packages"


def command(installed: Path, *words: str, cwd: Path) -> subprocess.CompletedProcess:
    """`python -m posttrain.cli` in a folder, which then comes first on sys.path."""
    environment = {**os.environ, "PYTHONPATH": str(installed), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "posttrain.cli", *words]
    return subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True)


def test_a_wheel_takes_one_name_and_holds_all_data(installed):
    assert {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")} == {"posttrain"}
    held = {
        str(file.relative_to(installed / "posttrain"))
        for file in (installed / "posttrain").rglob("*")
        if file.is_file()
    }
    assert "py.typed" in held and "nano/weights/k2-nano/model_index.json" in held
    ours = [file for name in ("posttrain", "rewards", "prompts", "recipes") for file in (runs.ROOT / name).rglob("*")]
    wanted = {str(file.relative_to(runs.ROOT)) for file in ours if file.is_file() and "__pycache__" not in file.parts}
    bundled = {file.removeprefix("bundled/") for file in held} | {f"posttrain/{file}" for file in held}
    assert wanted <= bundled, sorted(wanted - bundled)[:5]


@pytest.mark.long
def test_a_wheel_works_from_a_project_with_names_of_its_own(installed, tmp_path):
    done = command(installed, "init", "p", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "p"
    (folder / "rewards.py").write_text("def warm(images, prompts): return [0.5 for image in images]")
    spec = (
        '[{name: warm, function: "rewards:warm"}, {name: rubric, function: {class_path: rewards.diversity.Diversity}}]'
    )
    words = ["grpo", "--config", "recipes/nano/demo.yaml", "--rewards", spec, "--print_config"]
    done = command(installed, *words, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["model"]["path"] == str(installed / "posttrain/nano/weights/k2-nano")
    sample = ["sample", "--config", "recipes/nano/sample.yaml", "--prompt", "two red stars", "--steps", "1"]
    done = command(installed, *sample, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert (folder / "out/images/000.png").is_file()
    check = "from rewards.load import *; from rewards.base import RewardSpec as R; import posttrain.cli"
    text = f"import posttrain; {check}; print(load_rewards([R('warm', 'rewards:warm')])[0].function([1], ['']))"
    environment = {**os.environ, "PYTHONPATH": f"{folder}:{installed}"}
    done = subprocess.run([sys.executable, "-c", text], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.stdout == "[0.5]\n", done.stderr


def test_a_wheel_has_the_recipes_that_a_directory_has_not(installed, tmp_path):
    done = command(installed, "run", "recipes/nano/pipeline.yaml", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "9  expander " in done.stdout
    told = "recipes/nano/pipeline.yaml is not in this directory; taking the package's, "
    assert done.stderr == f"posttrain: {told}{installed}/posttrain/bundled/recipes/nano/pipeline.yaml\n"
