#!/usr/bin/env bash
# The statistics of the data (Table 2), ours beside the paper's -> outputs/reproduce/table2/table2.md, .csv, .json
# Usage: bash scripts/reproduce_table2.sh [configs/NAME.yaml ...]      default: the paper's three data sets
# CPU. Seconds for MicroLens-50k and the sample.
root=$(cd "$(dirname "$0")/.." && pwd)
source "$root/scripts/usage.sh"
configs=()
while [[ $# -gt 0 && $1 != --* ]]; do
    configs+=("$1")
    shift
done
[[ ${#configs[@]} -gt 0 ]] || configs=(configs/microlens.yaml configs/amazon_games.yaml configs/amazon_baby.yaml)
options=("$@")
set -- # the configs are not for common.sh, which takes one
source "$root/scripts/common.sh"
"$PYTHON" scripts/reproduce/data_statistics.py "${configs[@]}" ${options[@]+"${options[@]}"}
