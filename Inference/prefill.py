"""Reading prompts in small portions and writing their answers all together.

`generate` reads all prompts of a batch in one pass. Reading is bound by arithmetic, so a large pass gains nothing; it
needs memory for every token's activations and computes the padding. Writing is bound by memory bandwidth, so the more
texts are written at once the better. Here prompts are read a few at a time, their keys and values are put side by side,
and `generate` goes on from there.
"""

import torch
from transformers.cache_utils import Cache, DynamicLayer


class RoomyLayer(DynamicLayer):
    """Keys and values of one layer with room for what will be written: nothing is copied when a token is added."""

    def __init__(self, keys, values, rows, length, room):
        super().__init__()
        shape = (rows, keys.shape[1], length + room)
        self.all_keys, self.all_values = keys.new_zeros(*shape, keys.shape[3]), values.new_zeros(*shape, values.shape[3])
        self.length = length
        self.lazy_initialization(keys, values)
        self._show()

    def fill(self, first_row, keys, values):
        """Puts what a few prompts' tokens have left into their rows, at the end of the prompts' places."""
        rows, start = slice(first_row, first_row + keys.shape[0]), self.length - keys.shape[2]
        self.all_keys[rows, :, start : self.length], self.all_values[rows, :, start : self.length] = keys, values

    def update(self, key_states, value_states, *_, **__):
        end = self.length + key_states.shape[2]
        self.all_keys[:, :, self.length : end], self.all_values[:, :, self.length : end] = key_states, value_states
        self.length = end
        self._show()
        return self.keys, self.values

    def _show(self):
        self.keys, self.values = self.all_keys[:, :, : self.length], self.all_values[:, :, : self.length]


def can_read_in_portions(model):
    """False for models that number picture positions in two dimensions, or that do not keep all keys and values."""
    config = model.config.get_text_config()
    keeps_all = not getattr(config, "sliding_window", None) and set(getattr(config, "layer_types", None) or ()) <= {"full_attention"}
    return keeps_all and not any(hasattr(module, "get_rope_index") for module in model.modules())


def read(model, portions, pad_token_id, room):
    """Reads all tokens of all prompts but each one's last; returns what `generate` needs to go on, as a dict.

    portions: left-padded batches as `Chat.encode` makes them, in the order of the rows; room: tokens to be written.
    """
    rows, longest = sum(len(part["input_ids"]) for part in portions), max(part["input_ids"].shape[1] for part in portions)
    ids = torch.full((rows, longest), pad_token_id, device=model.device)
    mask, layers, first = torch.zeros_like(ids), [], 0
    for part in portions:
        inputs = {**part, "input_ids": part["input_ids"][:, :-1], "attention_mask": part["attention_mask"][:, :-1]}
        positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        found = model(**inputs, position_ids=positions, use_cache=True, logits_to_keep=1).past_key_values
        layers = layers or [RoomyLayer(layer.keys, layer.values, rows, longest - 1, room + 1) for layer in found.layers]
        for layer, new in zip(layers, found.layers, strict=True):
            layer.fill(first, new.keys, new.values)
        place = slice(first, first + len(part["input_ids"])), slice(longest - part["input_ids"].shape[1], longest)
        ids[place], mask[place] = part["input_ids"], part["attention_mask"]
        first = place[0].stop
    return {"input_ids": ids, "attention_mask": mask, "past_key_values": Cache(layers=layers)}


def bytes_per_token(model):
    """Memory that the keys and values of one token take."""
    config = model.config.get_text_config()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head * model.dtype.itemsize
