#!/usr/bin/env bash
# Uploads the adapter with its model card to the Hugging Face hub; --derived true also summaries and preferences, never raw data
# Usage: bash scripts/push_to_hub.sh configs/NAME.yaml --repo_id NAME/REPOSITORY [--folder {output_dir}/mllm_msr/merged] ...
# Needs stage 5 (stage 7 for the metrics in the card), and `hf auth login`.
source "$(dirname "$0")/common.sh"
"$PYTHON" MLLM-MSR/train/push_to_hub.py --config "$CONFIG" "$@"
