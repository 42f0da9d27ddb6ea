"""judge-nano: training rows are what serving asks, questions are true or false as said, and training learns."""

import numpy as np
import pytest
import torch
from PIL import Image

from posttrain.errors import UserError
from posttrain.nano.build import evaluate_judge, judge, judge_model
from posttrain.nano.world import questions, scenes, statements
from prompts.templates import load_template
from rewards.vlm import VLM

ROOM = {"rubric": 44, "transcribe": 14, "describe": 40}


@pytest.fixture(scope="module")
def tokenizer():
    return judge_model.make_tokenizer()


@pytest.fixture(scope="module")
def vlm(tokenizer, tmp_path_factory) -> VLM:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("judge")
    judge_model.save(judge_model.make_model(tokenizer), tokenizer, folder)
    return VLM.load(str(folder))


def test_it_is_small(vlm):
    assert sum(p.numel() for p in vlm.model.parameters()) <= 1_000_000


def test_packed_row_equals_chat_template(vlm, tokenizer):
    """Each question of a row has the logits that it has when it is asked alone, as a server asks it."""
    data = judge.make_data(3, 5, 1, tokenizer).map(torch.from_numpy)
    room = {name: getattr(data, name).shape[-1] for name in ROOM}
    layout = judge_model.Layout.of(tokenizer, 4, room)
    images, batch, _, _ = judge.draw(data, 2, 4)
    network = judge_model.JudgeNetwork(vlm.model, compiled=False)
    with torch.no_grad():
        image = network.see(images.permute(0, 3, 1, 2) / 127.5 - 1)
        states = layout.answers(network.read(layout.row(batch), image, layout), batch)
    template, pictures = load_template("rubric"), [Image.fromarray(i.numpy()) for i in images]
    before = judge_model.rubric_beginning(tokenizer)

    def alone(picture: Image.Image, text: str, answer: str = "") -> torch.Tensor:
        inputs = vlm.inputs([picture], [text])
        extra = tokenizer(answer, return_tensors="pt", add_special_tokens=False).input_ids
        for name, more in (("input_ids", extra), ("attention_mask", extra**0), ("mm_token_type_ids", 0 * extra)):
            inputs[name] = torch.cat([inputs[name], more.to(inputs[name].dtype)], dim=1)
        with torch.no_grad():
            return vlm.model(**inputs, logits_to_keep=1).logits[0, -1]

    def agree(state: torch.Tensor, expected: torch.Tensor) -> None:
        torch.testing.assert_close(vlm.model.lm_head(state), expected, atol=2e-4, rtol=2e-4)

    suffix = len(judge_model.token_ids(tokenizer, judge_model.SUFFIX))
    for b, picture in enumerate(pictures):
        for q in range(4):
            ids = before + batch.rubric[b, q, : batch.length[b, q] - suffix].tolist()
            text = tokenizer.decode(ids)
            assert text.startswith(template.render(requirement="x").split('"x"')[0])
            agree(states["rubric"][b, q], alone(picture, text))
        name = judge_model.OPINIONS[int(batch.opinion[b])]
        agree(states["opinion"][b], alone(picture, load_template(name).render()))
        said = batch.transcribe[b][batch.transcribe[b] >= 0]
        for n in (0, len(said) - 1) if len(said) else ():
            text = tokenizer.decode(said[:n])
            agree(states["transcribe"][b, n], alone(picture, load_template("transcribe").render(), text))


def test_statements_are_balanced_and_true_as_said():
    rng = np.random.default_rng(0)
    marks: dict[str, list[bool]] = {}
    for _ in range(300):
        scene = scenes.random_scene(rng)
        for _ in range(8):
            statement, truth = questions.ask(scene, rng)
            if statement in questions.FAULTS.values():
                assert not truth
                continue
            assert truth == questions.is_true(scene, statement)
            marks.setdefault(statements.parse(statement)[0], []).append(truth)
    assert set(marks) == set(statements._PATTERNS)
    assert all(0.3 < np.mean(m) < 0.7 for m in marks.values()), {k: np.mean(m) for k, m in marks.items()}
    rows = evaluate_judge.true_and_false(scenes.random_scene(rng, ["CAT"], "text"), rng)
    assert sum(truth for _, truth in rows) * 2 == len(rows)


def test_capitals_stay_letters(tokenizer):
    ids = judge_model.token_ids(tokenizer, judge_model.rubric('the text reads "ABCD"'))
    assert {"A", "B", "C", "D"} <= {tokenizer.decode([i]) for i in ids}
    assert len(judge_model.token_ids(tokenizer, "yes")) == len(judge_model.token_ids(tokenizer, "no")) == 1


def test_training_learns(tokenizer):
    torch.manual_seed(0)
    model = judge_model.make_model(tokenizer)
    data = judge.make_data(4, 1, 1, tokenizer).map(torch.from_numpy)
    rows: list[dict] = []
    judge.train(model, tokenizer, data, 0, 2, 2, 2e-3, lambda **row: rows.append(row), False, steps=6)
    before = rows[0]
    images, batch, _, _ = judge.draw(data, 4, 2)
    room = {name: getattr(data, name).shape[-1] for name in ROOM}
    layout, network = judge_model.Layout.of(tokenizer, 2, room), judge_model.JudgeNetwork(model, False)
    words = judge_model.token_ids(tokenizer, "yes")[0], judge_model.token_ids(tokenizer, "no")[0]
    with torch.no_grad():
        _, parts, _ = judge.losses(network, model.lm_head, judge.blemish(images), batch, layout, words)
    assert parts["rubric"] < before["rubric"] - 1 and parts["transcribe"] < before["transcribe"] - 0.3


def test_mistakes_are_user_errors(tmp_path):
    with pytest.raises(UserError, match=r"\./nowhere: no such directory"):
        VLM.load("./nowhere")
    (tmp_path / "config.json").write_text('{"model_type": "qwen2", "vocab_size": 8}')
    with pytest.raises(UserError, match="is a qwen2: judges are Qwen3-VL models"):
        VLM.load(str(tmp_path))


def test_a_picture_asked_twice_is_seen_once(vlm, monkeypatch):
    """Questions in one batch that share image objects, of two sizes, have the scores that each has alone."""
    rng = np.random.default_rng(5)
    a, b = (Image.fromarray(rng.integers(0, 255, (size, 64, 3), dtype=np.uint8)) for size in (64, 32))
    images, texts = [a, b, a, a, b], [f"Is it {word}?" for word in ("red", "blue", "green", "red", "large")]
    alone = [vlm.margins([image], [text]).item() for image, text in zip(images, texts)]
    assert vlm.margins(images, texts).tolist() == pytest.approx(alone, abs=1e-4)
    assert len(set(alone)) > 2
    patches = []
    visual = vlm.model.model.visual
    embed = visual.patch_embed.forward
    monkeypatch.setattr(visual.patch_embed, "forward", lambda x: patches.append(len(x)) or embed(x))
    vlm.margins(images, texts)
    assert patches == [vlm.inputs([a, b], texts[:2])["pixel_values"].shape[0]]
    assert vlm.complete(images[:3], texts[:3], 4) == [vlm.complete([i], [t], 4)[0] for i, t in zip(images, texts)][:3]
