"""The command that serves the model of a stage to `--engine server`; see scripts/serve.sh.

Prompts of stage 3 share their beginnings and all of a user's blocks, so prefix caching matters;
sampling defaults of a checkpoint must not mix with the config's, so they are switched off.
"""

from mllmrec.stage.main import run_main

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mllmrec.stage.errors import InputError
from mllmrec.stage.options import load_config

PROGRAMS = ("vllm", "sglang", "transformers")
IMAGE_SECTIONS = ("image_summary",)
SECTIONS = (*IMAGE_SECTIONS, "preference")
# LLaVA-NeXT: up to 2,928 tokens of an image (five tiles and their row ends), and the question.
IMAGE_PROMPT_TOKENS = 3072
PYTHON = "python"


def program_path(name: str) -> str:
    """A program of the environment that this Python belongs to, else as the shell finds it."""
    beside = Path(sys.executable).with_name(name)
    return sys.executable if name == PYTHON else str(beside) if beside.exists() else name


def longest(section: str, options: dict[str, Any]) -> int:
    """Tokens of the longest prompt with its text; 0: as many as the model takes."""
    room = int(options.get("max_prompt_tokens", 0))
    if section in IMAGE_SECTIONS:
        room = IMAGE_PROMPT_TOKENS
    return room + int(options.get("max_new_tokens", 1024)) if room else 0


def serve_command(
    program: str, section: str, config: dict[str, Any], port: int = 8000, data_parallel: int = 1
) -> list[str]:
    """The words of the command that serves the model of a config's section.

    program: one of PROGRAMS; section: one of SECTIONS; data_parallel: copies of the model, one GPU
    each. Raises InputError if the config names no model for the section, or a number is out of
    range.
    """
    if not 1 <= port <= 65535:
        raise InputError(f"--port {port} is no port; name one from 1 to 65535")
    if data_parallel < 1:
        raise InputError(f"--data_parallel {data_parallel} is no number of copies; name at least 1")
    options = config.get(section) or {}
    if "model" not in options:
        raise InputError(f"the config names no model in its section {section}")
    model, length = str(options["model"]), longest(section, options)
    if program == "transformers":
        if data_parallel > 1:
            raise InputError(
                "transformers serve has no data parallelism; start one on each GPU with another "
                "--port, and name all of them with --base_url"
            )
        words = ["transformers", "serve", model, "--port", str(port), "--dtype", "bfloat16"]
        # Continuous batching takes text models only; all texts are generated as the first request
        # says, which samples only where the checkpoint's generation config does.
        is_greedy = not float(options.get("temperature", 0.0))
        batches = section not in IMAGE_SECTIONS and is_greedy
        return words + (["--continuous-batching"] if batches else [])
    if program == "sglang":
        words = [PYTHON, "-m", "sglang.launch_server", "--model-path", model]
        words += ["--port", str(port), "--dtype", "bfloat16", "--sampling-defaults", "openai"]
        words += ["--context-length", str(length)] if length else []
        return words + (["--dp-size", str(data_parallel)] if data_parallel > 1 else [])
    words = ["vllm", "serve", model, "--port", str(port), "--dtype", "bfloat16"]
    words += ["--generation-config", "vllm", "--enable-prefix-caching"]
    words += ["--max-model-len", str(length)] if length else []
    if section in IMAGE_SECTIONS:
        words += ["--limit-mm-per-prompt", json.dumps({"image": 1})]
    return words + (["--data-parallel-size", str(data_parallel)] if data_parallel > 1 else [])


def main(argv: Sequence[str] | None = None) -> None:
    """Print the command; with --run become it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=SECTIONS, help="section of the config with the model")
    parser.add_argument("--config", required=True)
    parser.add_argument("--program", choices=PROGRAMS, default="vllm")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--data_parallel", type=int, default=1, help="copies, one GPU each")
    parser.add_argument("--run", action="store_true", help="start it instead of printing it")
    # What else is given goes to the server as it is.
    args, more = parser.parse_known_args(argv)
    config = load_config(Path(args.config))
    words = serve_command(args.program, args.stage, config, args.port, args.data_parallel) + more
    print(shlex.join(words), flush=True)
    if args.run:
        try:
            os.execvp(program_path(words[0]), words)
        except FileNotFoundError:
            raise InputError(f"{words[0]} is not installed in this environment") from None


if __name__ == "__main__":
    run_main(main)
