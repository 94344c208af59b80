#!/usr/bin/env bash
# MLLM4Rec, data: raw files -> {data_dir}/users.jsonl (leave-one-out), items.jsonl, stats.json, and Amazon's images
# Usage: bash scripts/mllm4rec/01_process_item.sh [configs/mllm4rec/NAME.yaml] [--raw_dir DIR] ...
# CPU. ml-latest-small: 5 s. Amazon: hours, for the images; an interrupted run resumes.
[[ $# -gt 0 && $1 != --* ]] || set -- configs/mllm4rec/ml-100k.yaml "$@"
source "$(dirname "$0")/../common.sh"
"$PYTHON" MLLM4Rec/process_item.py --config "$CONFIG" "$@"
