"""Models of the hub: by name and revision, without a connection, and what a mistyped path is told."""

from types import SimpleNamespace

import httpx
import huggingface_hub
import pytest
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors.torch import load_file, save_file

from posttrain import cli, loading
from posttrain.errors import UserError
from posttrain.expander.model import Expander
from posttrain.model import key_names
from posttrain.model.files import check_directory
from posttrain.model.k2 import K2
from rewards.vlm import VLM
from tests.model.test_loading import CHAT, JUDGE, NETWORK


@pytest.fixture
def hub(monkeypatch):
    """A hub that has owner/name at its branch main and at v1; `asked` are its questions, `downloads` what it gave."""
    found = SimpleNamespace(asked=[], downloads=[], folder=None, reachable=True)

    class Api:
        def model_info(self, name, revision=None, timeout=None):
            found.asked.append((name, revision))
            assert timeout <= 10
            if not found.reachable:
                raise httpx.ConnectError("Name or service not known")
            if name != "owner/name" or revision not in (None, "main", "v1"):
                response = httpx.Response(404, request=httpx.Request("GET", "http://hub"))
                raise RepositoryNotFoundError("404", response=response)
            return SimpleNamespace(sha="c0ffee")

    def download(name, revision=None, local_files_only=False, **patterns):
        if local_files_only and found.folder is None:
            raise FileNotFoundError("not cached")
        found.downloads.append((name, revision, local_files_only))
        found.patterns = patterns["allow_patterns"] if patterns else []
        return str(found.folder)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return found


def test_a_folder_of_the_owners_name_hides_nothing(hub, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner/other").mkdir(parents=True)
    hub.folder = model
    assert loading.is_hub_id("owner/name") and not loading.is_hub_id("owner/other")
    assert K2.load("owner/name").tokenizer is not None
    assert hub.downloads == [("owner/name", "c0ffee", False)]
    (tmp_path / "owner/name").mkdir()
    with pytest.raises(UserError, match=r"owner/name: has no model_index\.json"):  # what is here comes first
        K2.load("owner/name")


def test_a_single_file_leaves_the_other_transformer_on_the_hub(hub, model, tmp_path):
    """Which has 26 GB."""
    save_file(key_names.to_original(load_file(model / NETWORK)), tmp_path / "one.safetensors")
    hub.folder = model
    K2.load("owner/name", tmp_path / "one.safetensors")
    assert "transformer/*.json" in hub.patterns and "transformer/*" not in hub.patterns
    K2.load("owner/name")
    assert "transformer/*" in hub.patterns


def test_a_revision_is_pinned(hub, model):
    hub.folder = model
    K2.load("owner/name@v1")
    assert set(hub.asked) == {("owner/name", "v1")} and hub.downloads == [("owner/name", "c0ffee", False)]
    hub.folder = CHAT
    Expander.load("owner/name@v1")
    assert Expander.load("owner/name@v1").model.name_or_path == "owner/name"  # as PEFT and the hub write it
    hub.folder = JUDGE
    VLM.load("owner/name@v1")
    assert hub.asked == [("owner/name", "v1")] * 4
    with pytest.raises(UserError, match="owner/name@v2: no such directory here, and the hub has no such rep"):
        check_directory("owner/name@v2")


@pytest.mark.parametrize("reachable", [True, False])
def test_a_mistyped_path_is_told_at_once(hub, tmp_path, capsys, reachable):
    """By every command whose model may be on the hub, after one question to it."""
    hub.reachable = reachable
    says = "no such directory here, and the hub " + (
        "has no such" if reachable else "cannot be asked for it (Name or s"
    )
    out, data = tmp_path / "out", tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    for words in (
        ["sample", "--model.path=runs/nome", "--prompt=a", f"--output={out}"],
        ["expander", "sft", "--model=runs/nome", f"--data={data}", f"--output={out}"],
        ["expand", "--model=runs/nome", "--prompt=a"],
    ):
        hub.asked.clear()
        assert cli.main(words) == 2, words
        error = capsys.readouterr().err.splitlines()[-1]
        assert f"runs/nome: {says}" in error and hub.asked == [("runs/nome", None)], words
    assert not out.exists()


def test_without_a_connection_the_cache_serves(hub, model):
    hub.reachable, hub.folder = False, model
    K2.load("owner/name@v1")
    assert hub.downloads[-1] == ("owner/name", "v1", True)
