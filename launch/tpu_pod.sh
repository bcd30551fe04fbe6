#!/usr/bin/env bash
# Train on Cloud TPU slices of any size, with queued resources:
#
#   export TPU_NAME=lmim ZONE=us-west4-a TYPE=v5litepod-16 RUNTIME=v2-alpha-tpuv5-lite
#   ./launch/tpu_pod.sh train [flags of main.py]    create, wait, copy, install, start on all workers; again: resume
#   ./launch/tpu_pod.sh watch [flags of main.py]    the same, and again after every preemption, until the run is done
#   ./launch/tpu_pod.sh status | logs | stop | delete
#
# Also: PROJECT; SLICES=2, several slices as one run; one of SPOT=1 (cheaper, may be preempted), RESERVED=1, and
# FLEX=10h (flex-start, for so long); CREATE_FLAGS, more words for `gcloud compute tpus queued-resources create`;
# NFS=HOST:/SHARE, mounted as /mnt/nfs on all workers, for --workdir and data; DISK=projects/P/zones/Z/disks/D, mounted
# read-only as /mnt/disk, for data; DELETE=1, `watch` deletes the slices at the end. See launch/README.md.
# Google serves TPU7x and later by GKE only, not by the API used here: launch/gke_jobset.yaml.
set -uo pipefail
me="$(printf %q "$0")"  # as it was called, from the folder of the caller
cd "$(dirname "$0")/.." || exit
POLL="${POLL:-30}"          # seconds between two queries
FAILURES="${FAILURES:-20}"  # so many failed attempts in a row end `watch`; it waits longer after each
RESTARTS="${RESTARTS:-5}"   # so many restarts in a row without a new checkpoint end the run, and `watch`

fail() { echo "error: $*" >&2; exit 2; }
say() { echo "$(date '+%F %T') $*" >&2; }
[ -n "${TPU_NAME:-}" ] && [ -n "${ZONE:-}" ] || fail "set TPU_NAME and ZONE"
command -v gcloud >/dev/null || fail "gcloud is not installed: https://cloud.google.com/sdk/docs/install"
temporary="$(mktemp -d)"
trap 'rm -rf "$temporary"' EXIT

case "${SLICES:-1}" in "" | *[!0-9]* | 0*) fail "SLICES=$SLICES is not a number of slices" ;; esac
slices=("$TPU_NAME")
if [ "${SLICES:-1}" -gt 1 ]; then  # as queued resources name them
  slices=()
  for ((i = 0; i < SLICES; i++)); do slices+=("$TPU_NAME-$i"); done
fi

tpus() { gcloud ${TRACK:+"$TRACK"} compute tpus "$@" --zone="$ZONE" ${PROJECT:+--project="$PROJECT"}; }
ssh_to() { tpus tpu-vm ssh "$1" --worker="$2" --command="$3"; }  # SLICE, all or a number, COMMAND

each() {  # FUNCTION ARGUMENTS...: FUNCTION SLICE ARGUMENTS... for all slices at once; the last exit code that is not 0
  local function="$1" pids=() code=0 one
  shift
  # In the foreground: gcloud may ask for a password
  if [ "${#slices[@]}" = 1 ]; then "$function" "${slices[0]}" "$@"; return; fi
  for one in "${slices[@]}"; do
    "$function" "$one" "$@" &
    pids+=($!)
  done
  for one in "${pids[@]}"; do wait "$one" || code=$?; done
  return "$code"
}

workers() { each ssh_to all "$1"; }  # COMMAND, on all workers of all slices

step() {  # NAME COMMAND...: run it, and exit if it fails, with its exit code or instead of 2 with 1
  local name="$1" code
  shift
  say "== $name"
  "$@"
  code=$?
  [ "$code" = 0 ] && return
  echo "error: '$name' failed with exit code $code. Nothing was deleted; run the same command again to resume," >&2
  echo "  or delete the slice: $me delete" >&2
  [ "$code" = 2 ] && code=1  # 2: a mistake of the user, which `watch` does not try again
  exit "$code"
}

# ---- the queued resource ----

create() {
  local kind=() words=()
  [ -n "${SPOT:-}" ] && kind+=(--spot)
  [ -n "${RESERVED:-}" ] && kind+=(--reserved)
  [ -n "${FLEX:-}" ] && kind+=(--provisioning-model=flex-start)
  [ "${#kind[@]}" -le 1 ] || fail "give one of SPOT, RESERVED and FLEX"
  if [ "${#slices[@]}" = 1 ]; then words+=(--node-id="$TPU_NAME")
  else words+=(--node-count="$SLICES" --node-prefix="$TPU_NAME"); fi
  [ -z "${FLEX:-}" ] || kind+=(--max-run-duration="$FLEX")
  [ -z "${DISK:-}" ] || words+=(--data-disk="source=$DISK,mode=read-only")
  # gcloud knows flex-start in its alpha commands only. CREATE_FLAGS is split into words.
  TRACK="${FLEX:+alpha}" tpus queued-resources create "$TPU_NAME" "${words[@]}" --accelerator-type="$TYPE" \
    --runtime-version="$RUNTIME" ${kind[@]+"${kind[@]}"} ${CREATE_FLAGS:-}
}

delete() { tpus queued-resources delete "$TPU_NAME" --force --quiet; }

state() {  # NONE: there is no such resource. Any other error of gcloud is an error, after three attempts
  local answer attempt
  for attempt in 1 2 3; do
    if answer="$(tpus queued-resources describe "$TPU_NAME" --format='value(state.state)' 2>"$temporary/error")"; then
      echo "$answer"
      return
    fi
    if grep -q NOT_FOUND "$temporary/error"; then echo NONE; return; fi
    [ "$attempt" = 3 ] || sleep "$POLL"
  done
  cat "$temporary/error" >&2
  return 1
}

settled() {  # wait while it is queued, made or deleted; then its state: ACTIVE, FAILED, SUSPENDED or NONE
  local now
  while true; do
    now="$(state)" || return
    case "$now" in
      ACTIVE | FAILED | SUSPENDED | NONE) echo "$now"; return ;;
    esac
    say "the slice is $now; checking again in $POLL s"
    sleep "$POLL"
  done
}

settle() { settled >"$temporary/state"; }

become_active() {
  settle || return
  [ "$(<"$temporary/state")" = ACTIVE ] && return
  echo "the slice is $(<"$temporary/state"); the reason: gcloud compute tpus queued-resources describe $TPU_NAME" >&2
  return 1
}

lost() {  # whether Google has taken a slice away, although the queued resource may still be called active
  local one
  for one in "${slices[@]}"; do
    case "$(tpus tpu-vm describe "$one" --format='value(state)' 2>/dev/null)" in
      PREEMPTED | TERMINATED) return 0 ;;
    esac
  done
  return 1
}

gone() {
  local now
  now="$(state)" || return
  [ "$now" != ACTIVE ] || lost
}

# ---- the workers ----

copy() {
  local archive="$temporary/lmim_jax.tar.gz"
  tar czf "$archive" --exclude='./.*' --exclude=./runs --exclude=./build --exclude=__pycache__ . || return
  each copy_to "$archive"
}

copy_to() { tpus tpu-vm scp "$2" "$1:lmim_jax.tar.gz" --worker=all; }

# The images of TPU machines have an older Python, so uv installs one
INSTALL='set -e; mkdir -p lmim_jax; tar xzf lmim_jax.tar.gz -C lmim_jax; cd lmim_jax
[ -x .venv/bin/python ] || { python3 -m pip install --user -q uv
  python3 -m uv venv -q --python 3.12 .venv; }
python3 -m uv pip install -q --python .venv/bin/python "jax[tpu]" -r requirements.txt "gcsfs>=2025.3"'

mount_nfs() {  # a new machine updates itself and holds the lock of apt for some minutes
  workers "set -e
if ! mountpoint -q /mnt/nfs; then
  for attempt in \$(seq 20); do
    command -v mount.nfs >/dev/null && break
    sudo apt-get update -q && sudo apt-get -o DPkg::Lock::Timeout=60 install -y -q nfs-common || sleep ${POLL}
  done
  sudo mkdir -p /mnt/nfs
  sudo mount -t nfs $(printf %q "$NFS") /mnt/nfs
fi
[ -w /mnt/nfs ] || sudo chmod 777 /mnt/nfs"
}

mount_disk() {  # the one disk that is not the system's; noload: its journal cannot be written
  workers 'set -e
mountpoint -q /mnt/disk && exit
system="$(lsblk -no PKNAME "$(findmnt -no SOURCE /)")"
disk="$(lsblk -dnro NAME,TYPE | sed -n "/^$system /d; s/^\(sd.*\|nvme.*\) disk$/\1/p" | head -n 1)"
sudo mkdir -p /mnt/disk
sudo mount -o ro,noload "/dev/$disk" /mnt/disk'
}

# A worker's run: idle, running, stopped (by hand), "ended" and its exit code, or lost (the machine was restarted)
ACTIVITY='activity() {
  pid="$(cat train.pid 2>/dev/null)"
  if [ -n "$pid" ] && grep -qs main.py "/proc/$pid/cmdline"; then echo running
  elif [ -z "$pid" ]; then echo idle
  elif [ -e train.stopped ]; then echo stopped
  elif [ -s train.code ]; then echo "ended $(cat train.code)"
  else echo lost; fi
}'

activities() {  # of all workers, one per line
  workers "mkdir -p lmim_jax; cd lmim_jax || exit; $ACTIVITY
echo \"worker \$(hostname): \$(activity)\"" >"$temporary/answers" || return
  grep -o '^worker .*' "$temporary/answers"
}

verdict() {  # on all workers together: running, some (run), mistake (or no such program), stopped, finished or ended
  local lines
  lines="$(activities)" || return
  if ! grep -qv ': running$' <<<"$lines"; then echo running
  elif grep -q ': running$' <<<"$lines"; then echo some
  elif grep -q ': stopped$' <<<"$lines"; then echo stopped
  elif grep -Eq ': ended (2|126|127)$' <<<"$lines"; then echo mistake
  elif ! grep -qv ': ended 0$' <<<"$lines"; then echo finished
  else echo ended; fi
}

inspect() { verdict >"$temporary/verdict"; }

start() {  # quoted twice: for the local shell and the remote one
  workers "cd lmim_jax || exit; $ACTIVITY
[ \"\$(activity)\" = running ] && { echo already running; exit; }
rm -f train.pid train.code train.stopped
export LMIM_RESTARTS=$RESTARTS LMIM_RESTART=${restart:-0} LMIM_RESTART_REASON=$(printf %q "${reason:-}")
run='.venv/bin/python main.py \"\$@\" & echo \$! >train.pid; wait \$!; echo \$? >train.code'
nohup setsid sh -c \"\$run\" main.py$( [ $# = 0 ] || printf ' %q' "$@") >>train.log 2>&1 </dev/null &
until [ -s train.pid ]; do sleep 0.1; done"
}

KILL='kill -KILL "$(cat lmim_jax/train.pid)" || true'
STOP='cd lmim_jax && touch train.stopped && kill -TERM "$(cat train.pid)"'

# ---- the commands ----

train() {
  [ -n "${TYPE:-}" ] || fail "set TYPE, such as v5litepod-16"
  [ -n "${RUNTIME:-}" ] || fail "set RUNTIME, such as v2-alpha-tpuv5-lite"
  step "ask for the slice" settle
  if [ "$(<"$temporary/state")" = ACTIVE ] && lost; then echo SUSPENDED >"$temporary/state"; fi
  case "$(<"$temporary/state")" in
    FAILED | SUSPENDED)
      step "delete the slice ($(<"$temporary/state"))" delete
      echo NONE >"$temporary/state"
      ;;
  esac
  if [ "$(<"$temporary/state")" = NONE ]; then
    step "request a slice" create
    step "wait for the slice" become_active
  fi
  step "ask the workers" inspect
  case "$(<"$temporary/verdict")" in
    running) say "already running; nothing was changed"; return ;;
    some)
      echo "error: the run goes on on some workers only; they should end within a minute. Nothing was changed; run" >&2
      echo "  the same command again, or end them: $me stop" >&2
      exit 1
      ;;
  esac
  step "copy the code" copy
  step "install" workers "$INSTALL"
  [ -z "${NFS:-}" ] || step "mount $NFS" mount_nfs
  [ -z "${DISK:-}" ] || step "mount $DISK" mount_disk
  step "start on all workers" start "$@"
  say "started; $me logs"
}

follow() {  # wait until the run has ended, or the slice is gone; how is in $temporary/verdict
  local failures=0 partly=0
  while true; do
    if inspect; then
      failures=0
      case "$(<"$temporary/verdict")" in
        running) partly=0 ;;
        some)
          partly=$((partly + 1))
          [ "$partly" -lt "$FAILURES" ] || { say "ending the workers that still run"; workers "$KILL"; }
          ;;
        *) return ;;
      esac
    elif gone; then echo gone >"$temporary/verdict"; return
    else
      failures=$((failures + 1))
      say "no answer from the workers ($failures of $FAILURES)"
      [ "$failures" -lt "$FAILURES" ] || return 1
    fi
    sleep "$POLL"
  done
}

watch() {
  local failures=0 code how restart=0 reason=""
  while true; do
    (train "$@")  # a run that is going on is left alone
    code=$?
    [ "$code" != 2 ] || exit 2
    if [ "$code" = 0 ] && follow; then
      failures=0
      how="$(<"$temporary/verdict")"
    else
      failures=$((failures + 1))
      say "attempt $failures of $FAILURES in a row failed"
      [ "$failures" -lt "$FAILURES" ] || exit 1
      sleep $((POLL * failures))
      continue
    fi
    say "the run: $how"
    case "$how" in
      finished) [ -z "${DELETE:-}" ] || step "delete the slice" delete; return ;;
      stopped) return ;;
      mistake) workers "tail -n 20 lmim_jax/train.log" >&2; exit 2 ;;
      gone) continue ;;
    esac
    # The run itself counts its restarts without progress, and ends with exit code 2 after $RESTARTS
    restart=$((restart + 1))
    reason="$how"
    sleep "$POLL"
  done
}

status() {
  local now
  now="$(state)" || return
  echo "slice: $now"
  [ "$now" = ACTIVE ] || return 0
  activities
  ssh_to "${slices[0]}" 0 "tail -n 1 lmim_jax/train.log"
}

command="${1:-}"
[ $# -gt 0 ] && shift
case "$command" in
  train) train "$@" ;;
  watch) watch "$@" ;;
  status) status ;;
  logs) ssh_to "${slices[0]}" 0 "tail -n 100 -F lmim_jax/train.log" ;;
  stop) step "save and stop on all workers" workers "$STOP" ;;
  delete) step "delete the slice" delete ;;
  *) fail "no command ${command:-given}: train | watch | status | logs | stop | delete" ;;
esac
