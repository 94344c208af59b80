# Sourced by the numbered scripts: goes to the repository's root, takes the config from the arguments ($CONFIG: the
# first one, or --config), leaves the options in "$@" and finds the interpreter ($PYTHON: yours if set, else .venv,
# else the active environment).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/usage.sh"
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage_error() {
    echo "error: $1" >&2
    exit 2
}

CONFIG=
if [[ $# -gt 0 && $1 != --* ]]; then
    CONFIG=$1
    shift
fi
words=()
while [[ $# -gt 0 ]]; do
    if [[ $1 == --config || $1 == --config=* ]]; then
        [[ -z $CONFIG ]] || usage_error "two configs are named, $CONFIG and by $1; name one"
        if [[ $1 == --config ]]; then
            [[ $# -gt 1 && $2 != --* ]] || usage_error "--config needs a value"
            shift
        fi
        CONFIG=${1#--config=}
    else
        words+=("$1")
    fi
    shift
done
set -- ${words[@]+"${words[@]}"}
CONFIG=${CONFIG:-configs/microlens.yaml}
if [[ -z ${PYTHON:-} ]]; then
    if [[ -x .venv/bin/python ]]; then PYTHON=.venv/bin/python; else PYTHON=python; fi
fi

# On a CPU: glibc keeps the memory of tensors of up to 32 MB (the most it can) instead of returning and fetching it anew at
# each use. Larger ones are given back: kept, the gaps between a 7B model's weights grew to 15 GB while they were loaded.
if ! command -v nvidia-smi > /dev/null; then
    export MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-33554432}
    export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-4000000000}
fi

# Runs a script that loads a model: on one device, or as $ACCELERATE says, e.g.
#   ACCELERATE="--config_file configs/accelerate/multi_gpu.yaml --num_processes 4" bash scripts/02_image_summary.sh …
launch() {
    local words n
    read -ra words <<< "${ACCELERATE:-}"
    if [[ ${#words[@]} -gt 0 ]]; then
        for n in "${!words[@]}"; do # the stage compares it with the number of processes that were started
            case ${words[n]} in
                --num_processes) export MLLM_MSR_PROCESSES=${words[n + 1]:-} ;;
                --num_processes=*) export MLLM_MSR_PROCESSES=${words[n]#*=} ;;
            esac
        done
        "$PYTHON" -m accelerate.commands.launch --quiet "${words[@]}" "$@"
    else
        "$PYTHON" "$@"
    fi
}

# Runs a script that is not the last of its stage, so that it does not say what comes next.
part() {
    MLLM_MSR_PART=true "$@"
}

# The options that every script has, for the scripts of a stage that are not its main one.
common_overrides() {
    COMMON=()
    local kept=false
    while [[ $# -gt 0 ]]; do
        case $1 in
            --data_dir | --output_dir | --domain | --seed | --limit)
                [[ $# -gt 1 && $2 != --* ]] || usage_error "$1 needs a value"
                kept=true
                ;;
            --overwrite | --image_roots) kept=true ;; # with values or without
            --data_dir=* | --output_dir=* | --domain=* | --seed=* | --limit=* | --overwrite=* | --image_roots=*)
                kept=true
                ;;
            --*) kept=false ;;
        esac
        if $kept; then COMMON+=("$1"); fi
        shift
    done
}
