"""Muon: its arithmetic and numbers, which weights it moves, and runs that stop, continue and are shared."""

import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import Krea2Transformer2DModel

from posttrain import cli
from posttrain.config import clipping
from posttrain.config.sections import OptimConfig
from posttrain.config.types import ConfigError
from posttrain.errors import UserError
from posttrain.model import architecture
from posttrain.model.load import sizes_of
from posttrain.model.roles import Roles
from posttrain.stpo import train as stpo
from posttrain.training import checkpoint, muon
from posttrain.training.policy import POLICY
from posttrain.training.stepper import Stepper
from tests.helpers import runs
from tests.helpers.settings import validate

TO_Q, GATE = "transformer_blocks.0.attn.to_q.weight", "transformer_blocks.1.ff.gate.weight"
TABLE = "transformer_blocks.0.scale_shift_table"


def named(seed: int = 0) -> dict[str, torch.Tensor]:
    """Two matrices of blocks, a table that is a matrix too, the first linear, a vector; not in the order of groups."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"img_in.weight": (48, 16), TO_Q: (48, 48), TABLE: (6, 48), GATE: (96, 48), "norm.weight": (48,)}
    return {name: torch.randn(shape, generator=generator).requires_grad_() for name, shape in shapes.items()}


def fill(stepper: Stepper, seed: int, size: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in sorted(stepper.parameters, key=lambda p: p.shape):
        parameter.grad = size * torch.randn(parameter.shape, generator=generator)


# ---- arithmetic -----------------------------------------------------------------------------------------------


def polynomial(x: torch.Tensor, steps: int) -> torch.Tensor:
    a, b, c = muon.COEFFICIENTS
    for _ in range(steps):
        x = a * x + b * x**3 + c * x**5
    return x


def test_what_newton_schulz_does_to_singular_values():
    """Check 77: f(1) = .701; after five steps 1, .5, .1, .01, .001 are .6964, .7654, .7121, .6989, .4705; all of
    [.01, 1] lie in [.6818, 1.1344]."""
    values = torch.tensor([1.0, 0.5, 0.1, 0.01, 0.001], dtype=torch.float64)
    assert float(polynomial(values[:1], 1)) == pytest.approx(0.701, abs=5e-4)
    found = polynomial(values, muon.STEPS)
    assert found.tolist() == pytest.approx([0.6964, 0.7654, 0.7121, 0.6989, 0.4705], abs=5e-5)
    grid = polynomial(torch.logspace(-2, 0, 200_001, dtype=torch.float64), muon.STEPS)
    assert (float(grid.min()), float(grid.max())) == pytest.approx((0.6818, 1.1344), abs=5e-5)
    # The same of a matrix, whose norm of sqrt(1 + .25 + .01 + ...) divides its singular values; bf16 has 8 bits.
    q = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    matrix = (q * values) @ q.T
    found = torch.linalg.svdvals(muon.orthogonalised(matrix.float()).double()).sort().values
    expected = polynomial(values / values.norm(), muon.STEPS).sort().values
    assert torch.allclose(found[1:], expected[1:], atol=0.03)


def test_scales():
    """Check 78 at a rate of 1e-3: (512, 192) .2 sqrt(512) = .004525 e-3 a unit; either way round it is the same."""
    assert 1e-3 * muon.scale((512, 192)) == pytest.approx(0.004525, abs=5e-7)
    assert muon.scale((192, 512)) == muon.scale((512, 192))


def test_momentum_and_nesterov():
    """Check 79: g = I, then diag(1, 1, 1, -1): m = .95 x .05 + .05 = .0975 thrice and -.0025; the last of g~ is
    .05 x -1 + .95 x -.0025 = -.052375."""
    weight, other = torch.zeros(4, 4).requires_grad_(), torch.zeros(4).requires_grad_()
    optimizer = muon.Muon([weight], [other], [weight], OptimConfig(lr=0.0001))
    for diagonal in ([1.0, 1, 1, 1], [1.0, 1, 1, -1]):
        weight.grad = torch.diag(torch.tensor(diagonal))
        optimizer.step()
    momentum = optimizer.state[weight]["momentum_buffer"].diagonal()
    assert momentum.tolist() == pytest.approx([0.0975] * 3 + [-0.0025])
    assert optimizer._nesterov(0).diagonal()[-1].item() == pytest.approx(-0.052375)


def test_it_is_torchs_muon_and_torchs_adamw_bit_for_bit():
    config = OptimConfig(kind="muon", lr=1e-2, weight_decay=0.1, eps=1e-8, clip_factor=0)
    stepper, weights = Stepper(named(), config), named()
    matrices = [weights[TO_Q], weights[GATE]]
    others = [weights["img_in.weight"], weights[TABLE], weights["norm.weight"]]
    theirs = [
        torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=1e-2, betas=config.betas, eps=1e-8, weight_decay=0.1),
    ]
    for seed in range(4):
        fill(stepper, seed)
        for own, parameter in zip(stepper.parameters, [*matrices, *others], strict=True):
            assert own.shape == parameter.shape and own.grad is not None
            parameter.grad = own.grad.clone()
        stepper.step()
        for optimizer in theirs:
            optimizer.step()
        for own, parameter in zip(stepper.parameters, [*matrices, *others]):
            assert torch.equal(own, parameter)


@pytest.mark.parametrize(
    ("shape", "full", "low"), [((192, 512), 0.183, 0.047), ((192, 192), 0.177, 0.047), ((64, 192), 0.174, 0.075)]
)
def test_root_mean_square_of_updates(shape, full, low):
    """Check 80, in units of the rate: within [.16, .21] for gradients of full rank; .047 to .075 for rank 8."""
    generator = torch.Generator().manual_seed(0)
    gradients = (
        torch.randn(shape, generator=generator),
        (torch.randn(shape[0], 8, generator=generator) @ torch.randn(8, shape[1], generator=generator)),
    )
    found = []
    for gradient in gradients:
        weight, other = torch.zeros(shape).requires_grad_(), torch.zeros(1).requires_grad_()
        optimizer = muon.Muon([weight], [other], [weight], OptimConfig(lr=1e-3))
        weight.grad = gradient
        optimizer.step()
        found.append(float(weight.detach().square().mean().sqrt()) / 1e-3)
        assert optimizer.metrics()["update_rms"] == pytest.approx(found[-1], rel=1e-2)
    assert 0.16 < found[0] < 0.21 and found[0] == pytest.approx(full, abs=3e-3)
    assert found[1] == pytest.approx(low, abs=5e-3)


@pytest.mark.parametrize("size", [1e-9, 1e-14])
def test_the_update_does_not_depend_on_the_scale_of_the_loss(size):
    """At torch's eps of 1e-7 a matrix of 48 x 48 gradients of 1e-9, whose norm is 5e-8, would hardly be divided."""

    def after(scale):
        stepper = Stepper(named(), OptimConfig(kind="muon", lr=1e-2, eps=1e-30))
        for seed in range(3):
            fill(stepper, seed, scale)
            stepper.step()
        return torch.cat([(p - b).flatten() for p, b in zip(stepper.parameters, Stepper(named(), config).parameters)])

    config = OptimConfig(kind="muon")
    expected = after(1.0)
    assert (after(size) - expected).norm() < 0.02 * expected.norm()


def test_factors_of_an_adapter_would_move_in_another_direction():
    """Check 82: with orthogonalised steps of both factors, 32 x 24 at rank 4, W moves at a cosine of about .46."""
    generator = torch.Generator().manual_seed(0)
    cosines = []
    for _ in range(40):
        b, a = torch.randn(32, 4, generator=generator), torch.randn(4, 24, generator=generator)
        gradient = torch.randn(32, 24, generator=generator)
        step_b, step_a = muon.orthogonalised(gradient @ a.T).float(), muon.orthogonalised(b.T @ gradient).float()
        moved, wanted = step_b @ a + b @ step_a, muon.orthogonalised(gradient).float()
        cosines.append(float((moved * wanted).sum() / (moved.norm() * wanted.norm())))
    assert sum(cosines) / len(cosines) == pytest.approx(0.46, abs=0.03)


# ---- which weights --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def k2():
    with torch.device("meta"):
        roles = Roles(Krea2Transformer2DModel(**sizes_of("k2")[0]))
    roles.add_full_role(POLICY)
    return roles


def test_the_groups_of_k2_by_name(k2):
    """Check 81: of 12.82 billion weights the 224 linears of the blocks, 12,155,092,992; their state takes half."""
    trained = k2.role_named_parameters(POLICY)
    matrices, others = muon.split(trained)
    linears = {id(linear.weight) for linear in architecture.block_linears(k2.transformer)}
    assert {id(matrix) for matrix in matrices} == linears and len(matrices) == 224
    assert len(matrices) + len(others) == len(trained) and not linears & {id(other) for other in others}
    moved = sum(matrix.numel() for matrix in matrices)
    assert moved == 12_155_092_992
    assert sum(p.numel() for p in k2.transformer.parameters()) == 12_820_073_036
    left = [name for name, parameter in trained.items() if parameter.ndim == 2 and id(parameter) not in linears]
    assert {"img_in.weight", TABLE, "final_layer.linear.weight"} <= set(left)
    rest = sum(other.numel() for other in others)
    assert (4 * moved + 8 * rest) / (8 * (moved + rest)) < 0.55
    assert sum(muon.cost(matrix.shape) for matrix in matrices) == pytest.approx(1.8366e15, rel=1e-4)


def test_the_state_takes_about_half():
    state = {}
    for kind in ("adamw", "muon"):
        stepper = Stepper({TO_Q: torch.zeros(64, 64), "norm.weight": torch.zeros(64)}, OptimConfig(kind=kind))
        fill(stepper, 0)
        stepper.step()
        state[kind] = sum(tensor.nbytes for tensor in stepper.kept() if tensor.ndim)
    assert state["adamw"] == 8 * (64 * 64 + 64) and state["muon"] == 4 * 64 * 64 + 8 * 64


def test_what_muon_cannot_move_is_refused(tmp_path, model, capsys):
    config = runs.stpo_config(tmp_path, model)
    config.optim.kind = "muon"
    with pytest.raises(ConfigError, match=r"optim\.kind: is muon, .* lora trains factors .* or lora: null"):
        validate(config)
    path = runs.recipe(config, tmp_path / "r.yaml")
    assert cli.main(["stpo", "--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert "optim.kind: is muon" in error and len(error.strip().splitlines()) == 1
    for wrong in ({"final_layer.linear.weight": torch.zeros(4, 4)}, [torch.zeros(4, 4)]):
        with pytest.raises(UserError, match=r"optim\.kind: muon moves whole matrices .* none of them is trained"):
            Stepper(wrong, OptimConfig(kind="muon"))


# ---- spikes ---------------------------------------------------------------------------------------------------


def test_a_spike_is_left_out_and_counted():
    """Six times the median: no weight and no moment moves. Four times: an update. What stays high is usual at last."""
    stepper = Stepper(named(), OptimConfig(kind="muon", lr=1e-2))
    for seed in range(clipping.LEAST):
        fill(stepper, seed)
        stepper.step()
    for size, moves in ((6.0, False), (4.0, True), (math.nan, False)):
        before = [p.detach().clone() for p in stepper.parameters]
        state, _ = stepper.flattened()
        state = {key: value.clone() for key, value in state.items()}
        fill(stepper, 99, size)
        stepper.step()
        moved = [not torch.equal(p, b) for p, b in zip(stepper.parameters, before)]
        assert all(moved) if moves else not any(moved)
        if not moves:
            runs.assert_equal(state, stepper.flattened()[0])
        if size == 6.0:
            assert stepper.metrics()["grad_norm_ratio"] == pytest.approx(6, rel=0.2)
    assert (stepper.spiked, stepper.skipped) == (1, 1) and stepper.counters()["spiked"] == 1
    for seed in range(clipping.WINDOW):
        fill(stepper, seed, 6.0)
        stepper.step()
    assert stepper.metrics()["spiked_updates"] < 1 + clipping.WINDOW / 2 + 2
    assert stepper.metrics()["grad_norm_ratio"] == pytest.approx(1, rel=0.3)


# ---- runs -----------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path, model):
    made = runs.stpo_config(tmp_path, model)
    made.lora, made.optim.kind, made.optim.lr, made.optim.ema = None, "muon", 3e-4, 0.5
    made.steps, made.checkpoint.every, made.eval.every = 4, 2, 2
    return made


def test_killed_and_resumed_equals_uninterrupted(config, monkeypatch, tmp_path):
    """Killed in step 4; the moments of both groups are those of step 2's checkpoint."""
    stpo.train(config)
    whole, config.output = config.output, str(tmp_path / "killed")

    def killed(*arguments):
        if len(runs.training_rows(config.output)) == 3:
            raise RuntimeError("killed")
        return optimise(*arguments)

    optimise = stpo.optimise
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(stpo, "optimise", killed)
        stpo.train(config)
    stpo.train(config, resume=True)
    a, b = runs.latest(whole), runs.latest(config.output)
    assert a.step == b.step == 4
    for name in ("weights", "live", "optimizer"):
        runs.assert_equal(a.tensors[name], b.tensors[name])
    kinds = {key.partition(".")[2] for key in a.tensors["optimizer"]}
    assert kinds == {"momentum_buffer", "exp_avg", "exp_avg_sq", "step"}
    assert a.state["counters"] == b.state["counters"] and runs.untimed(whole) == runs.untimed(config.output)
    row = runs.training_rows(whole)[0]
    assert 0.05 < row["update_rms"] < 0.25 and row["muon_seconds"] > 0 and row["spiked_updates"] == 0
    runs.assert_metrics_are_defined(whole, "brightness")


def test_a_run_keeps_to_its_kind(config):
    config.steps = 2
    stpo.train(config)
    config.steps, config.optim.kind = 3, "adamw"
    with pytest.raises(UserError, match=r"optim\.kind: the checkpoint's is Muon and the recipe's AdamW"):
        stpo.train(config, resume=True)


def test_an_adapter_does_not_care(tmp_path, model):
    """Old checkpoints and adapters have one group; their counters have no spikes."""
    stepper = Stepper([torch.zeros(2, 2).requires_grad_()], OptimConfig())
    assert "spiked" not in stepper.counters()
    stepper.restore_counters(stepper.counters())
    assert stepper.spiked == 0


def test_state_is_plain_files(config):
    config.steps = 1
    stpo.train(config)
    saved = checkpoint.load(next((Path(config.output) / "checkpoints").glob("step-*")))
    first, second = saved.state["optimizer"]["groups"]
    assert saved.state["optimizer"]["kind"] == "Muon" and first["momentum"] == 0.95 and "betas" in second
    assert json.dumps(first) and first["lr"] == second["lr"] == config.optim.lr
