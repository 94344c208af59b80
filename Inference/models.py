"""Loading the models: which class, number format, attention and device; the same for tiny and for 7B/8B checkpoints."""

import importlib.util
import os
import re
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from transformers.utils import logging

from data_processing.errors import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device():
    """The accelerator of this process (LOCAL_RANK of several), else the CPU."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def pick_dtype(name, device):
    """torch dtype for `name`: auto is bfloat16 where the accelerator computes in it, else float16, and float32 on a CPU."""
    if name != "auto":
        return DTYPES[name]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def pick_attention(name, device, dtype):
    """Attention implementation: auto is FlashAttention 2 where it is installed and the device can, else SDPA."""
    if name != "auto":
        return name
    has_flash = importlib.util.find_spec("flash_attn") is not None
    return "flash_attention_2" if has_flash and device.type == "cuda" and dtype != torch.float32 else "sdpa"


def read_config(name):
    """The model's configuration. Raises InputError if `name` is neither a model folder nor a hub id that can be fetched."""
    path = Path(name)
    if not path.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") != 1 or path.parent.is_dir()):
        raise InputError(f"the model folder {name} is missing; put the model there or name another --model (a folder or a hub id)")
    if path.is_dir() and not (path / "config.json").exists():
        raise InputError(f"{name} holds no config.json, so it is no model folder; name another --model")
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InputError(f"the model {name} cannot be read: {_first_sentence(error)}") from None


def load_multimodal(name, dtype="auto", attention="auto"):
    """(model, processor) of a chat model that takes pictures, in evaluation mode on this process's device."""
    config = read_config(name)
    if not hasattr(config, "vision_config"):
        raise InputError(
            f"the model {name} ({config.model_type}) takes no pictures; name a multimodal --model such as llava-hf/llava-v1.6-mistral-7b-hf"
        )
    return _load(AutoModelForImageTextToText, name, dtype, attention), _load_processor(AutoProcessor, name)


def load_text(name, dtype="auto", attention="auto"):
    """(model, tokenizer) of a chat model for text, in evaluation mode on this process's device."""
    read_config(name)
    return _load(AutoModelForCausalLM, name, dtype, attention), _load_processor(AutoTokenizer, name)


def _load(auto_class, name, dtype, attention):
    device = pick_device()
    dtype = pick_dtype(dtype, device)
    logging.disable_progress_bar()
    try:
        model = auto_class.from_pretrained(
            name, dtype=dtype, attn_implementation=pick_attention(attention, device, dtype), device_map={"": device}
        )
    except (OSError, ValueError) as error:
        raise InputError(f"the model {name} cannot be loaded: {_first_sentence(error)}") from None
    return model.eval()


def _load_processor(auto_class, name):
    try:
        processor = auto_class.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InputError(f"{name} has no usable tokenizer or processor: {_first_sentence(error)}") from None
    tokenizer = getattr(processor, "tokenizer", processor)
    if tokenizer.pad_token is None:  # Llama-3 ships without one; padding is masked, so any token does
        tokenizer.pad_token = tokenizer.eos_token
    if not (getattr(processor, "chat_template", None) or tokenizer.chat_template):
        raise InputError(f"{name} has no chat template, so it is no chat model; name an instruction-tuned --model")
    return processor


def _first_sentence(error):
    return " ".join(str(error).split())[:300]


def language_model_linears(model, names=()):
    """(regular expression, list) of the linear layers of the LANGUAGE model, by module path.

    names: last parts of the layers' names to take, e.g. ("q_proj", "v_proj"); empty: all of them. The path is asked of
    the model, because the name of its vision part has changed once already. Raises InputError for unknown names.
    """
    decoder = model.get_decoder()
    path = next(name for name, module in model.named_modules() if module is decoder)
    found = [f"{path}.{name}" for name, module in decoder.named_modules() if isinstance(module, torch.nn.Linear)]
    kinds = sorted({name.rsplit(".", 1)[1] for name in found})
    unknown = sorted(set(names) - set(kinds))
    if unknown:
        raise InputError(f"the language model has no linear layers called {unknown[0]!r}; it has {', '.join(kinds)}")
    chosen = [name for name in found if name.rsplit(".", 1)[1] in (names or kinds)]
    pattern = rf"{re.escape(path)}\..*\.({'|'.join(names or kinds)})"
    return pattern, chosen


def attach_adapter(model, folder, name):
    """`model` with the LoRA weights of `folder`, in evaluation mode. Raises InputError if they belong to another base."""
    from peft import PeftConfig, PeftModel

    base = PeftConfig.from_pretrained(folder).base_model_name_or_path
    if base and Path(base).name != Path(name).name:
        raise InputError(f"the adapter {folder} was trained on {base}, not on {name}; pass the matching --model or --adapter")
    try:
        return PeftModel.from_pretrained(model, folder).eval()
    except (RuntimeError, ValueError) as error:
        raise InputError(f"the adapter {folder} does not fit the model {name}: {_first_sentence(error)}") from None
