#!/usr/bin/env bash
# The paper's block size and length of the preference (Figure 5) -> outputs/reproduce/NAME/figure5.md, .csv, .json, .png
# Usage: bash scripts/reproduce_figure5.sh [configs/NAME.yaml] [--seeds 42 43 44] [--folds 5] [--rows KEY ...] [--jobs N]
# Resumes; rows that several tables share are run once.
source "$(dirname "$0")/common.sh"
"$PYTHON" scripts/reproduce/run.py figure5 --config "$CONFIG" "$@"
