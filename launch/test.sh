#!/usr/bin/env bash
# Lint, check types and test: ./launch/test.sh [arguments of pytest]
# ./launch/test.sh --interop: comparisons with timm, transformers, ONNX Runtime, ... instead, which it installs (1 GB or more)
set -euo pipefail
cd "$(dirname "$0")/.."
case " $* " in
  *" --interop "*) source launch/venv.sh requirements-interop.txt ;;
  *) source launch/venv.sh requirements-dev.txt ;;
esac
ruff check .
ruff format --check .
NO_MKDOCS_2_WARNING=1 mkdocs build --strict -q -d build/site
mypy
exec python -m pytest "$@"
