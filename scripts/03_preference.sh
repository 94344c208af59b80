#!/usr/bin/env bash
# Stage 3: a frozen LLM reads every user's history block by block -> {output_dir}/mllm_msr/user_preferences.jsonl
# Usage: bash scripts/03_preference.sh [configs/NAME.yaml] [--limit N] [--model DIR] ...
# Needs stages 1 and 2. Sample: 20 s on 2 CPU cores. Llama-3-8B: one GPU; 60 users in 73 s on an H200 (docs/benchmarks.md).
source "$(dirname "$0")/common.sh"
launch Inference/preference_recurrent.py --config "$CONFIG" "$@"
