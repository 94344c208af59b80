"""How much memory a model takes, by arithmetic over its configuration.

All sizes are in bytes. Weights and keys and values follow from the configuration exactly; what a
forward pass holds besides is an upper bound for one layer at a time, which is how inference and
gradient checkpointing run. Held against measured peaks in tests/test_estimate.py.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from mllmrec.models.loading import module_path, takes_images

# Bytes of a quantised weight with its scales: bitsandbytes' int8 (one float32 for each row is
# next to nothing), and nf4 with double quantisation (blocks of 64, one byte each, and of 256).
QUANTIZED = {"int8": 1.0, "nf4": 0.5 + 1 / 64 + 4 / (64 * 256)}
ADAM = 16  # bytes of a trained parameter: float32 weight, gradient and two moments


@dataclass(frozen=True)
class ModelSize:
    """A model in numbers.

    parameters: of the whole model; linear: of these in the language model's linear layers, which
    quantization and LoRA are about; widths: inputs and outputs of the linear layers of one layer,
    all together, what LoRA of rank 1 adds to it; projections: width of its queries, keys, values
    and attention outputs; kv_numbers: keys and values of one token in all layers.
    """

    parameters: int
    linear: int
    widths: int
    layers: int
    hidden: int
    intermediate: int
    projections: int
    kv_numbers: int
    vocabulary: int

    def weights(
        self, quantization: str = "none", itemsize: int = 2, training: bool = False
    ) -> float:
        """The weights. itemsize: bytes of a number, e.g. 2 for bfloat16.

        training: PEFT then keeps what is not quantised in float32.
        """
        if quantization == "none":
            return self.parameters * itemsize
        rest = (self.parameters - self.linear) * (4 if training else itemsize)
        return rest + self.linear * QUANTIZED[quantization]

    def read_per_step(self, quantization: str = "none", itemsize: int = 2) -> float:
        """The weights that a step of decoding reads: linear layers and LM head."""
        return self.linear * QUANTIZED.get(quantization, itemsize) + self.head * itemsize

    def kv(self, tokens: int, itemsize: int = 2) -> float:
        """Keys and values of so many tokens."""
        return self.kv_numbers * itemsize * tokens

    def pass_through(self, tokens: int, itemsize: int = 2) -> float:
        """What one layer holds of a pass over so many tokens.

        Three hidden states, the projections of attention, and the gate of the MLP, its
        activation and their product.
        """
        numbers = 3 * self.hidden + self.projections + 3 * self.intermediate
        return numbers * itemsize * tokens

    def logits(self, positions: int) -> float:
        """Logits at so many positions, in float32, with the probabilities made of them."""
        return 2 * 4 * self.vocabulary * positions

    @property
    def head(self) -> int:
        """Weights of the LM head."""
        return self.vocabulary * self.hidden

    def adapter(self, rank: int) -> int:
        """Parameters of LoRA of this rank on all linear layers of the language model."""
        return rank * self.widths * self.layers

    def training(self, tokens: int, rank: int, checkpointing: bool, itemsize: int = 2) -> float:
        """What training adds to the weights for a micro-batch of so many tokens.

        With gradient checkpointing every layer's input is kept, and one layer is computed again
        with its gradients; without it all layers' states are kept.
        """
        kept: float = self.layers * self.hidden * itemsize * tokens
        states = 2 * self.pass_through(tokens, itemsize)
        if not checkpointing:
            kept = self.layers * self.pass_through(tokens, itemsize)
        return ADAM * self.adapter(rank) + kept + states


def model_size(config: Any) -> ModelSize:
    """The numbers of a model, from its configuration; no weights are made."""
    auto_class = AutoModelForImageTextToText if takes_images(config) else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto_class.from_config(config)
    decoder = model.get_decoder()
    inside = f"{module_path(model, decoder)}."
    linear = [
        module
        for name, module in model.named_modules()
        if name.startswith(inside) and isinstance(module, torch.nn.Linear)
    ]
    text = config.get_text_config()
    heads, kv_heads, head_size = attention_shape(config)
    return ModelSize(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        linear=sum(module.weight.numel() for module in linear),
        widths=sum(m.in_features + m.out_features for m in linear) // text.num_hidden_layers,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=getattr(text, "intermediate_size", 4 * text.hidden_size),
        projections=2 * (heads + kv_heads) * head_size,
        kv_numbers=kv_numbers_per_token(config),
        vocabulary=text.vocab_size,
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
