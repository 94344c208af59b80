"""LoRA on the language model: which layers, and attaching it."""

import logging
from collections.abc import Container, Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

from mllmrec.models.model_options import LoraOptions
from mllmrec.models.parts import module_path, modules_outside_language_model
from mllmrec.stage.errors import InputError

logger = logging.getLogger(__name__)


def language_model_linear_layers(model: Any, names: Sequence[str] = ()) -> list[str]:
    """Paths of the linear layers of the LANGUAGE model.

    names: last parts of the layers' names, e.g. ("q_proj", "v_proj"); none: all. Raises InputError
    for unknown names.
    """
    decoder = model.get_decoder()
    path = module_path(model, decoder)
    layers = [
        f"{path}.{name}"
        for name, module in decoder.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    kinds = sorted({name.rsplit(".", 1)[1] for name in layers})
    unknown = sorted(set(names) - set(kinds))
    if unknown:
        raise InputError(
            f"the language model has no linear layers called {unknown[0]!r}; it "
            f"has {', '.join(kinds)}"
        )
    return [name for name in layers if name.rsplit(".", 1)[1] in (names or kinds)]


def linear_layers_named(model: Any, names: Container[str]) -> list[str]:
    """Paths of all linear layers whose last part is one of `names`, wherever they are."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] in names
    ]


def excluded_modules(model: Any, names: Container[str]) -> str | None:
    """PEFT's `exclude_modules`: a regular expression for the parts outside the language model that
    have layers of these names, too, as a vision tower does; None if there are none.

    Other programs that load the adapter accept `target_modules` as a list of names only.
    """
    found = linear_layers_named(model, names)
    parts = {
        part.rpartition(".")[2]
        for part in modules_outside_language_model(model)
        if any(f"{name}.".startswith(f"{part}.") for name in found)
    }
    return rf"(.*\.)?({'|'.join(sorted(parts))})(\..*)?" if parts else None


def add_lora(model: Any, options: LoraOptions) -> Any:
    """`model` with LoRA on the linear layers of its language model and nowhere else.

    With `lora_vision` also on linear layers of the same names elsewhere, as the released code has
    it: its list of names is meant for the language model, and matches the vision tower, too.
    """
    chosen = language_model_linear_layers(model, options.lora_layers)
    names = sorted({name.rsplit(".", 1)[1] for name in chosen})
    if options.lora_vision:
        chosen, excluded = linear_layers_named(model, names), None
    else:
        excluded = excluded_modules(model, names)
    if options.quantization != "none":
        model = prepare_model_for_kbit_training(
            model, options.gradient_checkpointing, {"use_reentrant": False}
        )
    config = LoraConfig(
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=names,
        exclude_modules=excluded,
        task_type="CAUSAL_LM",
        init_lora_weights="gaussian" if options.lora_init == "gaussian" else True,
    )
    adapted = get_peft_model(model, config)
    trainable = {name: p.numel() for name, p in adapted.named_parameters() if p.requires_grad}
    outside = [name for name in trainable if not any(f".{layer}." in name for layer in chosen)]
    if outside:
        raise InputError(
            f"LoRA would also train {outside[0]}, which is not part of the language "
            "model; set --lora_layers"
        )
    logger.info(
        f"LoRA on {len(chosen)} linear layers, {', '.join(names)}: "
        f"{sum(trainable.values()):,} trainable parameters"
    )
    return adapted


def decoder_layer_class(model: Any) -> str:
    """Name of the class of the language model's layers: what FSDP is to wrap."""
    return type(model.get_decoder().layers[0]).__name__
