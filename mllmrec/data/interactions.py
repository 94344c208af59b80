"""Interactions as columns, and the rules that make candidate lists: k-core, split, negatives.

No loop runs over interactions. Codes are integers into arrays of ids.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

Array = np.ndarray[Any, Any]
PERIOD = 1000  # interactions: the nearest in time to a target


@dataclass
class InteractionLog:
    """Interactions as columns of one length, sorted by user and time, ties in raw order.

    user_ids, item_ids: shorter ids first, then by the alphabet; user, item: integer codes into
    them; time: integers of any one unit; first_row: of each user, its first row in the raw file;
    has_times: False where the time is only a place in an order.
    """

    user_ids: Array
    item_ids: Array
    user: Array
    item: Array
    time: Array
    first_row: Array
    has_times: bool = True

    @classmethod
    def from_ids(cls, users: Any, items: Any, times: Any) -> "InteractionLog":
        """From three columns in raw order: ids as strings, times as integers."""
        (user_ids, user), (item_ids, item) = _coded(users), _coded(items)
        times = np.asarray(times, dtype=np.int64)
        order = np.lexsort((times, user))
        first_row = np.unique(user, return_index=True)[1]
        return cls(user_ids, item_ids, user[order], item[order], times[order], first_row)

    def only_items(self, known: Any) -> "InteractionLog":
        """The log without interactions with items that are not in `known`, some ids."""
        known = set(known)
        is_known = np.array([item_id in known for item_id in self.item_ids], dtype=bool)
        if is_known.all():
            return self
        keep = is_known[self.item]
        return replace(self, user=self.user[keep], item=self.item[keep], time=self.time[keep])


def _coded(values: Any) -> tuple[Array, Array]:
    """(different ids, shorter ones first, then by the alphabet; the code of each value)."""
    ids = sorted(set(values), key=lambda name: (len(name), name))
    place = {name: code for code, name in enumerate(ids)}
    return np.array(ids, dtype=object), np.array([place[v] for v in values], dtype=np.int32)


def hashed_pairs(
    user_ids: Array, item_ids: Array, pairs: tuple[Array, Array], seed: int
) -> tuple[Array, Array]:
    """(a number for each pair of codes, one for each user) that only ids and seed decide."""
    seeded = np.array([f"{seed} {user_id}" for user_id in user_ids], dtype=object)
    users, items = (pd.util.hash_array(ids, categorize=False) for ids in (seeded, item_ids))
    return pd.util.hash_array(users[pairs[0]] + items[pairs[1]]), users


def k_core(user: Array, item: Array, user_core: int, item_core: int) -> Array:
    """Mask of the rows that remain when rare users and items are removed until none is left.

    Rare: users with fewer than `user_core`, items with fewer than `item_core` interactions.
    """
    keep = np.ones(len(user), dtype=bool)
    per_user, per_item = np.bincount(user), np.bincount(item)
    while True:
        removed = keep & ((per_user < user_core)[user] | (per_item < item_core)[item])
        if not removed.any():
            return keep
        keep &= ~removed
        per_user -= np.bincount(user[removed], minlength=len(per_user))
        per_item -= np.bincount(item[removed], minlength=len(per_item))


def sample_negatives(
    touched: Array,
    users: Array,
    n_items: int,
    how_many: int,
    rng: np.random.Generator,
    weights: Array | None = None,
) -> Array:
    """Items that the users never touched, without replacement.

    touched: sorted int64 keys user * n_items + item; users: integer codes, shape (n,); items are
    0 ... n_items - 1; weights: the next item is drawn in proportion to them, None: uniformly.
    Returns int64 of shape (n, how_many); a row that cannot be filled holds -1.
    """
    users = users.astype(np.int64)
    if how_many == 0:
        return np.empty((len(users), 0), dtype=np.int64)
    size = (len(users), 2 * how_many + 8)
    if weights is None:
        drawn = rng.integers(0, n_items, size=size)
    else:
        ends = np.cumsum(weights, dtype=np.float64)
        drawn = np.searchsorted(ends, rng.random(size) * ends[-1], side="right")
    negatives, rows = np.full((len(users), how_many), -1, dtype=np.int64), np.arange(len(users))
    for width in (how_many + 2, size[1]):  # for most users the first ones suffice
        part = drawn[rows, :width]
        good = ~_is_in(users[rows, None] * n_items + part, touched) & ~_repeats_in_row(part)
        good &= good.cumsum(1) <= how_many
        full = good.sum(1) == how_many
        negatives[rows[full]] = part[full][good[full]].reshape(-1, how_many)
        rows = rows[~full]
    for row in rows:  # rare, unless the catalogue is tiny: go through all items
        order = rng.permutation(n_items) if weights is None else _weighted_order(weights, rng)
        free = order[~_is_in(users[row] * n_items + order, touched)]
        if len(free) >= how_many:
            negatives[row] = free[:how_many]
    return negatives


def sample_negatives_of_period(
    touched: Array,
    lines: tuple[Array, Array],
    log: tuple[Array, Array],
    n_items: int,
    how_many: int,
    rng: np.random.Generator,
) -> Array:
    """As `sample_negatives`, among the items of the interactions nearest in time to each target.

    lines: (user code, time of the target) of each; log: (item code, time) of all interactions.
    Uniform among the different items of the `PERIOD` nearest interactions; where the user touched
    too many of them, of twice as many, and so on.
    """
    order = np.argsort(log[1], kind="stable")
    item, time = log[0][order], log[1][order]
    negatives = np.full((len(lines[0]), how_many), -1, dtype=np.int64)
    places = np.searchsorted(time, lines[1])
    for row, (user, place) in enumerate(zip(lines[0].tolist(), places.tolist(), strict=True)):
        reach = PERIOD // 2
        while True:
            near = np.unique(item[max(0, place - reach) : place + reach])
            free = near[~_is_in(user * n_items + near, touched)]
            if len(free) >= how_many:
                negatives[row] = rng.choice(free, how_many, replace=False)
            if len(free) >= how_many or reach >= len(item):
                break
            reach *= 2
    return negatives


def _weighted_order(weights: Array, rng: np.random.Generator) -> Array:
    """Items in the order in which they are drawn without replacement (exponential races)."""
    with np.errstate(divide="ignore"):
        arrival = rng.exponential(size=len(weights)) / weights
    return np.argsort(arrival, kind="stable")


def split_users(
    n_users: int, fractions: tuple[float, float], folds: tuple[int, int], rng: np.random.Generator
) -> tuple[Array, Array]:
    """(split, fold): arrays of length n_users; fold is -1 without folds.

    fractions: of training and validation users; folds: (number of folds or 0, the fold to test on).
    One permutation decides all. With folds, the users of the test fold are the test set and the
    validation users are taken from the rest.
    """
    (train_fraction, validation_fraction), (n_folds, test_fold) = fractions, folds
    place = np.empty(n_users, dtype=np.int64)
    place[rng.permutation(n_users)] = np.arange(n_users)
    n_validation = round(validation_fraction * n_users)
    if n_folds:
        fold = place % n_folds
        rank = np.argsort(np.argsort(np.where(fold == test_fold, n_users + place, place)))
        split = np.where(rank < n_validation, "validation", "train")
        return np.where(fold == test_fold, "test", split), fold
    train = round(train_fraction * n_users)
    rest = np.where(place < train + n_validation, "validation", "test")
    return np.where(place < train, "train", rest), np.full(n_users, -1)


def ranks_in_use(codes: Array, number: int) -> tuple[Array, Array]:
    """(rank of each of `number` codes among those in use, -1 for the others; mask of the used)."""
    used = np.bincount(codes, minlength=number) > 0
    return np.where(used, np.cumsum(used, dtype=np.int32) - 1, -1), used


def log_statistics(user: Array, item: Array) -> dict[str, float]:
    """The rows of the paper's Table 2 for one log; sparsity in per cent."""
    users, items = (int(np.count_nonzero(np.bincount(codes))) for codes in (user, item))
    interactions = len(user)
    return {
        "users": users,
        "items": items,
        "interactions": interactions,
        "average_length": round(interactions / max(users, 1), 2),
        "sparsity": round(100 * (1 - interactions / max(users * items, 1)), 2),
    }


def _is_in(keys: Array, sorted_keys: Array) -> Array:
    """Mask of shape keys.shape: which keys are in the sorted array."""
    place = np.minimum(np.searchsorted(sorted_keys, keys), len(sorted_keys) - 1)
    return sorted_keys[place] == keys


def _repeats_in_row(values: Array) -> Array:
    """Mask of the entries that also occur further left in their row."""
    order = np.argsort(values, axis=1, kind="stable")
    ordered = np.take_along_axis(values, order, axis=1)
    repeat = np.zeros(values.shape, dtype=bool)
    np.put_along_axis(repeat, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
    return repeat
