#!/usr/bin/env bash
# Times a published procedure and ours, same machine, same run -> outputs/benchmark/NAME.json
# Usage: bash scripts/benchmark.sh data|inference|train|scoring [options of scripts/benchmarks/time_NAME.py]
source "$(dirname "$0")/common.sh"
name=${CONFIG##*/} # the first argument
if [[ ! -f scripts/benchmarks/time_$name.py ]]; then
    echo "error: there is no benchmark '$name'; choose one of: data, inference, train, scoring" >&2
    exit 1
fi
"$PYTHON" "scripts/benchmarks/time_$name.py" "$@"
