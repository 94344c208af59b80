"""A log of interactions becomes users.jsonl, items.jsonl and stats.json (paper, "Experiments").

Rules, in this order:
1. items without an image are removed, if `require_image`: no candidate list can have a hole later;
2. of a user's repeated interactions with one item the earliest is kept;
3. users with fewer than `user_core` and items with fewer than `item_core` interactions are removed,
   until none is left to remove;
4. a user's items are put in time order, ties in the order of the raw file; the last is the target.
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

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from pydantic.dataclasses import dataclass as options_dataclass

from mllmrec.data.images import check_image_paths
from mllmrec.data.interactions import (
    Array,
    InteractionLog,
    k_core,
    keep_earliest,
    log_statistics,
    rank_by_id,
    sample_negatives,
    sample_negatives_of_period,
    split_users,
)
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import (
    atomic_file,
    encode_checked,
    relative_path,
    write_json,
    write_rejected,
    write_rows,
)
from mllmrec.stage.options import CommonOptions, option
from mllmrec.stage.schema import Row

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
RELEASED_ITEMS = 6  # of a user, target included, in the released code


@options_dataclass
class SplitOptions(CommonOptions):
    """Options of every loader: what becomes of the log once it is read."""

    raw_dir: str = option("data/raw", "folder of the raw files", min_length=1)
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
    max_history: int = option(0, "keep only the last N items of a history, 0 = all (paper)", ge=0)
    train_fraction: float = option(0.8, "fraction of users (paper: 80/10/10)", gt=0, lt=1)
    validation_fraction: float = option(
        0.1, "fraction of users; the rest is for the test", ge=0, lt=1
    )
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
    paper_users: int = option(0, "the paper's number, printed beside ours; 0 = none", ge=0)
    paper_items: int = option(0, "likewise", ge=0)
    paper_interactions: int = option(0, "likewise", ge=0)
    paper_average_length: float = option(0.0, "likewise", ge=0)
    paper_sparsity: float = option(0.0, "likewise, in per cent", ge=0, le=100)


@dataclass
class PreparedData:
    """The core of a log, and its candidate lists.

    items: DataFrame indexed by item_id, columns title and image; statistics: for stats.json;
    user_ids, item_ids: of the core, in id order; sequences: item codes of all users, each user's
    oldest first, user by user; ends: where in `sequences` each user ends; popularity: interactions
    of each item.

    Lines of users.jsonl, as columns: line_user: codes into user_ids; line_skip: how many of the
    user's last items lie behind the line's target; split; fold (-1: none); negatives: item codes,
    -1: none.
    """

    items: pd.DataFrame
    statistics: dict[str, Any]
    user_ids: Array
    item_ids: Array
    sequences: Array
    ends: Array
    popularity: Array
    line_user: Array
    line_skip: Array
    split: Array
    fold: Array
    negatives: Array

    def lines(self, options: SplitOptions) -> Iterator[Row]:
        """The lines of users.jsonl: users in id order, or in that of the released split."""
        for line, user in enumerate(self.line_user):
            start = self.ends[user - 1] if user else 0
            seen = self.sequences[start : self.ends[user] - self.line_skip[line]]
            if options.history == "released":
                seen = seen[self._released_places(seen, options.released_order)]
            history, target = seen[:-1], seen[-1]
            if options.max_history:
                history = history[-options.max_history :]
            negatives = self.negatives[line]
            yield {
                "user_id": self.user_ids[user],
                "history": self.item_ids[history].tolist(),
                "target": self.item_ids[target],
                "negatives": self.item_ids[negatives[negatives >= 0]].tolist(),
                "split": str(self.split[line]),
                "fold": int(self.fold[line]) if options.folds else None,
            }

    def _released_places(self, seen: Array, order: str) -> Array:
        """Which of a user's items the released code keeps, in its order: the six most popular.

        seen: item codes, oldest first; of equally popular items the oldest come first.
        """
        places = np.argsort(-self.popularity[seen], kind="stable")[:RELEASED_ITEMS]
        return np.sort(places) if order == "time" else places


def check_options(options: SplitOptions) -> None:
    """Raise InputError for options that would leave a line without history or a split without
    users.
    """
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

    catalogue: indexed by item_id, columns title and image (path or None); it must hold every item
    of the log.
    """
    check_options(options)
    order = np.lexsort((log.time, log.user))  # stable: ties stay in the order of the raw file
    keep, statistics = _core(log, catalogue, order, options)
    item_rank, item_ids = rank_by_id(log.item_ids, log.item[keep])
    user_rank, user_ids = rank_by_id(log.user_ids, log.user[keep])
    user, item = user_rank[log.user], item_rank[log.item]  # -1 outside the core
    n_users, n_items = len(user_ids), len(item_ids)
    in_core = (user >= 0) & (item >= 0)
    touched = np.sort(user[in_core].astype(np.int64) * n_items + item[in_core])  # of the WHOLE log

    rows = order[keep[order]]
    by_user = rows[np.argsort(user[rows], kind="stable")]
    sequences, times = item[by_user], log.time[by_user]
    ends = np.cumsum(np.bincount(user[rows], minlength=n_users))
    popularity = np.bincount(sequences, minlength=n_items)
    if options.split_by == "leave_one_out":
        columns = _leave_one_out_lines(n_users, options)
    elif options.split_by == "released":
        by_time = rows[np.argsort(log.time[rows], kind="stable")]
        columns = _released_split_lines(pd.unique(user[by_time]), options)
    elif options.folds > n_users:
        raise InputError(f"--folds {options.folds} are more than the {n_users} users; lower it")
    else:
        columns = _user_split_lines(n_users, options)
    line_user, line_skip, split, fold = columns
    draw = _Negatives(touched, user_ids, popularity, (sequences, times), options)
    negatives = draw.of_lines(line_user, split, times[ends[line_user] - 1 - line_skip])
    chosen = np.isin(line_user, _pilot_users(n_users, split, options))
    statistics["written_users"] = {name: int((split[chosen] == name).sum()) for name in SPLITS}
    return PreparedData(
        items=catalogue.loc[item_ids],
        statistics=statistics,
        user_ids=user_ids,
        item_ids=item_ids,
        sequences=sequences,
        ends=ends,
        popularity=popularity,
        line_user=line_user[chosen],
        line_skip=line_skip[chosen],
        split=split[chosen],
        fold=fold[chosen],
        negatives=negatives[chosen],
    )


def _core(
    log: InteractionLog, catalogue: pd.DataFrame, order: Array, options: SplitOptions
) -> tuple[Array, dict[str, Any]]:
    """(mask of the rows of the log that rules 1 to 3 keep, statistics)."""
    statistics: dict[str, Any] = {"raw": log_statistics(log.user, log.item)}
    image = catalogue["image"].reindex(log.item_ids)
    keep = np.ones(len(log.item), dtype=bool)
    if options.require_image:
        keep = image.notna().to_numpy()[log.item]
    statistics["items_without_image"] = int(image.isna().sum())
    keep &= keep_earliest(log.user, log.item, order)
    keep[keep] = k_core(log.user[keep], log.item[keep], options.user_core, options.item_core)
    if not keep.any():
        raise InputError(
            f"no interaction is left after the filters: {statistics['raw']['interactions']} read, "
            f"{statistics['items_without_image']} items without an image, at least "
            f"{options.user_core} per user and {options.item_core} per item required; lower "
            "--user_core and --item_core, or check that the images are where --raw_dir says"
        )
    return keep, statistics | log_statistics(log.user[keep], log.item[keep])


def _user_split_lines(n_users: int, options: SplitOptions) -> tuple[Array, Array, Array, Array]:
    """(user, skip, split, fold) of one line per user."""
    split, fold = split_users(
        n_users,
        (options.train_fraction, options.validation_fraction),
        (options.folds, options.test_fold),
        np.random.default_rng([options.seed, 1]),
    )
    return np.arange(n_users), np.zeros(n_users, dtype=np.int64), split, fold


def _released_split_lines(users: Array, options: SplitOptions) -> tuple[Array, Array, Array, Array]:
    """(user, skip, split, fold) of one line per user, in the order of the released split.

    users: codes in the order of their first interaction.
    """
    from sklearn.model_selection import train_test_split  # a second to import

    train, rest = train_test_split(users, test_size=0.2, random_state=options.seed)
    validation, test = train_test_split(rest, test_size=0.5, random_state=options.seed)
    line_user = np.concatenate([train, validation, test])
    split = np.repeat(np.array(SPLITS), [len(train), len(validation), len(test)])
    return line_user, np.zeros(len(line_user), dtype=np.int64), split, np.full(len(line_user), -1)


def _leave_one_out_lines(n_users: int, options: SplitOptions) -> tuple[Array, Array, Array, Array]:
    """(user, skip, split, fold) of three lines per user: the last item is the test's target."""
    return (
        np.repeat(np.arange(n_users), len(SPLITS)),
        np.tile(np.arange(len(SPLITS))[::-1], n_users),
        np.tile(np.array(SPLITS), n_users),
        np.full(n_users * len(SPLITS), -1),
    )


@dataclass
class _Negatives:
    """Draws the negatives of the lines.

    touched: as in `sample_negatives`; popularity: interactions of each item; log: (item code, time)
    of all interactions of the core.
    """

    touched: Array
    user_ids: Array
    popularity: Array
    log: tuple[Array, Array]
    options: SplitOptions

    def of_lines(self, line_user: Array, split: Array, target_time: Array) -> Array:
        """Item codes of shape (lines, most negatives), -1 behind the last."""
        options = self.options
        most = max(options.negatives, options.train_negatives)
        negatives = np.full((len(line_user), most), -1, dtype=np.int64)
        for is_train, how_many in ((True, options.train_negatives), (False, options.negatives)):
            where = np.flatnonzero((split == "train") == is_train)
            rng = np.random.default_rng([options.seed, 2, is_train])
            drawn = self._draw(line_user[where], target_time[where], how_many, rng)
            negatives[where, :how_many] = drawn
            short = (drawn < 0).any(1)
            if short.any():
                raise InputError(
                    f"user {self.user_ids[line_user[where[short][0]]]!r} touched so many of the "
                    f"{len(self.popularity)} items that {how_many} negatives cannot be drawn; "
                    "lower --negatives or --train_negatives"
                )
        return negatives

    def _draw(
        self, users: Array, target_time: Array, how_many: int, rng: np.random.Generator
    ) -> Array:
        n_items, sampling = len(self.popularity), self.options.negative_sampling
        if sampling == "period":
            lines = (users, target_time)
            return sample_negatives_of_period(self.touched, lines, self.log, n_items, how_many, rng)
        weights = self.popularity if sampling == "popularity" else None
        return sample_negatives(self.touched, users, n_items, how_many, rng, weights)


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


def data_outputs(options: SplitOptions) -> list[Path]:
    """users.jsonl, items.jsonl and stats.json in the data folder."""
    return [Path(options.data_dir) / name for name in ("users.jsonl", "items.jsonl", "stats.json")]


def write_data(data: PreparedData, options: SplitOptions) -> pd.DataFrame:
    """Write items.jsonl, users.jsonl and stats.json; return the items that were written.

    With --limit only the items that the written users need are written.
    """
    users_path, items_path, stats_path = data_outputs(options)
    images = [relative_path(i, items_path) for i in data.items["image"] if isinstance(i, str)]
    try:
        check_image_paths(images, items_path, options.data_dir, options.image_roots)
    except InputError as reason:  # here the images of the raw files are those that were named
        check_image_paths(images, items_path, options.data_dir, [options.raw_dir])
        logger.info(f"note: {reason}")
    used: set[str] = set()
    with atomic_file(users_path) as file:
        for line in data.lines(options):
            used.update(line["history"], line["negatives"], (line["target"],))
            file.write(encode_checked(users_path, line))
    items = data.items
    if len(np.unique(data.line_user)) < len(data.user_ids):
        items = items[items.index.isin(used)]
    write_items(items, items_path)
    write_json(stats_path, data.statistics)
    return items


def write_items(items: pd.DataFrame, path: Path) -> None:
    """Write items.jsonl. items: indexed by item_id, columns title and image (path or None)."""

    def rows() -> Iterator[Row]:
        for item_id, title, image in items[["title", "image"]].itertuples(name=None):
            name = relative_path(image, path) if isinstance(image, str) else None
            yield {"item_id": item_id, "title": title, "image": name}

    write_rows(path, rows())


def rejected_rows_path(options: SplitOptions) -> Path:
    """Where the rejected rows of the raw files go."""
    return Path(options.data_dir) / "interactions.rejected.jsonl"


def write_data_set(
    data: PreparedData, rejected: Sequence[Row], options: SplitOptions
) -> tuple[pd.DataFrame, dict[str, int]]:
    """Write all outputs of a loader, print the statistics; return (items, counts for the record).

    rejected: rows of the raw files.
    """
    for name in ("train", "test"):  # without validation users, the last epoch is kept
        if data.statistics["written_users"][name] == 0 and not options.limit:
            raise InputError(
                f"of {len(data.user_ids)} users none is in the {name} split; change "
                "--train_fraction, --validation_fraction or --folds"
            )
    data.statistics["rejected_rows"] = len(rejected)
    items = write_data(data, options)
    outputs = data_outputs(options)
    rejected_path = rejected_rows_path(options)
    write_rejected(rejected_path, rejected)
    if rejected:
        logger.info(
            f"{len(rejected):,} rows of the raw files were rejected; each is in {rejected_path} "
            f"with "
            "its reason"
        )
    counts = {
        "in": data.statistics["raw"]["interactions"],
        "users": len(np.unique(data.line_user)),
        "items": len(items),
        "rejected": len(rejected),
    }
    print_statistics(data.statistics, options)
    logger.info(f"wrote {outputs[0]} and {outputs[1]}")
    return items, counts


def print_statistics(statistics: dict[str, Any], options: SplitOptions) -> None:
    """The core's numbers beside the paper's, if the config names them."""
    print(f"{'':16}{'raw log':>12}{'this core':>12}{'the paper':>12}")
    for name in ("users", "items", "interactions", "average_length", "sparsity"):
        paper = getattr(options, f"paper_{name}")
        print(
            f"{name:16}{statistics['raw'][name]:>12,}{statistics[name]:>12,}"
            f"{format(paper, ',') if paper else '-':>12}"
        )
    written = statistics["written_users"].items()
    print(", ".join(f"{count:,} {name}" for name, count in written) + " users written")
