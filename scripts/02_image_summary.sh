#!/usr/bin/env bash
# Stage 2: a frozen multimodal model describes every item -> {output_dir}/mllm_msr/image_summaries.jsonl
# Usage: bash scripts/02_image_summary.sh [configs/NAME.yaml] [--limit N] [--model DIR] ...
# Needs stage 1. Sample: 10 s on 2 CPU cores. LLaVA-v1.6-Mistral-7B: one GPU; 9 images/s on an H200 (docs/benchmarks.md).
source "$(dirname "$0")/common.sh"
launch Inference/image_summary.py --config "$CONFIG" "$@"
