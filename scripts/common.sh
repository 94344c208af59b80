# Sourced by the numbered scripts: goes to the repository's root, takes the config from the arguments ($CONFIG), leaves
# the options in "$@" and finds the interpreter ($PYTHON: yours if set, else .venv, else the active environment).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
CONFIG=configs/microlens.yaml
if [[ $# -gt 0 && $1 != --* ]]; then
    CONFIG=$1
    shift
fi
if [[ -z ${PYTHON:-} ]]; then
    if [[ -x .venv/bin/python ]]; then PYTHON=.venv/bin/python; else PYTHON=python; fi
fi

# On a CPU: glibc keeps the memory of large tensors instead of returning and fetching it anew at each use,
# which made a training batch of three images take 22 s instead of 15.
if ! command -v nvidia-smi > /dev/null; then
    export MALLOC_MMAP_MAX_=${MALLOC_MMAP_MAX_:-0} MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-100000000000}
fi

# Runs a script that loads a model: on one device, or as $ACCELERATE says, e.g.
#   ACCELERATE="--config_file configs/accelerate/multi_gpu.yaml --num_processes 4" bash scripts/02_image_summary.sh …
launch() {
    local words
    read -ra words <<< "${ACCELERATE:-}"
    if [[ ${#words[@]} -gt 0 ]]; then
        "$PYTHON" -m accelerate.commands.launch "${words[@]}" "$@"
    else
        "$PYTHON" "$@"
    fi
}

# The options that every script has, for the scripts of a stage that are not its main one.
common_overrides() {
    COMMON=()
    while [[ $# -gt 0 ]]; do
        case $1 in
            --data_dir | --output_dir | --domain | --seed | --limit | --overwrite) COMMON+=("$1" "${2:-}") && shift ;;
            --data_dir=* | --output_dir=* | --domain=* | --seed=* | --limit=* | --overwrite=*) COMMON+=("$1") ;;
        esac
        shift
    done
}
