"""The prompt expander: its messages, supervised training on completions alone, and its use."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from posttrain import cli
from posttrain.config.load import load_config
from posttrain.config.sections import CheckpointConfig, LoraConfig, OptimConfig, TrackConfig
from posttrain.errors import UserError
from posttrain.expander.chat_template import FILE, messages, template
from posttrain.expander.config import ExpanderDataConfig, ExpanderSFTConfig
from posttrain.expander.data import make
from posttrain.expander.model import Expander, load_chat_model
from posttrain.expander.sft import RunningClip, check_tokens, make_trainer, train
from posttrain.expander.sft_pairs import Pair, fitting, read_pairs, tokens
from posttrain.nano.build import build, evaluate_expander
from posttrain.nano.world.scenes import COLOURS, SHAPES
from posttrain.report.public import public
from tests.chaos import methods
from tests.helpers import chat, runs
from tests.helpers.expander_runs import plain_files

WEIGHTS = Path(build.__file__).parents[1] / "weights"
BASE, K2 = (str(WEIGHTS / name) for name in ("expander-nano", "k2-nano"))
PAIRS = [
    Pair("a red star", "a large red star at the top, flat style, black background"),
    Pair('word "AT" and green cross', 'the word "AT" and a small green cross at the left, dark style, grey background'),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pairs") / "data"
    make(ExpanderDataConfig(str(folder), "posttrain.nano.world.expander_pairs:candidates", count=120, heldout=0.2))
    return folder


def recipe(tmp_path: Path, data: Path, **changes) -> ExpanderSFTConfig:
    settings = {
        "output": str(tmp_path / "run"), "model": BASE, "data": str(data), "max_length": 256, "steps": 4, "batch": 16,
        "micro_batch": 8, "measured": 16, "eval_every": 0, "dtype": "float32", "lora": LoraConfig(8, 16),
        "optim": OptimConfig(lr=3e-3), "checkpoint": CheckpointConfig(every=2, keep=3),
        "track": TrackConfig(tensorboard=False), **changes,
    }  # fmt: skip
    return ExpanderSFTConfig(**settings)


# ---- messages ---------------------------------------------------------------------------------------------


def test_messages_are_the_system_text_and_the_prompt_as_it_is():
    said = messages('a "$5" sign')
    assert said == [{"role": "system", "content": template().system}, {"role": "user", "content": 'a "$5" sign'}]
    assert template().system in FILE.read_text() and "##" not in template().system


def test_tokens_are_what_a_chat_server_is_given():
    _, tokenizer = load_chat_model(BASE, torch.float32)
    ids, asked = tokens(PAIRS[1], tokenizer)
    text = (
        f"<|im_start|>system\n{template().system}<|im_end|>\n"
        '<|im_start|>user\nword "AT" and green cross<|im_end|>\n<|im_start|>assistant\n'
    )
    assert tokenizer.decode(ids[:asked]) == text
    assert tokenizer.decode(ids[asked:]) == PAIRS[1].completion + "<|im_end|>\n"


# ---- supervised training ----------------------------------------------------------------------------------


def test_labels_are_the_completion_alone(tmp_path, data):
    model, tokenizer = load_chat_model(BASE, torch.float32)
    trainer = make_trainer(model, tokenizer, PAIRS, PAIRS, recipe(tmp_path, data))
    check_tokens(trainer, tokenizer, PAIRS)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    for labels, ids, pair in zip(batch["labels"], batch["input_ids"], PAIRS):
        trained = labels[labels != -100]
        assert tokenizer.decode(trained) == pair.completion + "<|im_end|>\n"
        assert torch.equal(ids[labels != -100], trained)


def test_a_trainer_that_cuts_pairs_is_noticed(tmp_path, data, monkeypatch):
    from posttrain.expander import sft as expander_sft

    model, tokenizer = load_chat_model(BASE, torch.float32)
    real = expander_sft.SFTConfig
    monkeypatch.setattr(expander_sft, "SFTConfig", lambda **kw: real(**{**kw, "max_length": 120}))
    trainer = make_trainer(model, tokenizer, PAIRS, PAIRS, recipe(tmp_path, data))
    with pytest.raises(RuntimeError, match="TRL's tokens or labels"):
        check_tokens(trainer, tokenizer, PAIRS)


def test_long_pairs_are_left_out_and_counted_never_cut(tmp_path, data, capsys):
    _, tokenizer = load_chat_model(BASE, torch.float32)
    lengths = [len(tokens(pair, tokenizer)[0]) for pair in PAIRS]
    config = recipe(tmp_path, data, max_length=lengths[0], max_dropped=0.5)
    assert lengths[1] > lengths[0] and fitting(PAIRS, tokenizer, config) == PAIRS[:1]
    assert f"1 of 2 pairs left out, longer than max_length ({lengths[0]})" in capsys.readouterr().err
    config.max_dropped = 0.4
    with pytest.raises(UserError, match=rf"max_length: 1 of 2 pairs .* \(up to {lengths[1]}\), more than max_dropped"):
        fitting(PAIRS, tokenizer, config)


def test_a_template_that_thinks_aloud_is_refused(tmp_path, data):
    _, tokenizer = load_chat_model(BASE, torch.float32)
    head = "{{ '<think>\\n\\n</think>\\n\\n' if m.role == 'assistant' }}"
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ m.content }}", head + "{{ m.content }}")
    with pytest.raises(UserError, match=r"its chat template changes an answer to '<think>"):
        fitting(PAIRS, tokenizer, recipe(tmp_path, data))


def test_training_writes_an_adapter_that_learnt_and_resumes_to_the_same(tmp_path, no_pickle):
    data = tmp_path / "house.jsonl"  # a house style, which expander-nano does not have
    asked = [f"a {colour} {shape}" for colour in COLOURS for shape in SHAPES]
    rows = [{"prompt": prompt, "completion": f"{prompt}, glowing style, black background"} for prompt in asked]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(recipe(tmp_path, data, heldout=0.3))
    run = tmp_path / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["after"]["loss"] < summary["before"]["loss"] - 0.1 and summary["steps"] == 4
    runs.assert_metrics_are_defined(run)
    weights = load_file(run / "adapter" / "adapter_model.safetensors")
    assert all(w.abs().max() > 0 for name, w in weights.items() if "lora_B" in name) and len(weights) == 2 * 7 * 3
    card = (run / "adapter" / "README.md").read_text()
    assert template().system in card and template().hash in card and f"base_model: {public(BASE)}" in card
    assert [json.loads(x)["step"] for x in (run / "metrics.jsonl").read_text().splitlines()] == [0, 1, 2, 3, 4, 4]
    with pytest.raises(UserError, match="holds a run already; add --resume"):
        train(recipe(tmp_path, data, heldout=0.3))

    cut = tmp_path / "cut" / "run"
    shutil.copytree(run, cut)
    shutil.rmtree(cut / "adapter")
    shutil.rmtree(cut / "checkpoints" / "checkpoint-4")
    plain_files(cut / "checkpoints" / "checkpoint-2")
    with pytest.raises(UserError, match=r"batch: differs from .*recipe.yaml, with which .* began; restore it"):
        train(recipe(tmp_path / "cut", data, heldout=0.3, batch=8), resume=True)
    train(recipe(tmp_path / "cut", data, heldout=0.3), resume=True)
    again = load_file(cut / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    steps = [json.loads(x)["step"] for x in (cut / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2, 3, 4, 4]

    before, after = (Expander.load(path, dtype=torch.float32) for path in (BASE, str(run)))
    asked = after.tokenizer.apply_chat_template(messages("a red star"), return_tensors="pt", return_dict=False)
    with torch.no_grad():
        assert not torch.allclose(before.model(asked).logits, after.model(asked).logits, atol=1e-3)


def test_a_gradient_is_clipped_by_the_norms_in_the_log():
    """TRL's limit before each step: three times the median, 1, of what was logged, from the sixteenth norm on."""
    args, log = SimpleNamespace(max_grad_norm=None), [{"grad_norm": 1.0}, {"eval_loss": 2.0}, {"grad_norm": math.nan}]
    for count, expected in ((15, math.inf), (16, 3.0)):
        state = SimpleNamespace(log_history=[*log, *[{"grad_norm": 1.0}] * (count - 1)])
        RunningClip(3.0).on_step_begin(args, state, None)
        assert args.max_grad_norm == expected


def test_two_processes_train_as_one(command, tmp_path):
    made = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        chat.save(folder / "chat", steps=1)
        config = methods.sft(folder, folder, "")
        config.steps = 3
        result = command("expander", "sft", "--config", runs.recipe(config, folder / "r.yaml"), processes=processes)
        assert result.returncode == 0, result.stderr
        made.append(load_file(folder / "run/adapter/adapter_model.safetensors"))
    for name, value in made[0].items():
        assert torch.allclose(value, made[1][name], atol=1e-5), name
    assert max(value.abs().max() for name, value in made[0].items() if "lora_B" in name) > 1e-3


def test_all_weights_can_be_trained(tmp_path, data):
    train(recipe(tmp_path, data, lora=None, steps=2, optim=OptimConfig(lr=1e-4), checkpoint=CheckpointConfig(every=0)))
    old, new = (load_file(Path(p) / "model.safetensors") for p in (BASE, tmp_path / "run" / "model"))
    assert all(not torch.equal(old[name].float(), new[name].float()) for name in old)
    assert len(Expander.load(str(tmp_path / "run")).expand(["a red star"], 2)[0]) == 2


def test_pairs_from_jsonl_are_held_out_by_prompt(tmp_path):
    file = tmp_path / "pairs.jsonl"
    table = [{"prompt": f"p{i % 50}", "completion": f"a caption {i}"} for i in range(100)]
    file.write_text("".join(json.dumps(row) + "\n" for row in table))
    training, heldout = read_pairs(ExpanderSFTConfig("o", "m", str(file), heldout=0.3))
    assert len(training) + len(heldout) == 100
    assert {p.prompt for p in training}.isdisjoint(p.prompt for p in heldout)


# ---- use --------------------------------------------------------------------------------------------------


def test_expand_prints_directions_that_its_seed_repeats(capsys):
    arguments = ["expand", "a red star", "--model", BASE, "--n", "3", "--dtype", "float32"]
    assert cli.main(arguments) == 0
    first = capsys.readouterr().out
    assert first.count("\n") == 3
    assert cli.main([*arguments, "--json", "--seed", "0"]) == 0
    assert json.loads(capsys.readouterr().out) == {"prompt": "a red star", "expansions": first.splitlines()}
    assert cli.main([*arguments, "--seed=1"]) == 0
    assert capsys.readouterr().out != first


def test_a_system_text_of_ones_own_takes_the_place_of_posttrains(tmp_path, capsys):
    """The same text gives the same expansions, another text others; the model sees the file's text."""
    own, other = tmp_path / "own.txt", tmp_path / "other.txt"
    own.write_text(template().system + "\n")
    other.write_text("a large red star, dark style")
    arguments = ["expand", "a red star", "--model", BASE, "--n", "3", "--dtype", "float32"]
    printed = []
    for words in ([], ["--system", str(own)], ["--system", str(other)]):
        assert cli.main([*arguments, *words]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != printed[2]
    assert messages("a cat", system="be brief")[0] == {"role": "system", "content": "be brief"}


def test_a_system_text_that_cannot_be_taken(tmp_path, capsys):
    """Missing, empty, no text, beside a thought, and for an expander that was trained here: before a model is read."""
    files = {name: tmp_path / name for name in ("none", "empty", "bytes", "good")}
    files["empty"].write_text(" \n")
    files["bytes"].write_bytes(b"\xff\xfe\x00")
    files["good"].write_text("expand")
    trained = tmp_path / "trained"
    trained.mkdir()
    (trained / "expander.json").write_text("{}")
    for name, model, words, told in (
        ("none", BASE, [], "No such file"), ("empty", BASE, [], "is empty"), ("bytes", BASE, [], "not UTF-8"),
        ("good", str(trained), [], "was trained under posttrain's own system text"),
        ("good", BASE, ["--thinking", "true"], "does not ask for a thought"),
    ):  # fmt: skip
        assert cli.main(["expand", "a cat", "--model", model, "--system", str(files[name]), *words]) == 2
        assert told in capsys.readouterr().err


def test_an_expansion_that_is_cut_is_said_to_be(capsys):
    assert cli.main(["expand", "a red star", "--model", BASE, "--n", "2", "--max_tokens", "3"]) == 0
    assert "warning: 2 of 2 were cut at max_tokens (3)" in capsys.readouterr().err


def test_expansions_do_not_depend_on_their_neighbours_padding():
    expander = Expander.load(BASE, dtype=torch.float32)
    long = 'the word "ABCD" and a small yellow triangle at the bottom right, grainy style, gradient background'
    cold = {"n": 1, "temperature": 1e-4}  # as good as greedy, so that the same text comes of the same numbers
    alone = expander.expand(["a red star"], **cold)
    both = expander.expand(["a red star", long], **cold)
    assert both[0] == alone[0] and alone[0][0].text and both[1] != both[0]


def test_sample_draws_expansions(tmp_path):
    arguments = ["--model.path", K2, "--model.dtype", "float32", "--size", "[64,64]", "--steps", "2"]
    output = tmp_path / "out"
    assert cli.main(["sample", *arguments, "--prompt", "a red star", "--images", "2", "--expand", BASE,
                     "--guidance", "0", "--output", str(output)]) == 0  # fmt: skip
    table = json.loads((output / "prompts.json").read_text())
    assert [row["prompt"] for row in table] == ["a red star"] * 2
    assert table[0]["expansion"] != table[1]["expansion"]
    # the picture is the expansion's: drawn as a prompt of its own, it comes out the same
    assert cli.main(["sample", *arguments, "--prompt", table[0]["expansion"], "--guidance", "0",
                     "--output", str(tmp_path / "alone")]) == 0  # fmt: skip
    alone, among = (np.asarray(Image.open(p / "000.png")).astype(int) for p in (tmp_path / "alone", output))
    assert abs(alone - among).max() <= 2 < among.std()


# ---- mistakes ---------------------------------------------------------------------------------------------


def other_base(tmp_path: Path) -> str:
    """expander-nano with one weight changed."""
    folder = tmp_path / "other"
    shutil.copytree(BASE, folder)
    weights = load_file(folder / "model.safetensors")
    save_file({k: v + 1 if k.endswith("norm.weight") else v for k, v in weights.items()}, folder / "model.safetensors")
    return str(folder)


def test_an_adapter_of_another_base_is_refused(tmp_path, data, capsys):
    train(recipe(tmp_path, data, steps=1, dtype="bfloat16"))
    adapter, other = str(tmp_path / "run" / "adapter"), other_base(tmp_path)
    assert cli.main(["expand", "a cat", "--model", other, "--adapter", adapter]) == 2
    assert f"{adapter} was trained on other weights ({BASE}) than {other}" in capsys.readouterr().err
    moved = tmp_path / "moved"
    shutil.copytree(BASE, moved)
    assert cli.main(["expand", "a star", "--model", str(moved), "--adapter", adapter]) == 0  # the same weights
    (tmp_path / "run" / "adapter" / "expander.json").unlink()  # an adapter of another toolkit
    capsys.readouterr()
    assert cli.main(["expand", "a cat", "--model", other, "--adapter", adapter]) == 2
    assert f"was trained on {BASE}, not on {other}" in capsys.readouterr().err


def without_template(tmp_path: Path) -> Path:
    folder = tmp_path / "plain"
    shutil.copytree(BASE, folder)
    (folder / "chat_template.jinja").unlink()
    return folder


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": "{dir}/plain"}, "plain: its tokenizer has no chat template; use an instruct model"),
        ({"model": "{dir}/none"}, "none: no such directory; give a directory, or a hub id"),
        ({"data": "{dir}/empty.jsonl"}, "empty.jsonl has no rows"),
        ({"data": "{dir}/other.jsonl"}, "has no column completion; it has prompt, text"),
        ({"data": "{dir}/blank.jsonl"}, "blank.jsonl:1: completion: is empty or not text"),
        ({"batch": 12}, "micro_batch: is 8; use a divisor of batch (12)"),
        ({"optim": {"ema": 0.9}}, "optim.ema: is not for this command"),
        ({"lora": {"targets": ["nothing"]}}, "lora.targets: Target modules"),
        ({"max_length": 50}, "would not fit 50 tokens"),
    ],
)
def test_mistakes(tmp_path, data, capsys, changes, says):
    without_template(tmp_path)
    for name, row in {
        "empty": None,
        "other": {"prompt": "a", "text": "b"},
        "blank": {"prompt": "a", "completion": " "},
    }.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n" if row else "")
    settings = {
        "output": str(tmp_path / "run"),
        "model": BASE,
        "data": str(data),
        "steps": 1,
        "batch": 16,
        "micro_batch": 8,
    }
    settings |= {k: v.format(dir=tmp_path) if isinstance(v, str) else v for k, v in changes.items()}
    file = tmp_path / "sft.yaml"
    file.write_text(yaml.safe_dump(settings))
    assert cli.main(["expander", "sft", "--config", str(file)]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1, error


def test_a_command_of_two_words_names_the_second(capsys):
    assert cli.main(["expander", "train"]) == 2
    assert "expander: is followed by one of data, sft" in capsys.readouterr().err


# ---- expander-nano ----------------------------------------------------------------------------------------


def test_recipes_are_valid():
    for name in ("data", "sft"):
        config, resume = load_config(f"expander {name}", ["--config", f"recipes/nano/expander_{name}.yaml"])
        assert config.seed == 0 and not resume


def test_weights_stay_small():
    files = [file for file in WEIGHTS.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 16_000_000


def test_expander_nano_keeps_its_prompt_mostly_and_spreads_over_what_that_leaves_open():
    """Floors below what posttrain/nano/weights/README.md measures on 200 prompts: 0.99, 0.72, 0.96; 5.6 and 4.2."""
    figures = evaluate_expander.measure(BASE, prompts=40)
    assert figures["valid"] > 0.94 and figures["keeps_all"] > 0.6 and figures["keeps_text"] > 0.85
    assert figures["styles_of_8"] > 5 and figures["backgrounds_of_8"] > 3.7 and figures["longest"] <= 64
