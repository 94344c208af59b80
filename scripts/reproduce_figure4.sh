#!/usr/bin/env bash
# The paper's ablations (Figure 4) -> outputs/reproduce/NAME/figure4.md, .csv, .json, .png
# Usage: bash scripts/reproduce_figure4.sh [configs/NAME.yaml] [--seeds 42 43 44] [--folds 5] [--rows KEY ...] [--jobs N]
# Resumes; rows that several tables share are run once.
source "$(dirname "$0")/common.sh"
"$PYTHON" scripts/reproduce/run.py figure4 --config "$CONFIG" "$@"
