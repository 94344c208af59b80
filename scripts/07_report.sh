#!/usr/bin/env bash
# Stage 7: scores -> {output_dir}/metrics.json, report.html, report.md; prints the metrics table
# Usage: bash scripts/07_report.sh [configs/NAME.yaml] [--output_dir DIR] ...
# Needs stage 6. CPU, seconds.
source "$(dirname "$0")/common.sh"
common_overrides "$@"
part "$PYTHON" MLLM-MSR/test/compute_metrics.py --config "$CONFIG" ${COMMON[@]+"${COMMON[@]}"}
"$PYTHON" MLLM-MSR/test/report.py --config "$CONFIG" "$@"
