#!/usr/bin/env bash
# Both systems, TALLRec and sequential baselines on one users.jsonl: quality, and tokens and seconds per user
# -> outputs/reproduce/NAME/systems.md, .csv, .json, .png
# Usage: bash scripts/compare_systems.sh [configs/sample.yaml] [--seeds 42 43 44] [--rows KEY ...] [--jobs N]
# Resumes; rows that several tables share are run once.
[[ $# -gt 0 && $1 != --* ]] || set -- configs/sample.yaml "$@"
source "$(dirname "$0")/common.sh"
"$PYTHON" scripts/reproduce/run.py systems --config "$CONFIG" "$@"
