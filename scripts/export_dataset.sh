#!/usr/bin/env bash
# What other programs read. Training rows for another trainer -> {output_dir}/mllm_msr/export/FORMAT/ (after stage 4);
# interactions and candidates for another recommender -> {data_dir}/export/FORMAT/ (after stage 1)
# Usage: bash scripts/export_dataset.sh [configs/NAME.yaml] --format trl|llamafactory|swift|recbole|mmrec
# CPU, seconds; mmrec also encodes titles and images.
source "$(dirname "$0")/common.sh"
case " $* " in
    *" --format recbole "* | *" --format=recbole "* | *" --format mmrec "* | *" --format=mmrec "*)
        "$PYTHON" MLLM-MSR/baselines/export_interactions.py --config "$CONFIG" "$@"
        ;;
    *) "$PYTHON" MLLM-MSR/train/export_dataset.py --config "$CONFIG" "$@" ;;
esac
