#!/bin/sh
# Measures the published models on this machine's GPU: loadtests/results/gpu-NAME.json and .png.
# Run it again after it was cut off: it goes on where it was, in runs/gpu-bench.
#
#   loadtests/gpu.sh                                    everything
#   loadtests/gpu.sh --models pixart-512 --batches 1,8  whatever `python -m engines bench --gpu --help` knows
#
# PYTHON   interpreter with torch for CUDA and what .[worker,distill] installs (default: .venv's, else python3)
# OUT      where the results are copied to in the end (default: loadtests/results)
# MINUTES  start no measurement after this long (default: no limit)
# TESTS    0 leaves out the tests that need a GPU, which compile a tiny model twice before anything is measured
set -eu
cd "$(dirname "$0")/.."
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ -x .venv/bin/python ] && PYTHON=.venv/bin/python
fi
"$PYTHON" - <<'PY'
import importlib.util
import sys

import torch

needed = ("triton", "diffusers", "transformers", "tokenizers", "pydantic", "rich", "matplotlib")
missing = [name for name in needed if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"missing: {', '.join(missing)}; {sys.executable} -m pip install -c constraints.txt '.[worker,distill]'")
if not torch.cuda.is_available():
    sys.exit(f"torch {torch.__version__} sees no GPU; PyTorch's package index has builds for CUDA")
PY
for tool in nvidia-smi g++; do
    command -v "$tool" >/dev/null || { echo "$tool is missing" >&2; exit 1; }
done
if [ "${TESTS:-1}" != 0 ] && "$PYTHON" -c 'import pytest' 2>/dev/null; then
    "$PYTHON" -m pytest -m gpu -q tests/engines  # numbers of wrong pictures would be none
fi
name=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr 'A-Z ' 'a-z-')
here=runs/gpu-bench/gpu-$name
out=${OUT:-loadtests/results}
keep() {
    mkdir -p "$out"
    for file in "$here.json" "$here.png"; do
        [ -f "$file" ] && cp "$file" "$out/"
    done
    return 0
}
trap keep EXIT
"$PYTHON" -m engines bench --gpu --out "$here.json" --minutes "${MINUTES:-100000}" "$@"
