#!/usr/bin/env bash
# All tests, in the same environment as the quickstart. Usage: bash scripts/run_tests.sh [pytest options]
# One process per core (pytest-xdist). The slow ones (retraining the tiny models, ...): -m slow
source "$(dirname "$0")/setup_env.sh"
"$PYTHON" -m pytest --numprocesses auto --dist loadfile "$@"
