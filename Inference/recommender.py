"""The model of stages 5 and 6: loading it, putting LoRA on its language model, attaching what was trained."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_processing.config import ModelArgs, option
from data_processing.errors import InputError
from data_processing.run_record import digests, first_difference, read_record


@dataclass
class RecommenderArgs(ModelArgs):
    """What training and scoring must agree on."""

    model: str = option("llava-hf/llava-v1.6-mistral-7b-hf", "multimodal chat model, hub id or folder (paper: LLaVA-v1.6-Mistral-7B)")
    max_text_tokens: int = option(512, "of one pair, the picture counted as one token (paper: 512, released code: 1024)")
    image_tiles: Literal["full", "single"] = option(
        "full", "single: LLaVA-NeXT sees the whole picture only, 577 tokens in place of up to 2,900: for 24 GB cards"
    )


def load_recommender(args):
    """(model, Chat) as `args`, a RecommenderArgs, wants them."""
    from Inference.chat import Chat
    from Inference.models import load_multimodal, read_config

    if args.image_tiles == "single" and (kind := read_config(args.model).model_type) != "llava_next":
        raise InputError(f"--image_tiles single is for LLaVA-NeXT; the model {args.model} ({kind}) has no tiles")
    model, processor = load_multimodal(args.model, args.dtype, args.attention, args.quantization)
    if args.image_tiles == "single":
        model.config.image_grid_pinpoints = [[0, 0]]  # no tile at all: what is left is the picture as a whole
    return model, Chat(processor, one_tile=args.image_tiles == "single")


def language_model_linears(model, names=()):
    """(regular expression, list) of the linear layers of the LANGUAGE model, by module path.

    names: last parts of the layers' names to take, e.g. ("q_proj", "v_proj"); empty: all of them. The path is asked of
    the model, because the name of its vision part has changed once already. Raises InputError for unknown names.
    """
    import torch

    from Inference.models import module_path

    decoder = model.get_decoder()
    path = module_path(model, decoder)
    found = [f"{path}.{name}" for name, module in decoder.named_modules() if isinstance(module, torch.nn.Linear)]
    kinds = sorted({name.rsplit(".", 1)[1] for name in found})
    unknown = sorted(set(names) - set(kinds))
    if unknown:
        raise InputError(f"the language model has no linear layers called {unknown[0]!r}; it has {', '.join(kinds)}")
    chosen = [name for name in found if name.rsplit(".", 1)[1] in (names or kinds)]
    pattern = rf"{re.escape(path)}\..*\.({'|'.join(names or kinds)})"
    return pattern, chosen


def add_lora(model, args):
    """`model` with LoRA on the linear layers of its language model and nowhere else; prints what is adapted.

    args: lora_r, lora_alpha, lora_dropout, lora_layers, quantization, gradient_checkpointing.
    """
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    pattern, chosen = language_model_linears(model, args.lora_layers)
    if args.quantization != "none":
        model = prepare_model_for_kbit_training(model, args.gradient_checkpointing, {"use_reentrant": False})
    config = LoraConfig(
        r=args.lora_r, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout, target_modules=pattern, task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(model, config)
    trainable = {name: p.numel() for name, p in adapted.named_parameters() if p.requires_grad}
    strays = [name for name in trainable if not any(f".{layer}." in name for layer in chosen)]
    if strays:
        raise InputError(f"LoRA would also train {strays[0]}, which is no part of the language model; set --lora_layers")
    print(f"LoRA on {len(chosen)} linear layers, {pattern}: {sum(trainable.values()):,} trainable parameters")
    return adapted


def fingerprint(name):
    """dict of what a model's configuration says of its kind and size; a name or a folder may change, this does not."""
    from Inference.models import read_config

    config = read_config(name)
    text = config.get_text_config()
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_key_value_heads")
    return {"model_type": config.model_type, "text_model_type": text.model_type} | {key: getattr(text, key, None) for key in sizes}


def layer_class(model):
    """Name of the class of the language model's layers: how FSDP is told which parts to split."""
    return type(model.get_decoder().layers[0]).__name__


def adapter_base(folder):
    """Name of the model that the LoRA weights of `folder` were trained on. Raises InputError if there are none."""
    from peft import PeftConfig

    if not (Path(folder) / "adapter_config.json").exists():
        raise InputError(f"{folder} is missing or holds no adapter_config.json; scripts/05_train.sh makes it, or pass --adapter none")
    return PeftConfig.from_pretrained(folder).base_model_name_or_path


def check_adapter(folder, name, image_tiles=None):
    """Raises InputError if the LoRA weights of `folder` belong to another base than `name`, or were trained on other tiles.

    Where this repository trained the adapter, compared are the base's kind and size, and the digests of its files where both
    are folders, or the names where both are hub ids; else the bare names.
    """
    base, record = adapter_base(folder), read_record(Path(folder)) or {}
    remedy = "pass the matching --model or --adapter"
    if "base" not in record:
        if base and Path(base).name != Path(name).name:
            raise InputError(f"the adapter {folder} was trained on {base}, not on {name}; {remedy}")
        return
    now = {file.rpartition("/")[2]: digest for file, digest in digests(name).items()}
    then = {file.rpartition("/")[2]: digest for file, digest in record["inputs"].items() if "/" in file}
    shared = now.keys() & then.keys() - {"generation_config.json"}
    difference = first_difference(record["base"], fingerprint(name)) or first_difference(
        {file: then[file] for file in shared}, {file: now[file] for file in shared}
    )
    if not difference and not then and not now and base != name:
        difference = f"the name was {base}, is {name}"
    if difference:
        raise InputError(f"the adapter {folder} was trained on {base}, which is another model than {name} ({difference}); {remedy}")
    tiles = record["settings"].get("image_tiles", image_tiles)
    if image_tiles is not None and tiles != image_tiles:
        raise InputError(f"the adapter {folder} was trained with --image_tiles {tiles}, not {image_tiles}; score with the same")


def attach_adapter(model, folder, name):
    """`model` (of the name `name`) with the LoRA weights of `folder`, in evaluation mode. Raises InputError if they do not fit."""
    from peft import PeftModel

    from Inference.models import one_line

    try:
        return PeftModel.from_pretrained(model, folder).eval()
    except (RuntimeError, ValueError) as error:
        raise InputError(f"the adapter {folder} does not fit the model {name}: {one_line(error)}") from None
