"""Batches for training: the order of an epoch's rows, and right-padded texts with their labels.

With a shared prefix, rows of one group (one item, or without images one user) come as one packed
row: what their prompts share is computed once, each row's own text follows and does not attend to
the others'. Loss and gradients are those of every row by itself, but for what LoRA's dropout leaves
out.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from mllmrec.data.images import pad_to_largest
from mllmrec.models.compat import length_grouped_order
from mllmrec.models.padding import common_prefix_length, pad_rows
from mllmrec.ranking.packing import PackedSequence, collate_packed
from mllmrec.ranking.reader import RowReader
from mllmrec.ranking.rows import EpochRows, group_rows, row_name
from mllmrec.ranking.training_options import FineTuningOptions
from mllmrec.stage.errors import InputError
from mllmrec.stage.record import world_size
from mllmrec.stage.schema import Row


class Collator:
    """Rows with answers -> one right-padded batch of tensors.

    share_prefix: compute what the prompts of one group have in common once. The batch then holds
    `parts`, one batch per group, for one forward and backward pass each: a pass over several images
    is no faster than several passes and takes the memory of all. With `in_parts` set to False all
    groups are one batch, which sharded training needs, where all processes run the same passes.
    pad_images: pad the images of a batch with black to the largest, as the released code does.
    loss: answer (on the answer's tokens only) or sequence (on all text). With `answer`,
    `logits_to_keep` (rows, answer tokens) holds the positions before the answers' tokens, and
    `shift_labels` the tokens themselves, which is how transformers takes labels that need no shift.
    """

    def __init__(
        self,
        reader: RowReader,
        loss: Literal["answer", "sequence"] = "answer",
        share_prefix: bool = False,
        pad_images: bool = False,
    ) -> None:
        self.reader, self.chat, self.loss = reader, reader.chat, loss
        self.share_prefix, self.pad_images = share_prefix, pad_images
        self.in_parts = share_prefix

    def text(self, row: Row) -> str:
        """The rendered row, question and answer."""
        return self.reader.prompt(row)[0] + self.reader.answer_tokens.texts[row["label"]]

    def answer_ids(self, row: Row) -> list[int]:
        """Token ids of the row's answer."""
        return list(self.reader.answer_tokens.ids[row["label"]])

    def __call__(self, rows: Sequence[Row]) -> Any:
        """A batch of these rows; `row_names` is for messages and not for the model."""
        batch = self._batch(rows)
        batch["row_names"] = [row_name(row) for row in rows]
        return batch

    @property
    def _pad_token_id(self) -> int:
        return int(self.chat.tokenizer.pad_token_id)

    def _batch(self, rows: Sequence[Row]) -> Any:
        if self.in_parts:
            parts = [
                self._packed_batch([rows[index] for index in group]) for group in group_rows(rows)
            ]
            # Not for the model: the trainer counts these.
            counted = {
                name: pad_rows([part[name][0].tolist() for part in parts], padding, "right")
                for name, padding in (("input_ids", self._pad_token_id), ("shift_labels", -100))
            }
            return {"parts": parts, "labels": counted["shift_labels"], **counted}
        if self.share_prefix:
            return self._packed_batch(rows)
        images = [self.reader.image(row) for row in rows]
        if self.pad_images:
            images = pad_to_largest(images)
        batch = self.chat.encode([self.text(row) for row in rows], images, side="right")
        answers = [self.answer_ids(row) for row in rows]
        lengths = batch["attention_mask"].sum(1).tolist()
        for row, length, answer, ids in zip(
            rows, lengths, answers, batch["input_ids"].tolist(), strict=True
        ):
            if ids[length - len(answer) : length] != answer:
                raise InputError(
                    f"{row_name(row)}: the rendered text does not end with the answer's tokens"
                )
        if self.loss == "sequence":
            masked = batch["attention_mask"] == 0
            if self.chat.image_token_id is not None:
                masked |= batch["input_ids"] == self.chat.image_token_id
            batch["labels"] = batch["input_ids"].masked_fill(masked, -100)
            return batch
        positions = [
            list(range(length - len(answer) - 1, length - 1))
            for length, answer in zip(lengths, answers, strict=True)
        ]
        return _with_labels(batch, positions, answers)

    def _packed_batch(self, rows: Sequence[Row]) -> Any:
        """One row of the batch per group: prefix, then each row's own text and answer."""
        firsts, packs, positions, answers = [], [], [], []
        for indices in group_rows(rows):
            group = [rows[index] for index in indices]
            image = self.reader.image(group[0])
            n_image_tokens = self.chat.count_image_tokens(image)
            prompts = [self.reader.prompt(row) for row in group]
            whole = [self.chat.expand_image_token(ids, n_image_tokens) for _, ids in prompts]
            prefix_length = common_prefix_length(whole)
            if self.chat.image_token_id in whole[0][prefix_length:]:
                raise InputError(
                    "--group_by item needs a chat template that starts with the image; "
                    "use --group_by length"
                )
            pack = PackedSequence(whole[0][:prefix_length])
            group_positions: list[int] = []
            group_answers: list[int] = []
            for row, ids in zip(group, whole, strict=True):
                answer = self.answer_ids(row)
                end = pack.add(ids[prefix_length:] + answer[:-1])  # the last token predicts nothing
                group_positions += range(end - len(answer), end)
                group_answers += answer
            firsts.append((prompts[0][0], image))
            packs.append(pack)
            positions.append(group_positions)
            answers.append(group_answers)
        batch = self.chat.encode([t for t, _ in firsts], [image for _, image in firsts], "right")
        batch |= collate_packed(packs, self._pad_token_id)
        return _with_labels(batch, positions, answers)


def _with_labels(batch: Any, positions: list[list[int]], answers: list[list[int]]) -> Any:
    batch["logits_to_keep"] = pad_rows(positions, 0, "right")
    batch["labels"] = batch["shift_labels"] = pad_rows(answers, -100, "right")
    return batch


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

    @classmethod
    def of(cls, options: FineTuningOptions) -> "EpochSettings":
        """As the options and the number of processes say."""
        step = world_size() * options.batch_size * options.accumulation
        return cls(step, options.batch_size, options.group_by, options.seed)


class EpochSampler(torch.utils.data.Sampler[int]):
    """Indices of an epoch's rows, decided by seed and epoch, so a resumed run has the same order.

    The last step is completed with the epoch's first rows, so that the epoch is the same for any
    number of processes. lengths: tokens of each row, needed for group_by length.
    """

    def __init__(
        self, rows: Sequence[Row], lengths: Sequence[int] | None, settings: EpochSettings
    ) -> None:
        if settings.step > len(rows):
            raise InputError(
                f"a step takes {settings.step:,} rows (--batch_size times --accumulation, in all "
                f"processes), the training has {len(rows):,}; lower --accumulation or --batch_size"
            )
        self.rows, self.lengths, self.settings = rows, lengths, settings
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that is iterated next."""
        self.epoch = epoch
        if isinstance(self.rows, EpochRows):
            self.rows.epoch = epoch

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
    """Chunks of at most `size` rows as bins of `size`, none split; bins that are not full last."""
    full: list[list[int]] = []
    open_bins: dict[int, list[list[int]]] = {free: [] for free in range(1, size)}  # by free places
    for chunk in chunks:
        # The fullest bin that takes the chunk.
        free = next((free for free in range(len(chunk), size) if open_bins[free]), None)
        packed = (open_bins[free].pop() if free else []) + chunk
        (full if len(packed) == size else open_bins[size - len(packed)]).append(packed)
    return full + [rest for bins in open_bins.values() for rest in bins]
