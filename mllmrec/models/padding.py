"""Sequences of unequal length: padding, and how far they are equal."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence


def pad_rows(rows: Sequence[Sequence[int]], value: int, side: str = "left") -> torch.Tensor:
    """int64 (rows, longest): rows padded with `value` on one side, left or right."""
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)


def pad_with_mask(rows: Sequence[Sequence[int]], value: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, attention mask), both int64 (rows, longest), padded on the left."""
    return pad_rows(rows, value), pad_rows([[1] * len(row) for row in rows], 0)


def common_prefix_length(sequences: Sequence[Sequence[Any]]) -> int:
    """How many leading elements all sequences share; at least one of each is left over."""
    shortest, first = min(map(len, sequences)), sequences[0]
    for n in range(shortest - 1):
        if any(other[n] != first[n] for other in sequences[1:]):
            return n
    return shortest - 1
