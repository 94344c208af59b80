#!/usr/bin/env bash
# The pages of docs/ as a site: checks all links, builds outputs/site, and shows it on http://localhost:8000.
# Usage: bash scripts/docs.sh [build]     build: without showing it
source "$(dirname "$0")/setup_env.sh"
"$PYTHON" -m pip install --quiet --disable-pip-version-check -e ".[docs]"
"$PYTHON" -m zensical build --clean --strict --config-file mkdocs.yml
[[ ${1:-} == build ]] || "$PYTHON" -m zensical serve --config-file mkdocs.yml
