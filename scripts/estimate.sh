#!/usr/bin/env bash
# What the stages of a config will cost: rows, tokens, memory in bfloat16, int8 and nf4, time at the rate of a pilot; no GPU needed
# Usage: bash scripts/estimate.sh [configs/NAME.yaml] [--data_dir DIR] [--output_dir DIR] [--system NAME]
# Needs stage 1; upper bounds until the stages before have run.
source "$(dirname "$0")/common.sh"
"$PYTHON" -m mllmrec.estimate --config "$CONFIG" "$@"
