#!/usr/bin/env bash
# MLLM4Rec's retriever beside popularity, GRU4Rec and SASRec over all items (leave-one-out)
# -> outputs/reproduce/NAME/retrieval.md, .csv, .json, .png
# Usage: bash scripts/reproduce_retrieval.sh [configs/mllm4rec/NAME.yaml] [--seeds 42 43 44] [--rows KEY ...] [--jobs N]
# Resumes.
[[ $# -gt 0 && $1 != --* ]] || set -- configs/mllm4rec/ml-100k.yaml "$@"
source "$(dirname "$0")/common.sh"
"$PYTHON" scripts/reproduce/run.py retrieval --config "$CONFIG" "$@"
