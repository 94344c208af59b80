"""How much memory a model takes in bfloat16, by arithmetic over its configuration."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from mllmrec.models.parts import module_path
from mllmrec.models.processors import takes_images

# Bytes of a weight with its scales: bitsandbytes' int8 (one float32 for each row is next to
# nothing), and nf4 with double quantisation (blocks of 64, one byte each, and of 256).
WEIGHT_BYTES = {"none": 2, "int8": 1.0, "nf4": 0.5 + 1 / 64 + 4 / (64 * 256)}
ADAM = 16  # bytes of a trained parameter: float32 weight, gradient and two moments


@dataclass(frozen=True)
class ModelSize:
    """A model in numbers.

    parameters: of the whole model; linear: of these in the language model's linear layers, which
    are quantised; lora: of LoRA of rank 1 on these layers; layers, hidden: of the language model;
    layer: numbers that one layer holds of a token; kv: of its keys and values in all layers.
    """

    parameters: int
    linear: int
    lora: int
    layers: int
    hidden: int
    layer: int
    kv: int

    def weights(self, quantization: str = "none", training: bool = False) -> float:
        """Bytes. training: PEFT then keeps what is not quantised in float32."""
        rest = self.parameters - self.linear
        itemsize = 4 if training and quantization != "none" else 2
        return rest * itemsize + self.linear * WEIGHT_BYTES[quantization]

    def inference(self, computed: int, cached: int) -> int:
        """Bytes beside the weights: a pass over some tokens, keys and values of some tokens.

        As many as one layer holds at a time, an upper bound.
        """
        return 2 * (self.layer * computed + self.kv * cached)

    def training(self, tokens: int, rank: int, checkpointing: bool) -> int:
        """Bytes beside the weights for a micro-batch of so many tokens.

        Every layer's input is kept with checkpointing, else its states, and one layer's gradients.
        """
        kept = self.layers * (self.hidden if checkpointing else self.layer)
        return ADAM * rank * self.lora + 2 * tokens * (kept + 2 * self.layer)


def model_size(config: Any) -> ModelSize:
    """The numbers of a model, from its configuration; no weights are made."""
    auto_class = AutoModelForImageTextToText if takes_images(config) else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto_class.from_config(config)
    inside = f"{module_path(model, model.get_decoder())}."
    modules = [module for name, module in model.named_modules() if name.startswith(inside)]
    linear = [module for module in modules if isinstance(module, torch.nn.Linear)]
    text = config.get_text_config()
    heads, kv_heads, head_size = attention_shape(config)
    intermediate = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    return ModelSize(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        linear=sum(module.weight.numel() for module in linear),
        lora=sum(module.in_features + module.out_features for module in linear),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        # Hidden states, projections of attention; the MLP's gate, its activation, their product.
        layer=3 * text.hidden_size + 2 * (heads + kv_heads) * head_size + 3 * intermediate,
        kv=kv_numbers_per_token(config),
    )


def attention_shape(config: Any) -> tuple[int, int, int]:
    """(heads, key-value heads, size of a head) of a model's language model.

    A config without `num_key_value_heads` (GPT-2, OPT, BLOOM) has one per attention head.
    """
    text = config.get_text_config()
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    return heads, kv_heads, getattr(text, "head_dim", None) or text.hidden_size // heads


def kv_numbers_per_token(config: Any) -> int:
    """How many numbers the keys and values of one token are, in all layers."""
    _, kv_heads, head_size = attention_shape(config)
    return 2 * config.get_text_config().num_hidden_layers * kv_heads * head_size
