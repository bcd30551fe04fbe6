#!/usr/bin/env bash
# Checks and measures everything on one GPU, in 8 minutes at most: ./launch/gpu_check.sh
# Call it again for what did not fit: parts whose result is in $OUT/results.jsonl are not repeated. Variables:
#   OUT=runs/gpu_check  the results, their table, logs      LIMIT=470  seconds for everything
#   ONLY=step,torch        only parts that begin like that     IMAGES=    a folder of images for the loop; else drawn ones
#   PYTHON=python3         an interpreter that has jax for the GPU; NO_INSTALL=1: and all other packages
#   WHEELS=folder          install the packages that it lacks from wheels in a folder, without a network
#   GPU_CHECK_TINY=1       small sizes, to try it on a CPU     SLOTS=     processes at a time; by default as many as cores, 8 at most
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON="${PYTHON:-python3}"
export OUT="${OUT:-runs/gpu_check}"
mkdir -p "$OUT"
if [ -z "${NO_INSTALL:-}" ]; then
  if [ -n "${WHEELS:-}" ]; then
    packages="$OUT/packages"
    [ -d "$packages" ] || "$PYTHON" -m pip install --quiet --no-index --no-deps --target "$packages" "$WHEELS"/*.whl
    export PYTHONPATH="$packages:${PYTHONPATH:-}"
  else
    "$PYTHON" -m pip install --quiet --disable-pip-version-check -r requirements.txt pytest
  fi
fi
if command -v nvidia-smi >/dev/null; then
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
fi
export PYTHONPATH="$PWD:${PYTHONPATH:-}" PYTHONUNBUFFERED=1 TF_CPP_MIN_LOG_LEVEL=2
export XLA_PYTHON_CLIENT_PREALLOCATE=false # several processes share the GPU
exec "$PYTHON" launch/gpu_check.py
