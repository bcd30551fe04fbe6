#!/usr/bin/env bash
# Train on this machine: ./launch/local.sh [flags of main.py]
# Makes .venv on the first call (PYTHON chooses the interpreter), then runs main.py; no flags: configs/quickstart.py.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/venv.sh requirements.txt

if [ "${JAX_PLATFORMS:-}" != cpu ] && { command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; }; then
  if ! python -c 'import sys, jax; sys.exit(jax.default_backend() == "cpu")' 2>/dev/null; then
    echo "error: this machine has an NVIDIA GPU, but jax sees only the CPU." >&2
    echo "  Install: .venv/bin/pip install 'jax[cuda13]'   (jax[cuda12] for drivers older than 580)" >&2
    echo "  or run on the CPU on purpose: JAX_PLATFORMS=cpu $0 $*" >&2
    exit 2
  fi
fi
exec python main.py "$@"
