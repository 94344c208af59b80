#!/usr/bin/env bash
# Stage 4: yes/no rows as chat turns -> {output_dir}/mllm_msr/train.jsonl, validation.jsonl, test.jsonl
# Usage: bash scripts/04_datasets.sh [configs/NAME.yaml] [--limit N] ...
# Needs stages 1 and 3. CPU, seconds.
source "$(dirname "$0")/common.sh"
part "$PYTHON" MLLM-MSR/train/dataset_create.py --config "$CONFIG" "$@"
"$PYTHON" MLLM-MSR/test/multi_col_dataset.py --config "$CONFIG" "$@"
