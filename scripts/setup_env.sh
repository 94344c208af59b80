# Sourced by quickstart.sh and run_tests.sh: makes .venv and installs requirements.txt, once; sets $PYTHON.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/usage.sh"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ ! -x .venv/bin/python ]]; then
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "error: python3 is missing or older than 3.11; install Python 3.11 or newer" >&2
        exit 1
    }
    python3 -m venv .venv
fi
if ! cat requirements.txt pyproject.toml | cmp -s - .venv/installed.txt; then
    echo "installing requirements.txt into .venv (a few minutes, once)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
    cat requirements.txt pyproject.toml >.venv/installed.txt
fi
export PYTHON=$PWD/.venv/bin/python
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-10000} # as mllmrec/stage/main.py sets it, also for the tests
