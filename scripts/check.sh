#!/usr/bin/env bash
# The static checks: lint, format, types. Usage: bash scripts/check.sh
# Needs the environment of quickstart.sh or run_tests.sh, which make it. CPU, seconds.
source "$(dirname "$0")/common.sh"
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
