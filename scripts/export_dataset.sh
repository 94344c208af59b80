#!/usr/bin/env bash
# Training and validation rows for another trainer -> {output_dir}/mllm_msr/export/FORMAT/
# Usage: bash scripts/export_dataset.sh [configs/NAME.yaml] --format trl|llamafactory|swift
# Needs stage 4. CPU, seconds.
source "$(dirname "$0")/common.sh"
"$PYTHON" MLLM-MSR/train/export_dataset.py --config "$CONFIG" "$@"
