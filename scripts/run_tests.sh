#!/usr/bin/env bash
# All tests, in the same environment as the quickstart. Usage: bash scripts/run_tests.sh [pytest options]
# The slow ones (retraining the tiny models, …) run with: bash scripts/run_tests.sh -m slow
source "$(dirname "$0")/setup_env.sh"
"$PYTHON" -m pytest "$@"
