"""Branch coverage of what a run would go on without noticing: formulas, prompt pool, checkpoints, the judges' client.

    python -m tests.cover

Only the tests written for these files count, so what a whole run happens to pass through is not taken for tested.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
LEAST = 95.0
"""Percent, of lines and branches together and of branches alone."""
FILES = {
    "posttrain/grpo/losses.py": ["grpo/test_losses.py"],
    "posttrain/judge/losses.py": ["judge/test_losses.py"],
    "posttrain/stpo/losses.py": ["stpo/test_preference_loss.py"],
    "posttrain/tdm/losses.py": ["tdm/test_tdm_loss.py", "tdm/test_tdm_gaussians.py"],
    "posttrain/training/advantages.py": ["training/test_advantages.py"],
    "posttrain/model/sampler.py": ["model/test_sampler.py"],
    "prompts/pool.py": ["prompts/test_pool.py", "prompts/test_pool_state.py"],
    "prompts/informativeness.py": ["prompts/test_pool.py"],
    "posttrain/training/checkpoint.py": [
        "training/test_checkpoint.py",
        "test_options.py::test_8_bit_moments_resume_bit_for_bit",
    ],
    "rewards/judge.py": ["rewards/test_judge_client.py", "rewards/test_judge_answers.py"],
    "rewards/endpoints.py": ["rewards/test_judge_client.py", "rewards/test_judge_answers.py"],
    "rewards/encode.py": ["rewards/test_judge_client.py", "rewards/test_judge_answers.py"],
}


def main() -> int:
    tests = dict.fromkeys(f"tests/{name}" for names in FILES.values() for name in names)
    with tempfile.TemporaryDirectory() as scratch:
        environment = {**os.environ, "COVERAGE_FILE": str(Path(scratch) / "data")}

        def coverage(*arguments: str) -> int:
            return subprocess.run([sys.executable, "-m", "coverage", *arguments], cwd=ROOT, env=environment).returncode

        if code := coverage("run", "-m", "pytest", *tests):
            return code
        table = Path(scratch) / "table.json"
        if code := coverage("combine", "-q") or coverage(
            "json", "-q", "-o", str(table), f"--include={','.join(FILES)}"
        ):
            return code
        found = json.loads(table.read_text())["files"]
    low = 0
    for file in FILES:
        held = found[file]["summary"]
        branches = 100 * held["covered_branches"] / held["num_branches"] if held["num_branches"] else 100.0
        shares = (held["percent_covered"], branches)
        low += min(shares) < LEAST
        lines = ", ".join(map(str, found[file]["missing_lines"]))
        print(f"{file:<30} {shares[0]:5.1f} %  branches {branches:5.1f} %", f"  not reached: {lines}" if lines else "")
    return int(low > 0)


if __name__ == "__main__":
    sys.exit(main())
