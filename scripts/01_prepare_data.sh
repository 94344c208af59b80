#!/usr/bin/env bash
# Stage 1: raw files -> {data_dir}/users.jsonl, items.jsonl, stats.json
# Usage: bash scripts/01_prepare_data.sh [configs/NAME.yaml] [--raw_dir DIR] [--require_image false] [--limit N] ...
# The config's line `dataset: NAME` names the loader data_processing/NAME.py.
# Amazon (amazon, amazon_2014, released_lists): then fetches the images, and prepares again without the items whose image could not be fetched.
# CPU. Sample: 5 s. MicroLens-50k: 5 s. Amazon: hours, for the images; an interrupted run resumes.
source "$(dirname "$0")/common.sh"
dataset=$("$PYTHON" -m mllmrec.stage.options "$CONFIG")
if [[ ! $dataset =~ ^[A-Za-z0-9_]+$ ]] || ! grep -qs '^SECTION = "data"' "data_processing/$dataset.py"; then
    loaders=$(grep -l '^SECTION = "data"' data_processing/*.py | sed 's|.*/||; s|[.]py$||' | paste -sd ' ')
    echo "error: the line 'dataset: NAME' of $CONFIG is missing or names no loader; choose one of: $loaders" >&2
    exit 1
fi
if [[ $dataset == amazon || $dataset == amazon_2014 || $dataset == released_lists ]]; then
    part "$PYTHON" "data_processing/$dataset.py" --config "$CONFIG" "$@"
    common_overrides "$@"
    # --limit counts users; their images are all that is listed
    part "$PYTHON" data_processing/download_images.py --config "$CONFIG" ${COMMON[@]+"${COMMON[@]}"} --limit 0
fi
"$PYTHON" "data_processing/$dataset.py" --config "$CONFIG" "$@"
