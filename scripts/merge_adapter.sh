#!/usr/bin/env bash
# Merges the adapter of stage 5 into its base model -> {output_dir}/mllm_msr/merged/, a model folder that needs no PEFT
# Usage: bash scripts/merge_adapter.sh [configs/NAME.yaml] [--adapter DIR] [--merged DIR] ...
# Needs stage 5. CPU or GPU; as much memory as the model's weights.
source "$(dirname "$0")/common.sh"
"$PYTHON" MLLM-MSR/train/merge_adapter.py --config "$CONFIG" "$@"
