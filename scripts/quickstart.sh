#!/usr/bin/env bash
# The whole pipeline on the bundled sample, from nothing: .venv, stages 1-7 with tiny models, metrics and report.
# Usage: bash scripts/quickstart.sh [--seed N] [--output_dir DIR --data_dir DIR] ...
# No GPU, no network but the package index. About 4 minutes on 2 CPU cores after the install; started again, it has nothing to do.
source "$(dirname "$0")/setup_env.sh"
config=configs/sample.yaml
for stage in 01_prepare_data 02_image_summary 03_preference 04_datasets 05_train 06_score 07_report; do
    bash "scripts/$stage.sh" "$config" "$@"
done
