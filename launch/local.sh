#!/usr/bin/env bash
# Train on this machine: ./launch/local.sh [DIR] [--processes=N] [--fake_devices=N] [--restarts=N] [flags of lmim train]
# Creates .venv on the first call (PYTHON selects the interpreter), then trains on the images in the folder DIR; without
# DIR and flags, the recipe quickstart. Paths are those of the folder that it is called from. One process uses all GPUs;
# several (--processes) share them. --fake_devices: CPU devices per process. --restarts: start again after an error or a
# crash, at most N times in a row without a new checkpoint, and not after a mistake of the user or Ctrl-C.
set -euo pipefail
here="$PWD"
cd "$(dirname "$0")/.."
root="$PWD"
source launch/venv.sh requirements.txt
cd "$here"

processes=1
restarts=0
arguments=()
for argument in "$@"; do
  case "$argument" in
    --processes=*) processes="${argument#*=}" ;;
    --restarts=*) restarts="${argument#*=}" ;;
    --fake_devices=*)
      export JAX_PLATFORMS=cpu XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=${argument#*=}"
      ;;
    *) arguments+=("$argument") ;;
  esac
done

if [ "${JAX_PLATFORMS:-}" != cpu ] && { command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; }; then
  if ! python -c 'import sys, jax; sys.exit(jax.default_backend() == "cpu")' 2>/dev/null; then
    echo "error: this machine has an NVIDIA GPU, but jax sees only the CPU." >&2
    printf "  Install: %q -m pip install 'jax[cuda13]'   (jax[cuda12] for drivers older than 580)\n" "$(command -v python)" >&2
    echo "  or run on the CPU: JAX_PLATFORMS=cpu$(printf ' %q' "$0" "$@")" >&2
    exit 2
  fi
fi
command=(python "$root/main.py" ${arguments[@]+"${arguments[@]}"})
if [ "$processes" != 1 ]; then command=("$root/launch/processes.sh" "$processes" "${command[@]}"); fi
if [ "$restarts" != 0 ]; then command=(python "$root/launch/restart.py" "$restarts" "${command[@]}"); fi
exec "${command[@]}"
