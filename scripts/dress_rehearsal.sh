#!/usr/bin/env bash
# Every stage once with random weights of full size in nf4, on a CPU: peak memory, tokens, seconds -> outputs/rehearsal/rehearsal.json
# Usage: bash scripts/dress_rehearsal.sh [--folder DIR] [--size full|tiny] [--delete]
# Needs 24 GB of memory, 60 GB of disk; resumes.
source "$(dirname "$0")/common.sh"
"$PYTHON" scripts/rehearsal/rehearse.py "$@"
