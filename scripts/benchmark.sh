#!/usr/bin/env bash
# Times a published procedure beside ours, same machine, same run -> outputs/benchmark/NAME.json
# Usage: bash scripts/benchmark.sh data|inference|train|scoring [options of scripts/benchmark_NAME.py]
source "$(dirname "$0")/common.sh"
name=${CONFIG##*/} # the first argument
if [[ ! -f scripts/benchmark_$name.py ]]; then
    echo "error: there is no benchmark '$name'; choose one of: $(cd scripts && echo benchmark_*.py | sed 's/benchmark_//g; s/\.py//g')" >&2
    exit 1
fi
"$PYTHON" "scripts/benchmark_$name.py" "$@"
