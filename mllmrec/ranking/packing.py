"""Several texts behind one prefix as one sequence, for training and scoring.

What the texts share is computed once, and its keys and values are read once; the mask keeps the
texts apart.
"""

from collections.abc import Iterator, Sequence

import torch

from mllmrec.models.padding import pad_rows


class PackedSequence:
    """A prefix and the texts that follow it, each at the positions it would have by itself.

    ids, positions, segments: one integer per token; segment 0 is the prefix, n the n-th text; ends:
    where each text ends. If the prefix is in a cache, `prefix` is empty and `start` its length.
    """

    def __init__(self, prefix: Sequence[int], start: int = 0) -> None:
        self.prefix_length = start + len(prefix)
        self.ids = list(prefix)
        self.positions = list(range(start, self.prefix_length))
        self.segments = [0] * len(prefix)
        self.ends: list[int] = []

    def add(self, ids: Sequence[int]) -> int:
        """Append one text; return where it ends."""
        self.ids += ids
        self.positions += range(self.prefix_length, self.prefix_length + len(ids))
        self.segments += [len(self.ends) + 1] * len(ids)
        self.ends.append(len(self.ids))
        return self.ends[-1]


def collate_packed(
    packs: Sequence[PackedSequence], pad_token_id: int, side: str = "right"
) -> dict[str, torch.Tensor]:
    """input_ids, position_ids (rows, longest), attention_mask (rows, 1, longest, longest).

    True in the mask = attended to: a token attends to the prefix and to its own segment before it.
    side: of the padding.
    """
    segments = pad_rows([pack.segments for pack in packs], -1, side)
    longest = segments.shape[1]
    causal = torch.ones(longest, longest, dtype=torch.bool).tril()
    same = segments[:, None, :] == segments[:, :, None]
    return {
        "input_ids": pad_rows([pack.ids for pack in packs], pad_token_id, side),
        "position_ids": pad_rows([pack.positions for pack in packs], 0, side),
        "attention_mask": (causal & (same | (segments[:, None, :] == 0)))[:, None],
    }


def packs_behind(
    texts: Sequence[Sequence[int]], start: int, longest: int
) -> Iterator[PackedSequence]:
    """The texts, in their order, as sequences of at most `longest` tokens, or of one text each.

    start: length of the prefix, which is in a cache.
    """
    pack = PackedSequence([], start)
    for ids in texts:
        if pack.ends and len(pack.ids) + len(ids) > longest:
            yield pack
            pack = PackedSequence([], start)
        pack.add(ids)
    yield pack


def collate_behind(
    packs: Sequence[PackedSequence], prefix_mask: torch.Tensor, pad_token_id: int
) -> dict[str, torch.Tensor]:
    """As `collate_packed`, padded on the left, behind prefixes that are in a cache.

    prefix_mask: (rows, tokens of the longest prefix). If each sequence is one text, the attention
    mask is (rows, tokens), which every kind of attention takes.
    """
    inputs = collate_packed(packs, pad_token_id, side="left")
    inputs = {name: values.to(prefix_mask.device) for name, values in inputs.items()}
    own = inputs["attention_mask"]
    if all(len(pack.ends) == 1 for pack in packs):  # the last token attends to all of its text
        mask = torch.cat([prefix_mask, own[:, 0, -1].to(prefix_mask.dtype)], dim=1)
    else:
        prefix = prefix_mask.bool()[:, None, None].expand(-1, -1, own.shape[2], -1)
        mask = torch.cat([prefix, own], dim=-1)
    return inputs | {"attention_mask": mask}
