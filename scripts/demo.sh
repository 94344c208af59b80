#!/usr/bin/env bash
# The recommender by hand, in a browser: choose a user or write a preference, choose or upload an item, see p(yes) before and after SFT
# Usage: bash scripts/demo.sh [configs/NAME.yaml] [--port 7860] [options of stage 6]
# Needs stages 1 to 5. Shown on this machine only, at http://127.0.0.1:7860.
source "$(dirname "$0")/common.sh"
"$PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps -r scripts/demo/requirements.txt
"$PYTHON" scripts/demo/demo.py --config "$CONFIG" "$@"
