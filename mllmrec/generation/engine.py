"""The engine that runs a stage's dialogues: a model in this process, or one on a server.

Imports torch only for the first.
"""

import logging
import os
import sys
from typing import TYPE_CHECKING, Any

from mllmrec.models.chat import ChatProcessor
from mllmrec.models.model_options import DEFAULT_URL, GenerationStageOptions
from mllmrec.stage.errors import InputError

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

    from mllmrec.generation.local_engine import GenerationEngine
    from mllmrec.generation.server import ServerEngine

logger = logging.getLogger(__name__)


def load_engine(
    name: str, options: GenerationStageOptions, multimodal: bool
) -> tuple["GenerationEngine | ServerEngine", int]:
    """(engine, how many tokens a prompt may have) for the model `name`.

    On a server the model's weights are not loaded here, only its config and processor.
    """
    if options.engine == "server":
        return _server_engine(name, options, multimodal)
    from mllmrec.generation.local_engine import GenerationEngine
    from mllmrec.models.loading import load_multimodal, load_text
    from mllmrec.models.processors import max_prompt_tokens
    from mllmrec.models.trial import check_end_tokens, check_trial

    if options.base_url != DEFAULT_URL:
        raise InputError("--base_url names a server, but --engine is local; pass --engine server")
    model, processor = (load_multimodal if multimodal else load_text)(name, options)
    limit = max_prompt_tokens(model.config, options.max_new_tokens)
    chat = ChatProcessor(processor, prompt_format=options.prompt_format)
    check_trial(name, model, chat)
    check_end_tokens(name, model)
    return GenerationEngine(model, chat, options), limit


def _server_engine(
    name: str, options: GenerationStageOptions, multimodal: bool
) -> tuple["ServerEngine", int]:
    if options.prompt_format:
        raise InputError(
            "--prompt_format: a server renders prompts with its own chat template; start it with "
            "one, or use --engine local"
        )
    try:
        from mllmrec.generation.server import ServerEngine
    except ImportError as error:
        raise InputError(f"--engine server: {error}; pip install 'mllmrec[server]'") from None
    for option, default in (("dtype", "auto"), ("attention", "auto"), ("quantization", "none")):
        if getattr(options, option) != default:
            logger.warning(
                "--%s %s has no effect: the server decides", option, getattr(options, option)
            )
    if not multimodal:  # image processors are torch's
        _hide_torch()
    chat, limit = load_chat(name, options, multimodal)
    return ServerEngine(name, chat, options), limit


def _hide_torch() -> None:
    """Keep transformers from importing torch, which a client of a server needs for nothing.

    None in `sys.modules` is how Python notes that a module cannot be imported; a torch that is
    imported already stays.
    """
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # "PyTorch was not found"


def load_chat(
    name: str, options: GenerationStageOptions, multimodal: bool = False
) -> tuple[ChatProcessor, int]:
    """(ChatProcessor, how many tokens a prompt may have) for the model `name`, without weights."""
    from mllmrec.models.processors import load_processor, max_prompt_tokens, read_config

    processor = load_processor(name, options, multimodal)
    limit = max_prompt_tokens(read_config(name), options.max_new_tokens)
    return ChatProcessor(processor, prompt_format=options.prompt_format), limit


def read_ahead(dataset: Any, workers: int, is_remote: bool = False) -> "DataLoader[Any]":
    """Iterate over a dataset that `workers` processes read ahead of the model.

    workers: -1 = up to 8 of this process's cores if a GPU or a server computes, none if the model
    itself computes on the CPU. is_remote: the model is on a server.
    """
    import torch

    if workers < 0:
        cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        workers = min(8, cores) if is_remote or torch.cuda.is_available() else 0
    return torch.utils.data.DataLoader(
        dataset,
        batch_size=None,
        collate_fn=_unchanged,
        num_workers=workers,
        worker_init_fn=_disable_tokenizer_threads,
    )


def _unchanged(row: Any) -> Any:
    return row


def _disable_tokenizer_threads(_: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # else every worker warns that it was forked
