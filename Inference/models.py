"""Loading the models: which class, number format, attention and device; the same for tiny and for 7B/8B checkpoints."""

import importlib.util
import os
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, BitsAndBytesConfig
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES, processor_class_from_name
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
        raise InputError(f"the model {name} cannot be read: {one_line(error)}") from None


def load_multimodal(name, dtype="auto", attention="auto", quantization="none"):
    """(model, processor) of a chat model that takes pictures, in evaluation mode on this process's device."""
    config = read_config(name)
    if not hasattr(config, "vision_config"):
        raise InputError(
            f"the model {name} ({config.model_type}) takes no pictures; name a multimodal --model such as llava-hf/llava-v1.6-mistral-7b-hf"
        )
    return _load(AutoModelForImageTextToText, name, config, dtype, attention, quantization), _load_processor(AutoProcessor, name, config)


def load_text(name, dtype="auto", attention="auto", quantization="none"):
    """(model, tokenizer) of a chat model for text, in evaluation mode on this process's device."""
    config = read_config(name)
    return _load(AutoModelForCausalLM, name, config, dtype, attention, quantization), _load_processor(AutoTokenizer, name, config)


def quantization_config(quantization, auto_class, config, dtype):
    """How bitsandbytes stores the language model's linear layers, or None; the rest (eyes, projector, answers) stays as it is.

    quantization: none; int8 (8 bit); nf4 (4 bit, as in QLoRA), computed in `dtype`.
    """
    if quantization == "none":
        return None
    with torch.device("meta"):
        model = auto_class.from_config(config)
    path = module_path(model, model.get_decoder())
    # Parts that neither are the language model nor hold it; a part of one that is listed need not be listed.
    outside = [n for n, _ in model.named_modules() if n and not f"{path}.".startswith(f"{n}.") and not n.startswith(f"{path}.")]
    outside = [name for name in outside if name.rpartition(".")[0] not in outside]
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=outside)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=outside,
    )  # fmt: skip


def _load(auto_class, name, config, dtype, attention, quantization):
    device = pick_device()
    dtype = pick_dtype(dtype, device)
    logging.disable_progress_bar()
    try:
        model = auto_class.from_pretrained(
            name, dtype=dtype, attn_implementation=pick_attention(attention, device, dtype), device_map={"": device},
            quantization_config=quantization_config(quantization, auto_class, config, dtype),
        )  # fmt: skip
    except (OSError, ValueError) as error:
        raise InputError(f"the model {name} cannot be loaded: {one_line(error)}") from None
    except ImportError as error:
        wants = f"--quantization {quantization} --attention {attention}"
        raise InputError(f"the model {name} cannot be loaded with {wants}, a package is missing: {one_line(error)}") from None
    return model.eval()


def _load_processor(auto_class, name, config):
    problems = []
    # Processors that also take films want torchvision for that alone; no stage shows a film.
    for load in (auto_class.from_pretrained, lambda name: without_films(config.model_type).from_pretrained(name)):
        try:
            processor = load(name)
            break
        except (ImportError, KeyError, OSError, ValueError) as error:
            problems.append(error)
    else:
        raise InputError(f"{name} has no usable tokenizer or processor: {one_line(problems[0])}")
    tokenizer = getattr(processor, "tokenizer", processor)
    if tokenizer.pad_token is None:  # Llama-3 ships without one; padding is masked, so any token does
        tokenizer.pad_token = tokenizer.eos_token
    if not (getattr(processor, "chat_template", None) or tokenizer.chat_template):
        raise InputError(f"{name} has no chat template, so it is no chat model; name an instruction-tuned --model")
    return processor


def without_films(model_type):
    """The processor class of a kind of model, less its video part."""
    processor_class = processor_class_from_name(PROCESSOR_MAPPING_NAMES[model_type])
    return type(
        processor_class.__name__, (processor_class,),
        {"get_attributes": classmethod(lambda cls: ["image_processor", "tokenizer"]), "__module__": processor_class.__module__},
    )  # fmt: skip


def module_path(model, wanted):
    """Name of a module inside a model."""
    return next(name for name, module in model.named_modules() if module is wanted)


def one_line(error):
    """What went wrong inside a library, as one line of 300 characters at most."""
    return " ".join(str(error).split())[:300]


def room_for_prompts(model, max_new_tokens):
    """How many tokens a prompt may have beside an answer of `max_new_tokens`. Raises InputError if there is no room."""
    longest = model.config.get_text_config().max_position_embeddings
    if max_new_tokens >= longest:
        raise InputError(f"--max_new_tokens {max_new_tokens} leaves no room for a prompt: the model takes {longest} tokens in all")
    return longest - max_new_tokens
