"""The least time that a machine needs for prefill and decoding, from speeds measured on it.

Prefill computes: two operations for each weight and token, and attention over all pairs of tokens.
Decoding reads: each step all weights once and the keys and values of all rows; with many rows the
products of a step can take longer than the reading, and count instead. Speeds are those of the
operations themselves: a large matrix product, and a product of a large matrix with a vector.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from tools import count_parameters, timed

from mllmrec.generation.prefill import kv_bytes_per_token
from mllmrec.models.chat import ChatProcessor
from mllmrec.models.compat import packed_linears

REPEATS = 7
Pass = tuple[int, int]  # (weights, tokens) through a part that sees the images only


@dataclass(frozen=True)
class Speeds:
    """Of this machine: operations a second of matrix products, bytes a second that are read."""

    flops: float
    bandwidth: float


def measure_speeds(device: torch.device, dtype: torch.dtype) -> Speeds:
    """Speeds with tensors of the size that models of 100 million to 8 billion weights have.

    On a CPU by the library that computes faster, see `packed_linears`.
    """
    on_gpu = device.type == "cuda"
    rows, width = 1024, 4096 if on_gpu else 1024
    height = (1 << 31 if on_gpu else 1 << 28) // (width * dtype.itemsize)
    seconds = []
    for n_rows, n_outputs in ((rows, 4 * width), (1, height)):
        layer = torch.nn.Linear(width, n_outputs, bias=False, device=device, dtype=dtype)
        work = partial(layer, torch.randn(n_rows, width, device=device, dtype=dtype))
        plain = best(work)
        with packed_linears(layer):
            seconds.append(min(plain, best(work)))
    flops, nbytes = 2 * rows * width * 4 * width, height * width * dtype.itemsize
    return Speeds(flops / seconds[0], nbytes / seconds[1])


@torch.inference_mode()
def best(work: Callable[[], object]) -> float:
    """Seconds of the fastest of REPEATS calls; the first one is not counted."""
    return min([timed(work)[0] for _ in range(REPEATS + 1)][1:])


def layer_weights(model: Any) -> tuple[int, int]:
    """(number, bytes) of the weights that each token passes: layers and LM head."""
    weights = [*model.get_decoder().layers.parameters(), model.lm_head.weight]
    return sum(w.numel() for w in weights), sum(w.nbytes for w in weights)


def vision_passes(
    model: Any, chat: ChatProcessor, prompts: Iterable[tuple[str, Any]]
) -> list[Pass]:
    """[(weights, tokens)] of tower and projector. prompts: (text, image) each."""
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    patches = (tower.config.image_size // tower.config.patch_size) ** 2
    tiles = sum(chat.encode_arrays(*prompt)["pixel_values"].shape[1] for prompt in prompts)
    return [
        (count_parameters(tower), tiles * (patches + 1)),
        (count_parameters(projector), tiles * patches),
    ]


def prefill_seconds(
    model: Any, lengths: Iterable[float], speeds: Speeds, passes: Iterable[Pass] = ()
) -> float:
    """Prefill of prompts of these lengths.

    passes: as from `vision_passes`. The LM head is needed at one position of each prompt.
    """
    text = model.config.get_text_config()
    per_token = 2 * sum(w.numel() for w in model.get_decoder().layers.parameters())
    head = 2 * model.lm_head.weight.numel()
    attention = 2 * text.num_hidden_layers * text.hidden_size  # of a pair of tokens, causal
    operations = sum(per_token * n + attention * n * n + head for n in lengths)
    operations += sum(2 * weights * tokens for weights, tokens in passes)
    return operations / speeds.flops


def generation_seconds(
    model: Any,
    batches: Sequence[Sequence[int]],
    new_tokens: int,
    speeds: Speeds,
    passes: Iterable[Pass] = (),
) -> tuple[float, float]:
    """(prefill, decoding) of `new_tokens` tokens for every prompt of these batches.

    batches: of prompt lengths; passes: as from `vision_passes`.
    """
    lengths = [length for batch in batches for length in batch]
    prefill = prefill_seconds(model, lengths, speeds, passes)
    return prefill, decoding_seconds(model, batches, new_tokens, speeds)


def decoding_seconds(
    model: Any, batches: Iterable[Sequence[int]], new_tokens: int, speeds: Speeds
) -> float:
    """Decoding of `new_tokens` tokens for every prompt of these batches.

    batches: of prompt lengths; each batch is decoded together.
    """
    number, nbytes = layer_weights(model)
    kv = kv_bytes_per_token(model)
    total = 0.0
    for lengths in batches:
        held = kv * sum(n + new_tokens / 2 for n in lengths)
        reading = (nbytes + held) / speeds.bandwidth
        computing = 2 * number * len(lengths) / speeds.flops
        total += new_tokens * max(reading, computing)
    return total
