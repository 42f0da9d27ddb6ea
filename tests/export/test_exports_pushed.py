"""Cards of exports, and the way to a hub."""

import base64
import http.server
import json
import os
import shutil
import threading
from dataclasses import asdict
from pathlib import Path

import huggingface_hub
import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file

from posttrain.config.sections import ModelConfig
from posttrain.errors import UserError
from posttrain.export import hub
from posttrain.export.model_card import model_card
from posttrain.grpo import train as grpo
from posttrain.training import checkpoint
from tests.export.test_exports_checked import write
from tests.helpers import runs


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    return runs.trained(tmp_path_factory.mktemp("trained"), model)


# ---- cards --------------------------------------------------------------------------------------------------


def test_the_card_says_what_it_is(run, model, tmp_path):
    second = runs.config(tmp_path, model)
    second.model.start, second.steps = str(run), 1
    second.servers, second.rewards[0].weight = [], 0.5
    grpo.train(second)
    out = Path(second.output)
    text = (write(out, tmp_path / "tuned") / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert "base_model" not in front and front["library_name"] == "diffusers"  # a directory is no base for a hub
    assert (front["license"], front["license_name"]) == ("other", "as-the-base-model")
    assert f"As the base model, `{model.name}`: its terms hold" in text and str(tmp_path) not in text
    one, two = (line for line in text.splitlines() if line.startswith(("1. ", "2. ")))
    assert "GRPO" in one and "1 step of an adapter of rank 4 (`run/step-000001`)" in two
    before, after = (runs.latest(out).state["history"][name]["brightness"] for name in ("before", "after"))
    assert f"| brightness | {before:.4f} | {after:.4f} |" in text and "| | before | step 1 |" in text
    assert "- `brightness` (tests.helpers.runs:brightness): weight 0.5" in text
    assert (
        'Krea2Pipeline.from_pretrained("tuned"' in text
        and "guidance_scale=0," in text
        and "height=32,\n    width=32," in text
    )
    assert "Trained with guidance 0 and measured with 0 in 2 steps" in text
    settings = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert settings["lora"]["rank"] == 4 and not {"servers", "output"} & settings.keys()

    file = write(out, tmp_path / "lora.safetensors", "lora-original", license="apache-2.0")
    text = file.with_suffix(".md").read_text()
    assert yaml.safe_load(text.split("---")[1])["license"] == "apache-2.0" and "at strength 1" in text
    with pytest.raises(UserError, match=r"output: .*lora\.md exists; choose another name"):
        file.unlink()
        write(out, file, "lora")


@pytest.mark.parametrize("format", ["diffusers", "lora", "original"])
def test_the_cards_code_runs_as_it_stands(run, model, tmp_path, monkeypatch, format):
    name = "tuned" if format == "diffusers" else "tuned.safetensors"
    out = write(run, tmp_path / name, format, allow_rounding=True)
    (tmp_path / model.name).symlink_to(model)  # where the card says that the base is
    card = out / "README.md" if out.is_dir() else out.with_suffix(".md")
    text = card.read_text()
    assert (
        str(model.parent) not in text and f"with the base model at `{model.name}`:" in text
    ) or format == "diffusers"
    code = text.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "card", "exec"), {})
    assert Image.open("fox.png").size == (32, 32)


def test_the_card_of_a_push_names_the_repository(run):
    saved = runs.latest(run)
    for format, says in (
        ("diffusers", 'from_pretrained("me/out", '),
        ("lora", 'load_lora_weights("me/out", weight_name="a.safetensors")'),
        ("original", '"https://huggingface.co/me/out/blob/main/a.safetensors", config='),
    ):
        assert says in model_card(saved, Path("a.safetensors"), format, None, hub="me/out")


def test_settings_changed_on_resuming_are_on_the_card(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    rows = [{"after_step": 0, "setting": "optim.lr", "before": 0.01, "now": 0.02},
            {"after_step": 0, "setting": "track.tensorboard", "before": False, "now": True},
            {"after_step": 1, "setting": "optim.ema", "before": 0.9, "now": 0.5}]  # fmt: skip
    (tmp_path / "run/changes.json").write_text(json.dumps(rows))
    text = model_card(runs.latest(tmp_path / "run"), Path("a.safetensors"), "lora", None)
    assert "- optim.lr: 0.01 until step 0, then 0.02\n" in text
    assert "track.tensorboard" not in text and "optim.ema: 0.9" not in text  # later than this checkpoint


def test_the_licence_is_the_bases(run, model, tmp_path):
    """Whatever its card says; and of a checkpoint that says no more than older ones did, there is still a card."""
    base = tmp_path / "base"
    shutil.copytree(model, base, copy_function=os.link)
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: krea-2\nlicense_link: LICENSE.md\n---\n# Raw\n")
    saved = runs.latest(run)
    state = {"model": asdict(ModelConfig(str(base), dtype="float32")), "lora": saved.state["lora"]}
    checkpoint.save(tmp_path / "old/checkpoints", 1, {"adapter": saved.tensors["adapter"]}, state, keep=1)
    text = write(tmp_path / "old", tmp_path / "a.safetensors", "lora").with_suffix(".md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert (front["license_name"], front["license_link"]) == ("krea-2", "LICENSE.md")
    assert "As the base model, `base`: krea-2 (LICENSE.md)." in text and "## Results" not in text
    state["model"]["path"] = "krea/Krea-2-Raw@v1"
    text = model_card(checkpoint.Checkpoint(saved.path, 1, {}, state), Path("a.safetensors"), "lora", None)
    front = yaml.safe_load(text.split("---")[1])
    assert front["base_model"] == "krea/Krea-2-Raw"
    assert (front["license_name"], front["license_link"]) == (
        "as-the-base-model",
        "https://huggingface.co/krea/Krea-2-Raw",
    )


def test_a_base_that_has_moved_is_no_hub_id(model, tmp_path, monkeypatch):
    """A relative path has the form OWNER/NAME. Nothing is asked of a hub, and the card names no base there."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model, "models/k2")
    runs.trained(tmp_path, Path("models/k2"))
    shutil.move("models", "elsewhere")
    monkeypatch.setattr(huggingface_hub, "HfApi", None)
    saved = runs.latest(tmp_path / "run")
    card = model_card(saved, Path("a.safetensors"), "lora", None)
    assert (
        "base_model" not in card
        and "huggingface.co/models" not in card
        and "with the base model at `models/k2`" in card
    )
    for format in ("lora", "original", "diffusers"):
        with pytest.raises(UserError, match=r"^models/k2: is gone, and .*step-\d+ was trained on it; put it back$"):
            write(tmp_path / "run", tmp_path / "out.safetensors", format)


# ---- to a hub -----------------------------------------------------------------------------------------------


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as creating a repository and a commit of plain files takes."""

    made: list
    files: dict
    refuse = False

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        answer, code = {}, 200
        if self.refuse:
            answer, code = {"error": "You have no right to do this"}, 403
        elif self.path == "/api/repos/create":
            self.made.append(json.loads(body))
            answer = {"url": f"http://{self.headers['Host']}/me/out"}
        elif "/preupload/" in self.path:
            answer = {
                "files": [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for f in json.loads(body)["files"]
                ]
            }
        elif "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            answer = {
                "commitUrl": f"http://{self.headers['Host']}/me/out/commit/1",
                "commitOid": "1",
                "pullRequestUrl": None,
            }
        self.send_response(code)
        data = json.dumps(answer).encode()
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        self.send_response(404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format, *args):
        pass


@pytest.fixture
def a_hub(monkeypatch):
    handler = type("Handler", (Hub,), {"made": [], "files": {}})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: API(endpoint=url, token="hf_test"))
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_test")
    yield handler
    server.shutdown()
    server.server_close()


API = huggingface_hub.HfApi


def is_private(made: dict) -> bool:
    """As older and newer clients say it."""
    return made["visibility"] == "private" if "visibility" in made else made["private"]


def test_push_uploads_the_export_with_its_card(run, tmp_path, a_hub, capsys):
    write(run, tmp_path / "quiet.safetensors", "lora")
    assert not a_hub.made  # never by default
    file = write(run, tmp_path / "lora.safetensors", "lora", push="me/out")
    assert [(one["name"], one["organization"]) for one in a_hub.made] == [("out", "me")] and is_private(a_hub.made[0])
    assert a_hub.files["lora.safetensors"] == file.read_bytes()
    assert a_hub.files["README.md"] == file.with_suffix(".md").read_bytes()
    assert "pushed it to http://127.0.0.1" in capsys.readouterr().out
    a_hub.files.clear()
    folder = write(run, tmp_path / "whole", push="me/out", private=False)
    assert not is_private(a_hub.made[-1])
    assert a_hub.files.keys() == {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_a_push_that_fails_leaves_the_export(run, tmp_path, a_hub, monkeypatch):
    monkeypatch.setattr(a_hub, "refuse", True)
    with pytest.raises(UserError, match=r"push: me/out did not take it: .* is whole, push it once more") as error:
        write(run, tmp_path / "a.safetensors", "lora", push="me/out")
    assert "\n" not in str(error.value) and load_file(tmp_path / "a.safetensors")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: API(endpoint="http://127.0.0.1:9", token="hf_test"))
    with pytest.raises(UserError, match="push: me/out did not take it"):
        hub.push(tmp_path / "a.safetensors", tmp_path / "a.md", "me/out", private=True)


@pytest.mark.parametrize("name", ["out", "me/out/more", "me/o ut", "-me/out"])
def test_a_push_to_no_hub_id_writes_nothing(run, tmp_path, a_hub, name):
    with pytest.raises(UserError, match=r"push: '.*' is no hub id: .*; write owner/name"):
        write(run, tmp_path / "a.safetensors", "lora", push=name)
    assert not list(tmp_path.iterdir()) and not a_hub.made


def test_a_push_without_a_token_writes_nothing(run, tmp_path, a_hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(UserError, match="push: no token; run `hf auth login`, or set HF_TOKEN"):
        write(run, tmp_path / "a.safetensors", "lora", push="me/out")
    assert not list(tmp_path.iterdir())
