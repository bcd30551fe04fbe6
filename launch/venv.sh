# Sourced: creates .venv with this package and the requirements in the file $1, unless it is up to date,
# and activates it.
PYTHON="${PYTHON:-python3}"
VENV="${VENV:-.venv}"
if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "error: $PYTHON is $("$PYTHON" --version 2>&1); Python 3.11 or newer is needed (PYTHON=python3.12 $0)" >&2
  exit 2
fi
wanted="$("$PYTHON" --version) $(cat requirements.txt pyproject.toml "$1" | cksum)"
if [ "$(cat "$VENV/installed-for-$1" 2>/dev/null)" != "$wanted" ]; then
  echo "installing $1 into $VENV" >&2
  [ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
  "$VENV/bin/pip" install --quiet --disable-pip-version-check -r "$1"
  "$VENV/bin/pip" install --quiet --disable-pip-version-check --no-deps --editable .  # the command lmim
  echo "$wanted" >"$VENV/installed-for-$1"
fi
export LMIM_CALLER_PATH="${LMIM_CALLER_PATH:-$PATH}"  # printed commands are for that shell
source "$VENV/bin/activate"
