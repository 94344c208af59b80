"""Retrieval: which items of the whole catalogue come first for each user (MLLM4Rec, stage one)."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mllmrec.data.candidates import item_popularity, users_of_split
from mllmrec.evaluation.metrics import Array, CandidateLists, per_user
from mllmrec.sequential.sequences import SequenceData
from mllmrec.sequential.training import item_products
from mllmrec.stage.schema import Row

CUTOFFS = (5, 10, 20)
BATCH = 256  # users whose scores of all items are held at once

Scorer = Callable[[list[list[int]]], torch.Tensor]


@dataclass
class RankedUsers:
    """Users whose next item is searched in the whole catalogue.

    users: ids; histories: item numbers, oldest first; targets: item number of each.
    """

    users: list[str]
    histories: list[list[int]]
    targets: list[int]

    @classmethod
    def of(cls, users: Sequence[Row], data: SequenceData, split: str) -> "RankedUsers":
        """The lines of users.jsonl of one split."""
        chosen = users_of_split(users, split)
        return cls(
            [user["user_id"] for user in chosen],
            [[data.number[item] for item in user["history"]] for user in chosen],
            [data.number[user["target"]] for user in chosen],
        )


def model_scorer(model: Any, max_length: int) -> Scorer:
    """Histories -> scores (users, items + 1) of a sequential model; number 0 is no item."""
    return lambda histories: item_products(model, model.items(), histories, max_length)


def popularity_scorer(users: Sequence[Row], data: SequenceData) -> Scorer:
    """Histories -> the interactions of each item in training, the same for everybody."""
    counts = torch.zeros(len(data.number) + 1)
    for item, count in item_popularity(users).items():
        counts[data.number[item]] = count
    return lambda histories: counts.expand(len(histories), -1)


@torch.inference_mode()
def catalogue_scores(
    score: Scorer, ranked: RankedUsers, with_history: bool = False
) -> Iterator[tuple[slice, Array]]:
    """Yield (users, float32 scores of all items), a batch of users at a time.

    Number 0 scores -inf, and items of the history, which are not to be found again, unless
    `with_history`.
    """
    for start in range(0, len(ranked.users), BATCH):
        part = slice(start, start + BATCH)
        scores = score(ranked.histories[part]).float().cpu().numpy().copy()
        scores[:, 0] = -np.inf
        if not with_history:
            for row, history in zip(scores, ranked.histories[part], strict=True):
                row[history] = -np.inf
        yield part, scores


def retrieval_metrics(
    score: Scorer, ranked: RankedUsers, with_history: bool = False
) -> dict[str, float]:
    """recall@k, mrr@k and ndcg@k over the catalogue, means of the users; nothing without users.

    with_history: items of the history compete, too. A target among equal scores counts as a random
    order of them gives on average.
    """
    found: dict[str, list[Array]] = {}
    for part, scores in catalogue_scores(score, ranked, with_history):
        targets = np.array(ranked.targets[part])[:, None]
        at_target = np.take_along_axis(scores, targets, axis=1)
        np.put_along_axis(scores, targets, -np.inf, axis=1)  # it is in column 0 below
        scores[:, :1] = at_target
        for name, values in per_user(CandidateLists.of_matrix(scores), CUTOFFS).items():
            found.setdefault(name.replace("hr@", "recall@"), []).append(values)
    found.pop("auc_per_user", None)  # over the catalogue it says little
    return {name: float(np.concatenate(values).mean()) for name, values in found.items()}


def retrieve(
    score: Scorer, ranked: RankedUsers, items: Sequence[str], split: str, how_many: int
) -> Iterator[Row]:
    """Yield the lines of candidates.jsonl: each user's best items, best first.

    items: ids in the order of their numbers, from 1 on. Of equal scores the lower number comes
    first.
    """
    for part, scores in catalogue_scores(score, ranked):
        order = np.argsort(-scores, axis=1, kind="stable")[:, :how_many]
        best = np.take_along_axis(scores, order, axis=1)
        users, targets = ranked.users[part], ranked.targets[part]
        for user, target, own, values in zip(users, targets, order, best, strict=True):
            kept = np.isfinite(values)  # a user with nearly all items has fewer left
            yield {
                "user_id": user,
                "split": split,
                "item_ids": [items[number - 1] for number in own[kept]],
                "scores": values[kept].tolist(),
                "has_target": bool(target in own[kept]),
            }
