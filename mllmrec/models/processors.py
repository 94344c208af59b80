"""Configurations, tokenizers and processors of models, without their weights.

Imports no torch by itself: a stage whose model is on a server needs none for texts.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoProcessor, AutoTokenizer
from transformers.utils import logging as transformers_logging

from mllmrec.models.model_options import ModelOptions
from mllmrec.stage.errors import InputError, machine_fault

REMEDY = "fetch it again or name another --model"


def read_config(name: str) -> Any:
    """The model's configuration.

    Raises InputError if `name` is neither a model folder nor a hub id that can be fetched.
    """
    if not name.strip():
        raise InputError("--model is empty; name a folder or a hub id")
    path = Path(name)
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") != 1
    if not path.is_dir() and (looks_like_path or path.parent.is_dir()):
        raise InputError(
            f"the model folder {name} is missing; put the model there or name another --model (a "
            "folder or a hub id)"
        )
    if path.is_dir() and not (path / "config.json").exists():
        raise InputError(
            f"{name} has no config.json, so it is no model folder; name another --model"
        )
    raw = _check_json_files(path) if path.is_dir() else {}
    if "vision_config" in raw and not (raw.get("text_config") or "hidden_size" in raw):
        raise InputError(  # transformers would make a language model of 7 billion parameters
            f"{path / 'config.json'} has no text_config, so the model's size is unknown; {REMEDY}"
        )
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # each model's class has checks of its own, and errors of their own
        raise cannot(f"the model {name} cannot be read", error) from None


def _check_json_files(folder: Path) -> dict[str, Any]:
    """The contents of a model folder's config.json.

    Raises InputError if it, or a file that is used if it is there, is no JSON object: transformers
    passes over a damaged generation_config.json, which holds the end tokens.
    """
    contents = {}
    for file in sorted(folder.glob("*config.json")):
        try:
            contents[file.name] = json.loads(file.read_bytes())
        except (ValueError, RecursionError) as error:
            raise InputError(f"{file} is no JSON file ({one_line(error)}); {REMEDY}") from None
        if not isinstance(contents[file.name], dict):
            raise InputError(f"{file} must hold one JSON object; {REMEDY}")
    return contents["config.json"]


def cannot(what: str, error: Exception, remedy: str = REMEDY) -> Exception:
    """The error to raise for a library's error: InputError, or itself if the machine is at fault.

    what: what cannot be done with which file.
    """
    if not isinstance(error, OSError) and machine_fault(error) is not None:
        return error
    return InputError(f"{what}: {one_line(error)}; {remedy}")


def load_processor(name: str, options: ModelOptions, multimodal: bool = False) -> Any:
    """The processor of a multimodal model, or the tokenizer of a text model, without weights.

    multimodal: a model that takes no images is refused.
    """
    config = read_config(name)
    if multimodal:
        check_takes_images(name, config)
    auto_class = AutoProcessor if takes_images(config) else AutoTokenizer
    return checked_processor(auto_class, name, config, options)


def check_takes_images(name: str, config: Any) -> None:
    """Raises InputError for a text model."""
    if not takes_images(config):
        raise InputError(
            f"the model {name} ({config.model_type}) takes no images; name a multimodal --model "
            "such as llava-hf/llava-v1.6-mistral-7b-hf"
        )


def takes_images(config: Any) -> bool:
    """True for the configuration of a multimodal model."""
    return hasattr(config, "vision_config")


def checked_processor(auto_class: Any, name: str, config: Any, options: ModelOptions) -> Any:
    """The processor of a model that is loaded; raises InputError where a part of it is missing."""
    try:
        processor = auto_class.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # `tokenizers` raises nothing narrower for a damaged file
        from mllmrec.models.compat import processor_without_video

        try:  # processors with a video part need torchvision for it alone; no stage has video input
            processor = processor_without_video(config.model_type).from_pretrained(name)
        except Exception:
            raise cannot(f"{name} has no usable tokenizer or processor", error) from None
    tokenizer = getattr(processor, "tokenizer", processor)
    if tokenizer.eos_token is None:
        raise InputError(
            f"the tokenizer of {name} names no end token, as one without its "
            f"tokenizer_config.json does; {REMEDY}"
        )
    _append_nothing(tokenizer)
    if tokenizer.pad_token is None:  # Llama-3 has none; padding is masked, so any token will do
        tokenizer.pad_token = tokenizer.eos_token
    has_template = getattr(processor, "chat_template", None) or tokenizer.chat_template
    if not has_template and not options.prompt_format:
        raise InputError(
            f"{name} has no chat template; name an instruction-tuned --model, or "
            "give a --prompt_format"
        )
    return processor


def _append_nothing(tokenizer: Any) -> None:
    """Have the tokenizer put nothing behind a text, as one with `add_eos_token` does.

    An answer follows on the last token of the chat template. What stands before a text is kept.
    """
    ids, whole = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
    if whole[-len(ids) :] == ids:
        return
    before = whole[: whole.index(ids[0])]
    names = tokenizer.convert_ids_to_tokens(before)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=[*names, "$A"], special_tokens=list(zip(names, before, strict=True))
    )


@contextmanager
def without_key_table() -> Iterator[None]:
    """Within: transformers prints no table of weights that do not fit; the caller refuses them."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def one_line(error: BaseException) -> str:
    """The message of a library's error as one line of at most 300 characters."""
    return " ".join(str(error).split())[:300]


def max_prompt_tokens(config: Any, max_new_tokens: int) -> int:
    """How many tokens a prompt may have beside an answer of `max_new_tokens`.

    Raises InputError if there is no room for a prompt.
    """
    longest = config.get_text_config().max_position_embeddings
    if max_new_tokens >= longest:
        raise InputError(
            f"--max_new_tokens {max_new_tokens} leaves no room for a prompt: the model takes "
            f"{longest} tokens in all; lower it"
        )
    return longest - max_new_tokens
