"""Stage 1 for the Amazon lists that the authors of MLLM-MSR ship: used as they are.

In, all in {raw_dir}:
     <category>_user_items_negs_train.csv, ..._test.csv, as shipped: user, items and negatives,
                                 separated by tabs; items and negatives separated by commas. A
                                 ..._val.csv is read, too, if it is there
     <category>_i_map.tsv        header original,item_id: the items' own ids
     meta_<category>.jsonl[.gz]  product pages of Amazon Reviews 2023
Out: users.jsonl, items.jsonl, stats.json, image_urls.jsonl: as `amazon.py`. The last of a user's
     items is the target, those before it are the history, in the order of the list; negatives and
     split are the authors'. Users are called as in the lists, items by their own ids

    python data_processing/released_lists.py --config configs/amazon_games_released.yaml

A user with an item that has no page or no title is rejected, and so is one whose target is among
the negatives. `--limit N` takes the first N users of each file. CPU, minutes for the pages.
"""

from mllmrec.stage.main import run_main

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from pydantic.dataclasses import dataclass

from mllmrec.data.amazon_pages import PageOptions, read_pages
from mllmrec.data.interactions import log_statistics
from mllmrec.data.loader import run_loader
from mllmrec.data.raw_files import check_raw_file, csv_table
from mllmrec.data.raw_log import require_rows
from mllmrec.data.split import DataOptions, PreparedData
from mllmrec.stage.errors import InputError
from mllmrec.stage.options import option, parse_options, print_options
from mllmrec.stage.schema import Row

SECTION = "data"
SPLITS = {"train": "train", "val": "validation", "test": "test"}  # ending of the file -> split
COLUMNS = ("user", "items", "negatives")


@dataclass
class Options(DataOptions, PageOptions):
    raw_dir: str = option("data/raw/amazon", "folder of the raw files", min_length=1)


def find_files(raw_dir: str, category: str) -> tuple[dict[str, Path], Path, Path]:
    """(dict split -> list file, item map, pages file) of one category."""
    folder = Path(raw_dir)
    paths = {s: folder / f"{category}_user_items_negs_{end}.csv" for end, s in SPLITS.items()}
    if not paths["validation"].exists():  # not shipped
        del paths["validation"]
    pages = [folder / f"meta_{category}.jsonl{ending}" for ending in ("", ".gz")]
    lists = {split: check_raw_file(path) for split, path in paths.items()}
    item_map = check_raw_file(folder / f"{category}_i_map.tsv")
    return lists, item_map, check_raw_file(pages[1] if pages[1].exists() else pages[0])


def read_lists(path: Path, split: str, own_ids: pd.Series) -> tuple[pd.DataFrame, list[Row]]:
    """(DataFrame of user, items, negatives and split, rejected rows) of one list file.

    own_ids: code -> item id. items and negatives: lists of item ids.
    """
    table = csv_table(path, COLUMNS, names=COLUMNS, delimiter="\t", quoted=False)
    frame, bad = table.frame(), []
    for column in ("items", "negatives"):
        frame[column] = [[code.strip() for code in text.split(",")] for text in frame[column]]
    for row, (_, items, negatives) in enumerate(frame.itertuples(index=False)):
        unknown = [code for code in (*items, *negatives) if code not in own_ids.index]
        if unknown:
            bad.append((row, f"item {unknown[0]!r} is not in the item map"))
        elif len(items) < 2:
            bad.append((row, "a list needs a history and a target"))
        elif items[-1] in negatives:
            bad.append((row, "the target is among the negatives"))
        elif len(set(negatives)) < len(negatives):
            bad.append((row, "a negative is listed twice"))
    rejected = table.rejected(bad)
    frame = frame.drop(index=[row for row, _ in bad]).assign(split=split)
    require_rows(len(frame), table, rejected)
    for column in ("items", "negatives"):
        frame[column] = [own_ids[codes].tolist() for codes in frame[column]]
    return frame, rejected


def load(
    lists: dict[str, Path], item_map: Path, pages: Path, options: Options
) -> tuple[pd.DataFrame, pd.DataFrame, list[Row]]:
    """(lists, catalogue, rejected rows). lists: as in `read_lists`, of all files."""
    table = csv_table(item_map, ("original", "item_id"), delimiter="\t", quoted=False)
    own_ids = table.frame().set_index("item_id")["original"]
    found = [read_lists(path, split, own_ids) for split, path in lists.items()]
    frame = pd.concat([part[: options.limit or None] for part, _ in found], ignore_index=True)
    rejected = [row for _, bad in found for row in bad]
    repeated = frame["user"][frame["user"].duplicated()]
    if len(repeated):
        names = ", ".join(map(str, lists.values()))
        raise InputError(f"user {repeated.iloc[0]!r} has two lists in {names}; remove one of them")
    used = sorted({item for items in (*frame["items"], *frame["negatives"]) for item in items})
    catalogue, without_page = read_pages(pages, used, options)
    rejected += without_page
    known, kept = set(catalogue.index), []
    for user, items, negatives, _ in frame.itertuples(index=False):
        missing = [item for item in (*items, *negatives) if item not in known]
        kept.append(not missing)
        if missing:
            reason = f"item {missing[0]} has no page or no title"
            rejected.append({"user_id": user, "reason": reason})
    return frame[kept], catalogue, rejected


def as_they_are(lists: pd.DataFrame, catalogue: pd.DataFrame, options: Options) -> PreparedData:
    """The lists as the lines of users.jsonl."""
    item_ids = catalogue.index
    lengths = lists["items"].str.len().to_numpy()
    codes = item_ids.get_indexer(lists["items"].explode())
    ends = np.cumsum(lengths)
    is_target = np.zeros(len(codes), dtype=bool)
    is_target[ends - 1] = True
    negatives = np.full((len(lists), lists["negatives"].str.len().max()), -1)
    for row, listed in enumerate(lists["negatives"]):
        negatives[row, : len(listed)] = item_ids.get_indexer(listed)
    statistics = log_statistics(np.repeat(np.arange(len(lists)), lengths), codes)
    written = {split: int((lists["split"] == split).sum()) for split in SPLITS.values()}
    return PreparedData(
        items=catalogue,
        statistics={"raw": statistics, **statistics, "written_users": written},
        user_ids=lists["user"].to_numpy(object),
        item_ids=item_ids.to_numpy(object),
        popularity=np.bincount(codes, minlength=len(item_ids)),
        line_user=np.arange(len(lists)),
        history=codes[~is_target],
        ends=ends - np.arange(1, len(lists) + 1),
        target=codes[is_target],
        split=lists["split"].to_numpy(object),
        fold=np.full(len(lists), -1),
        negatives=negatives,
    )


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_options(Options, SECTION, argv, __doc__)
    print_options(options, "stage 1, data: the released lists of Amazon")
    lists, item_map, pages = find_files(options.raw_dir, options.category)
    files = [*lists.values(), item_map, pages]

    def load_all() -> tuple[pd.DataFrame, pd.DataFrame, list[Row]]:
        return load(lists, item_map, pages, options)

    run_loader(options, files, load_all, rules=as_they_are, has_urls=True)


if __name__ == "__main__":
    run_main(main)
