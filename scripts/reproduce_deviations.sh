#!/usr/bin/env bash
# What each deviation from the released code is worth, alone and all together -> outputs/reproduce/NAME/deviations.md, .csv, .json, .png
# Usage: bash scripts/reproduce_deviations.sh [configs/NAME.yaml] [--seeds 42 43 44] [--folds 5] [--rows KEY ...] [--jobs N]
# Resumes. Sample, three seeds: about 60 minutes on 2 CPU cores.
source "$(dirname "$0")/common.sh"
"$PYTHON" scripts/reproduce/run.py deviations --config "$CONFIG" "$@"
