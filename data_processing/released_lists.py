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
the negatives. Users with the target or a negative in their history, as shipped, are kept and marked
(`overlap: true`). `--limit N` takes the first N users of each file. CPU, minutes for the pages.
"""

from mllmrec.stage.main import run_main

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic.dataclasses import dataclass

from mllmrec.data.amazon_pages import PageOptions, read_pages
from mllmrec.data.data_split import DataOptions
from mllmrec.data.interactions import log_statistics
from mllmrec.data.loader import run_loader
from mllmrec.data.raw_files import check_raw_file, csv_table
from mllmrec.data.raw_log import require_rows, require_unique
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import encode
from mllmrec.stage.options import option, parse_options, print_options
from mllmrec.stage.schema import Row

SECTION = "data"
SPLITS = {"train": "train", "val": "validation", "test": "test"}  # ending of the file -> split
COLUMNS = ("user", "items", "negatives")

logger = logging.getLogger("mllmrec")  # a script has no name of its own


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


@dataclass(config={"arbitrary_types_allowed": True})
class Lists:
    """The lists as the lines of users.jsonl."""

    lines: list[Row]
    items: pd.DataFrame
    statistics: dict[str, Any]

    def encoded_lines(self) -> Iterator[bytes]:
        """As in the file."""
        return map(encode, self.lines)


def read_lists(path: Path, split: str, own_ids: dict[str, str]) -> tuple[list[Row], list[Row]]:
    """(lines of users.jsonl, rejected rows) of one list file. own_ids: code -> item id."""
    table = csv_table(path, COLUMNS, names=COLUMNS, delimiter="\t", quoted=False)
    lines, bad = [], []
    for number, row in enumerate(table.frame().itertuples(index=False)):
        listed = [[code.strip() for code in text.split(",")] for text in (row.items, row.negatives)]
        unknown = [code for codes in listed for code in codes if code not in own_ids]
        items, negatives = ([own_ids.get(code, "") for code in codes] for codes in listed)
        line = {"user_id": row.user.strip(), "history": items[:-1], "target": items[-1]}
        line |= {"negatives": negatives, "split": split, "fold": None}
        overlap = not set(items[:-1]).isdisjoint([items[-1], *negatives])
        lines.append(line | ({"overlap": True} if overlap else {}))
        if not line["user_id"]:
            bad.append((number, "the user is empty"))
        elif unknown:
            bad.append((number, f"item {unknown[0]!r} is not in the item map"))
        elif len(items) < 2:
            bad.append((number, "a list needs a history and a target"))
        elif items[-1] in negatives:
            bad.append((number, "the target is among the negatives"))
        elif len(set(negatives)) < len(negatives):
            bad.append((number, "a negative is listed twice"))
    rejected, places = table.rejected(bad), {number for number, _ in bad}
    require_rows(len(lines) - len(bad), table, rejected)
    return [line for number, line in enumerate(lines) if number not in places], rejected


def items_of(line: Row) -> list[str]:
    """All items of a line of users.jsonl."""
    return [*line["history"], line["target"], *line["negatives"]]


def load(
    files: tuple[dict[str, Path], Path, Path], options: Options
) -> tuple[list[Row], pd.DataFrame, list[Row]]:
    """(lines of users.jsonl, catalogue, rejected rows)."""
    lists, item_map, pages = files
    table = csv_table(item_map, ("item_id", "original"), delimiter="\t", quoted=False)
    require_unique(table, "item_id", "original")
    own_ids = dict(table.frame().itertuples(index=False))
    lines: list[Row] = []
    rejected: list[Row] = []
    for split, path in lists.items():
        more, bad = read_lists(path, split, own_ids)
        lines, rejected = lines + more[: options.limit or None], rejected + bad
    users = pd.Series([line["user_id"] for line in lines])
    if users.duplicated().any():
        names = ", ".join(map(str, lists.values()))
        raise InputError(f"user {users[users.duplicated()].iloc[0]!r} has two lists in {names}")
    used = sorted({item for line in lines for item in items_of(line)})
    catalogue, without_page = read_pages(pages, used, options)
    missing = set(used) - set(catalogue.index)
    unknown = [[item for item in items_of(line) if item in missing] for line in lines]
    kept = [line for line, items in zip(lines, unknown, strict=True) if not items]
    rejected += without_page + [
        {"user_id": line["user_id"], "reason": f"item {items[0]} has no page or no title"}
        for line, items in zip(lines, unknown, strict=True)
        if items
    ]
    if not kept:
        raise InputError(
            f"none of the {len(lines)} users can be used: the item {unknown[0][0]!r} of user "
            f"{lines[0]['user_id']!r} has no page or no title in {pages}; fetch it again"
        )
    if overlaps := sum("overlap" in line for line in kept):
        logger.info(
            f"{overlaps:,} users have the target or a negative in their history, as shipped; their "
            "lines are marked with overlap: true"
        )
    return kept, catalogue, rejected


def as_they_are(lines: list[Row], catalogue: pd.DataFrame, options: Options) -> Lists:
    """The lines with the statistics of their histories and targets."""
    pairs = [
        (n, item) for n, line in enumerate(lines) for item in (*line["history"], line["target"])
    ]
    users, items = (np.array(column) for column in zip(*pairs, strict=True))
    statistics: dict[str, Any] = log_statistics(users, catalogue.index.get_indexer(items))
    splits = [line["split"] for line in lines]
    written = {split: splits.count(split) for split in SPLITS.values()}
    return Lists(lines, catalogue, {"raw": statistics, **statistics, "written_users": written})


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_options(Options, SECTION, argv, __doc__)
    print_options(options, "stage 1, data: the released lists of Amazon")
    files = find_files(options.raw_dir, options.category)
    run_loader(
        options,
        [*files[0].values(), *files[1:]],
        lambda: load(files, options),
        rules=as_they_are,
        has_urls=True,
    )


if __name__ == "__main__":
    run_main(main)
