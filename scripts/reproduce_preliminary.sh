#!/usr/bin/env bash
# The paper's preliminary study, GRU4Rec on image summaries -> outputs/reproduce/NAME/preliminary.md, .csv, .json, .png
# Usage: bash scripts/reproduce_preliminary.sh [configs/NAME.yaml] [--seeds 42 43 44] [--folds 5] [--rows KEY ...] [--jobs N]
# Resumes; rows that several tables share are run once.
source "$(dirname "$0")/common.sh"
"$PYTHON" scripts/reproduce/run.py preliminary --config "$CONFIG" "$@"
