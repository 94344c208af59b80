"""Sampling with a counter-based RNG: the noise depends on seed, row, turn and position only.

A token is sampled from softmax(scores) by adding Gumbel noise to the scores and taking the largest
(the Gumbel-max trick). The noise is computed by a hash, on the scores' device, instead of by a
generator with a state. So neither the batch, nor the order, nor the number of processes, nor an
interruption changes the noise. (In bfloat16 the scores themselves differ a little between batches;
in float32 on a CPU they do not, as far as texts can tell.)
"""

import torch
from transformers import LogitsProcessor, TemperatureLogitsWarper, TopPLogitsWarper


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


# Odd 64-bit constants of well-known integer hashes (splitmix64, murmur3); torch has signed
# integers only.
_STEP = _signed(0x9E3779B97F4A7C15)
_TOKEN = _signed(0xD1B54A32D192ED03)
_MIX_FACTORS = (_signed(0xFF51AFD7ED558CCD), _signed(0xC4CEB9FE1A85EC53))
_MASK = (1 << 31) - 1


def counter(stream: int, position: int) -> int:
    """31-bit number of a stream's token at `position` (0: the first new one)."""
    mixed = stream * 0x9E3779B1 + position * 0x85EBCA77 + (position << 40)
    return (mixed % ((1 << 61) - 1)) & _MASK


def gumbel_noise(counters: torch.Tensor, n_tokens: int) -> torch.Tensor:
    """float32 (counters, n_tokens): standard Gumbel noise. counters: integers made by `counter`."""

    def shifted(value: torch.Tensor, bits: int) -> torch.Tensor:  # logical: torch's keeps the sign
        return (value >> bits) & ((1 << (64 - bits)) - 1)

    tokens = torch.arange(n_tokens, device=counters.device)
    mixed = counters.long()[:, None] * _STEP + tokens * _TOKEN
    for factor in _MIX_FACTORS:
        mixed = (mixed ^ shifted(mixed, 33)) * factor
    return gumbel_of_bits(shifted(mixed, 41))


def gumbel_of_bits(bits: torch.Tensor) -> torch.Tensor:
    """float32 Gumbel noise of integers of 23 bits.

    With a half added they are still exact in float32, and the uniform number is never 0 or 1.
    """
    return -torch.log(-torch.log((bits.float() + 0.5) / (1 << 23)))


def warpers(temperature: float, top_p: float) -> list[LogitsProcessor]:
    """What is applied to the scores before sampling (released code: temperature 0.6, top-p 0.9)."""
    nucleus = [TopPLogitsWarper(top_p)] if top_p < 1 else []
    return [TemperatureLogitsWarper(temperature), *nucleus]


class GumbelMaxSampler(LogitsProcessor):
    """For greedy `generate`: makes each row's largest score a sample from its softmax.

    streams: one number for each row; prompt_length: columns of the padded prompts. The counters of
    all new tokens are made at once, so that no step waits for a copy to the GPU.
    """

    def __init__(self, streams: list[int], prompt_length: int, max_new_tokens: int) -> None:
        positions = range(max_new_tokens)
        self.counters = torch.tensor(
            [[counter(s, position) for s in streams] for position in positions]
        )
        self.prompt_length = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """scores: (rows, vocabulary); the same with noise added."""
        self.counters = self.counters.to(scores.device)  # the first step copies
        position = input_ids.shape[1] - self.prompt_length
        return scores + gumbel_noise(self.counters[position], scores.shape[1])
