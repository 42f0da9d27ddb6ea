"""Thoughts before a caption: their form, supervised training on them, their gate in GDPO, and that only captions are
used."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from posttrain import cli
from posttrain.config.sections import LoraConfig
from posttrain.errors import UserError
from posttrain.expander import gdpo, model, thinking
from posttrain.expander.chat_template import messages, template
from posttrain.expander.config import ExpanderDataConfig
from posttrain.expander.data import make
from posttrain.expander.gdpo_config import ChatModelConfig
from posttrain.expander.model import Expander, load_chat_model
from posttrain.expander.policy import Policy
from posttrain.expander.score import gate
from posttrain.expander.sft import train
from posttrain.expander.sft_pairs import Pair, fitting, tokens
from posttrain.expander.text_metrics import causes
from posttrain.expander.thinking import CLOSE, OPEN, Answer, drift, figures, joined, part_losses, split, thought_end
from posttrain.training import advantages
from prompts.records import PromptRecord
from tests.expander.test_expander import BASE, recipe
from tests.helpers import expander_runs, runs

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
THOUGHT = Pair("a red star", "a red star, flat style", "red star; flat style")


# ---- the form


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("a cat", Answer("a cat")),
        ("<think>\nfur\n</think>\n\na cat", Answer("a cat", "fur")),
        ("<think>\nfur\nand ears\n</think>\n\na cat\n", Answer("a cat", "fur\nand ears")),
        ("<think>\n\n</think>\n\na cat", Answer("a cat", "")),
        ("<think>\nfur</think>\n\na cat", Answer("a cat", "fur")),
        ("<think>\nfur\n</think>a cat", Answer("a cat", "<think>\nfur\n", False)),
        ("so <think>\nfur\n</think>\n\na cat", Answer("a cat", "so <think>\nfur\n", False)),
        ("<think>\na\n</think>\n\nb\n</think>\n\nc", Answer("c", "<think>\na\n</think>\n\nb\n", False)),
        ("<think>\nfur, and on and", Answer("", "<think>\nfur, and on and", False)),
        ("a cat <think>", Answer("", "a cat <think>", False)),
        ("", Answer("")),
    ],
)
def test_an_answer_is_split(answer, expected):
    assert split(answer) == expected


def test_what_is_joined_is_split_again():
    assert split(joined("fur", "a cat")) == Answer("a cat", "fur") and joined("", "a cat") == "a cat"
    assert split("fur" + CLOSE + "a cat", opened=True) == Answer("a cat", "fur")
    assert split("a cat", opened=True) == Answer("", OPEN + "a cat", False)


def test_the_gate_sees_the_form_of_both_parts():
    """Check: one paragraph, no tag inside, finished, and the thought in its form."""
    assert causes("a cat", "a grey cat", True, "") == []
    assert causes("a cat", "a grey cat", True, "", thought_ok=False) == ["thinking"]
    assert causes("a cat", "a grey cat\n\nand more", True, "") == ["paragraphs"]
    assert causes("a cat", "a grey\ncat", True, "") == []
    assert causes("a cat", "", False, "", thought_ok=False) == ["empty", "truncated", "thinking"]


def test_an_expansion_that_fails_the_form_scores_0_before_the_advantages():
    """Scores (.9, .8, .7, .6), of which the third fails: advantages of (.9, .8, 0, .6), whose mean is .575 and whose
    standard deviation is .4031."""
    values, valid = gate(np.array([0.9, 0.8, 0.7, 0.6]), np.ones(4, bool), np.array([1.0, 1, 0, 1]), 0.0)
    assert values.tolist() == [0.9, 0.8, 0, 0.6]
    found = advantages.standardise(torch.from_numpy(values).view(1, 4, 1), torch.from_numpy(valid).view(1, 4, 1),
                                   torch.tensor([0.0]))  # fmt: skip
    assert found.flatten().tolist() == pytest.approx([0.8060, 0.5580, -1.4261, 0.0620], abs=1e-3)


def test_figures_and_when_a_run_ends():
    before = figures(["fur", "paws", None, ""], [10, 20, 0, 0])
    assert before == {"thought/empty": 0.5, "thought/tokens": 15.0}
    assert figures([None], [0]) == {"thought/empty": 1.0, "thought/tokens": None}
    sound = {"format": 0.99, "thought/empty": 0.2, "thought/tokens": 20.0}
    assert drift(before, sound) is None
    assert drift(before, sound | {"format": 0.94}).startswith("6% of the expansions fail the format")
    assert drift(before, sound | {"thought/empty": 0.51}).startswith("51% of the answers have no thought")
    assert drift(before, sound | {"thought/tokens": 30.0}) is None
    assert drift(before, sound | {"thought/tokens": 31.0}).startswith(
        "the length of thoughts is 31, over 2 times the 15"
    )


# ---- supervised training


@pytest.fixture(scope="module")
def tokenizer():
    return load_chat_model(BASE, torch.float32)[1]


def test_the_request_for_a_thought_is_in_the_system_text_alone():
    asked, direct = messages("a cat", True), messages("a cat")
    assert asked[1] == direct[1] and asked[0]["content"] == f"{template().system}\n\n{template().thinking}"
    assert direct[0]["content"] == template().system


def test_a_pair_with_a_thought_trains_on_both_parts(tokenizer):
    ids, start = tokens(THOUGHT, tokenizer)
    assert tokenizer.decode(ids[start:]) == f"{OPEN}red star; flat style{CLOSE}a red star, flat style<|im_end|>\n"
    end = thought_end(ids, start, tokenizer.decode)
    assert tokenizer.decode(ids[start:end]) == f"{OPEN}red star; flat style{CLOSE}"
    direct, asked = tokens(Pair("a red star", "a red star, flat style"), tokenizer)
    assert tokenizer.decode(direct[asked:]) == "a red star, flat style<|im_end|>\n"
    with pytest.raises(ValueError, match="no thought"):
        thought_end(direct, asked, tokenizer.decode)


def always_thinking(tokenizer):
    """A chat template that opens the thought itself, as models have it that always think."""
    changed = AutoTokenizer.from_pretrained(BASE)
    changed.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    return changed


def test_a_model_that_always_thinks_begins_within_the_thought(tokenizer, tmp_path):
    changed = always_thinking(tokenizer)
    ids, start = tokens(THOUGHT, changed)
    assert changed.decode(ids[start:]).startswith("red star; flat style\n</think>")
    assert fitting([THOUGHT], changed, recipe(tmp_path, tmp_path)) == [THOUGHT]
    with pytest.raises(UserError, match="writes a prompt differently once it is answered"):
        fitting([Pair("a red star", "a red star, flat style")], changed, recipe(tmp_path, tmp_path))


def test_losses_of_both_parts_are_means_over_tokens(tokenizer):
    """A model that gives each token the same chance has a loss of log(vocabulary) in both; and the mean over all tokens
    weighs the parts by their lengths: 200 tokens at 1 and 100 at .5 are .8333."""
    assert pytest.approx(0.8333, abs=5e-5) == (200 * 1.0 + 100 * 0.5) / 300
    network, _ = load_chat_model(BASE, torch.float32)
    rows = [tokens(THOUGHT, tokenizer), tokens(Pair("a cross", "a pink cross, dark style", "cross; dark"), tokenizer)]
    found = part_losses(network, rows, tokenizer.decode)
    sums, counts = [0.0, 0.0], [0, 0]
    for ids, start in rows:  # one by one, token by token
        end = thought_end(ids, start, tokenizer.decode)
        with torch.no_grad():
            logp = network(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
        for place in range(start, len(ids)):
            sums[place >= end] -= float(logp[place - 1, ids[place]])
            counts[place >= end] += 1
    assert found["loss_thought"] == pytest.approx(sums[0] / counts[0], abs=1e-4)
    assert found["loss_caption"] == pytest.approx(sums[1] / counts[1], abs=1e-4)


@pytest.fixture(scope="module")
def thoughtful(tmp_path_factory) -> Path:
    """Pairs with thoughts."""
    folder = tmp_path_factory.mktemp("thoughtful") / "data"
    captions = "posttrain.nano.world.expander_pairs:candidates"
    make(ExpanderDataConfig(str(folder), captions, count=120, heldout=0.2, thoughts=True))
    return folder


def test_a_run_with_thoughts_says_so_beside_its_adapter(tmp_path, thoughtful):
    train(recipe(tmp_path, thoughtful, thinking=True, max_length=320, steps=2))
    run = tmp_path / "run"
    losses = [row for row in runs.rows(run) if "eval/loss_thought" in row]
    assert [row["step"] for row in losses] == [0, 2]
    assert losses[1]["eval/loss_thought"] < losses[0]["eval/loss_thought"]  # of a form that it has never seen
    runs.assert_metrics_are_defined(run)
    assert json.loads((run / "adapter/expander.json").read_text())["thinking"] is True
    assert Expander.load(str(run), dtype=torch.float32).thinking
    assert not Expander.load(str(run), dtype=torch.float32, thinking=False).thinking
    assert not Expander.load(BASE, dtype=torch.float32).thinking
    policy = Policy(ChatModelConfig(str(run), dtype="float32"), LoraConfig(4, 8), 0, torch.device("cpu"))
    assert policy.thinking and "Write first, between <think>" in policy.template


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"thought": None}, "no row has a thought"),
        ({}, "has no column thought"),
        ({"thought": 5}, "thought: is not text"),
        ({"thought": "x", "weight": 4}, "weight: is 4; write a number above 0, at most 3"),
        ({"thought": "x", "weight": True}, "weight: is True"),
    ],
)
def test_data_that_cannot_be(tmp_path, capsys, row, says):
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps({"prompt": "a", "completion": "a b"} | row) + "\n")
    config = recipe(tmp_path, file, thinking=True)
    assert cli.main(["expander", "sft", "--config", str(runs.recipe(config, tmp_path / "r.yaml"))]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_pairs_are_repeated_by_their_weight(tmp_path):
    """A tenth of the pairs at weight 3 gets a quarter of the draws."""
    from posttrain.expander.sft_pairs import read_pairs

    rows = [{"prompt": f"p{i}", "completion": f"c{i}", "weight": 3.0 if i % 10 == 0 else 1.0} for i in range(400)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    training, heldout = read_pairs(recipe(tmp_path, tmp_path / "pairs.jsonl", heldout=0.2))
    heavy = [pair for pair in training if int(pair.prompt[1:]) % 10 == 0]
    distinct = set(training)
    assert len(heavy) == 3 * len(set(heavy)) and len(training) - len(heavy) == len(distinct) - len(set(heavy))
    assert len(heavy) / len(training) == pytest.approx(0.25, abs=0.04)
    assert len(set(heldout)) == len(heldout) and not distinct & set(heldout)


# ---- use


class Scripted:
    """Stands in for sampling: answers in turn."""

    def __init__(self, monkeypatch, *answers: str):
        self.answers, self.asked = list(answers), []
        monkeypatch.setattr(model.Expander, "_sample", self)

    def __call__(self, prompts, n, seed, temperature, max_tokens):
        self.asked.append((list(prompts), n))
        taken, self.answers = self.answers[: len(prompts) * n], self.answers[len(prompts) * n :]
        parts = [split(answer) for answer in taken]
        return [model.Expansion(part.caption, bool(part.caption), part.thought, 7) for part in parts]


def test_a_thought_is_cut_off_and_one_without_an_end_is_asked_for_again(monkeypatch):
    expander = Expander(None, None, True)
    fine, endless = "<think>\nfur\n</think>\n\na grey cat", "<think>\nfur and fur and"
    scripted = Scripted(monkeypatch, fine, endless, endless, fine, endless)
    first, second, third = expander.expand(["a cat"], 3)[0]
    assert (first.text, first.thought, first.unexpanded) == ("a grey cat", "fur", False)
    assert (second.text, second.unexpanded) == ("a grey cat", False)
    assert (third.text, third.unexpanded, third.whole) == ("a cat", True, False)
    assert scripted.asked == [(["a cat"], 3), (["a cat"], 1), (["a cat"], 1)] and not scripted.answers


def test_expand_prints_no_thought(tmp_path, thoughtful, capsys):
    train(recipe(tmp_path, thoughtful, thinking=True, max_length=320, steps=1))
    words = ["expand", "a red star", "--model", str(tmp_path / "run"), "--dtype", "float32", "--max_tokens", "60"]
    assert cli.main([*words, "--n", "6"]) == 0
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 6 and "think>" not in captured.out


# ---- GDPO


def test_a_run_that_thinks_measures_thoughts_and_draws_captions(tmp_path, model, monkeypatch):
    parts = expander_runs.parts(tmp_path, model)
    config = expander_runs.config(tmp_path, parts)
    config.model.thinking, config.steps = True, 1
    seen = []

    class Watched(gdpo.Policy):
        def expansion(self, record, ids):
            e = super().expansion(record, ids)
            # The tiny model has learnt no thoughts, so each second answer is given one.
            if len(seen) % 2:
                e.thought, e.thought_tokens = "shapes", 2
            seen.append(e)
            return e

    monkeypatch.setattr(gdpo, "Policy", Watched)
    gdpo.train(config)
    (row,) = (row for row in runs.rows(config.output) if "loss" in row)
    assert row["thought/tokens"] == 2 and row["thought/empty"] == 0.5 and row["format/thinking"] == 0
    runs.assert_metrics_are_defined(Path(config.output), "brightness", "redness", "diversity")
    kept = json.loads((Path(config.output) / "evaluations.json").read_text())
    assert kept[0]["figures"]["thought/empty"] == 0.5
    assert json.loads((Path(config.output) / "adapter/expander.json").read_text())["thinking"] is True
    assert '"thought": "shapes"' in (Path(config.output) / "groups/step-000000/groups.json").read_text()


def test_thoughts_that_decay_end_a_run(tmp_path, model, monkeypatch, capsys):
    parts = expander_runs.parts(tmp_path, model)
    config = expander_runs.config(tmp_path, parts)
    config.model.thinking, config.steps, config.eval.every = True, 4, 1
    monkeypatch.setattr(thinking, "SETTLED", 2)
    gdpo.train(config)  # the tiny model never thinks
    assert json.loads((Path(config.output) / "summary.json").read_text())["steps"] == 2
    assert "the run ends at step 2: 100% of the answers have no thought" in capsys.readouterr().err
    assert (Path(config.output) / "checkpoints/checkpoint-2/manifest.json").is_file()


def test_a_policy_splits_its_answers(tmp_path, model, tokenizer):
    policy = Policy(ChatModelConfig(BASE, dtype="float32", thinking=True), LoraConfig(4, 8), 0, torch.device("cpu"))
    end = policy.ends[0]

    def expansion(answer):
        return policy.expansion(PromptRecord("a star"), [*tokenizer(answer).input_ids, end])

    fine = expansion(joined("red star; flat", "a red star, flat style"))
    assert (fine.text, fine.thought, fine.thought_ok, fine.ended) == (
        "a red star, flat style", "red star; flat", True, True,
    )  # fmt: skip
    assert fine.thought_tokens == len(tokenizer("red star; flat").input_ids)
    long = expansion(joined("red star " * 110, "a red star"))
    assert long.thought_tokens > thinking.LONGEST and not long.thought_ok and long.text == "a red star"
    assert not expansion("<think>\nred\n</think>a red star").thought_ok
    assert expansion("a red star").thought_ok
