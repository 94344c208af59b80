#!/usr/bin/env bash
# MLLM4Rec, ranker: an LLM with LoRA ranks what was retrieved -> {output_dir}/mllm4rec/adapter/, ranked/scores.jsonl,
# ranker/scores.jsonl and metrics.json
# Usage: bash scripts/mllm4rec/04_ranker.sh [configs/mllm4rec/NAME.yaml] [--llm_base_model DIR] ...
# Needs 01, 03, and 02 for captions. Llama-2-7B: a GPU; not run (docs/mllm4rec.md).
[[ $# -gt 0 && $1 != --* ]] || set -- configs/mllm4rec/ml-100k.yaml "$@"
source "$(dirname "$0")/../common.sh"
launch MLLM4Rec/train_ranker.py --config "$CONFIG" "$@"
