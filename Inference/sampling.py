"""Sampling that can be repeated: a draw depends on the seed, the row, the turn and the position in the text, on nothing else.

A token is drawn from softmax(scores) by adding Gumbel noise to the scores and taking the largest (the Gumbel-max trick).
The noise comes from a hash, computed on the scores' device, in place of a generator with a state. So what was batched
together, in which order, by how many processes or after how many interruptions cannot change the noise. (In bfloat16 the
scores themselves differ a little with what shares a batch; in float32 on a CPU they do not, as far as texts can tell.)
"""

import hashlib
import json

import torch
from transformers import LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)


def _signed(value):
    return value - (1 << 64) if value >= 1 << 63 else value


# Odd 64-bit constants of well-known integer hashes (splitmix64, murmur3); torch has signed integers only.
_STEP, _TOKEN, _MIX_1, _MIX_2 = map(_signed, (0x9E3779B97F4A7C15, 0xD1B54A32D192ED03, 0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53))
_MASK = (1 << 31) - 1


def stream(*names):
    """31-bit number of the stream of draws that belongs to `names`, e.g. (seed, user id, block)."""
    return int.from_bytes(hashlib.sha256(json.dumps(names).encode()).digest()[:4]) & _MASK


def draw(stream_number, position):
    """31-bit number of one draw: the token at `position` (0 = the first new one) of a stream."""
    return ((stream_number * 0x9E3779B1 + position * 0x85EBCA77 + (position << 40)) % ((1 << 61) - 1)) & _MASK


def gumbel(draws, n_tokens):
    """float32 (draws, n_tokens): standard Gumbel noise. draws: integer tensor of numbers made by `draw`."""

    def shifted(value, bits):  # a logical shift: torch's keeps the sign
        return (value >> bits) & ((1 << (64 - bits)) - 1)

    mixed = draws.long()[:, None] * _STEP + torch.arange(n_tokens, device=draws.device) * _TOKEN
    for factor in (_MIX_1, _MIX_2):
        mixed = (mixed ^ shifted(mixed, 33)) * factor
    return gumbel_of(shifted(mixed, 41))


def gumbel_of(bits):
    """float32 Gumbel noise of integers of 23 bits: with a half added they are still exact in float32, and never 0 or 1."""
    return -torch.log(-torch.log((bits.float() + 0.5) / (1 << 23)))


def warpers(temperature, top_p):
    """What is done to the scores before a draw (released code: temperature 0.6, top-p 0.9)."""
    return [TemperatureLogitsWarper(temperature), *([TopPLogitsWarper(top_p)] if top_p < 1 else [])]


class GumbelMax(LogitsProcessor):
    """For `generate`: makes each row's largest score a draw from the softmax of its scores.

    streams: one number for each row; prompt_length: columns of the padded prompts.
    """

    def __init__(self, streams, prompt_length):
        self.streams, self.prompt_length = streams, prompt_length

    def __call__(self, input_ids, scores):
        position = input_ids.shape[1] - self.prompt_length
        draws = torch.tensor([draw(number, position) for number in self.streams], device=scores.device)
        return scores + gumbel(draws, scores.shape[1])


class ContinuousGumbelMax(ContinuousBatchingLogitsProcessor):
    """The same for continuous batching, where every request of a step is at another position of its text."""

    supported_kwargs = {"stream": int}  # noqa: RUF012 - the base class wants it so
    ignored_kwargs = ()

    def fill_defaults(self, int32_tensor):
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token):
        draws = []
        for request in requests_with_new_token:
            state = request.state
            # A request that had to make room starts again with what it had written as part of its prompt.
            prompt_length = state._true_initial_tokens or len(state.initial_tokens)
            draws.append(draw(state.logit_processor_kwargs.get("stream", 0), state.position_offset - prompt_length))
        return torch.tensor(draws, dtype=torch.int32)

    def __call__(self, scores, tensor_arg):
        return scores + gumbel(tensor_arg[: scores.shape[0]], scores.shape[1])


def for_continuous_batching(temperature, top_p):
    """The processors of a ContinuousBatchingManager that samples so."""
    processors = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([*warpers(temperature, top_p), ContinuousGumbelMax()]))
    processors.tensors_required = 1  # the list counts only the processors that it has converted itself
    return processors
