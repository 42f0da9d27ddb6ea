"""What is loaded is whole, of plain numbers and the one that was asked for; else one line, whoever loads it."""

import asyncio
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file

from posttrain import cli
from posttrain.config.sections import ModelConfig
from posttrain.errors import UserError
from posttrain.expander.gdpo_config import ChatModelConfig, RendererConfig
from posttrain.expander.model import Expander
from posttrain.expander.policy import Policy
from posttrain.expander.renderer import EndpointRenderer, K2Renderer
from posttrain.loading import adapter_folder
from posttrain.model.k2 import K2
from posttrain.resources import WEIGHTS
from posttrain.training.policy import load_model
from prompts.templates import load_template
from rewards.local_judge import LocalJudge
from rewards.serve import ServerSpec, command
from rewards.vlm import VLM

TEXT, VAE = "text_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors"
NETWORK = "transformer/diffusion_pytorch_model.safetensors"
JUDGE, CHAT = WEIGHTS / "judge-nano", WEIGHTS / "expander-nano"


@pytest.fixture
def copied(model, tmp_path):
    return Path(shutil.copytree(model, tmp_path / "k2"))


def weights(file, edit):
    """An edit of a file's tensors."""

    def apply(folder):
        state = load_file(folder / file)
        edit(state)
        save_file(state, folder / file, metadata={"format": "pt"})

    return apply


def settings(file, **changes):
    def apply(folder):
        held = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(held | changes))

    return apply


def drop(part):
    def edit(state):
        for key in [key for key in state if part in key]:
            del state[key]

    return edit


def rename(state):
    for key in list(state):
        state[f"_orig_mod.{key}"] = state.pop(key)


def not_finite(part):
    def edit(state):
        key = next(key for key in state if part in key)
        state[key].view(-1)[0] = torch.nan

    return edit


def eight_bits(kind):
    def edit(state):
        for key, value in state.items():
            if value.ndim == 2:
                state[key] = (value / value.abs().max() * 100).to(kind)

    return edit


def tokens(file="tokenizer/tokenizer.json", **changes):
    """An edit of the tokenizer's model."""

    def apply(folder):
        held = json.loads((folder / file).read_text())
        held["model"] |= {name: change(held["model"]) for name, change in changes.items()}
        (folder / file).write_text(json.dumps(held))

    return apply


def first_half(held):
    return {token: i for token, i in held["vocab"].items() if i < len(held["vocab"]) // 2}


def without(*files):
    def apply(folder):
        for file in files:
            (folder / file).unlink() if (folder / file).is_file() else shutil.rmtree(folder / file)

    return apply


def pointer(file):
    """What Git LFS leaves where a file was not fetched."""

    def apply(folder):
        (folder / file).write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{0:064d}\nsize 24610\n")

    return apply


SCHEDULE = "scheduler/scheduler_config.json"


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (weights(TEXT, drop("layers.1.")), r"text_encoder: keys .*: 11 missing \(language_model\.layers\.1\.inp"),
        (weights(TEXT, rename), r"text_encoder: keys .* missing .* unexpected \(_orig_mod\."),
        (weights(TEXT, lambda s: s.update({"language_model.norm.weight": torch.ones(3)})),
         r"text_encoder: keys .*: 1 of another shape \(language_model\.norm\.weight\)"),
        (weights(TEXT, not_finite("layers.1.")), r"text_encoder: language_model\.layers\.1\..* not finite"),
        (weights(TEXT, eight_bits(torch.float8_e4m3fn)), r"stored as F8_E4M3 \(8 bits\), with \d+ more: quantised"),
        (weights(VAE, drop("decoder.conv_out")), r"vae: keys .*: 2 missing \(decoder\.conv_out\.bias, decoder"),
        (weights(VAE, lambda s: s.update(surplus=torch.ones(2))), r"vae: keys .*: 1 unexpected \(surplus\)"),
        (weights(VAE, lambda s: s.update({"decoder.conv_out.bias": torch.ones(7)})), r"1 of another shape \(dec"),
        (weights(VAE, not_finite("decoder")), r"vae: decoder\..* not finite"),
        (weights(NETWORK, not_finite("transformer_blocks.1")), r"transformer: transformer_blocks\.1\..* not finite"),
        (weights(NETWORK, eight_bits(torch.int8)), r"stored as I8 \(8 bits\)"),
        (settings("transformer/config.json", quantization_config={"quant_method": "torchao"}), "quantization_config"),
        (settings("text_encoder/config.json", text_config={"a": 1}), r"describes a model of [\d,]+ numbers, and"),
        (without(TEXT), "text_encoder: has no weights as safetensors"),
        (lambda d: (d / f"{TEXT}.index.json").write_text('{"weight_map": {"a": "x.safetensors"}}'),
         r"x\.safetensors: is"),
        (pointer(TEXT), r"model\.safetensors: not a whole safetensors file"),
        (pointer("tokenizer/tokenizer.json"), r"tokenizer\.json: not JSON"),
        (without("tokenizer/tokenizer.json"), r"tokenizer: the tokenizer has \d tokens, and its model's embedding \d"),
        (without("tokenizer"), "tokenizer: the tokenizer has 1 token,"),
        (tokens(vocab=first_half, merges=lambda held: []), r"tokenizer: the tokenizer has \d+ tokens, and its"),
        (tokens(merges=lambda held: []), "tokenizer: the tokenizer joins no letters to tokens: its merges are lost"),
        (tokens(merges=lambda held: held["merges"][:20]), r"tokenizer: makes \d+ tokens of a part of .* that has 34"),
        (settings(SCHEDULE, time_shift_type="linear"), 'time_shift_type is "linear", and only "exp'),
        (settings(SCHEDULE, use_dynamic_shifting=False, shift=3.0), "use_dynamic_shifting is false, and only true is"),
        (settings(SCHEDULE, shift_terminal=0.02), "shift_terminal is 0.02, and only null is"),
        (settings(SCHEDULE, use_karras_sigmas=True), "use_karras_sigmas is true"),
        (settings(SCHEDULE, use_beta_sigmas=True), "use_beta_sigmas is true"),
        (settings(SCHEDULE, use_exponential_sigmas=True), "use_exponential_sigmas is true"),
        (settings(SCHEDULE, base_shift=None), "base_ and max_shift and _image_seq_len must be numbers"),
        (settings("model_index.json", scheduler=["diffusers", "UniPCMultistepScheduler"]), "UniPC.* is not sampled"),
        (settings("model_index.json", is_distilled="false"), "is_distilled is 'false'; make it true or false"),
        (settings("model_index.json", text_encoder_select_layers=[1, 2]), r"\[1, 2\] must be 3 of the"),
        (settings("model_index.json", text_encoder_select_layers=[1, 2, 9]), r"\[1, 2, 9\] must be 3 of the text enc"),
        (settings("model_index.json", patch_size=4), "patches of 4 x 4 of the VAE's 16 channels do not make the"),
        (settings("vae/config.json", latents_std=[1.0]), "latents_std must be 16 finite numbers"),
    ],
)  # fmt: skip
def test_a_pipeline_that_is_not_whole(copied, capfd, damage, says):
    damage(copied)
    with pytest.raises(UserError, match=says) as error:
        K2.load(copied)
    assert str(error.value).startswith(str(copied)) and "\n" not in str(error.value)
    assert capfd.readouterr().err == ""  # one line, and no report of a library before it


def test_an_image_that_is_no_image_is_not_written(copied, tmp_path, capsys):
    """Settings of the right type and shape under which numbers are not finite."""
    settings("transformer/config.json", norm_eps=-1e9)(copied)
    out = tmp_path / "out"
    words = ["sample", f"--model.path={copied}", "--model.dtype=float32", "--prompt=a", f"--output={out}"]
    assert cli.main([*words, "--size=[32, 32]", "--steps=2"]) == 2
    assert "draws numbers that are not finite" in capsys.readouterr().err and not list(out.glob("*.png"))


@pytest.mark.parametrize("odd", [torch.nan, torch.inf])
def test_what_is_drawn_is_finite_everywhere(model, odd, monkeypatch):
    """Rollouts, evaluations, pairs and the expander's renderer all decode: one image of a batch is enough."""
    k2 = K2.load(model)
    latents = torch.zeros(3, k2.image_tokens(32, 32), k2.latent_channels)
    assert len(k2.decode(latents, 32, 32, batch=1)) == 3
    latents[1, 0, 0] = odd
    for batch in (1, None):
        with pytest.raises(UserError, match=r"^model: draws numbers that are not finite; copy"):
            k2.decode(latents, 32, 32, batch)
    renderer = K2Renderer(RendererConfig(path=str(model), dtype="float32", size=[32, 32]), torch.device("cpu"))
    monkeypatch.setattr(renderer.k2, "velocity", lambda x, *a, **k: torch.full_like(x, odd))
    with pytest.raises(UserError, match="draws numbers that are not finite"):
        renderer(["a"], [0])


def test_what_is_not_needed_may_be_gone(copied, model):
    """The tokenizer's settings only name what its file says too."""
    without("tokenizer/tokenizer_config.json")(copied)
    assert K2.load(copied).tokenize(["a red circle"]) == K2.load(model).tokenize(["a red circle"])


def test_every_way_in_loads_alike(copied, tmp_path, capsys):
    """Sampling, the expander's renderer, training and --check: the same line, before a prompt is drawn."""
    weights(VAE, drop("decoder.conv_out"))(copied)
    turbo = Path(shutil.copytree(copied, tmp_path / "turbo"))
    settings("model_index.json", is_distilled=True)(turbo)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    says = "vae: keys do not match this model: 2 missing (decoder.conv_out"
    rewards = '[{"name": "a", "function": "tests.helpers.runs:brightness"}]'
    lora = {"blocks.0.attn.wq.lora_A.weight": torch.ones(1, 128), "blocks.0.attn.wq.lora_B.weight": torch.ones(128, 1)}
    save_file({f"diffusion_model.{key}": value for key, value in lora.items()}, tmp_path / "a.safetensors")
    for words in (
        ["sample", "--model.path", copied, "--model.dtype", "float32", "--prompt", "a", "--output", tmp_path / "out"],
        ["export", "--check", tmp_path / "a.safetensors", "--turbo", turbo, "--model.path", copied, "--model.dtype",
         "float32", "--prompts", prompts, "--rewards", rewards, "--size", "[32, 32]"],
    ):  # fmt: skip
        assert cli.main(list(map(str, words))) == 2
        assert says in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError) as error:
        K2Renderer(RendererConfig(path=str(copied), dtype="float32"), torch.device("cpu"))
    assert says in str(error.value)
    with pytest.raises(UserError) as error:
        load_model(ModelConfig(path=str(copied), dtype="float32"), "cpu")
    assert says in str(error.value)


def test_the_tokenizer_that_counts_for_servers(copied):
    config = RendererConfig(path=str(copied), urls=["http://127.0.0.1:1/v1"])
    assert EndpointRenderer(config)._tokenizer("a red circle").input_ids
    without("tokenizer/tokenizer.json")(copied)
    with pytest.raises(UserError, match=r"renderer\.path: .*/tokenizer: "):
        EndpointRenderer(config)


# ---- language models and judges -----------------------------------------------------------------------------


@pytest.mark.parametrize("base", [JUDGE, CHAT])
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (
            weights("model.safetensors", drop("layers.0.mlp")),
            r"keys .*: 3 missing \(model\..*layers\.0\.mlp\.down_proj",
        ),
        (weights("model.safetensors", lambda s: s.update(surplus=torch.ones(2))), r"1 unexpected \(surplus\)"),
        (weights("model.safetensors", not_finite("layers.0.mlp")), "not finite"),
        (weights("model.safetensors", eight_bits(torch.float8_e4m3fn)), r"F8_E4M3 \(8 bits\)"),
        (without("tokenizer.json"), "tokenizer"),
        (tokens("tokenizer.json", vocab=first_half, merges=lambda held: []), r"the tokenizer has \d+ tokens, and its"),
        (pointer("config.json"), r"config\.json: not JSON"),
    ],
)
def test_chat_models_and_judges(tmp_path, base, damage, says):
    folder = Path(shutil.copytree(base, tmp_path / "model"))
    damage(folder)
    for load in (VLM.load, lambda path: LocalJudge(path, device="cpu")) if base == JUDGE else (Expander.load,):
        with pytest.raises(UserError, match=says) as error:
            load(str(folder))
        assert str(folder) in str(error.value) and "\n" not in str(error.value)


def adapter(folder):
    """A LoRA of the chat model, whose B is not zero."""
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(CHAT), config).save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (drop("layers.0"), r"keys .*: 2 missing \(base_model\.model\.model\.layers\.0"),
        (lambda s: s.update({"base_model.model.other.lora_A.weight": torch.ones(2, 2)}), r"1 unexpected"),
        (not_finite("lora_B"), "not finite"),
        (eight_bits(torch.int8), r"I8 \(8 bits\)"),
    ],
)
def test_adapters_of_chat_models(tmp_path, edit, says):
    folder = adapter(tmp_path / "adapter")
    assert Expander.load(str(CHAT), str(folder)).model.peft_config
    weights("adapter_model.safetensors", edit)(folder)
    config = ChatModelConfig(str(CHAT), str(folder), dtype="float32")
    for load in (
        lambda: Expander.load(str(CHAT), str(folder)),
        lambda: Policy(config, None, 0, torch.device("cpu")),  # type: ignore[arg-type]
    ):
        with pytest.raises(UserError, match=says) as error:
            load()
        assert str(folder) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("edit", "says"), [(drop("layers.0"), "missing"), (not_finite("lora_B"), "not finite")])
def test_adapters_of_judges(tmp_path, edit, says):
    folder = Path(shutil.copytree(WEIGHTS / "judge-aesthetic", tmp_path / "adapter"))
    weights("adapter_model.safetensors", edit)(folder)
    with pytest.raises(UserError, match=says):
        LocalJudge(str(JUDGE), str(folder), device="cpu")


def test_a_run_of_a_judge_is_its_adapter(tmp_path):
    """In process, and for vLLM, which is given the directory within."""
    folder = Path(shutil.copytree(WEIGHTS / "judge-aesthetic", tmp_path / "run/adapter"))
    image, template = Image.new("RGB", (64, 64), "red"), load_template("aesthetic")
    scores = [
        asyncio.run(LocalJudge(str(JUDGE), str(path), device="cpu").p_yes(image, template))
        for path in (folder, folder.parent)
    ]
    assert scores[0] == scores[1]
    words = command(ServerSpec("vlm", str(JUDGE), adapters={"taste": str(folder.parent)}), "127.0.0.1", 1)
    assert f"taste={folder}" in words
    with pytest.raises(UserError, match="a run of posttrain judge that has ended"):
        LocalJudge(str(JUDGE), str(tmp_path), device="cpu")


def test_what_a_judge_s_adapter_may_name(tmp_path):
    """A directory of PEFT's, a run of posttrain judge, or PEFT's file itself; not a checkpoint to resume from."""
    run = tmp_path / "run"
    (run / "adapter").mkdir(parents=True)
    (run / "adapter/adapter_config.json").write_text("{}")
    for named in (run, run / "adapter", run / "adapter/adapter_model.safetensors"):
        assert adapter_folder(named) == run / "adapter"
    saved = run / "checkpoints/step-000010"
    saved.mkdir(parents=True)
    (saved / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="is a checkpoint to resume from, not an adapter to load; name its run"):
        adapter_folder(saved)
