"""Loading models: class, dtype, attention and device, for tiny and for 7B/8B checkpoints."""

import importlib.util
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
)
from transformers.utils import logging as transformers_logging

from mllmrec.models.compat import keep_4bit_layout, processor_without_video
from mllmrec.models.model_options import ModelOptions
from mllmrec.models.parts import modules_outside_language_model
from mllmrec.stage.errors import InputError, machine_fault

# Buffers that models compute themselves; old checkpoints hold them beside the weights.
COMPUTED = re.compile(r"(position_ids|rotary_emb\.inv_freq)$")
REMEDY = "fetch it again or name another --model"
FINITE_PART = 1 << 24  # numbers that are checked at a time
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device() -> torch.device:
    """The accelerator of this process (LOCAL_RANK of several), else the CPU."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """torch dtype for `name`; auto: bfloat16, or float16 on old GPUs; float32 on a CPU."""
    if name != "auto":
        return DTYPES[name]
    if device.type != "cuda":
        return torch.float32
    has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bfloat16 else torch.float16


def pick_attention(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """Attention implementation; auto: FlashAttention 2 if installed and usable here, else SDPA."""
    if name != "auto":
        return name
    has_flash = importlib.util.find_spec("flash_attn") is not None
    usable = has_flash and device.type == "cuda" and dtype != torch.float32
    return "flash_attention_2" if usable else "sdpa"


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


def load_multimodal(name: str, options: ModelOptions | None = None) -> tuple[Any, Any]:
    """(model, processor) of a model that takes images, for evaluation on this device."""
    config, options = read_config(name), options or ModelOptions()
    check_takes_images(name, config)
    model = _load_model(AutoModelForImageTextToText, name, config, options)
    return model, _load_processor(AutoProcessor, name, config, options)


def load_text(name: str, options: ModelOptions | None = None) -> tuple[Any, Any]:
    """(model, tokenizer) of a text model, in evaluation mode on this process's device."""
    config, options = read_config(name), options or ModelOptions()
    if takes_images(config) and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise InputError(
            f"the model {name} ({config.model_type}) takes images; name a text --model such as "
            "meta-llama/Meta-Llama-3-8B-Instruct"
        )
    model = _load_model(AutoModelForCausalLM, name, config, options)
    return model, _load_processor(AutoTokenizer, name, config, options)


def load_processor(name: str, options: ModelOptions, multimodal: bool = False) -> Any:
    """The processor of a multimodal model, or the tokenizer of a text model, without weights.

    multimodal: a model that takes no images is refused.
    """
    config = read_config(name)
    if multimodal:
        check_takes_images(name, config)
    auto_class = AutoProcessor if takes_images(config) else AutoTokenizer
    return _load_processor(auto_class, name, config, options)


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


def quantization_config(
    quantization: str, auto_class: Any, config: Any, dtype: torch.dtype
) -> BitsAndBytesConfig | None:
    """How bitsandbytes stores the language model's linear layers; None: it does not.

    Vision tower, projector and LM head stay as they are. quantization: none; int8 (8 bit); nf4 (4
    bit, as in QLoRA), computed in `dtype`.
    """
    if quantization == "none":
        return None
    with torch.device("meta"):
        model = auto_class.from_config(config)
    outside = modules_outside_language_model(model)
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=outside)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=outside,
    )


def _load_model(auto_class: Any, name: str, config: Any, options: ModelOptions) -> Any:
    device = pick_device()
    dtype = pick_dtype(options.dtype, device)
    transformers_logging.disable_progress_bar()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # its table of keys: `check_keys` refuses instead
    try:
        model, keys = auto_class.from_pretrained(
            name,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            trust_remote_code=False,  # else a folder may ask on the terminal to run its code
            use_safetensors=True,  # other formats can hold code
            dtype=dtype,
            attn_implementation=pick_attention(options.attention, device, dtype),
            device_map={"": device},
            quantization_config=quantization_config(
                options.quantization, auto_class, config, dtype
            ),
        )
    except ImportError as error:
        wanted = f"--quantization {options.quantization} --attention {options.attention}"
        raise InputError(
            f"the model {name} cannot be loaded with {wanted}, a package is missing: "
            f"{one_line(error)}; install it or change these options"
        ) from None
    except Exception as error:  # a wrong number in config.json can fail in any line of the model
        raise cannot(f"the model {name} cannot be loaded", error) from None
    finally:
        transformers_logging.set_verbosity(verbosity)
    keep_4bit_layout(model)
    check_keys(name, keys)
    check_finite(name, model)
    return model.eval()


def check_keys(name: str, keys: Mapping[str, Iterable[Any]]) -> None:
    """Raise InputError unless the checkpoint `name` has exactly the weights of its model.

    keys: what `from_pretrained` returns as loading info; tied weights are in none of its lists.
    transformers would initialise what is missing at random, and only print a table.
    """
    unexpected = [k for k in keys["unexpected_keys"] if not COMPUTED.search(k)]
    found = {
        "missing": sorted(keys["missing_keys"]),
        "unexpected": sorted(unexpected),
        "of another shape": sorted(str(k[0]) for k in keys["mismatched_keys"]),
    }
    if any(found.values()):
        raise InputError(
            f"the checkpoint {name} does not hold the weights of its "
            f"model ({listed(found)}); {REMEDY}"
        )


def listed(keys: Mapping[str, Sequence[str]]) -> str:
    """What is wrong with some keys -> the keys, as half a sentence that names the first three."""
    return ", ".join(
        f"{len(names)} {what}: {' '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
        for what, names in keys.items()
        if names
    )


def check_finite(name: str, model: torch.nn.Module, only: str = "") -> None:
    """Raise InputError if a weight is not finite. only: check parameters whose name holds this."""
    for key, parameter in model.named_parameters():
        is_checked = only in key and parameter.is_floating_point()
        if is_checked and not _all_finite(parameter):
            raise InputError(
                f"the weights {key} of {name} are not all finite numbers: the file is damaged, the "
                "training diverged, or --dtype float16 is too narrow for them; restore it, train "
                "again, or pass --dtype float32"
            )


def _all_finite(parameter: torch.Tensor) -> bool:
    """In parts: `isfinite` makes a copy, and an embedding of 128,256 tokens takes 2 GB."""
    parts = parameter.detach().flatten().split(FINITE_PART)
    return all(bool(torch.isfinite(part).all()) for part in parts)


def _load_processor(auto_class: Any, name: str, config: Any, options: ModelOptions) -> Any:
    try:
        processor = auto_class.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # `tokenizers` raises nothing narrower for a damaged file
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
