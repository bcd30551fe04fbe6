#!/usr/bin/env bash
# Train on this machine: ./launch/local.sh [--processes=N] [--fake_devices=N] [flags of main.py]
# Creates .venv on the first call (PYTHON selects the interpreter), then runs main.py; without flags, the recipe
# quickstart. One process uses all GPUs; several (--processes) share them. --fake_devices: CPU devices per process.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/venv.sh requirements.txt

processes=1
arguments=()
for argument in "$@"; do
  case "$argument" in
    --processes=*) processes="${argument#*=}" ;;
    --fake_devices=*)
      export JAX_PLATFORMS=cpu XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=${argument#*=}"
      ;;
    *) arguments+=("$argument") ;;
  esac
done

if [ "${JAX_PLATFORMS:-}" != cpu ] && { command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; }; then
  if ! python -c 'import sys, jax; sys.exit(jax.default_backend() == "cpu")' 2>/dev/null; then
    echo "error: this machine has an NVIDIA GPU, but jax sees only the CPU." >&2
    echo "  Install: .venv/bin/pip install 'jax[cuda13]'   (jax[cuda12] for drivers older than 580)" >&2
    echo "  or run on the CPU: JAX_PLATFORMS=cpu $0 $*" >&2
    exit 2
  fi
fi
if [ "$processes" = 1 ]; then exec python main.py ${arguments[@]+"${arguments[@]}"}; fi
exec launch/processes.sh "$processes" python main.py ${arguments[@]+"${arguments[@]}"}
