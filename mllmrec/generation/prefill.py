"""Chunked prefill: prompts are processed a few at a time, their answers decoded all together.

`generate` processes all prompts of a batch in one pass. Prefill is compute-bound, so a large pass
gains nothing, needs memory for every token's activations and computes the padding. Decoding is
memory-bound, so the more texts are decoded at once the better. Here prompts are processed in
chunks, their keys and values are stored side by side, and `generate` continues from there.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from mllmrec.models.compat import (
    PreallocatedLayer,
    cache_of,
    has_full_attention,
    has_plain_positions,
)
from mllmrec.models.size import kv_numbers_per_token


def supports_chunked_prefill(model: Any) -> bool:
    """False for models with M-RoPE or sliding windows, or that take no position ids."""
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    return takes_positions and has_full_attention(model) and has_plain_positions(model)


def chunked_prefill(
    model: Any, chunks: Sequence[Any], pad_token_id: int, max_new_tokens: int
) -> dict[str, Any]:
    """Process all tokens of all prompts but each one's last; return the inputs of `generate`.

    chunks: left-padded batches as `ChatProcessor.encode` makes them, in the order of the rows.
    """
    rows = sum(len(chunk["input_ids"]) for chunk in chunks)
    longest = max(chunk["input_ids"].shape[1] for chunk in chunks)
    ids = torch.full((rows, longest), pad_token_id, device=model.device)
    mask = torch.zeros_like(ids)
    layers: list[PreallocatedLayer] = []
    first = 0
    for chunk in chunks:
        length = chunk["input_ids"].shape[1]
        without_last = {key: chunk[key][:, :-1] for key in ("input_ids", "attention_mask")}
        positions = (without_last["attention_mask"].cumsum(1) - 1).clamp(min=0)
        cache = model(
            **{**chunk, **without_last}, position_ids=positions, use_cache=True, logits_to_keep=1
        ).past_key_values
        size = (rows, longest - 1, max_new_tokens + 1)
        layers = layers or [PreallocatedLayer(new.keys, new.values, size) for new in cache.layers]
        for layer, new in zip(layers, cache.layers, strict=True):
            layer.fill(first, new.keys, new.values)
        last = first + len(chunk["input_ids"])
        ids[first:last, longest - length :] = chunk["input_ids"]
        mask[first:last, longest - length :] = chunk["attention_mask"]
        first = last
    return {"input_ids": ids, "attention_mask": mask, "past_key_values": cache_of(layers)}


def kv_bytes_per_token(model: Any) -> int:
    """Memory in bytes that the keys and values of one token take."""
    return kv_numbers_per_token(model.config) * model.dtype.itemsize
