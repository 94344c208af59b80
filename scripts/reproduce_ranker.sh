#!/usr/bin/env bash
# MLLM4Rec's ranker beside the retriever's order, its ablations, shuffled labels; and both parts over all users
# -> outputs/reproduce/NAME/ranker.md, overall.md, and .csv, .json, .png of both
# Usage: bash scripts/reproduce_ranker.sh [configs/mllm4rec/NAME.yaml] [--seeds 42 43 44] [--jobs N]
# Resumes; rows that several tables share are run once.
[[ $# -gt 0 && $1 != --* ]] || set -- configs/mllm4rec/sample.yaml "$@"
source "$(dirname "$0")/common.sh"
"$PYTHON" scripts/reproduce/run.py ranker --config "$CONFIG" "$@"
"$PYTHON" scripts/reproduce/run.py overall --config "$CONFIG" "$@"
