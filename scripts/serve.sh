#!/usr/bin/env bash
# Prints the command that serves the model of a stage to `--engine server`; --run starts it
# Usage: bash scripts/serve.sh configs/NAME.yaml image_summary|preference [--program vllm|sglang|transformers] [--run]
#        [--port N] [--data_parallel N]; other options go to the server as they are
# The program must be installed (README, Servers). Clients: bash scripts/02_image_summary.sh ... --engine server
source "$(dirname "$0")/common.sh"
"$PYTHON" -m mllmrec.generation.serve_command --config "$CONFIG" "$@"
