#!/usr/bin/env bash
# Train on a Cloud TPU slice of any size, with queued resources:
#
#   export TPU_NAME=lmim ZONE=us-west4-a TYPE=v5litepod-16 RUNTIME=v2-alpha-tpuv5-lite
#   ./launch/tpu_pod.sh train [flags of main.py]    create, wait, copy, install, start on all workers; again: resume
#   ./launch/tpu_pod.sh status | logs | stop | delete
#
# Also: PROJECT; SPOT=1 (cheaper, may be preempted); NFS=HOST:/SHARE, mounted as /mnt/nfs on all workers, for --workdir
# and data. `train` may be repeated at any time: an existing slice is kept, a preempted one is re-created, and the run
# resumes from its last checkpoint. See launch/README.md.
set -uo pipefail
cd "$(dirname "$0")/.."
POLL="${POLL:-30}"  # seconds between two queries while waiting for a slice

fail() { echo "error: $*" >&2; exit 2; }
[ -n "${TPU_NAME:-}" ] && [ -n "${ZONE:-}" ] || fail "set TPU_NAME and ZONE"
command -v gcloud >/dev/null || fail "gcloud is not installed: https://cloud.google.com/sdk/docs/install"

tpus() { gcloud compute tpus "$@" --zone="$ZONE" ${PROJECT:+--project="$PROJECT"}; }
workers() { tpus tpu-vm ssh "$TPU_NAME" --worker="$1" --command="$2"; }  # all, or a number
state() { tpus queued-resources describe "$TPU_NAME" --format='value(state.state)' 2>/dev/null || echo NONE; }

step() {  # NAME COMMAND...: run it, and exit with its exit code if it fails
  local name="$1" code
  shift
  echo "== $name" >&2
  "$@"
  code=$?
  [ "$code" = 0 ] && return
  echo "error: '$name' failed with exit code $code. Nothing was deleted; run the same command again to resume," >&2
  echo "  or delete the slice: ./launch/tpu_pod.sh delete" >&2
  exit "$code"
}

create() {
  [ -n "${TYPE:-}" ] && [ -n "${RUNTIME:-}" ] || fail "set TYPE and RUNTIME, such as v5litepod-16 and v2-alpha-tpuv5-lite"
  tpus queued-resources create "$TPU_NAME" --node-id="$TPU_NAME" --accelerator-type="$TYPE" \
    --runtime-version="$RUNTIME" ${SPOT:+--spot}
}

delete() { tpus queued-resources delete "$TPU_NAME" --force --quiet; }

wait_until_active() {
  local now
  while now="$(state)"; [ "$now" != ACTIVE ]; do
    case "$now" in
      FAILED | SUSPENDED | NONE) echo "the slice is $now" >&2; return 1 ;;
    esac
    echo "the slice is $now; checking again in $POLL s" >&2
    sleep "$POLL"
  done
}

copy() {
  local archive
  archive="$(mktemp -d)/lmim_jax.tar.gz"
  tar czf "$archive" --exclude='./.*' --exclude=./runs --exclude=__pycache__ . &&
    tpus tpu-vm scp "$archive" "$TPU_NAME:lmim_jax.tar.gz" --worker=all
}

# The images of TPU machines have an older Python, so uv installs one
INSTALL='set -e; mkdir -p lmim_jax; tar xzf lmim_jax.tar.gz -C lmim_jax; cd lmim_jax
[ -x .venv/bin/python ] || { python3 -m pip install --user -q uv; python3 -m uv venv -q --python 3.12 .venv; }
python3 -m uv pip install -q --python .venv/bin/python "jax[tpu]" -r requirements.txt'

mount_nfs() {
  workers all "mountpoint -q /mnt/nfs || { sudo apt-get install -y -q nfs-common && sudo mkdir -p /mnt/nfs &&
sudo mount -t nfs $(printf %q "$NFS") /mnt/nfs && sudo chmod 777 /mnt/nfs; }"
}

ALIVE='[ -f train.pid ] && kill -0 "$(cat train.pid)" 2>/dev/null'

start() {  # quoted twice: for the local shell and the remote one
  workers all "cd lmim_jax; if $ALIVE; then echo already running; else
nohup setsid .venv/bin/python main.py$( [ $# = 0 ] || printf ' %q' "$@") >>train.log 2>&1 </dev/null & echo \$! >train.pid; fi"
}

command="${1:-}"
[ $# -gt 0 ] && shift
case "$command" in
  train)
    now="$(state)"
    case "$now" in
      FAILED | SUSPENDED) step "delete the preempted slice ($now)" delete; now=NONE ;;
    esac
    [ "$now" = NONE ] && step "request a slice" create
    step "wait for the slice" wait_until_active
    step "copy the code" copy
    step "install" workers all "$INSTALL"
    [ -z "${NFS:-}" ] || step "mount $NFS" mount_nfs
    step "start on all workers" start "$@"
    echo "started; ./launch/tpu_pod.sh logs" >&2
    ;;
  status)
    echo "slice: $(state)"
    workers all "cd lmim_jax && if $ALIVE; then echo running; else echo not running; fi; tail -n 1 train.log"
    ;;
  logs) workers 0 "tail -n 100 -F lmim_jax/train.log" ;;
  stop) step "save and stop on all workers" workers all "cd lmim_jax && kill -TERM \"\$(cat train.pid)\"" ;;
  delete) step "delete the slice" delete ;;
  *) fail "no command ${command:-given}: train | status | logs | stop | delete" ;;
esac
