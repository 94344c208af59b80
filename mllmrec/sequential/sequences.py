"""users.jsonl as sequences of item numbers, for models that learn vectors of items."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mllmrec.data.candidates import candidates, users_of_split
from mllmrec.stage.schema import Row

PADDING = 0  # the number of no item


@dataclass
class SequenceData:
    """What a sequential model may know, and what it is to rank.

    number: item id -> its number, from 1 on. training: for each training user the history and then
    the target, as numbers, oldest first: nothing else is learned from.
    """

    number: dict[str, int]
    training: list[list[int]]

    @classmethod
    def of(cls, users: Sequence[Row], items: Sequence[str]) -> "SequenceData":
        """users: lines of users.jsonl; items: ids of items.jsonl."""
        number = {item: n for n, item in enumerate(items, start=PADDING + 1)}
        training = [
            [number[item] for item in (*user["history"], user["target"])]
            for user in users
            if user["split"] == "train"
        ]
        return cls(number, training)

    def leave_out(self, numbers: Iterable[int]) -> None:
        """Take items out of the training lists; lists of fewer than two items are removed."""
        removed = set(numbers)
        kept = ([n for n in row if n not in removed] for row in self.training)
        self.training = [row for row in kept if len(row) > 1]

    def candidate_lists(self, users: Sequence[Row], split: str) -> "CandidateNumbers":
        """Histories and candidates of the users of one split."""
        chosen = users_of_split(users, split)
        listed = [candidates(user) for user in chosen]
        return CandidateNumbers(
            [user["user_id"] for user in chosen],
            [[self.number[item] for item in user["history"]] for user in chosen],
            [[self.number[item] for item, _ in own] for own in listed],
        )

    def training_batches(
        self, options: Any, generator: torch.Generator
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(inputs, targets) of one epoch, both (sequences, length): the target is the next item.

        A list of more than `max_length` items becomes several sequences, see `windows`, or with
        `long_lists: last` one of its last items. `first_item`: the padding stands for no history.
        """
        before = [PADDING] if options.first_item else []
        lists = [windows([*before, *row], options.max_length) for row in self.training]
        if options.long_lists == "last":
            lists = [parts[:1] for parts in lists]
        sequences = [part for parts in lists for part in parts]
        order = torch.randperm(len(sequences), generator=generator).tolist()
        for start in range(0, len(order), options.batch_size):
            rows = padded([sequences[n] for n in order[start : start + options.batch_size]])
            yield rows[:, :-1], rows[:, 1:]


@dataclass
class CandidateNumbers:
    """Per user: the history, and the candidates with the target first, as item numbers."""

    users: list[str]
    histories: list[list[int]]
    candidates: list[list[int]]


def windows(row: list[int], length: int) -> list[list[int]]:
    """Parts of at most `length` + 1 items, from the end, in which each next item occurs once.

    The last item of a part is the first of the one behind it.
    """
    ends = range(len(row), 1, -length)
    return [row[max(0, end - length - 1) : end] for end in ends]


def padded(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Integers of shape (rows, longest), filled with PADDING behind the last item."""
    longest = max(map(len, rows))
    batch = np.full((len(rows), longest), PADDING, dtype=np.int64)
    for row, numbers in zip(batch, rows, strict=True):
        row[: len(numbers)] = numbers
    return torch.from_numpy(batch)
