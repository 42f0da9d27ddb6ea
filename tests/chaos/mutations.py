"""Plants one-line mistakes into formulas, one at a time, and sees whether the tests that carry their numbers fail.

    python -m tests.chaos.mutations [WORD]        # those whose file or line holds WORD

Each mistake is made in a copy of the tree. One that the tests pass with survives: then a check of a number is missing.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
SECONDS = 120

MUTATIONS: dict[tuple[str, str], list[tuple[str, str]]] = {
    ("posttrain/training/advantages.py", "tests/training/test_advantages.py"): [
        ("/ (count - 1).clamp_min(1)).sqrt()", "/ count.clamp_min(1)).sqrt()"),
        ("return centred / divisor(_std(centred, valid_PGK), floor_K)", "return centred"),
        ("std_P1K if floor_K is None else torch.maximum(std_P1K, floor_K.double()[..., None, :])", "std_P1K"),
        ("FLAT * size_K if floor_K is None else torch.maximum(floor_K.double(), FLAT * size_K)", "FLAT * size_K"),
        ("torch.minimum(noise_PK[:, None] / 4, std_P1K)", "noise_PK[:, None] / 4"),
        ("noise_K * ~flat_PK", "noise_K"),
        ("weighed_PG = (weights_K.double() * standardise", "weighed_PG = (weights_K.double() ** 2 * standardise"),
        ("return _over_batch(weighed_PG, valid_PGK.any(-1))", "return weighed_PG"),
        ("return _over_batch(weighed_PG, valid_PGK.any(-1))", "return _over_batch(weighed_PG, valid_PGK.all(-1))"),
        ("| (top - bottom < least)", "| (top - bottom < 0)"),
        ("return (values - mean).masked_fill", "return values.masked_fill"),
        ("valid_PGK.sum(1, keepdim=True).clamp_min(1)\n    return", "valid_PGK.shape[1]\n    return"),
        ("return values_PG / std if", "return (values_PG - 1e-3) / std if"),
        ("(weights_K.double() * _centre(rewards_PGK", "(_centre(rewards_PGK"),
    ],
    ("posttrain/grpo/losses.py", "tests/grpo/test_losses.py"): [
        ("-torch.minimum(ratio", "-torch.maximum(ratio"),
        ("ratio.clamp(1 - clip_low, 1 + clip_high)", "ratio.clamp(1 - clip_high, 1 + clip_low)"),
        ("(v.float() - v_reference.float()).square()", "(v.float() - v_reference.float()).abs()"),
        (".square().flatten(1).mean(1)", ".square().flatten(1).sum(1)"),
        ("log_ratio_B.float().exp()", "log_ratio_B.float() + 1"),
    ],
    ("posttrain/judge/losses.py", "tests/judge/test_losses.py"): [
        ("pair_B + 0.01 * (rho_w_B.float() + rho_l_B", "pair_B + 0.01 * (rho_w_B.float() - rho_l_B"),
    ],
    ("posttrain/stpo/losses.py", "tests/stpo/test_preference_loss.py"): [
        ("(v + reference - 2 * target)", "(v + reference - target)"),
        ("z = beta / 2 * (phi - dw)", "z = beta * (phi - dw)"),
        ("pull = (-z).sigmoid() - (1 - label_B)", "pull = (-z).sigmoid()"),
        ("pull = (-z).sigmoid() - (1 - label_B)", "pull = z.sigmoid() - (1 - label_B)"),
        ("((1 - guard) * norm_w / inner)", "((1 - guard) * inner / norm_w)"),
        ("torch.where((inner > 0) & (pull >= 0)", "torch.where((inner < 0) & (pull >= 0)"),
        ('"loser": -beta / 2 * pull * kept * phi', '"loser": -beta / 2 * pull * phi'),
        ("phi = dl if bound is None else bounded(dl, 2 * bound / beta)", "phi = dl"),
        ("bounded(dl, 2 * bound / beta)", "bounded(dl, bound / beta)"),
        ("-limit * torch.expm1(-change", "limit * torch.tanh(change"),
        ('terms["anchor"] = beta / 2 * anchor * (drift_w + drift_l)', 'terms["anchor"] = anchor * (drift_w + drift_l)'),
        ('terms["hinge"] = beta / 2 * hinge * dw', 'terms["hinge"] = -beta / 2 * hinge * dw'),
        ("(1 - guard) * max(0.0, winner_n) / loser_n)", "guard * max(0.0, winner_n) / loser_n)"),
        ("share if share == 1 and not human else", "share if share == 1 else"),
    ],
    ("posttrain/tdm/losses.py", "tests/tdm/test_tdm_loss.py tests/tdm/test_tdm_gaussians.py"): [
        ("a = (1 - tau) / (1 - m)", "a = (1 - m) / (1 - tau)"),
        ("(tau.square() - (a * m).square())", "(tau.square() + (a * m).square())"),
        ("(_column(a * m, e) * e + _column(b, e) * z)", "(_column(b, e) * e + _column(a * m, e) * z)"),
        ("((_mean_square(z) - _mean_square(n)) / 2).exp()", "(_mean_square(z) - _mean_square(n)).exp()"),
        ("((_mean_square(z) - _mean_square(n)) / 2).exp()", "((_mean_square(n) - _mean_square(z)) / 2).exp()"),
        ("torch.minimum((1 - tau).square(), 5 * tau.square())", "torch.minimum((1 - tau).square(), tau.square())"),
        ("clipped = omega.clamp(*clip)", "clipped = omega"),
        ("sampler.velocity_target(x0, n))", "sampler.velocity_target(x0, z))"),
        ("_column(a * m.square(), x_m) * z", "_column(a * m, x_m) * z"),
        ("r = x_tau - _column(tau, x_tau) * v_real.float()", "r = x_tau + _column(tau, x_tau) * v_real.float()"),
        ("d = x0 - x0.detach() + (f - r)", "d = x0 - x0.detach() + (r - f)"),
        (".mean(1).clamp(min=LEAST_SCALE)", ".mean(1).clamp(min=1)"),
        ("most = (s - BELOW).clamp(max=LAST) if separate", "most = (s + BELOW).clamp(max=LAST) if separate"),
        ("u_m * (s - GAP - s_next)", "u_m * (s - s_next)"),
    ],
    ("posttrain/model/sampler.py", "tests/model/test_sampler.py"): [
        ("(math.exp(mu) + (1 / s - 1))", "(math.exp(-mu) + (1 / s - 1))"),
        ("max_tokens: int = 6400", "max_tokens: int = 4096"),
        ("return cond + scale * (cond - uncond)", "return uncond + scale * (cond - uncond)"),
        ("return x - t_ * v, x + (1 - t_) * v", "return x - t_ * v, x + t_ * v"),
        ("(_column(t_next, x) - _column(t, x)) * v", "(_column(t, x) - _column(t_next, x)) * v"),
        ("delta * variance / (2 * t_) * eps, (variance", "delta * variance / t_ * eps, (variance"),
        ("(variance * delta).sqrt()", "variance.sqrt() * delta"),
        ("return eta**2 * t / (1 - torch.where", "return eta * t / (1 - torch.where"),
        ("torch.where(t >= 1, t_first.to(t.device), t)", "t.clamp(max=0.99)"),
        ("return torch.full_like(t, eta**2)", "return torch.full_like(t, eta)"),
        ("angle = eta * math.pi / 2", "angle = eta * math.pi"),
        ("next_ * math.cos(angle) * eps, next_ * math.sin(angle)", "next_ * math.cos(angle) * eps, math.sin(angle)"),
        ("logp = -0.5 * z.square() - std.log()", "logp = -0.5 * z.square() + std.log()"),
        ("* difference / std).flatten(1)", "* difference / std.square()).flatten(1)"),
        ("dynamics, eta) * (1 - t) / (2 * t))", "dynamics, eta) / (2 * t))"),
        ("torch.sigmoid(mean + std * n.float() + mu)", "torch.sigmoid(mean + std * n.float() - mu)"),
    ],
    ("prompts/informativeness.py", "tests/prompts/test_pool.py"): [
        ("np.maximum(count_PK - 1, 1)", "np.maximum(count_PK, 1)"),
        ("std = np.sqrt(variance_RK)", "std = variance_RK"),
        ("np.minimum(ratio, 1.0)", "ratio"),
        ("np.where(np.isnan(values_RK), 0.0, weights_K)", "np.where(np.isnan(values_RK), weights_K, weights_K)"),
        ("weights_K), nan=1.0)", "weights_K), nan=0.0)"),
        ("missing = count_PK < 2", "missing = count_PK < 1"),
    ],
    ("prompts/pool.py", "tests/prompts/test_pool.py tests/prompts/test_pool_state.py"): [
        ("np.maximum(self.config.decay, 1 / (self.visits[rows, None] + 1))",
         "np.full((len(rows), 1), self.config.decay)"),
        ("explore + (1 - explore) * self.informativeness(rows) ** self.config.sharpness",
         "explore + self.informativeness(rows) ** self.config.sharpness"),
        ("(1 + np.minimum(1.0, age / self.config.staleness))", "(1 + age / self.config.staleness)"),
        ("self.streak[visited] >= self.config.prune_after", "self.streak[visited] > self.config.prune_after"),
        ("step + times * self.config.cooldown", "step + self.config.cooldown"),
    ],
    ("rewards/ocr.py", "tests/rewards/test_ocr.py"): [
        ("/ np.maximum(len(word), lengths)", "/ len(word)"),
        ("longer = running + extra", "longer = running + missing"),
        ("ends = without[i] | 1 << i", "ends = without[i]"),
        ("np.minimum.accumulate(longer - skipped, axis=1) + skipped", "longer"),
    ],
    ("rewards/diversity.py", "tests/rewards/test_diversity.py"): [
        ("(n - unit @ unit.sum(0)) / (n - 1)", "(n - unit @ unit.sum(0)) / n"),
        ("None if safe else 0.0 for safe", "None for safe"),
    ],
}  # fmt: skip
"""File and the tests of its numbers: what is in a line, and what is put there instead."""


def fail(tree: Path, tests: str) -> bool:
    """Whether tests of a tree fail, in a process of their own that has imported the libraries already."""
    child = os.fork()
    if child == 0:
        os.chdir(tree)
        for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
            del sys.modules[name]
        sys.path[:] = [str(tree), *(place for place in sys.path if Path(place or ".").resolve() != ROOT)]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            import pytest

            code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--rootdir", str(tree), *tests.split()])
        os._exit(int(code))
    began = time.monotonic()
    while time.monotonic() - began < SECONDS:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            if code not in (0, 1):
                raise SystemExit(f"{tests} did not run (exit code {code})")
            return code == 1
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True  # it hangs, which would not go unseen


def caught(tree: Path, file: str, tests: str, old: str, new: str) -> bool:
    """Whether the tests fail with the mistake."""
    path = tree / file
    text = path.read_text()
    if text.count(old) != 1:
        raise SystemExit(f"{file}: {old!r} is there {text.count(old)} times, and should be once")
    path.write_text(text.replace(old, new))
    try:
        return fail(tree, tests)
    finally:
        path.write_text(text)


def main(word: str = "") -> int:
    # Before the forks, so that none of them takes its time; nothing of the copy may be among it.
    import transformers  # noqa: F401

    survived, count = [], 0
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch)
        for name in ("posttrain", "prompts", "rewards", "tests", "recipes", "pyproject.toml"):
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, tree / name)
        sys.dont_write_bytecode = True  # two mutations within a second would be one
        for (file, tests), mutations in MUTATIONS.items():
            chosen = [(old, new) for old, new in mutations if word in f"{file} {old}"]
            if chosen and fail(tree, tests):
                raise SystemExit(f"{tests}: fails without a mistake")
            for old, new in chosen:
                found, count = caught(tree, file, tests, old, new), count + 1
                if not found:
                    survived.append(f"{file}: {old!r} -> {new!r}")
                print(f"{'caught  ' if found else 'SURVIVED'} {file}: {new}", flush=True)
    print(f"{count - len(survived)} of {count} caught")
    return int(bool(survived))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
