#!/usr/bin/env bash
# What the stages of a config will cost: rows, tokens, memory on three cards, the least time; no GPU needed
# Usage: bash scripts/estimate.sh [configs/NAME.yaml] [--stages image_summary preference train score] [--json FILE]
# Needs stage 1; upper bounds until the stages before have run. Seconds per thousand users.
source "$(dirname "$0")/common.sh"
"$PYTHON" -m mllmrec.estimate.command --config "$CONFIG" "$@"
