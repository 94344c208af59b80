#!/usr/bin/env bash
# MLLM4Rec, retriever: LRURec ranks all items -> {output_dir}/mllm4rec/retriever/candidates.jsonl, scores.jsonl, metrics.json
# Usage: bash scripts/mllm4rec/03_retriever.sh [configs/mllm4rec/NAME.yaml] [--retriever sasrec --variant sasrec] ...
# Needs 01. One CPU core or a GPU; times in docs/results.md.
[[ $# -gt 0 && $1 != --* ]] || set -- configs/mllm4rec/ml-100k.yaml "$@"
source "$(dirname "$0")/../common.sh"
"$PYTHON" MLLM4Rec/train_retriever.py --config "$CONFIG" "$@"
