"""A log of interactions becomes users.jsonl, items.jsonl and stats.json (paper, "Experiments").

Rules, in this order:
1. items without an image are removed, if `require_image`: no candidate list can have a hole later;
2. of a user's repeated interactions with one item the earliest is kept;
3. users with fewer than `user_core` and items with fewer than `item_core` interactions are removed,
   until none is left to remove;
4. a user's items are put in time order, ties in the order of the raw file or, with `ties: hash`, in
   one that seed, user and item decide; the last is the target.
   With `history: released` only the six most popular of them are kept before that, as the released
   code does, in the order of time or of popularity;
5. split by user: `seed` decides which users are for training, validation and test; `released`: as
   scikit-learn's `train_test_split` decides, users in the order of their first interaction.
   Leave-one-out: each user's last item is the test target, the second last the validation target,
   the third last the target of the training line, each after the history before it;
6. negatives are drawn without replacement from the remaining items that the user never touched
   anywhere in the log - also in the parts that steps 2 and 3 removed: uniformly, in proportion to
   their interactions, or among the items that others had when the user had the target.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
from pydantic.dataclasses import dataclass as options_dataclass

from mllmrec.data.columns import LINES, encoded, encoded_lists, json_lines, numbers
from mllmrec.data.interactions import (
    Array,
    InteractionLog,
    hashed_pairs,
    k_core,
    log_statistics,
    ranks_in_use,
    sample_negatives,
    sample_negatives_of_period,
    split_users,
)
from mllmrec.stage.errors import InputError
from mllmrec.stage.options import CommonOptions, option
from mllmrec.stage.schema import Row

SPLITS = ("train", "validation", "test")
RELEASED_ITEMS = 6  # of a user, target included, in the released code
FEW_TIMES = 10  # different ones: ratings or years, if most interactions are tied


@options_dataclass
class DataOptions(CommonOptions):
    """Options of every loader."""

    raw_dir: str = option("data/raw", "folder of the raw files", min_length=1)
    paper_users: int = option(0, "the paper's number, printed beside ours; 0 = none", ge=0)
    paper_items: int = option(0, "likewise", ge=0)
    paper_interactions: int = option(0, "likewise", ge=0)
    paper_average_length: float = option(0.0, "likewise", ge=0)
    paper_sparsity: float = option(0.0, "likewise, in per cent", ge=0, le=100)


@options_dataclass
class SplitOptions(DataOptions):
    """Options of what becomes of a log once it is read."""

    user_core: int = option(
        6, "fewest interactions of a user (6 gives the paper's 25,411 users)", ge=2
    )
    item_core: int = option(5, "fewest interactions of an item", ge=1)
    require_image: bool = option(True, "remove items without an image")
    split_by: Literal["user", "released", "leave_one_out"] = option(
        "user",
        "user: each user is in one split (paper); released: the released code's split, lines in "
        "its order (80/10/10, seed 42); leave_one_out: the last item is for the test, the second "
        "last for validation (MLLM4Rec)",
    )
    history: Literal["chronological", "released"] = option(
        "chronological",
        "released: the last of the user's six most popular items is the target, the other five "
        "are the history, as in the released code",
    )
    released_order: Literal["time", "popularity"] = option(
        "time",
        "order of the released history's six items: time, as its committed notebook says; "
        "popularity: as the version with saved outputs has them",
    )
    ties: Literal["file", "hash"] = option(
        "file",
        "order of a user's interactions of one time: file: of the raw file; hash: by a hash of "
        "seed, user and item, whatever the order of the raw file",
    )
    max_history: int = option(0, "keep only the last N items of a history, 0 = all (paper)", ge=0)
    train_fraction: float = option(0.8, "fraction of users (paper: 80/10/10)", gt=0, lt=1)
    validation_fraction: float = option(
        0.1, "fraction of users; the rest is for the test", ge=0, lt=1
    )
    cold_items: float = option(
        0.0,
        "share of the items that no training user may know: a random choice by seed; a test user "
        "whose target is one has such negatives, too, another one has none; validation likewise",
        ge=0,
        lt=1,
    )
    validation_users: int = option(
        0, "at most this many lines of the validation split, a random choice by seed; 0 = all", ge=0
    )
    test_users: int = option(0, "likewise of the test split", ge=0)
    folds: int = option(0, "0: one split; 5: users in five folds (paper: 5-fold validation)", ge=0)
    test_fold: int = option(0, "with folds: the fold that is the test set", ge=0)
    negatives: int = option(20, "negatives of a validation or test user (paper: 20)", ge=0, le=1000)
    train_negatives: int = option(1, "negatives of a training user (paper: 1)", ge=0, le=1000)
    negative_sampling: Literal["uniform", "popularity", "period"] = option(
        "uniform",
        "uniform (paper, released code); popularity: in proportion to an item's interactions, "
        "since popularity alone ranks well among uniform ones; period: uniform among the items of "
        "the 1,000 interactions nearest in time to the target's, since uniform ones are mostly "
        "older or newer than what a user could have seen",
    )


class Sequences(NamedTuple):
    """Interactions as columns, user by user, each user's oldest first; codes and times."""

    users: Array
    items: Array
    times: Array

    def spans(self, n_users: int) -> tuple[Array, Array]:
        """(place of each user's first interaction, place behind the last)."""
        ends = np.cumsum(np.bincount(self.users, minlength=n_users))
        return np.append(0, ends[:-1]), ends

    def tied(self) -> Array:
        """Which interactions have the time of the user's one before."""
        same_user, same_time = (c[1:] == c[:-1] for c in (self.users, self.times))
        return np.append(False, same_user & same_time)


class Lines(NamedTuple):
    """Lines of users.jsonl as columns; skip: how many of the user's last items are left out."""

    user: Array
    skip: Array
    split: Array
    fold: Array


@dataclass
class PreparedData:
    """The core of a log, and its candidate lists.

    items: DataFrame indexed by item_id, columns title and image; statistics: for stats.json;
    user_ids, item_ids: of the core, in id order; popularity: interactions of each item; touched: as
    in `sample_negatives`.

    Lines of users.jsonl, as columns: line_user: codes into user_ids; history: item codes of all
    lines, line by line; ends: where in `history` each line ends; target: item codes; split; fold
    (-1: none); negatives: item codes of shape (lines, most negatives), -1: none; times: of the
    history's items and of the targets, None: not known.

    cold: (items,) bool, which items no training line has; None: not asked for.
    """

    items: pd.DataFrame
    statistics: dict[str, Any]
    user_ids: Array
    item_ids: Array
    popularity: Array
    touched: Array
    line_user: Array
    history: Array
    ends: Array
    target: Array
    split: Array
    fold: Array
    negatives: Array
    times: tuple[Array, Array] | None = None
    cold: Array | None = None

    def lines(self) -> Iterator[Row]:
        """The lines of users.jsonl as dicts."""
        for part in self.encoded_lines():
            yield from map(json.loads, part.splitlines())

    def encoded_lines(self) -> Iterator[bytes]:
        """The lines of users.jsonl: users in id order, or in that of the released split."""
        # Ids are encoded once: there may be millions of lines.
        users, items = encoded(self.user_ids), encoded(self.item_ids)
        is_drawn, ends = self.negatives >= 0, np.append(0, self.ends)
        folds = np.where(self.fold >= 0, self.fold.astype("S"), b"null")
        for start in range(0, len(self.target), LINES):
            part = slice(start, start + LINES)
            first, *own_ends = ends[start : start + LINES + 1]
            drawn = is_drawn[part]
            yield from json_lines(
                user_id=users.take(self.line_user[part]),
                history=encoded_lists(
                    items.take(self.history[first : own_ends[-1]]), np.array(own_ends) - first
                ),
                target=items.take(self.target[part]),
                negatives=encoded_lists(
                    items.take(self.negatives[part][drawn]), drawn.sum(1).cumsum()
                ),
                split=encoded(self.split[part]),
                fold=pa.array(folds[part], pa.binary()),
                **self._more_columns(part, slice(first, own_ends[-1]), np.array(own_ends) - first),
            )

    def _more_columns(self, part: slice, items: slice, ends: Array) -> dict[str, Any]:
        """The optional keys of some lines. items: the part of `history`; ends: where each ends."""
        more = {}
        if self.times is not None:
            history, target = self.times
            more["times"] = encoded_lists(numbers(history[items]), ends)
            more["target_time"] = numbers(target[part])
        if self.cold is not None:
            words = np.array([b"false", b"true"])[self.cold[self.target[part]].astype(int)]
            more["cold"] = pa.array(words, pa.binary())
        return more

    def touched_lines(self) -> Iterator[bytes]:
        """The lines of touched.jsonl: of each test user, all items of the core in the raw log."""
        users = np.unique(self.line_user[self.split == "test"])
        user, item = np.divmod(self.touched, len(self.item_ids))  # sorted by user
        is_listed = np.isin(user, users)
        ends = np.bincount(user[is_listed], minlength=len(self.user_ids))[users].cumsum()
        listed = encoded_lists(encoded(self.item_ids).take(item[is_listed]), ends)
        return json_lines(user_id=encoded(self.user_ids[users]), item_ids=listed)


def check_options(options: SplitOptions) -> None:
    """Raise InputError for options that leave a line without history or a split without users."""
    fractions = options.train_fraction + options.validation_fraction
    wrong = {
        "--train_fraction and --validation_fraction must leave users for the test": (
            not options.folds and fractions >= 1
        ),
        "--folds must be 0 or at least 2, and --test_fold one of them, counted from 0": (
            options.folds == 1 or (options.folds > 0 and options.test_fold >= options.folds)
        ),
        "--split_by leave_one_out needs --user_core 4 or more: a history and three targets": (
            options.split_by == "leave_one_out" and options.user_core < 4
        ),
        "--split_by leave_one_out needs --history chronological: popularity knows later targets": (
            options.split_by == "leave_one_out" and options.history == "released"
        ),
        "--negative_sampling period needs --history chronological: a released target has no time": (
            options.negative_sampling == "period" and options.history == "released"
        ),
        "--cold_items needs --split_by user, --history chronological and another "
        "--negative_sampling than period": (
            options.cold_items > 0
            and (
                options.split_by != "user"
                or options.history != "chronological"
                or options.negative_sampling == "period"
            )
        ),
        "--test_fold needs --folds: without it there is one split": (
            not options.folds and options.test_fold > 0
        ),
        f"--split_by {options.split_by} cannot be used with --folds": (
            options.split_by != "user" and options.folds > 0
        ),
        "--split_by released has fractions of its own: leave --train_fraction at 0.8 and "
        "--validation_fraction at 0.1": (
            options.split_by == "released"
            and (options.train_fraction, options.validation_fraction) != (0.8, 0.1)
        ),
    }
    for message, is_wrong in wrong.items():
        if is_wrong:
            raise InputError(message)


def prepare(log: InteractionLog, catalogue: pd.DataFrame, options: SplitOptions) -> PreparedData:
    """Apply the rules of this module's docstring.

    catalogue: indexed by item_id, columns title and image (path or None). Interactions with items
    that it lacks are left out; the loader has rejected those items.
    """
    check_options(options)
    log = log.only_items(catalogue.index)
    pair = log.user.astype(np.int64) * len(log.item_ids) + log.item
    earliest = np.unique(pair, return_index=True)[1]  # of each pair, sorted by user and item
    keep, statistics = _core(log, catalogue, earliest, options)
    user_rank, users = ranks_in_use(log.user[keep], len(log.user_ids))
    item_rank, items = ranks_in_use(log.item[keep], len(log.item_ids))
    user_ids, item_ids = log.user_ids[users], log.item_ids[items]
    touched = _touched(user_rank[log.user[earliest]], item_rank[log.item[earliest]], len(item_ids))
    own = Sequences(user_rank[log.user[keep]], item_rank[log.item[keep]], log.time[keep])
    del pair, earliest, keep  # each as long as the log
    starts, ends = own.spans(len(user_ids))
    one_time = own.times[starts] == own.times[ends - 1]
    _check_times(own, (user_ids, one_time), options)
    first = log.first_row[users]
    if options.ties == "hash":
        hashes, first = hashed_pairs(user_ids, item_ids, (own.users, own.items), options.seed)
        own = own._replace(items=own.items[np.lexsort((hashes, own.times, own.users))])
    lines = Lines(*_lines(np.lexsort((first, own.times[starts])), options))
    cold = _cold_items(len(item_ids), options)
    known = _without_cold(own, lines, cold)
    left_out = len(lines.user) - len(known[1].user)
    statistics |= {"cold_items": int(cold.sum()), "left_out_users": left_out}
    own, lines = known
    popularity = np.bincount(own.items, minlength=len(item_ids))
    starts, ends = own.spans(len(user_ids))
    last = ends[lines.user] - 1 - lines.skip  # place of each line's target
    negatives = _negatives((touched, popularity, cold), own, (lines, last), options)
    pilot = np.isin(lines.user, _pilot_users(len(user_ids), lines.split, options))
    chosen = pilot & _held_out(lines.split, pilot, options)
    spans = (starts[lines.user[chosen]], last[chosen])
    places, history_ends, targets = _histories(own.items, spans, popularity, options)
    statistics |= _counts(own, lines, last, chosen) | {"users_with_one_time": int(one_time.sum())}
    data = PreparedData(
        items=catalogue.loc[item_ids],
        statistics=statistics,
        user_ids=user_ids,
        item_ids=item_ids,
        popularity=popularity,
        touched=touched,
        line_user=lines.user[chosen],
        history=own.items[places],
        ends=history_ends,
        target=own.items[targets],
        split=lines.split[chosen],
        fold=lines.fold[chosen],
        negatives=negatives[chosen],
        times=(own.times[places], own.times[targets]) if log.has_times else None,
        cold=cold if options.cold_items else None,
    )
    if not pilot.all():  # only the items that the lines name
        named = [data.history, data.target, data.negatives[data.negatives >= 0]]
        data.items = data.items.iloc[np.unique(np.concatenate(named))]
    return data


def _cold_items(n_items: int, options: SplitOptions) -> Array:
    """(items,) bool: a random share of the items, which no training user may know."""
    order = np.random.default_rng([options.seed, 7]).permutation(n_items)
    return order < round(options.cold_items * n_items)


def _without_cold(own: Sequences, lines: Lines, cold: Array) -> tuple[Sequences, Lines]:
    """Without cold items in the training users' sequences, and without those who keep only one."""
    if not cold.any():
        return own, lines
    training = np.isin(own.users, lines.user[lines.split == "train"])
    own = Sequences(*(column[~(training & cold[own.items])] for column in own))
    length = np.bincount(own.users, minlength=int(lines.user.max()) + 1)
    return own, Lines(*(column[length[lines.user] > 1] for column in lines))


def _counts(own: Sequences, lines: Lines, last: Array, chosen: Array) -> dict[str, Any]:
    """How many lines are written, and how many interactions and test targets are tied."""
    tied, split = own.tied(), lines.split
    targets = tied[last[split == "test"]]
    return {
        "written_users": {name: int((split[chosen] == name).sum()) for name in SPLITS},
        "tied_interactions": int(tied.sum()),
        "tied_test_targets": int(targets.sum()),
        "test_targets": len(targets),
    }


def _check_times(own: Sequences, users: tuple[Array, Array], options: SplitOptions) -> None:
    """Raise InputError for times that leave the order of most interactions open.

    users: (ids, which have one time only).
    """
    (user_ids, same), times, tied = users, own.times, own.tied()
    if options.ties == "file" and same.mean() > 0.5:
        raise InputError(
            f"the interactions of {same.sum():,} of {len(same):,} users, as {user_ids[same][0]!r}, "
            "all have one time, so their order is not known; correct the times (places 1, 2, 3 "
            "... are times, too), or pass --ties hash for an order that the seed decides"
        )
    if tied.mean() >= 0.5 and 1 < len(values := np.unique(times)) <= FEW_TIMES:
        raise InputError(
            f"the times have only {len(values)} different values, as ratings have; check which "
            "column holds the times"
        )


def _core(
    log: InteractionLog, catalogue: pd.DataFrame, earliest: Array, options: SplitOptions
) -> tuple[Array, dict[str, Any]]:
    """(mask of the rows of the log that rules 1 to 3 keep, statistics)."""
    statistics: dict[str, Any] = {"raw": log_statistics(log.user, log.item)}
    image = catalogue["image"].reindex(log.item_ids)
    keep = np.zeros(len(log.item), dtype=bool)
    keep[earliest] = True
    if options.require_image:
        keep &= image.notna().to_numpy()[log.item]
    statistics["items_without_image"] = int(image.isna().sum())
    if options.require_image and not keep.any():
        raise InputError(
            f"none of the {len(image)} items of the log has an image, as {log.item_ids[0]!r}; name "
            "them <prefix>_covers/<item>.jpg (MicroLens) or as in catalogue.jsonl (your own data), "
            "or pass --require_image false"
        )
    keep[keep] = k_core(log.user[keep], log.item[keep], options.user_core, options.item_core)
    if not keep.any():
        raise InputError(
            f"no interaction is left after the filters: {statistics['raw']['interactions']} read, "
            f"{statistics['items_without_image']} items without an image, at least "
            f"{options.user_core} per user and {options.item_core} per item required; lower "
            "--user_core and --item_core, or check that the images are where --raw_dir says"
        )
    return keep, statistics | log_statistics(log.user[keep], log.item[keep])


def _touched(user: Array, item: Array, n_items: int) -> Array:
    """Sorted keys user * n_items + item of pairs that are sorted; -1: outside the core."""
    inside = (user >= 0) & (item >= 0)
    return user[inside].astype(np.int64) * n_items + item[inside]


def _histories(
    sequences: Array, spans: tuple[Array, Array], popularity: Array, options: SplitOptions
) -> tuple[Array, Array, Array]:
    """(place in `sequences` of all histories' items, where each history ends, each target's place).

    sequences: item codes, each user's oldest first; spans: place of each line's first item and of
    its target in them.
    """
    (start, last), kept_places = spans, None
    if options.history == "released":  # the most popular items, of equally popular ones the oldest
        kept = []
        for a, b in zip(start, last, strict=True):
            best = np.argsort(-popularity[sequences[a : b + 1]], kind="stable")[:RELEASED_ITEMS]
            kept.append(a + (np.sort(best) if options.released_order == "time" else best))
        last = np.cumsum([len(items) for items in kept]) - 1
        start = np.append(0, last[:-1] + 1)
        kept_places = np.concatenate(kept)
    if options.max_history:
        start = np.maximum(start, last - options.max_history)
    length = last - start
    ends = np.cumsum(length)
    places = np.arange(ends[-1]) + np.repeat(start - ends + length, length)
    if kept_places is not None:
        places, last = kept_places[places], kept_places[last]
    return places, ends, last


def _lines(users: Array, options: SplitOptions) -> tuple[Array, Array, Array, Array]:
    """(user, skip, split, fold) of each line; skip: how many of the user's last items are left out.

    users: codes in the order of their first interaction.
    """
    n_users, n_splits = len(users), len(SPLITS)
    if options.split_by == "leave_one_out":  # three lines per user
        skip = np.tile(np.arange(n_splits)[::-1], n_users)
        split = np.tile(np.array(SPLITS), n_users)
        return np.repeat(np.arange(n_users), n_splits), skip, split, np.full(len(skip), -1)
    skip = np.zeros(n_users, dtype=np.int64)
    if options.split_by == "released":  # the lines are in its order
        from sklearn.model_selection import train_test_split  # a second to import

        train, rest = train_test_split(users, test_size=0.2, random_state=options.seed)
        parts = (train, *train_test_split(rest, test_size=0.5, random_state=options.seed))
        split = np.repeat(np.array(SPLITS), [len(part) for part in parts])
        return np.concatenate(parts), skip, split, np.full(n_users, -1)
    if options.folds > n_users:
        raise InputError(f"--folds {options.folds} are more than the {n_users} users; lower it")
    fractions = (options.train_fraction, options.validation_fraction)
    folds, rng = (options.folds, options.test_fold), np.random.default_rng([options.seed, 1])
    return np.arange(n_users), skip, *split_users(n_users, fractions, folds, rng)


def _negatives(
    items: tuple[Array, Array, Array],
    own: Sequences,
    targets: tuple[Lines, Array],
    options: SplitOptions,
) -> Array:
    """Item codes of shape (lines, most negatives); -1 behind a line's last.

    items: (touched, as in `sample_negatives`; interactions of each item; which are cold); targets:
    (lines, place of each line's target in `own`). A cold target has cold negatives, another one has
    none, so that being cold tells nothing in a list.
    """
    (touched, popularity, cold), (lines, last) = items, targets
    users, split, target = lines.user, lines.split, own.items[last]
    most, n_items = max(options.negatives, options.train_negatives), len(popularity)
    negatives = np.full((len(users), most), -1, dtype=np.int64)
    groups = product((True, False), (False, True) if cold.any() else (False,))
    for is_train, is_cold in groups:
        where = np.flatnonzero(((split == "train") == is_train) & (cold[target] == is_cold))
        how_many = options.train_negatives if is_train else options.negatives
        rng = np.random.default_rng([options.seed, 2, is_train, *([1] if is_cold else [])])
        if options.negative_sampling == "period":
            asked, log = (users[where], own.times[last[where]]), (own.items, own.times)
            drawn = sample_negatives_of_period(touched, asked, log, n_items, how_many, rng)
        else:
            weights = popularity if options.negative_sampling == "popularity" else None
            if cold.any():
                weights = (cold == is_cold) * (1 if weights is None else weights)
            drawn = sample_negatives(touched, users[where], n_items, how_many, rng, weights)
        if (drawn < 0).any():
            raise InputError(
                f"a user touched so many of the {n_items} items that {how_many} negatives cannot "
                "be drawn; lower --negatives or --train_negatives"
            )
        negatives[where, :how_many] = drawn
    return negatives


def _held_out(split: Array, pilot: Array, options: SplitOptions) -> Array:
    """(lines,) bool: False for lines beyond --validation_users and --test_users, among `pilot`."""
    kept = np.ones(len(split), dtype=bool)
    for name, most in (("validation", options.validation_users), ("test", options.test_users)):
        lines = np.flatnonzero(pilot & (split == name))
        order = np.random.default_rng([options.seed, 6]).permutation(len(lines))
        kept[lines[order[most:]]] = not most
    return kept


def _pilot_users(n_users: int, split: Array, options: SplitOptions) -> Array:
    """Which users are written: all, or with --limit N a random N by seed, from all splits alike."""
    if not 0 < options.limit < n_users:
        return np.arange(n_users)
    order = np.random.default_rng([options.seed, 3]).permutation(n_users)
    if options.split_by == "leave_one_out":  # every user is in every split
        return np.sort(order[: options.limit])
    rank = np.empty(n_users)
    for name in SPLITS:  # 0 ... 1 within each split, so that the smallest ranks are from all splits
        members = order[split[order] == name]
        rank[members] = (np.arange(len(members)) + 0.5) / max(len(members), 1)
    return np.sort(np.argsort(rank, kind="stable")[: options.limit])
