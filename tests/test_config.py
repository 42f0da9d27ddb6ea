"""Recipe checks: every field out of range is refused with its path and a remedy."""

import subprocess
import sys
from dataclasses import asdict, replace

import pytest

from posttrain.config.load import make
from posttrain.config.sections import ModelConfig, PromptsConfig
from posttrain.config.types import ConfigError
from posttrain.errors import UserError
from posttrain.export.config import ExportConfig
from posttrain.grpo.config import GRPOConfig
from posttrain.judge.config import ServeConfig
from posttrain.preferences.config import ColumnMap
from posttrain.sample_config import SampleConfig
from posttrain.stpo.config import PairSetConfig, STPOConfig
from rewards.base import RewardSpec
from rewards.serve import ServerSpec
from tests.helpers.settings import validate


def grpo() -> GRPOConfig:
    return GRPOConfig(
        output="runs/a",
        model=ModelConfig(path="k2"),
        prompts=PromptsConfig(train="a.jsonl", heldout="b.jsonl"),
        rewards=[RewardSpec(name="oracle", function="pkg.mod:score")],
    )


def set_path(config, path: str, value) -> None:
    *sections, name = path.split(".")
    for section in sections:
        config = getattr(config, section)
    assert hasattr(config, name)
    setattr(config, name, value)


def test_defaults_are_valid_and_stay_what_they_are():
    config = grpo()
    validate(config)
    assert config == grpo()


def test_all_weights_need_no_adapter():
    config = grpo()
    config.lora = None
    validate(config)
    assert config == replace(grpo(), lora=None)


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("output", " ", "name a directory"),
        ("steps", 0, "use 1 or more"),
        ("seed", -1, "use 0 or more"),
        ("prompts.max_tokens", 0, "use 1 or more"),
        ("lora.rank", 0, "use 1 or more"),
        ("lora.alpha", 0.0, "above 0"),
        ("lora.targets", [], "nothing would be trained"),
        ("sampling.sizes", [], "at least one"),
        ("sampling.steps", 1, "use 2 or more"),
        ("sampling.eta", 0.0, "above 0"),
        ("sampling.window", 8, "of 8 steps 1 to 7 can"),
        ("sampling.window", 0, "1 to 7 can have noise"),
        ("sampling.window_start", 6, "would end after step 6"),
        ("sampling.window_start", -1, "use 0 or more"),
        ("sampling.window_every", 0, "use 1 or more"),
        ("groups.prompts_per_step", 0, "use 1 or more"),
        ("groups.group_size", 1, "use 2 or more"),
        ("groups.micro_batch", 0, "use 1 or more"),
        ("rollout.gpus", -1, "use 0 or more"),
        ("loss.max_weight", 0.9, "use 1 or more"),
        ("pool.decay", 0.0, "use 0.01 to 1"),
        ("pool.explore", 0.0, "use 0.01 to 1"),
        ("pool.low_variance", 1.1, "use 0 to 1"),
        ("pool.floor", float("nan"), "use 0 to 1"),
        ("pool.hard", 0.95, "not below pool.easy (0.9)"),
        ("pool.sharpness", -1.0, "use 0 or more"),
        ("pool.staleness", 0, "use 1 or more"),
        ("pool.prune_after", 0, "use 1 or more"),
        ("pool.cooldown", 0, "use 1 or more"),
        ("pool.audit", 1.0, "below 1"),
        ("pool.quotas", {"a": 0.6, "b": 0.6}, "add up to 1.2"),
        ("optim.lr", -1e-4, "above 0"),
        ("optim.lr", float("nan"), "above 0"),
        ("optim.betas", (0.9, 1.0), "below 1"),
        ("optim.weight_decay", -0.1, "use 0 or more"),
        ("optim.eps", 0.0, "above 0"),
        ("optim.clip_factor", 0.5, "use 1 or more"),
        ("optim.passes", 0, "use 1 or more"),
        ("optim.warmup_steps", -1, "use 0 or more"),
        ("optim.ema", 1.0, "below 1"),
        ("loss.clip_low", 1.0, "between 0 and 1"),
        ("loss.clip_high", 0.0, "above 0"),
        ("loss.kl", -1.0, "use 0 or more"),
        ("loss.max_advantage", 0.0, "above 0"),
        ("rewards", [], "at least one reward"),
        ("eval.every", -1, "use 0 or more"),
        ("eval.prompts", 0, "use 1 or more"),
        ("eval.steps", 0, "use 1 or more"),
        ("eval.seed", -1, "use 0 or more"),
        ("eval.guidance", [], "[0.0]"),
        ("eval.groups", -1, "use 0 or more"),
        ("eval.group_size", 1, "use 2 or more"),
        ("eval.best", "orcale", "known here: oracle, image/brightness, image/saturation, image/high_frequency"),
        ("eval.best", "oracle@1.5", "known here: oracle, image/brightness"),
        ("eval.stop.metric", "diversity", "image/latent_norm, image/diversity"),
        ("eval.stop.drop", 0.0, "above 0"),
        ("eval.stop.patience", 0, "use 1 or more"),
        ("checkpoint.every", -1, "use 0 or more"),
        ("checkpoint.minutes", -1.0, "use 0 or more"),
        ("checkpoint.keep", 0, "use 1 or more"),
    ],
)
def test_out_of_range_names_the_field(path, value, says):
    config = grpo()
    set_path(config, path, value)
    with pytest.raises(ConfigError) as error:
        validate(config)
    assert error.value.field == path
    assert says in error.value.problem


def stpo() -> STPOConfig:
    return STPOConfig(
        output="runs/a",
        model=ModelConfig(path="k2"),
        pairs=PairSetConfig(train="runs/pairs"),
        heldout="heldout.jsonl",
    )


def test_stpo_needs_no_reward():
    config = stpo()
    validate(config)
    assert config == stpo()
    config.rewards = [RewardSpec("oracle", "m:f", weight=0)]
    config.eval.best, config.eval.stop.metric, config.eval.stop.limit = "oracle", "pairs/winner", 0.01
    config.eval.stop.better = "lower"
    config.pairs.columns = ColumnMap("caption", first="jpg_0", second="jpg_1", label="label_0")
    validate(config)


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("output", "", "name a directory"),
        ("heldout", " ", "name prompts"),
        ("steps", 0, "use 1 or more"),
        ("batch", 0, "use 1 or more"),
        ("micro_batch", 0, "use 1 or more"),
        ("lora.rank", 0, "use 1 or more"),
        ("optim.passes", 2, "use 1"),
        ("optim.lr", 0.0, "above 0"),
        ("pairs.train", "", "name one"),
        ("pairs.cache", " ", "name one"),
        ("pairs.max_bad", 1.0, "below 1"),
        ("pairs.drop_prompt", -0.1, "at least 0"),
        ("pairs.heldout", 0.0, "between 0 and 1"),
        ("pairs.measured", 3, "use 4 or more"),
        ("pairs.max_tokens", 0, "use 1 or more"),
        ("pairs.size", [64, 60], "60 pixels is not a multiple of 16; use 64"),
        ("loss.beta", 0.0, "above 0"),
        ("loss.guard_share", 1.1, "use 0 to 1"),
        ("loss.bound", 0.0, "above 0"),
        ("loss.anchor", -1.0, "use 0 or more"),
        ("loss.hinge", float("nan"), "use 0 or more"),
        ("loss.time_mean", float("inf"), "use a number"),
        ("loss.time_std", 0.0, "above 0"),
        ("loss.terms_every", -1, "use 0 or more"),
        ("eval.best", "pairs/winer", "image/high_energy_ratio"),
        ("eval.stop.limit", float("nan"), "use a number or null"),
        ("checkpoint.keep", 0, "use 1 or more"),
    ],
)
def test_stpo_out_of_range_names_the_field(path, value, says):
    config = stpo()
    set_path(config, path, value)
    with pytest.raises(ConfigError) as error:
        validate(config)
    assert error.value.field == path
    assert says in error.value.problem


def test_the_exact_guard_needs_an_adapter():
    config = stpo()
    config.loss.guard, config.lora = "exact", None
    with pytest.raises(ConfigError, match=r"loss\.guard: exact needs an adapter's gradients"):
        validate(config)
    config.loss.kind = "dpo"  # which has none
    validate(config)


@pytest.mark.parametrize(
    ("sizes", "field", "says"),
    [
        ([[64, 64], [64, 100]], "sampling.sizes[1]", "100 pixels is not a multiple of 16; use 96"),
        ([[0, 64]], "sampling.sizes[0]", "use 16"),
        ([[64]], "sampling.sizes[0]", "[height, width]"),
    ],
)
def test_sizes(sizes, field, says):
    config = grpo()
    config.sampling.sizes = sizes
    with pytest.raises(ConfigError) as error:
        validate(config)
    assert error.value.field == field
    assert says in error.value.problem


def test_window_that_just_fits():
    config = grpo()
    config.sampling.window, config.sampling.window_start = 2, 5  # steps 5 and 6 of 0..7; 7 is the last
    validate(config)
    config.sampling.window, config.sampling.window_start = None, 0
    validate(config)
    config.sampling.window_start = 1
    with pytest.raises(ConfigError, match=r"sampling\.window_start"):
        validate(config)


def test_drawing_ahead():
    config = grpo()
    config.loss.max_weight = 1.001
    with pytest.raises(
        ConfigError, match=r"loss\.max_weight: has no effect where all ratios are 1; set rollout\.ahead"
    ):
        validate(config)
    config.rollout.gpus = 1
    with pytest.raises(ConfigError, match=r"rollout\.gpus: .* would wait for each update; set rollout\.ahead: 1"):
        validate(config)
    config.rollout.ahead = 1
    validate(config)


def test_sliding_needs_a_window():
    config = grpo()
    config.sampling.window_start = "sliding"
    validate(config)
    config.sampling.window = None
    with pytest.raises(ConfigError, match=r"sampling\.window_start: nothing can slide"):
        validate(config)


def test_cps_noise_level():
    config = grpo()
    config.sampling.dynamics, config.sampling.eta = "cps", 1.2
    with pytest.raises(ConfigError, match="at most 1"):
        validate(config)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"weight": 0.0}, "rewards"),
        ({"heldout_only": True}, "rewards"),
        ({"gate": "mask", "threshold": 0.5}, "rewards"),
        ({"weight": -1.0}, "rewards[0].weight"),
        ({"noise": -0.1}, "rewards[0].noise"),
        ({"name": ""}, "rewards[0].name"),
        ({"name": "image/diversity"}, "rewards[0].name"),
        ({"function": "no_colon"}, "rewards[0].function"),
    ],
)
def test_rewards(change, field):
    recipe = asdict(grpo()) | {"rewards": [{"name": "a", "function": "m:f"} | change]}
    with pytest.raises(ConfigError) as error:
        make(GRPOConfig, recipe)
    assert error.value.field == field


def test_reward_names_are_unique():
    config = grpo()
    config.rewards = [RewardSpec("a", "m:f"), RewardSpec("a", "m:g")]
    with pytest.raises(ConfigError, match="used twice"):
        validate(config)


def test_what_picks_a_step_or_ends_a_run_is_not_trained_on():
    config = grpo()
    config.eval.guidance = [0.0, 1.5]
    for name in ("oracle", "oracle@1.5"):
        config.eval.best = name
        with pytest.raises(ConfigError, match=rf"eval\.best: '{name}' is trained on, .* heldout_only: true"):
            validate(config)
    config.rewards.append(RewardSpec("gate", "m:gate", gate="multiply"))
    config.eval.best, config.eval.stop.metric = "image/diversity", "gate"
    with pytest.raises(ConfigError, match=r"eval\.stop\.metric: 'gate' is trained on"):
        validate(config)
    config.rewards.append(RewardSpec("again", "pkg.mod:score", heldout_only=True))
    config.eval.stop.metric = "again"
    with pytest.raises(ConfigError, match="'again' is the same function as 'oracle', which is trained on"):
        validate(config)
    config.rewards[-1].function = "pkg.mod:other"
    validate(config)


def test_a_stop_rule_needs_a_best_step():
    config = grpo()
    config.eval.stop.metric = "image/diversity"
    with pytest.raises(ConfigError, match=r"eval\.best: is null, and eval\.stop\.metric is set: .*; name the metric"):
        validate(config)
    config.eval.best, config.eval.stop.better = "image/diversity", "lower"
    with pytest.raises(ConfigError, match=r"eval\.best: takes the highest .*, and eval\.stop\.better is lower"):
        validate(config)


def test_figures_that_an_evaluation_has():
    """Those of each guidance setting, and the diversity of groups only where there are groups."""
    config = grpo()
    config.rewards.append(RewardSpec("other", "m:g", heldout_only=True))
    config.eval.guidance, config.eval.best, config.eval.stop.metric = [1.5], "other@1.5", "image/diversity@1.5"
    validate(config)
    config.eval.groups = 0
    with pytest.raises(ConfigError, match=r"eval\.stop\.metric: 'image/diversity@1\.5' is no metric"):
        validate(config)
    config.rewards.append(RewardSpec("far", "m:f", group=True, heldout_only=True))
    config.eval.best, config.eval.stop.metric = "far@1.5", None
    with pytest.raises(ConfigError, match=r"eval\.best: 'far@1\.5' is no metric"):
        validate(config)
    config.eval.groups = 8
    validate(config)
    config.eval.stop.metric, config.eval.every = "image/diversity@1.5", 0
    with pytest.raises(ConfigError, match=r"eval\.stop\.metric: has no meaning when eval\.every is 0"):
        validate(config)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"name": "org/model"}, "servers[1].name"),
        ({"name": "a"}, "servers[1].name"),
        ({"port": 70000}, "servers[1].port"),
        ({"ready_timeout": 0.0}, "servers[1].ready_timeout"),
        ({"port": 8000}, "servers[1].port"),
        ({"gpus": [-1]}, "servers[1].gpus"),
        ({"gpus": [2, 2]}, "servers[1].gpus"),
        ({"gpus": [1, 2]}, "servers"),
        ({"urls": ["10.0.0.2:8000"]}, "servers[1].urls"),
        ({"urls": ["http://judges:80000/v1"]}, "servers[1].urls"),
        ({"urls": ["http://judges:8000/v1"] * 2}, "servers[1].urls"),
        ({"urls": ["http://me:secret@judges:8000/v1"]}, "servers[1].urls"),
    ],
)
def test_servers(change, field):
    servers = [{"name": "a", "model": "m", "port": 8000, "gpus": [1]}, {"name": "b", "model": "m"} | change]
    for config, recipe in ((GRPOConfig, asdict(grpo())), (ServeConfig, {})):
        with pytest.raises(ConfigError) as error:
            make(config, recipe | {"servers": servers})
        assert error.value.field == field


def test_servers_may_share_a_gpu_and_be_up_elsewhere():
    half = ["--gpu-memory-utilization=0.45"]
    two = [ServerSpec(name, "m", gpus=[1], extra_args=half) for name in "ab"]
    elsewhere = ServerSpec("c", "m", gpus=[1], port=8000, urls=["http://judges:8000/v1", "https://[::1]:8000/v1"])
    validate(ServeConfig([*two, elsewhere]))
    with pytest.raises(ConfigError, match="servers: all have urls and are up already"):
        validate(ServeConfig([elsewhere]))
    with pytest.raises(UserError, match="server a: extra_args: --gpu-memory-utilization is much, not a number"):
        validate(ServeConfig([ServerSpec("a", "m", gpus=[1], extra_args=["--gpu-memory-utilization", "much"]), two[1]]))


def test_sample_needs_exactly_one_source_of_prompts():
    with pytest.raises(ConfigError, match="either prompt"):
        SampleConfig(output="out", model=ModelConfig(path="k2"))
    sample = SampleConfig(output="out", model=ModelConfig(path="k2"), prompt="a red cube")
    sample.prompts = "a.jsonl"
    with pytest.raises(ConfigError, match="either prompt"):
        validate(sample)
    sample.prompts, sample.model.start = None, "runs/a"
    with pytest.raises(ConfigError, match=r"model\.start: has no meaning here; name that run as adapter"):
        validate(sample)


def test_export_file_name():
    with pytest.raises(ConfigError, match=r"end it in \.safetensors"):
        validate(ExportConfig(source="runs/a", output="out", format="lora"))
    validate(ExportConfig(source="runs/a", output="out.safetensors", format="lora"))
    validate(ExportConfig(source="runs/a", output="out", format="diffusers"))


def test_config_and_command_line_import_no_torch():
    code = "import sys, posttrain.config.sections, posttrain.cli; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
