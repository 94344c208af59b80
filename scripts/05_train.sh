#!/usr/bin/env bash
# Stage 5: LoRA teaches the multimodal model to answer yes or no -> {output_dir}/mllm_msr/adapter/
# Usage: bash scripts/05_train.sh [configs/NAME.yaml] [--epochs N] [--batch_size N] ...
# Needs stage 4. Sample: 60 s on 2 CPU cores. LLaVA-v1.6-Mistral-7B: one GPU; 2 to 3 rows/s on an H200 (docs/benchmarks.md).
source "$(dirname "$0")/common.sh"
launch MLLM-MSR/train/train_llava_sft.py --config "$CONFIG" "$@"
