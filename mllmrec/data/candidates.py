"""Candidate lists of users, and lines of scores.jsonl."""

from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mllmrec.data.interactions import sample_negatives
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import PathLike, read_by_id, read_lines
from mllmrec.stage.provenance import check_lines_source
from mllmrec.stage.schema import Row


def candidates(user: Row) -> list[tuple[str, int]]:
    """[(item_id, label)] of one line of users.jsonl: the target first, then the negatives."""
    return [(user["target"], 1), *((item_id, 0) for item_id in user["negatives"])]


def score_row(
    user_id: str, item_id: str, label: int, score: float, logits: Mapping[str, float] | None = None
) -> Row:
    """One line of scores.jsonl.

    logits: answer -> logit, None for rules without a language model.
    """
    return {
        "user_id": user_id,
        "item_id": item_id,
        "label": label,
        "score": score,
        "logits": dict(logits) if logits is not None else None,
    }


def read_users(path: PathLike) -> list[Row]:
    """The lines of users.jsonl.

    Raises InputError for a user with two lines of one split or with lines that are not nested (see
    `is_leave_one_out`), and for a history with the target or a negative, unless the line says
    `overlap: true`, as those of released lists do.
    """
    lines: dict[tuple[str, str], int] = {}
    users = []
    for number, user in read_lines(path):
        key = (user["user_id"], user["split"])
        if key in lines:
            raise InputError(
                f"{path}, line {number}: user {key[0]!r} is already in line {lines[key]} with the "
                f"split {key[1]!r}; remove one of the two"
            )
        lines[key] = number
        users.append(user)
        leaked = set(user["history"]).intersection([user["target"], *user["negatives"]])
        if leaked and user.get("overlap") is not True:
            item = min(leaked)
            part = "target" if item == user["target"] else "negative"
            raise InputError(
                f"{path}, line {number}: the {part} {item!r} of user {key[0]!r} is in its history; "
                "correct the line, or make the file again with scripts/01_prepare_data.sh"
            )
    if is_leave_one_out(users):
        _check_nested(path, users)
    return users


def _check_nested(path: PathLike, users: Sequence[Row]) -> None:
    by_user: dict[str, dict[str, Row]] = {}
    for user in users:
        by_user.setdefault(user["user_id"], {})[user["split"]] = user
    # Users with several lines first: if one was edited, the others are right.
    for user_id, own in sorted(by_user.items(), key=lambda entry: len(entry[1]) == 1):
        lines = [own[split] for split in ("train", "validation", "test") if split in own]
        if len(lines) < 3 or not all(_continues(*pair) for pair in pairwise(lines)):
            raise InputError(
                f"{path}: the lines of user {user_id!r} ({', '.join(own)}) do not fit: a user has "
                "one line, or all users have one of each split whose history continues the one "
                "before; make the file again with scripts/01_prepare_data.sh"
            )


def _continues(earlier: Row, later: Row) -> bool:
    """Whether the later history ends with what the earlier line has, as far as it goes back."""
    known = [*earlier["history"], earlier["target"]]
    return bool(known[-len(later["history"]) :] == later["history"])


def read_users_and_items(
    users_path: PathLike,
    items_path: PathLike,
    parts: Sequence[str] = ("history", "target", "negatives"),
) -> tuple[list[Row], dict[str, Row]]:
    """(lines of users.jsonl, lines of items.jsonl by id).

    parts: of a line that must be there. Raises InputError, naming the line, for an item of these
    parts that is not in items.jsonl, and for a user without negatives if they are among the parts.
    """
    users, items = read_users(users_path), read_by_id(items_path, "item_id")
    for number, user in enumerate(users, start=1):
        where = f"{users_path}, line {number}"
        if "negatives" in parts and not user["negatives"]:
            raise InputError(
                f"{where}: user {user['user_id']!r} has no negatives, so nothing could be ranked; "
                "make the file again with --negatives and --train_negatives above 0"
            )
        listed = [i for part in parts if part != "target" for i in user[part]]
        for item_id in (*listed, *([user["target"]] if "target" in parts else [])):
            if item_id not in items:
                raise InputError(
                    f"{where}: item {item_id!r} is not in {items_path}; "
                    "scripts/01_prepare_data.sh makes both again"
                )
    return users, items


def training_negatives(user: Row, how_many: int) -> list[str]:
    """The first negatives of a training user. Raises InputError if there are fewer."""
    if len(user["negatives"]) < how_many:
        raise InputError(
            f"user {user['user_id']!r} has {len(user['negatives'])} negatives in its training "
            f"line, {how_many} are needed; prepare the data with --train_negatives {how_many}"
        )
    return list(user["negatives"][:how_many])


def is_leave_one_out(users: Sequence[Row]) -> bool:
    """True if users.jsonl has a line per user and split, as `split_by: leave_one_out` writes it."""
    return len({user["user_id"] for user in users}) < len(users)


def user_key(user: Row, leave_one_out: bool) -> Any:
    """What identifies a line: the user id, or (user id, split) if a user has several."""
    return (user["user_id"], user["split"]) if leave_one_out else user["user_id"]


def item_popularity(users: Sequence[Row]) -> Counter[str]:
    """item_id -> number of interactions that a recommender may know.

    Split by user: all histories, and the targets of training users. Leave-one-out: histories and
    targets of the training lines, which end before the validation target.
    """
    leave_one_out = is_leave_one_out(users)
    counts: Counter[str] = Counter()
    for user in users:
        if user["split"] == "train" or not leave_one_out:
            counts.update(user["history"])
        if user["split"] == "train":
            counts[user["target"]] += 1
    return counts


def popularity_scores(users: Sequence[Row], split: str = "test") -> list[Row]:
    """Lines of scores.jsonl for the users of `split`: a candidate's score is its popularity."""
    counts = item_popularity(users)
    return [
        score_row(user["user_id"], item_id, label, float(counts[item_id]))
        for user in users
        if user["split"] == split
        for item_id, label in candidates(user)
    ]


def cold_users(users_path: Path) -> dict[str, bool]:
    """Test user -> whether its target is a cold item; empty if the data set has none."""
    users = users_of_split(read_users(users_path), "test") if users_path.exists() else []
    cold = {user["user_id"]: user.get("cold") is True for user in users}
    return cold if any(cold.values()) else {}


def read_touched(path: PathLike, users: Sequence[Row]) -> dict[str, list[str]]:
    """Test user -> all items that it had in the raw log, from touched.jsonl.

    Raises InputError if the file is not of these users: one is missing, or has other items.
    """
    touched = {key: row["item_ids"] for key, row in read_by_id(path, "user_id").items()}
    for user in users_of_split(users, "test"):
        if not {*user["history"], user["target"]} <= set(touched.get(user["user_id"], ())):
            raise InputError(
                f"{path} lacks items of user {user['user_id']!r} in users.jsonl beside it; "
                "scripts/01_prepare_data.sh makes both again"
            )
    return touched


def redraw_negatives(
    users: Sequence[Row],
    item_ids: Iterable[str],
    had: Mapping[str, Sequence[str]],
    sampling: str,
    seed: int,
) -> list[Row]:
    """The lines of users.jsonl, those of the test with redrawn negatives.

    As many as before, among all items (item_ids) but those of the user's own lines and those that
    it had in the log (`had`, see `read_touched`); sampling: uniform, or popularity, in proportion
    to an item's interactions (histories and targets). The target stays. A list that cannot be
    filled keeps its negatives.
    """
    seen = [[*user["history"], user["target"]] for user in users]
    items = pd.Index(sorted(item_ids), dtype=object)
    item = items.get_indexer([i for own in seen for i in own])
    line_user, _ = pd.factorize(np.array([user["user_id"] for user in users], dtype=object))
    user = np.repeat(line_user, [len(own) for own in seen]).astype(np.int64)
    touched = np.unique(user * len(items) + item)
    interactions = np.bincount(touched % len(items), minlength=len(items))
    weights = interactions if sampling == "popularity" else None
    lines = [n for n, line in enumerate(users) if line["split"] == "test"]
    how_many = max((len(users[n]["negatives"]) for n in lines), default=0)
    more = [(line_user[n], items.get_indexer(had[users[n]["user_id"]])) for n in lines]
    more = [user * len(items) + codes[codes >= 0] for user, codes in more]
    touched = np.union1d(touched, np.concatenate([touched[:0], *more]))
    rng = np.random.default_rng([seed, 4])
    drawn = sample_negatives(touched, line_user[lines], len(items), how_many, rng, weights)
    redrawn = list(users)
    for n, codes in zip(lines, drawn, strict=True):
        if codes.min(initial=0) >= 0:
            own = codes[: len(users[n]["negatives"])]
            redrawn[n] = {**users[n], "negatives": items[own].tolist()}
    return redrawn


def users_of_split(users: Iterable[Row], split: str, limit: int = 0) -> list[Row]:
    """The lines of users.jsonl of one split, the first `limit` of them; 0: all."""
    return [user for user in users if user["split"] == split][: limit or None]


def own_candidates(user: Row, items: Container[str]) -> Row:
    """The candidates of a line of users.jsonl, in the form of a line of candidates.jsonl.

    items: known ids. Raises InputError for a negative that is not among them.
    """
    listed = [user["target"], *user["negatives"]]
    if unknown := [item for item in listed if item not in items]:
        raise InputError(
            f"users.jsonl, user {user['user_id']!r}: the negative {unknown[0]!r} is not in "
            "items.jsonl; scripts/01_prepare_data.sh makes both again"
        )
    return {
        "user_id": user["user_id"],
        "split": user["split"],
        "item_ids": listed,
        "has_target": True,
    }


def read_candidates(path: Path, users: Sequence[Row], items: Container[str]) -> list[Row]:
    """The lines of candidates.jsonl.

    users: lines of users.jsonl; items: known ids. Raises InputError for the first line that is not
    about their histories and targets, or names another item.
    """
    lines = read_by_id(path, ("user_id", "split"))
    known = {(user["user_id"], user["split"]): user for user in users}
    fault = "the list is of another users.jsonl; run MLLM4Rec/train_retriever.py again"
    for number, (key, line) in enumerate(lines.items(), start=1):
        listed, user = line["item_ids"], known.get(key)
        is_own = user is not None and line["has_target"] == (user["target"] in listed)
        if not is_own or not all(item in items for item in listed):
            raise InputError(f"{path}, line {number} ({' '.join(key)}): {fault}")
    inputs = {key: [[user["history"], user["target"]]] for key, user in known.items()}
    check_lines_source(lines, inputs, path, fault)
    return list(lines.values())
