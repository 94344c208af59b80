"""Stage 1 for your own data: interactions.csv and catalogue.jsonl become the files of the stages.

In:  {raw_dir}/interactions.csv  header user,item,timestamp
     {raw_dir}/catalogue.jsonl   item_id, title, image (path relative to the file, or null)
Out: {data_dir}/items.jsonl      item_id, title, image (path relative to the file, or null)
     {data_dir}/users.jsonl      user_id, history (item ids, oldest first, without the target),
                                 target, negatives, split, fold
     {data_dir}/touched.jsonl    user_id, item_ids: all that a test user had in the log
     {data_dir}/stats.json       the rows of the paper's Table 2
     {data_dir}/interactions.rejected.jsonl   file, line, row, reason

    python data_processing/split.py --config configs/microlens.yaml --raw_dir DIR --data_dir DIR

The rules of the split are in `mllmrec/data/data_split.py`. CPU, seconds.
"""

from mllmrec.stage.main import run_main

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from mllmrec.data.data_split import SplitOptions
from mllmrec.data.interactions import InteractionLog
from mllmrec.data.loader import run_loader
from mllmrec.data.raw_files import check_raw_file, csv_table, json_table
from mllmrec.data.raw_log import read_log, read_titles
from mllmrec.stage.options import parse_options, print_options
from mllmrec.stage.schema import Row

SECTION = "data"
FILES = ("interactions.csv", "catalogue.jsonl")

logger = logging.getLogger("mllmrec")  # a script has no name of its own


def load(pairs: Path, items: Path) -> tuple[InteractionLog, pd.DataFrame, list[Row]]:
    """(log, catalogue, rejected rows). An image that is not there counts as none."""
    catalogue, bad_items = read_titles(json_table(items, ("item_id", "title", "image")))
    images = [os.path.join(items.parent, name) for name in catalogue["image"]]
    found = [image if os.path.isfile(image) else None for image in images]
    missing = [n for n, image in zip(catalogue["image"], found, strict=True) if n and not image]
    if missing:
        logger.warning(
            f"{items}: {len(missing):,} of its images are not there, the first is "
            f"{missing[0][:200]!r}; their items count as without one (an image is the path of a "
            "file, relative to catalogue.jsonl, with forward slashes)"
        )
    catalogue["image"] = found
    columns = ("user", "item", "timestamp")
    log, rejected = read_log(csv_table(pairs, columns), catalogue.index, f"is not in {items.name}")
    return log, catalogue, bad_items + rejected


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_options(SplitOptions, SECTION, argv, __doc__)
    print_options(options, "stage 1, data: your own interactions.csv and catalogue.jsonl")
    files = [check_raw_file(Path(options.raw_dir) / name) for name in FILES]
    run_loader(options, files, lambda: load(*files))


if __name__ == "__main__":
    run_main(main)
