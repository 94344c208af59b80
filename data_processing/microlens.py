"""Stage 1 for MicroLens-50k and -100k, from the published files.

In, all in {raw_dir}, as published:
     MicroLens-50k_pairs.csv     header user,item,timestamp (milliseconds); or
     MicroLens-50k_pairs.tsv     user, TAB, item ids separated by blanks, oldest first
     MicroLens-50k_titles.csv    item,title with or without a header; also *_title_en.csv
     MicroLens-50k_covers/       <item>.jpg, also .jpeg, .png, .webp, upper case
Out: see `split.py`; the rules of the split are in `mllmrec/data/data_split.py`.

    python data_processing/microlens.py --config configs/microlens.yaml --raw_dir data/raw/microlens

CPU; about 2 seconds for MicroLens-50k.
"""

from mllmrec.stage.main import run_main

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
from pydantic.dataclasses import dataclass

from mllmrec.data.data_split import SplitOptions
from mllmrec.data.images import image_index
from mllmrec.data.interactions import InteractionLog
from mllmrec.data.loader import run_loader
from mllmrec.data.raw_files import RawTable, check_raw_file, csv_table, header_of
from mllmrec.data.raw_log import read_log, read_titles, require_unique
from mllmrec.stage.errors import InputError
from mllmrec.stage.options import option, parse_options, print_options
from mllmrec.stage.schema import Row

SECTION = "data"
HEADERS = ("item", "item_id", "id", "video_id")  # first fields of a header of titles


@dataclass
class Options(SplitOptions):
    name: str = option(
        "",
        "prefix of the files, e.g. MicroLens-50k; needed if there are several",
        pattern=r"^[\w.-]*$",
    )


def find_files(raw_dir: str, name: str) -> tuple[Path, Path, Path | None]:
    """(pairs file, titles file, covers folder or None) in `raw_dir`."""
    folder, wanted = Path(raw_dir), name or "*"
    pairs = sorted(p for end in ("csv", "tsv") for p in folder.glob(f"{wanted}_pairs.{end}"))
    if not pairs:
        raise InputError(
            f"{folder} has no {wanted}_pairs.csv or .tsv; docs/data.md says where to get "
            "it, or name another --raw_dir"
        )
    if len(pairs) > 1:
        names = f"{pairs[0].name}, {pairs[1].name}"
        remedy = "choose one with --name"
        if len({path.stem for path in pairs}) == 1:
            remedy = "keep one of them there"
        raise InputError(f"{folder} has {len(pairs)} sets of pairs ({names}); {remedy}")
    prefix = pairs[0].name.rsplit("_pairs", 1)[0]
    titles = [folder / f"{prefix}_{end}" for end in ("titles.csv", "title_en.csv", "title.csv")]
    existing = [path for path in titles if path.exists()]
    if not existing:
        raise InputError(f"{titles[0]} is missing; docs/data.md says where to get it")
    covers = folder / f"{prefix}_covers"
    files = check_raw_file(pairs[0]), check_raw_file(existing[0])
    return *files, covers if covers.is_dir() else None


def check_options(options: Options, pairs: Path, covers: Path | None) -> None:
    """Raise InputError for options that need covers or times which are not there."""
    if options.require_image and covers is None:
        prefix = pairs.name.rsplit("_pairs", 1)[0]
        raise InputError(
            f"{options.raw_dir} has no folder {prefix}_covers; put the covers there, or pass "
            "--require_image false to prepare the log without them"
        )
    if pairs.suffix == ".csv":
        return
    for option_name in ("split_by released", "negative_sampling period"):
        name, value = option_name.split()
        if getattr(options, name) == value:
            raise InputError(
                f"{pairs} has no timestamps, which --{option_name} needs; give "
                f"{pairs.stem}.csv, or another --{name}"
            )


def pairs_table(path: Path) -> RawTable:
    """Table of user, item and timestamp from pairs.csv or pairs.tsv."""
    if path.suffix == ".csv":
        return csv_table(path, ("user", "item", "timestamp"))
    lines = csv_table(path, ("user", "items"), ("user", "items"), delimiter="\t", quoted=False)
    require_unique(lines, "user")  # the items of two lines have no common order
    user, items = lines.columns.values()
    numbered = f"SELECT {user} AS user_, regexp_split_to_array(trim({items}), '\\s+') AS items, "
    numbered += f"row_number() OVER () - 1 AS line FROM {lines.scan}"
    # The time is the place in the user's line, there is nothing else.
    pairs = "SELECT line, user_, unnest(items) AS item_, unnest(range(len(items))) AS place"
    columns = {"user": "user_", "item": "item_", "timestamp": "place::VARCHAR"}
    return replace(lines, columns=columns, scan=f"({pairs} FROM ({numbered}))", row="line")


def titles_table(path: Path) -> RawTable:
    """Table of item and title; the first line says whether it is a header."""
    names = header_of(path)
    lower = [name.lower() for name in names]
    items = [name for name, low in zip(names, lower, strict=True) if low in HEADERS]
    if items and (lower[0] in HEADERS or "title" in lower):
        title = names[lower.index("title")] if "title" in lower else "title"
        return csv_table(path, (items[0], title))
    return csv_table(path, ("item", "title"), names=("item", "title"))


def load(
    pairs: Path, titles: Path, covers: Path | None
) -> tuple[InteractionLog, pd.DataFrame, list[Row]]:
    """(log, catalogue, rejected rows) of one MicroLens release."""
    catalogue, bad_titles = read_titles(titles_table(titles))
    unknown = f"has no title in {titles.name}"
    log, rejected = read_log(pairs_table(pairs), catalogue.index, unknown)
    found = image_index(covers)  # a name that is no text is no item's
    images = pd.Series({n: found[n] for n in found.keys() & catalogue.index}, dtype=object)
    log = replace(log, has_times=pairs.suffix == ".csv")
    return log, catalogue.assign(image=images.reindex(catalogue.index)), bad_titles + rejected


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_options(Options, SECTION, argv, __doc__)
    print_options(options, "stage 1, data: MicroLens")
    pairs, titles, covers = find_files(options.raw_dir, options.name)
    check_options(options, pairs, covers)
    images = len(os.listdir(covers)) if covers else 0
    run_loader(options, [pairs, titles], lambda: load(pairs, titles, covers), images=images)


if __name__ == "__main__":
    run_main(main)
