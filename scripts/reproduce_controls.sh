#!/usr/bin/env bash
# What the sequential rows owe to popularity and time, and controls that should be near chance
# -> outputs/reproduce/NAME/controls.md, .csv, .json, .png, .png
# Usage: bash scripts/reproduce_controls.sh [configs/NAME.yaml] [--seeds 42 43 44] [--folds 5] [--rows KEY ...] [--jobs N]
# Resumes; rows that several tables share are run once.
source "$(dirname "$0")/common.sh"
"$PYTHON" scripts/reproduce/run.py controls --config "$CONFIG" "$@"
