#!/usr/bin/env bash
# The bundled sample over several seeds: zero-shot, SFT, what image and preference contribute, bounds
# -> outputs/reproduce/sample/sample.md, .csv, .json, .png
# Usage: bash scripts/reproduce_sample.sh [configs/sample.yaml] [--seeds 42 43 44] [--folds 5] [--rows KEY ...] [--jobs N]
# Resumes; rows that several tables share are run once.
[[ $# -gt 0 && $1 != --* ]] || set -- configs/sample.yaml "$@"
source "$(dirname "$0")/common.sh"
"$PYTHON" scripts/reproduce/run.py sample --config "$CONFIG" "$@"
