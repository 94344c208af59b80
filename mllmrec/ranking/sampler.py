"""The order of the rows of an epoch."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from mllmrec.models.compat import length_grouped_order
from mllmrec.ranking.rows import group_rows
from mllmrec.stage.schema import Row


@dataclass(frozen=True)
class EpochSettings:
    """What decides the order of an epoch.

    step: rows of one optimizer step, over all processes and micro-batches; micro_batch: rows of one
    micro-batch; group_by: none, length (rows of similar length together), or item (up to a
    micro-batch, but at most half a step, of one item's rows together; of one user's if the rows
    have no images).
    """

    step: int
    micro_batch: int
    group_by: Literal["none", "length", "item"]
    seed: int


class EpochSampler(torch.utils.data.Sampler[int]):
    """Indices of an epoch's rows, decided by (seed, epoch), so that a resumed run has the same
    order.

    The epoch is filled up to whole steps with its first rows, so that it is the same for any number
    of processes. lengths: tokens of each row, needed for group_by length.
    """

    def __init__(
        self, rows: Sequence[Row], lengths: Sequence[int] | None, settings: EpochSettings
    ) -> None:
        self.rows, self.lengths, self.settings = rows, lengths, settings
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that is iterated next."""
        self.epoch = epoch

    def __len__(self) -> int:
        step = self.settings.step
        return -(-len(self.rows) // step) * step

    def __iter__(self) -> Iterator[int]:
        return itertools.islice(itertools.cycle(self._each_once()), len(self))

    def _each_once(self) -> list[int]:
        settings = self.settings
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + self.epoch)
        if settings.group_by == "length":
            assert self.lengths is not None
            return length_grouped_order(self.lengths, settings.step, generator)
        order = torch.randperm(len(self.rows), generator=generator).tolist()
        if settings.group_by == "none":
            return order
        size = max(1, min(settings.micro_batch, settings.step // 2))
        groups = [[order[k] for k in group] for group in group_rows([self.rows[i] for i in order])]
        chunks = [g[start : start + size] for g in groups for start in range(0, len(g), size)]
        shuffled = [chunks[k] for k in torch.randperm(len(chunks), generator=generator).tolist()]
        return [i for batch in pack_into_batches(shuffled, settings.micro_batch) for i in batch]


def pack_into_batches(chunks: Sequence[list[int]], size: int) -> list[list[int]]:
    """Chunks of at most `size` rows as bins of `size`, no chunk split; bins that are not full come
    last.
    """
    full: list[list[int]] = []
    open_bins: dict[int, list[list[int]]] = {free: [] for free in range(1, size)}  # by free places
    for chunk in chunks:
        # The fullest bin that takes the chunk.
        free = next((free for free in range(len(chunk), size) if open_bins[free]), None)
        packed = (open_bins[free].pop() if free else []) + chunk
        (full if len(packed) == size else open_bins[size - len(packed)]).append(packed)
    return full + [rest for bins in open_bins.values() for rest in bins]
