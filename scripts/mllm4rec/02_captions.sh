#!/usr/bin/env bash
# MLLM4Rec, captions: an image-text model describes each item's image -> {output_dir}/mllm4rec/image_summaries.jsonl
# Usage: bash scripts/mllm4rec/02_captions.sh [configs/mllm4rec/NAME.yaml] [--model_path DIR] [--limit N] ...
# Needs 01. Sample: 10 s on 2 CPU cores. BLIP-2: a GPU; not run. Not for ml-100k, which has no images.
[[ $# -gt 0 && $1 != --* ]] || set -- configs/mllm4rec/ml-100k.yaml "$@"
source "$(dirname "$0")/../common.sh"
launch MLLM4Rec/process_item_blip2.py --config "$CONFIG" "$@"
