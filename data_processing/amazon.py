"""Stage 1 for Amazon Reviews 2023: a category's reviews and product pages.

In, all in {raw_dir}, as published, gzipped or not:
     <category>.jsonl[.gz]       reviews: user_id, parent_asin, timestamp (milliseconds), ...; or
     <category>.csv[.gz]         the 0core and 5core tables, with the header
                                 user_id,parent_asin,rating,timestamp
     meta_<category>.jsonl[.gz]  product pages: parent_asin, title, description, features, images
Out: users.jsonl, items.jsonl, stats.json: see `split.py`; rules: `mllmrec/data/data_split.py`
     {data_dir}/image_urls.jsonl  item_id, url: what `download_images.py` downloads into images/

    python data_processing/amazon.py --config configs/amazon_baby.yaml --raw_dir data/raw/amazon

An item has an image if its page names one and `download_images.py` has not rejected it
(images.rejected.jsonl): run again after the download, and items whose image could not be downloaded
are removed before the k-core. Memory grows with the log and its items' texts. CPU.
"""

from mllmrec.stage.main import run_main

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from pydantic.dataclasses import dataclass

from mllmrec.data.amazon_pages import PageOptions, read_pages
from mllmrec.data.data_split import SplitOptions
from mllmrec.data.interactions import InteractionLog
from mllmrec.data.loader import run_loader
from mllmrec.data.raw_files import csv_table, json_table, only_file
from mllmrec.data.raw_log import read_log
from mllmrec.stage.options import parse_options, print_options
from mllmrec.stage.schema import Row

SECTION = "data"
REVIEW = ("user_id", "parent_asin", "timestamp")
ENDINGS = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz")


@dataclass
class Options(SplitOptions, PageOptions):
    pass


def find_files(raw_dir: str, category: str) -> list[Path]:
    """[reviews file, pages file] of one category in `raw_dir`."""
    files = []
    for prefix, endings in (("", ENDINGS), ("meta_", ENDINGS[:2])):
        missing = (
            f"{raw_dir} has no {prefix}{category}.jsonl or .jsonl.gz; docs/data.md says "
            "where to get it, or name another --raw_dir"
        )
        names = [f"{prefix}{category}{ending}" for ending in endings]
        files.append(only_file(Path(raw_dir), names, missing))
    return files


def load(
    reviews: Path, pages: Path, options: Options
) -> tuple[InteractionLog, pd.DataFrame, list[Row]]:
    """(log, catalogue, rejected rows); every review is an interaction."""
    table = csv_table if ".csv" in reviews.suffixes else json_table
    log, rejected = read_log(table(reviews, REVIEW))
    catalogue, without_page = read_pages(pages, log.item_ids, options)
    return log, catalogue, rejected + without_page


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_options(Options, SECTION, argv, __doc__)
    print_options(options, "stage 1, data: Amazon Reviews 2023")
    reviews, pages = find_files(options.raw_dir, options.category)
    run_loader(options, [reviews, pages], lambda: load(reviews, pages, options), has_urls=True)


if __name__ == "__main__":
    run_main(main)
