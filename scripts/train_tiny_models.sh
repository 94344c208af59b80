#!/usr/bin/env bash
# Trains the sample's three tiny models from nothing -> Inference/tiny_models/llava, llama, list_llama
# Usage: bash scripts/train_tiny_models.sh [FOLDER] [--seed N]
# About 80 minutes on two CPU cores; the number of threads is set, so that the result does not depend on that of the cores.
# llava and llama were made by this script with its defaults, list_llama by the two phases of its own, one after the other.
source "$(dirname "$0")/setup_env.sh"
folder=Inference/tiny_models
if [[ $# -gt 0 && $1 != --* ]]; then
    folder=$1
    shift
fi
"$PYTHON" scripts/tiny_models/train_llava.py --output "$folder/llava" "$@"
"$PYTHON" scripts/tiny_models/train_llama.py --output "$folder/llama" "$@"
"$PYTHON" scripts/tiny_models/train_list_llama.py --output "$folder/list_llama" "$@"
