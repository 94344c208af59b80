#!/usr/bin/env bash
# Every stage once with random weights of full size in nf4, on a CPU: peak memory and seconds -> outputs/rehearsal/rehearsal.json
# Usage: bash scripts/dress_rehearsal.sh [--folder DIR] [--size full|tiny] [--delete]
# Needs 24 GB of memory, 60 GB of disk; resumes.
source "$(dirname "$0")/common.sh"
# On a CPU glibc then gives every tensor of a megabyte or more back at once, so the peaks are what the stages need.
export MALLOC_MMAP_THRESHOLD_=1048576 MALLOC_TRIM_THRESHOLD_=1048576
"$PYTHON" scripts/rehearsal/rehearse.py "$@"
