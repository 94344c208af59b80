"""Loading models: class, dtype, attention and device, for tiny and for 7B/8B checkpoints."""

import importlib.util
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
)
from transformers.utils import logging as transformers_logging

from mllmrec.models.compat import keep_4bit_layout
from mllmrec.models.model_options import ModelOptions
from mllmrec.models.parts import modules_outside_language_model
from mllmrec.models.processors import (
    REMEDY,
    cannot,
    check_takes_images,
    checked_processor,
    one_line,
    read_config,
    takes_images,
    without_key_table,
)
from mllmrec.stage.errors import InputError

# Buffers that models compute themselves; old checkpoints hold them beside the weights.
COMPUTED = re.compile(r"(position_ids|rotary_emb\.inv_freq)$")
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


def load_multimodal(name: str, options: ModelOptions | None = None) -> tuple[Any, Any]:
    """(model, processor) of a model that takes images, for evaluation on this device."""
    config, options = read_config(name), options or ModelOptions()
    check_takes_images(name, config)
    model = _load_model(AutoModelForImageTextToText, name, config, options)
    return model, checked_processor(AutoProcessor, name, config, options)


def load_text(name: str, options: ModelOptions | None = None) -> tuple[Any, Any]:
    """(model, tokenizer) of a text model, in evaluation mode on this process's device."""
    config, options = read_config(name), options or ModelOptions()
    if takes_images(config) and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise InputError(
            f"the model {name} ({config.model_type}) takes images; name a text --model such as "
            "meta-llama/Meta-Llama-3-8B-Instruct"
        )
    model = _load_model(AutoModelForCausalLM, name, config, options)
    return model, checked_processor(AutoTokenizer, name, config, options)


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
    try:
        with without_key_table():  # `check_keys` refuses instead
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
