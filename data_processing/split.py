"""Stage 1, second half: a log of interactions becomes users.jsonl, items.jsonl and stats.json (paper, "Experiments").

In:  a log (user, item, timestamp) and a catalogue (item_id, title, image), from `microlens.py`, `amazon.py` or
     `sample.py`; or, run by itself, your own `interactions.csv` (columns user,item,timestamp) and `catalogue.jsonl`.
Out: {data_dir}/items.jsonl  item_id, title, image (path relative to the file, or null)
     {data_dir}/users.jsonl  user_id, history (item ids, oldest first, target left out), target, negatives, split, fold
     {data_dir}/stats.json   the rows of the paper's Table 2

    python data_processing/split.py --config configs/microlens.yaml --raw_dir my_data --data_dir data/mine

Rules, in this order:
1. items without an image leave, if `require_image`: no candidate list can have a hole later;
2. of a user's repeated interactions with one item the earliest stays;
3. users with fewer than `user_core` and items with fewer than `item_core` interactions leave, until none is left to go;
4. a user's items are put in time order, ties in the order of the raw file; the last is the target;
5. users are split by `seed`; negatives are drawn uniformly, without replacement, from the remaining items that the user
   never touched anywhere in the log - in the parts that steps 2 and 3 took away, too.
No loop runs over interactions; users are ordered by id (shorter ids first, then alphabetically).
CPU; MicroLens-50k in about 2 seconds.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from data_processing.config import CommonArgs, option, parse_args, show
from data_processing.errors import InputError, run
from data_processing.jsonl import dump, read_by_id, relative_path, require, whole_file, write_json, write_rejected, write_rows
from data_processing.run_record import digests, is_up_to_date, settings_of, write_record

SPLITS = ("train", "validation", "test")


@dataclass
class SplitArgs(CommonArgs):
    """Options of every loader: what becomes of the log once it is read."""

    raw_dir: str = option("data/raw", "folder of the raw files")
    user_core: int = option(6, "fewest interactions of a user (6 gives the paper's 25,411 users; the released notebook: 7)")
    item_core: int = option(5, "fewest interactions of an item")
    require_image: bool = option(True, "leave out items without an image")
    history: Literal["chronological", "released"] = option(
        "chronological", "released: the user's six most popular items, as the released notebook does"
    )
    max_history: int = option(0, "keep only the last N items of a history, 0 = all (paper)")
    train_fraction: float = option(0.8, "share of users (paper: 80/10/10)")
    validation_fraction: float = option(0.1, "share of users; the rest is for the test")
    folds: int = option(0, "0: one split; 5: users in five folds (paper: 5-fold validation)")
    test_fold: int = option(0, "with folds: the fold that is the test set")
    negatives: int = option(20, "negatives of a validation or test user (paper: 20)")
    train_negatives: int = option(1, "negatives of a training user (paper: 1)")
    paper_users: int = option(0, "the paper's number, printed beside ours; 0 = none")
    paper_items: int = option(0, "likewise")
    paper_interactions: int = option(0, "likewise")
    paper_average_length: float = option(0.0, "likewise")
    paper_sparsity: float = option(0.0, "likewise, in per cent")


@dataclass
class Log:
    """Interactions as columns. user, item: int codes into user_ids, item_ids; time: int; all of one length, raw order."""

    user_ids: np.ndarray
    item_ids: np.ndarray
    user: np.ndarray
    item: np.ndarray
    time: np.ndarray

    @classmethod
    def from_ids(cls, users, items, times):
        """From three columns: ids as strings, times as integers."""
        user, user_ids = pd.factorize(pd.Series(users, dtype="str"))
        item, item_ids = pd.factorize(pd.Series(items, dtype="str"))
        return cls(user_ids.to_numpy(object), item_ids.to_numpy(object), user, item, np.asarray(times, dtype=np.int64))

    def only_items(self, known):
        """The log without the interactions with items that are not in `known` (an index of item ids)."""
        keep = pd.Index(self.item_ids).isin(known)[self.item]
        return self if keep.all() else Log(self.user_ids, self.item_ids, self.user[keep], self.item[keep], self.time[keep])


# ------------------------------------------------------------------------------------------------ the steps
def keep_earliest(log_user, log_item, order):
    """Mask of the rows that are the first of their (user, item) in `order` (row numbers, oldest first)."""
    pair = log_user.astype(np.int64) * (log_item.max(initial=0) + 1) + log_item
    first = ~pd.Series(pair[order]).duplicated().to_numpy()
    mask = np.zeros(len(order), dtype=bool)
    mask[order[first]] = True
    return mask


def k_core(user, item, user_core, item_core):
    """Mask of the rows left when users below `user_core` and items below `item_core` leave until none has to go."""
    keep = np.ones(len(user), dtype=bool)
    while True:
        per_user = np.bincount(user[keep], minlength=user.max(initial=-1) + 1)
        per_item = np.bincount(item[keep], minlength=item.max(initial=-1) + 1)
        still = keep & (per_user[user] >= user_core) & (per_item[item] >= item_core)
        if still.sum() == keep.sum():
            return keep
        keep = still


def sample_negatives(touched, users, n_items, how_many, rng):
    """Items the users never touched, uniform without replacement.

    touched: sorted int64 keys user x n_items + item; users: int codes, shape (n,); items are 0 … n_items - 1.
    Returns int64 of shape (n, how_many); a row that cannot be filled holds -1.
    """
    users = users.astype(np.int64)
    if how_many == 0:
        return np.empty((len(users), 0), dtype=np.int64)
    drawn = rng.integers(0, n_items, size=(len(users), 2 * how_many + 8))
    good = ~_is_in(users[:, None] * n_items + drawn, touched) & ~_repeats_in_row(drawn)
    good &= good.cumsum(1) <= how_many
    found = np.full((len(users), how_many), -1, dtype=np.int64)
    full = good.sum(1) == how_many
    found[full] = drawn[full][good[full]].reshape(-1, how_many)
    for row in np.flatnonzero(~full):  # hardly anyone, unless the catalogue is tiny: go through all items
        order = rng.permutation(n_items)
        free = order[~_is_in(users[row] * n_items + order, touched)]
        if len(free) >= how_many:
            found[row] = free[:how_many]
    return found


def _is_in(keys, sorted_keys):
    """Mask of shape keys.shape: which keys stand in the sorted array."""
    place = np.minimum(np.searchsorted(sorted_keys, keys), len(sorted_keys) - 1)
    return sorted_keys[place] == keys


def _repeats_in_row(values):
    """Mask of the entries that stand further left in their row, too."""
    order = np.argsort(values, axis=1, kind="stable")
    ordered = np.take_along_axis(values, order, axis=1)
    repeat = np.zeros(values.shape, dtype=bool)
    np.put_along_axis(repeat, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
    return repeat


def split_users(n_users, train_fraction, validation_fraction, folds, test_fold, rng):
    """(split, fold): arrays of length n_users; fold is -1 without folds.

    One permutation decides all. With folds, the users of `test_fold` are the test set and `validation_fraction` of all
    users is taken from the rest.
    """
    place = np.empty(n_users, dtype=np.int64)
    place[rng.permutation(n_users)] = np.arange(n_users)
    fold = place % folds if folds else np.full(n_users, -1)
    if folds:
        rank_in_rest = np.argsort(np.argsort(np.where(fold == test_fold, n_users + place, place)))
        split = np.where(rank_in_rest < round(validation_fraction * n_users), "validation", "train")
        return np.where(fold == test_fold, "test", split), fold
    train, validation = round(train_fraction * n_users), round(validation_fraction * n_users)
    return np.where(place < train, "train", np.where(place < train + validation, "validation", "test")), fold


def check_ranges(args):
    """Raises InputError for options that would leave a user without history or a split without users."""
    wrong = {
        "--user_core must be at least 2: a history and a target": args.user_core < 2,
        "--train_fraction and --validation_fraction must lie between 0 and 1 and leave users for the test": not (
            0 < args.train_fraction < 1
            and 0 <= args.validation_fraction < 1
            and (args.folds or args.train_fraction + args.validation_fraction < 1)
        ),
        "--folds must be 0 or at least 2, and --test_fold one of them, counted from 0": args.folds in (1, *range(-9, 0))
        or (args.folds > 0 and not 0 <= args.test_fold < args.folds),
    }
    for message, is_wrong in wrong.items():
        if is_wrong:
            raise InputError(message)


def prepare(log, catalogue, args):
    """The six rules of this file's docstring, applied.

    log: Log; catalogue: DataFrame indexed by item_id with columns title and image (path or None). Every item of the log
    must be in the catalogue. Returns (items DataFrame, users dict of columns, stats dict).
    """
    check_ranges(args)
    stats = {"raw": _table(log.user, log.item)}  # the core's own table joins it at the top level
    item, user, when = log.item, log.user, log.time
    image = catalogue["image"].reindex(log.item_ids)
    keep = image.notna().to_numpy()[item] if args.require_image else np.ones(len(item), dtype=bool)
    stats["items_without_image"] = int(image.isna().sum())
    order = np.lexsort((when, user))  # stable: ties stay in the order of the raw file
    keep &= keep_earliest(user, item, order)
    keep[keep] = k_core(user[keep], item[keep], args.user_core, args.item_core)
    if not keep.any():
        raise InputError(
            f"no interaction is left after the filters: {stats['raw']['interactions']} read, "
            f"{stats['items_without_image']} items without an image, at least {args.user_core} per user and {args.item_core} "
            "per item asked for; lower --user_core and --item_core, or see whether the images are where --raw_dir says"
        )
    stats |= _table(user[keep], item[keep])

    # Codes of the core, in the order of the ids, so that nothing depends on the order of the raw file.
    item_rank, core_items = _rank_by_id(log.item_ids, item[keep])
    user_rank, core_users = _rank_by_id(log.user_ids, user[keep])
    n_items = len(core_items)
    user, item = user_rank[user], item_rank[item]  # -1 outside the core
    mine = (user >= 0) & (item >= 0)
    touched = np.sort(user[mine].astype(np.int64) * n_items + item[mine])  # of the WHOLE log

    rows = order[keep[order]]
    core_user, core_item = user[rows], item[rows]
    by_user = np.argsort(core_user, kind="stable")
    core_item = core_item[by_user]
    ends = np.cumsum(np.bincount(core_user, minlength=len(core_users)))
    popularity = np.bincount(core_item, minlength=n_items)

    split, fold = split_users(
        len(core_users), args.train_fraction, args.validation_fraction, args.folds, args.test_fold, np.random.default_rng([args.seed, 1])
    )
    chosen = _pilot_users(split, args)
    negatives = np.full((len(core_users), max(args.negatives, args.train_negatives)), -1)
    for is_train, how_many in ((True, args.train_negatives), (False, args.negatives)):
        who = np.flatnonzero((split == "train") == is_train)
        negatives[who, :how_many] = sample_negatives(touched, who, n_items, how_many, np.random.default_rng([args.seed, 2, is_train]))
        if (negatives[who, :how_many] < 0).any():
            short = core_users[who[(negatives[who, :how_many] < 0).any(1)][0]]
            raise InputError(
                f"user {short!r} has touched so many of the {n_items} items that {how_many} negatives cannot be drawn; lower "
                "--negatives or --train_negatives"
            )
    users = {
        "ids": core_users, "item_ids": core_items, "items": core_item, "ends": ends, "split": split, "fold": fold,
        "negatives": negatives, "popularity": popularity, "chosen": chosen,
    }  # fmt: skip
    stats["written_users"] = {name: int((split[chosen] == name).sum()) for name in SPLITS}
    return catalogue.loc[core_items], users, stats


def _table(user, item):
    """The rows of the paper's Table 2 for one log."""
    users, items, interactions = *(int(np.count_nonzero(np.bincount(codes))) for codes in (user, item)), len(user)
    return {
        "users": users,
        "items": items,
        "interactions": interactions,
        "average_length": round(interactions / max(users, 1), 2),
        "sparsity": round(100 * (1 - interactions / max(users * items, 1)), 2),
    }


def _rank_by_id(ids, codes):
    """(rank of each code among the codes in use, -1 for the others; the ids in use in rank order)."""
    used = np.flatnonzero(np.bincount(codes, minlength=len(ids)))  # counting: much faster than np.unique
    names = ids[used].astype(str)
    order = np.lexsort((names, np.char.str_len(names)))
    rank = np.full(len(ids), -1, dtype=np.int32)  # half the memory to jump about in
    rank[used[order]] = np.arange(len(used), dtype=np.int32)
    return rank, ids[used[order]]


def _pilot_users(split, args):
    """Which users are written: all, or with --limit N a random N by seed, shared among the splits as all users are."""
    if not 0 < args.limit < len(split):
        return np.arange(len(split))
    order = np.random.default_rng([args.seed, 3]).permutation(len(split))
    rank = np.empty(len(split))
    for name in SPLITS:  # 0 … 1 within each split, so that the smallest ranks come from all splits alike
        mine = order[split[order] == name]
        rank[mine] = (np.arange(len(mine)) + 0.5) / max(len(mine), 1)
    return np.sort(np.argsort(rank, kind="stable")[: args.limit])


# ---------------------------------------------------------------------------------------------- the outputs
def histories(users, args):
    """Yields (row, history as item codes, target as item code) for each chosen user, in id order."""
    for row in users["chosen"]:
        start = users["ends"][row - 1] if row else 0
        seen = users["items"][start : users["ends"][row]]
        history, target = seen[:-1], seen[-1]
        if args.history == "released":  # the six most popular items of the user, most popular first
            history = history[np.argsort(-users["popularity"][history], kind="stable")][:6]
        yield row, history[-args.max_history :] if args.max_history else history, target


def write_data(items, users, stats, args):
    """Writes items.jsonl, users.jsonl and stats.json; returns the items and the number of users that were written."""
    item_ids, used = users["item_ids"], np.zeros(len(users["item_ids"]), dtype=bool)
    with whole_file(Path(args.data_dir) / "users.jsonl") as file:
        for row, history, target in histories(users, args):
            negatives = users["negatives"][row]
            negatives = negatives[negatives >= 0]
            for codes in (history, target, negatives):
                used[codes] = True
            line = {
                "user_id": users["ids"][row],
                "history": item_ids[history].tolist(),
                "target": item_ids[target],
                "negatives": item_ids[negatives].tolist(),
                "split": str(users["split"][row]),
                "fold": int(users["fold"][row]) if args.folds else None,
            }
            file.write(dump(line))
    path = Path(args.data_dir) / "items.jsonl"
    if len(users["chosen"]) == len(users["ids"]):
        used[:] = True  # the whole core; with --limit only what the chosen users need
    rows = (
        {"item_id": item_id, "title": title, "image": relative_path(image, path) if isinstance(image, str) else None}
        for item_id, title, image in items.loc[used, ["title", "image"]].itertuples(name=None)
    )
    write_rows(path, rows)
    write_json(Path(args.data_dir) / "stats.json", stats)
    return items[used], len(users["chosen"])


def print_stats(stats, args):
    """The core's numbers beside the paper's, where the config names them."""
    print(f"{'':16}{'raw log':>12}{'this core':>12}{'the paper':>12}")
    for name in ("users", "items", "interactions", "average_length", "sparsity"):
        paper = getattr(args, f"paper_{name}")
        print(f"{name:16}{stats['raw'][name]:>12,}{stats[name]:>12,}{format(paper, ',') if paper else '-':>12}")
    print(", ".join(f"{count:,} {name}" for name, count in stats["written_users"].items()) + " users written")


def run_loader(args, raw_files, load, complete=None, also=(), **more):
    """What all loaders share: skip if nothing changed, load, apply the rules, write, record.

    raw_files: what is read, for the record; load: function () -> (Log, catalogue DataFrame, list of refused rows);
    complete: function (items of the core) -> the same with their titles, for loaders that read these last; also: outputs
    that the caller adds, so that nothing is up to date without them; more: what else decides the result, e.g. the number
    of images.
    Returns (items that were written, users, stats), or None if the outputs were up to date.
    """
    started = time.monotonic()
    folder = Path(args.data_dir)
    settings = settings_of(args, limit=args.limit, raw_dir=args.raw_dir, **more)
    inputs = digests(*raw_files)
    outputs = [folder / name for name in ("users.jsonl", "items.jsonl", "stats.json")] + list(also)
    if is_up_to_date(outputs, settings, inputs, args.overwrite):
        print(f"{outputs[0]} is up to date, nothing to do")
        return None
    log, catalogue, refused = load()
    items, users, stats = prepare(log, catalogue, args)
    items = complete(items) if complete else items
    stats["rejected_rows"] = len(refused)
    items, n_users = write_data(items, users, stats, args)
    rejected_path = folder / "interactions.rejected.jsonl"
    write_rejected(rejected_path, refused)
    if refused:
        print(f"{len(refused):,} rows of the raw files were refused; each is in {rejected_path} with its reason")
    rows = {"in": stats["raw"]["interactions"], "users": n_users, "items": len(items), "rejected": len(refused)}
    write_record(outputs[0], args, settings, inputs, time.monotonic() - started, rows)
    print_stats(stats, args)
    print(f"wrote {outputs[0]} and {outputs[1]} in {time.monotonic() - started:.1f} s")
    return items, users, stats


# ------------------------------------------------------------------------------------- your own data set
def load_own(raw_dir):
    """(Log, catalogue, refused rows) from interactions.csv and catalogue.jsonl in `raw_dir`."""
    from data_processing.tables import read_table, set_aside, with_time

    pairs, refused = read_table(Path(raw_dir) / "interactions.csv", ("user", "item", "timestamp"))
    path = Path(raw_dir) / "catalogue.jsonl"
    rows = list(read_by_id(path, "item_id", keys=("item_id", "title", "image")).values())
    for row in rows:
        if not isinstance(row["title"], str) or not isinstance(row["image"], str | None):
            raise InputError(f"{path}, item {row['item_id']!r}: title must be a string, image a string or null; correct the line")
    images = [str(path.parent / row["image"]) if row["image"] and (path.parent / row["image"]).is_file() else None for row in rows]
    catalogue = pd.DataFrame({"title": [row["title"] for row in rows], "image": images}, index=[row["item_id"] for row in rows])
    pairs, refused = with_time(pairs, "interactions.csv", refused)
    pairs, refused = set_aside(pairs, pairs["user"] == "", "the user is empty", "interactions.csv", refused)
    pairs, refused = set_aside(
        pairs, ~pairs["item"].isin(catalogue.index), "the item is not in catalogue.jsonl", "interactions.csv", refused
    )
    return Log.from_ids(pairs["user"], pairs["item"], pairs["time"]), catalogue, refused


def main(argv=None):
    args = parse_args(SplitArgs, "data", argv, __doc__)
    show(args, "stage 1, data: your own interactions.csv and catalogue.jsonl")
    remedy = "you; the README, section «Real data», tells its form, or name another --raw_dir. Nothing else"
    raw_files = [require(Path(args.raw_dir) / name, maker=remedy) for name in ("interactions.csv", "catalogue.jsonl")]
    run_loader(args, raw_files, lambda: load_own(args.raw_dir))
    print(f"next: bash scripts/02_image_summary.sh {args.config}")


if __name__ == "__main__":
    run(main)
