"""Expansions to rewards: each is drawn and scored once, gated before all normalisation, and safe or worth nothing."""

import numpy as np
import pytest
import torch
from PIL import Image

from posttrain.errors import UserError
from posttrain.expander import callbacks, gdpo
from posttrain.expander.gdpo_config import ExpanderGDPOConfig, SafetySpec
from posttrain.expander.policy import Policy
from posttrain.expander.renderer import Rendering
from posttrain.expander.score import Expansion, Scorer, gate
from posttrain.expander.trl_rewards import for_trl
from posttrain.training import advantages
from prompts.records import PromptRecord
from rewards.base import RewardSpec
from rewards.diversity import Features
from tests.helpers import expander_runs

RECORD = PromptRecord("a red circle")
TEXTS = ["a red circle, flat", "a red circle, pastel", "a red circle at night", "a red circle, soft light"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory, model):
    return expander_runs.parts(tmp_path_factory.mktemp("parts"), model)


@pytest.fixture
def config(tmp_path, parts) -> ExpanderGDPOConfig:
    return expander_runs.config(tmp_path, parts)


@pytest.fixture(scope="module")
def features(parts):
    return Features(str(parts / "dinov3"), device="cpu")


class Drawer:
    """A renderer of one colour a prompt; None for the prompts named."""

    def __init__(self, missing=()):
        self.missing, self.calls = missing, []

    def __call__(self, prompts, seeds):
        self.calls.append((list(prompts), list(seeds)))
        images = [None if p in self.missing else Image.new("RGB", (32, 32), (len(p) * 9 % 256, 90, 9)) for p in prompts]
        return Rendering(images, [0] * len(prompts))


def scorer(config, features, renderer=None):
    return Scorer(config, renderer or Drawer(), features, "", {})


def written(texts, record=RECORD, **options):
    return [Expansion(record, text, **options) for text in texts]


def trl(rewards, size):
    """TRL's advantages of one reward before the batch's own scale: fp32, and 1e-4 beside the standard deviation."""
    grouped = torch.tensor(rewards, dtype=torch.float32).view(-1, size)
    mean = grouped.nanmean(1, keepdim=True)
    there = (~grouped.isnan()).sum(1, keepdim=True)
    std = ((grouped - mean).square().nansum(1, keepdim=True) / (there - 1)).sqrt()
    return (grouped - mean) / (std + 1e-4)


def test_trl_gets_the_floor():
    """Groups of 7, which no sum of equal fp32 numbers divides exactly: one with a spread, one with a missing value and
    one within the noise. TRL then has the advantages that `advantages.standardise` has, and the means are kept."""
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.random(7), 0.3 + 0.05 * rng.random(7), 0.9131 + 0.009 * rng.random(7)])
    valid = np.arange(21) != 9
    floored = for_trl(values, valid, 7, 0.01)
    got = trl(np.where(valid, floored, np.nan), 7).nan_to_num()
    tables = torch.tensor(values).view(3, 7, 1), torch.tensor(valid).view(3, 7, 1)
    expected = advantages.standardise(*tables, torch.tensor([0.01]))[..., 0]
    assert torch.allclose(got.double(), expected, atol=2e-3) and got[:2].abs().max() > 1
    assert (got[2] == 0).all() and (expected[2] == 0).all()
    for rows in (slice(0, 7), slice(14, 21)):
        assert floored[rows].mean() == pytest.approx(values[rows].mean(), rel=3e-4)
    assert (for_trl(values, valid, 7, 0.0)[:7] == values[:7]).all()  # TRL makes the same of them


@pytest.mark.parametrize("unit", [3e-5, 1e-9])
def test_trl_sees_no_units(unit):
    """Of a standard deviation of 3e-5, TRL's own 1e-4 leaves 3 / 13; that of U(0, 3e-5) is a third of it."""
    values, valid = np.random.default_rng(1).random(21), np.ones(21, bool)
    shown = for_trl(unit * values, valid, 7, 0.0)
    expected = trl(values, 7)
    assert trl(unit * values, 7).abs().max() < 0.2 * expected.abs().max()
    assert torch.allclose(trl(shown, 7), expected, atol=2e-3)
    assert shown.reshape(3, 7).mean(1) == pytest.approx(unit * values.reshape(3, 7).mean(1), abs=1e-12)


def test_an_expansion_is_drawn_once_and_shown_to_each_reward_once(config, features):
    """Two rewards, diversity and a safety check, and one render; the same text from one noise is one too."""
    renderer = Drawer()
    texts = [*TEXTS[:3], TEXTS[0]]
    expander_runs.CALLS.clear()
    found = scorer(config, features, renderer)(written(texts), [7] * 4, 4)
    assert renderer.calls == [(TEXTS[:3], [7] * 3)] and found.renders == 3
    assert expander_runs.CALLS == [4]
    assert found.names == ["brightness", "redness", "diversity"]
    assert found.rewards("brightness")[0] == found.rewards("brightness")[3]


def test_trl_gets_one_evaluation_of_a_batch(config, features, parts):
    policy = Policy(config.model, config.lora, 0, torch.device("cpu"))
    procs = gdpo.Processes()
    shared = callbacks.SharedRewards(config, policy, scorer(config, features), [RECORD], procs)
    ids = [[*policy.tokenizer(text).input_ids, policy.ends[0]] for text in TEXTS]
    state, logged = type("State", (), {"global_step": 3}), {}
    expander_runs.CALLS.clear()
    answers = {
        function.__name__: function(
            prompts=[],
            completions=[],
            completion_ids=ids,
            row=[0] * 4,
            trainer_state=state,
            log_metric=logged.__setitem__,
        )
        for function in shared.functions()
    }
    assert list(answers) == ["brightness", "redness", "diversity"] and expander_runs.CALLS == [4]
    assert logged["renders"] == 4 and logged["format"] == 1.0
    assert shared.scored is not None and len(set(answers["diversity"])) > 1
    [(_, seeds)] = shared.scorer.renderer.calls
    assert len(set(seeds)) == 1  # a group starts from one noise
    shared.functions()[0](
        completion_ids=[*ids[:3], ids[3][:-1]], row=[0] * 4, trainer_state=state, log_metric=logged.__setitem__
    )
    shown = {"step": 4, "prompt": "a red circle", "expansion": TEXTS[3], "fails": "truncated"}
    assert list(shared.faults) == [shown] and logged["format/truncated"] == 0.25
    with pytest.raises(RuntimeError, match="not whole groups"):
        shared.functions()[0](completion_ids=ids[:3], row=[0] * 3, trainer_state=state, log_metric=logged.__setitem__)
    with pytest.raises(RuntimeError, match="not whole groups"):
        shared.functions()[0](completion_ids=ids, row=[0, 0, 1, 1], trainer_state=state, log_metric=print)


def test_the_gate_comes_before_normalisation():
    """Self-check 36: of (.9, .8, .7, .6) the third is unsafe; (.9, .8, 0, .6) has mean .575 and deviation .4031."""
    values, valid = gate(np.array([0.9, 0.8, 0.7, 0.6]), np.ones(4, bool), np.array([1, 1, 0, 1.0]), 0.0)
    assert values.tolist() == [0.9, 0.8, 0.0, 0.6]
    shape = (1, 4, 1)
    a = advantages.gdpo(torch.tensor(values).view(shape), torch.tensor(valid).view(shape), torch.ones(1))
    assert a[0].tolist() == pytest.approx([0.806, 0.558, -1.426, 0.062], abs=5e-4)


def test_a_reward_that_may_be_negative_is_gated_to_its_worst():
    values, valid = gate(np.array([-0.5, 0.3, 0.0]), np.array([True, True, False]), np.array([0, 1, 0.0]), -2.0)
    assert values.tolist() == [-2.0, 0.3, -2.0]
    assert valid.tolist() == [True, True, True]  # what is gated is known, drawn or not


def test_a_negative_score_whose_worst_is_unknown_ends_the_run(config, features):
    config.rewards = [RewardSpec("brightness", "tests.helpers.expander_runs:brightness", offset=-1.0)]
    with pytest.raises(
        UserError, match=r"reward brightness: a score of -.* is below the worst score \(0\).*; set worst"
    ):
        scorer(config, features)(written(TEXTS), [1] * 4, 4)
    config.worst = {"brightness": -1.0}
    found = scorer(config, features)(written([TEXTS[0], "", *TEXTS[2:]]), [1] * 4, 4)
    assert found.rewards("brightness")[1] == -1.0


def test_what_fails_the_format_is_counted_not_drawn_and_gets_the_worst(config, features):
    group = [
        Expansion(RECORD, TEXTS[0]),
        Expansion(RECORD, TEXTS[1], ended=False),
        Expansion(RECORD, "красный круг"),
        Expansion(RECORD, TEXTS[3]),
    ]
    renderer = Drawer()
    found = scorer(config, features, renderer)(group, [1] * 4, 4)
    assert renderer.calls[0][0] == [TEXTS[0], TEXTS[3]]
    assert found.rewards("brightness")[1:3] == [0.0, 0.0] and found.rewards("diversity")[1:3] == [0.0, 0.0]
    shares = found.figures(4)
    assert shares["format"] == 0.5 and shares["safe"] == 1.0
    assert shares["format/truncated"] == shares["format/language"] == 0.25
    assert shares["format/empty"] == shares["format/leaked"] == 0.0
    assert shares["flat/brightness"] == 0.0


def test_unsafe_text_is_not_drawn_and_an_unsafe_picture_is_not_rewarded(config, features):
    config.safety[1] = SafetySpec("picture", "image", "tests.expander.test_expander_score:dark_is_unsafe")
    texts = ["a red circle of gore", TEXTS[1], TEXTS[2], TEXTS[3]]
    renderer = Drawer()
    found = scorer(config, features, renderer)(written(texts), [1] * 4, 4)
    assert texts[0] not in renderer.calls[0][0]
    assert found.unsafe_N == [["words"], ["picture"], [], []]
    for name in ("brightness", "redness", "diversity"):
        values = found.rewards(name)
        assert values[:2] == [0.0, 0.0] and all(v is not None for v in values)
    # The two that are left are as far from each other.
    assert found.rewards("diversity")[2] == pytest.approx(found.rewards("diversity")[3])
    assert found.figures(4)["safe"] == 0.5


def dark_is_unsafe(images, prompts):
    return [0.0 if image.getpixel((0, 0))[0] == len(TEXTS[1]) * 9 % 256 else 1.0 for image in images]


@pytest.mark.parametrize("sees", ["text", "image"])
@pytest.mark.parametrize(("function", "reason"), [("unreachable", "does not answer"), ("silent", "gave no score")])
def test_a_safety_check_that_cannot_be_had_ends_the_run(config, features, sees, function, reason):
    config.safety = [SafetySpec("guard", sees, f"tests.helpers.expander_runs:{function}")]
    with pytest.raises(UserError, match=rf"safety guard: cannot be checked: .*{reason}.*nothing is safe by default"):
        scorer(config, features)(written(TEXTS), [1] * 4, 4)


def test_a_safety_judge_that_is_down_ends_the_run(config, features):
    judge = {"model": "guard", "base_urls": "http://127.0.0.1:9/v1", "deadline": 0.3}
    for sees, name in (("text", "TextJudge"), ("image", "ImageJudge")):
        function = {"class_path": f"rewards.safety.{name}", "init_args": {"judge": judge}}
        config.safety = [SafetySpec("guard", sees, function)]
        with pytest.raises(UserError, match=r"safety guard: cannot be checked: .*127\.0\.0\.1:9"):
            scorer(config, features)(written(TEXTS), [1] * 4, 4)


def test_a_missing_picture_is_missing_and_not_zero(config, features):
    found = scorer(config, features, Drawer(missing=[TEXTS[1]]))(written(TEXTS), [1] * 4, 4)
    assert found.rewards("brightness")[1] is None and found.rewards("diversity")[1] is None
    assert all(found.rewards("brightness")[i] is not None for i in (0, 2, 3))
    assert found.figures(4)["missing_images"] == 0.25
    everything = scorer(config, features, Drawer(missing=TEXTS))(written(TEXTS), [1] * 4, 4)
    assert everything.rewards("brightness") == everything.rewards("diversity") == [None] * 4


def test_rewards_see_the_users_prompt_and_its_columns(config, features):
    seen = {}

    def spy(images, prompts, requirements, expansion):
        seen.update(prompts=prompts, requirements=requirements, expansion=expansion)
        return [1.0] * len(images)

    built = scorer(config, features)
    built.rewards[0].function, built.rewards[0].parameters = spy, {"images", "prompts", "requirements", "expansion"}
    built(written(TEXTS, PromptRecord("a red circle", ["it is red"])), [1] * 4, 4)
    assert seen == {"prompts": ["a red circle"] * 4, "requirements": [["it is red"]] * 4, "expansion": TEXTS}
    built(written(TEXTS), [1] * 4, 4)
    assert seen["requirements"] == [None] * 4  # and the rubric finds them
