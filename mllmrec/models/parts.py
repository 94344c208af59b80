"""Which modules of a model are its language model, and which are not."""

from typing import Any

import torch


def modules_outside_language_model(model: Any) -> list[str]:
    """Paths of the modules that neither are the language model nor contain it, the outermost ones.

    For LLaVA-NeXT: vision tower, projector, LM head.
    """
    path = module_path(model, model.get_decoder())
    outside = [
        name
        for name, _ in model.named_modules()
        if name and not f"{path}.".startswith(f"{name}.") and not name.startswith(f"{path}.")
    ]
    return [name for name in outside if name.rpartition(".")[0] not in outside]


def module_path(model: torch.nn.Module, wanted: torch.nn.Module) -> str:
    """Name of a module inside a model."""
    return next(name for name, module in model.named_modules() if module is wanted)
