#!/usr/bin/env bash
# Stage 6: every test row is scored, without SFT and with it -> {output_dir}/mllm_msr/zero_shot/scores.jsonl,
# sft/scores.jsonl, and the baseline {output_dir}/baselines/popularity/scores.jsonl
# Usage: bash scripts/06_score.sh [configs/NAME.yaml] [--batch_tokens N] ...
# Needs stages 4 and 5. Sample: 45 s on 2 CPU cores. LLaVA-v1.6-Mistral-7B: one GPU; 20 rows/s on an H200 (docs/benchmarks.md).
source "$(dirname "$0")/common.sh"
common_overrides "$@"
part "$PYTHON" MLLM-MSR/baselines/popularity.py --config "$CONFIG" ${COMMON[@]+"${COMMON[@]}"}
part launch MLLM-MSR/test/test_with_llava_sft.py --config "$CONFIG" "$@" --adapter none --hide nothing
launch MLLM-MSR/test/test_with_llava_sft.py --config "$CONFIG" "$@"
