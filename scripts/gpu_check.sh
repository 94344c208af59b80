#!/usr/bin/env bash
# Are a card's numbers right, and how near is it to its limits? At most about 9 minutes -> outputs/benchmark/gpu_check.md, .json
# Usage: bash scripts/gpu_check.sh [--size tiny] [--parts numbers text images training graphs trl] [--minutes 9]
source "$(dirname "$0")/common.sh"
"$PYTHON" scripts/benchmarks/time_card.py "$@"
