#!/usr/bin/env bash
# Several processes of one run on this machine: launch/processes.sh COUNT COMMAND [ARGUMENTS]
# Adds --coordinator, --num_processes and --process_id to COMMAND and marks output by [0], [1], ... Reports which
# process ended and how; the exit code is that of the first one that failed. SIGTERM, SIGUSR1 and Ctrl-C are forwarded
# to all processes. NVIDIA GPUs are divided evenly among them.
set -uo pipefail
count="$1"
shift
case "$count" in "" | *[!0-9]* | 0) echo "error: --processes=$count is not a number of processes" >&2; exit 2 ;; esac
port="${PORT:-$(python3 -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')}"
gpus=()
if [ "${JAX_PLATFORMS:-}" != cpu ] && command -v nvidia-smi >/dev/null; then
  if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then IFS=, read -ra gpus <<<"$CUDA_VISIBLE_DEVICES"
  else mapfile -t gpus < <(nvidia-smi --query-gpu=index --format=csv,noheader); fi
  if [ $((${#gpus[@]} % count)) != 0 ]; then
    echo "error: ${#gpus[@]} GPUs cannot be shared evenly by --processes=$count" >&2
    exit 2
  fi
fi

pids=()
for ((i = 0; i < count; i++)); do
  share=$((${#gpus[@]} / count))
  if [ "$share" -gt 0 ]; then export CUDA_VISIBLE_DEVICES="$(IFS=,; echo "${gpus[*]:i * share:share}")"; fi
  "$@" --coordinator="localhost:$port" --num_processes="$count" --process_id="$i" > >(sed -u "s/^/[$i] /") 2>&1 &
  pids+=($!)
done
forward() { kill -"$1" "${pids[@]}" 2>/dev/null; }
trap 'forward TERM' TERM INT
trap 'forward USR1' USR1

first=0
while [ "${#pids[@]}" -gt 0 ]; do
  for i in "${!pids[@]}"; do
    kill -0 "${pids[$i]}" 2>/dev/null && continue
    wait "${pids[$i]}"
    code=$?
    how="ended with exit code $code"
    [ "$code" -gt 128 ] && how="was killed by signal $((code - 128)) ($(kill -l $((code - 128))))"
    if [ "$code" != 0 ]; then
      echo "process $i (pid ${pids[$i]}) $how" >&2
      if [ "$first" = 0 ]; then
        first="$code"
        [ "$code" = 75 ] || echo "waiting for the other processes to notice; they end within a minute" >&2
      fi
    fi
    unset "pids[$i]"
  done
  sleep 0.2
done
exit "$first"
