#!/usr/bin/env bash
# Lint and test: ./launch/test.sh [arguments of pytest]
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/venv.sh requirements-dev.txt
ruff check .
ruff format --check .
exec python -m pytest "$@"
