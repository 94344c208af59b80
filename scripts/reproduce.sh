#!/usr/bin/env bash
# One table of configs/tables/ -> outputs/reproduce/CONFIG/TABLE.md, .csv, .json, .png
# Usage: bash scripts/reproduce.sh TABLE CONFIG [--seeds 42 43 44] [--folds 5] [--rows KEY ...] [--jobs N]
#        bash scripts/reproduce.sh table2 CONFIG ...       the statistics of the data of several configs
# Resumes; rows that several tables share are run once. The list of tables: python scripts/reproduce/run_table.py --help
source "$(dirname "$0")/common.sh"
table=$CONFIG # the first argument
"$PYTHON" scripts/reproduce/run_table.py "$table" "$@"
