#!/usr/bin/env bash
# The paper's main results (Table 3) -> outputs/reproduce/NAME/table3.md, .csv, .json, .png
# Usage: bash scripts/reproduce_table3.sh [configs/NAME.yaml] [--seeds 42 43 44] [--folds 5] [--rows KEY ...] [--jobs N]
# Resumes; rows that several tables share are run once.
source "$(dirname "$0")/common.sh"
"$PYTHON" scripts/reproduce/run.py table3 --config "$CONFIG" "$@"
