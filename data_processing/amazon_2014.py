"""Stage 1 for Amazon's product data of 2014 (Beauty, Toys_and_Games, Video_Games).

In, both in {raw_dir}, as published, gzipped or not:
     ratings_<category>.csv       no header: user, item, rating, seconds
     meta_<category>.json[.gz]    a Python literal in each line: asin, title, imUrl (may be missing)
                                  or, with `--pages 2018`, an object of the release of 2018: asin,
                                  title, imageURL (a list, of which the seed draws one)
Out: users.jsonl, items.jsonl, stats.json: see `split.py`; rules: `mllmrec/data/data_split.py`
     {data_dir}/image_urls.jsonl  item_id, url: what `download_images.py` downloads into images/

    python data_processing/amazon_2014.py --config configs/mllm4rec/beauty.yaml

The literals are parsed, never run. MLLM4Rec takes ratings of 2014 with pages of 2018 for
Video_Games (its released code). An item has an image if its page names one and
`download_images.py` has not rejected it: run again after the download. CPU, minutes.
"""

from mllmrec.stage.main import run_main

import ast
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from pydantic.dataclasses import dataclass

from mllmrec.data.amazon_pages import catalogue_of, item_text
from mllmrec.data.data_split import SplitOptions
from mllmrec.data.interactions import Array, InteractionLog
from mllmrec.data.loader import run_loader
from mllmrec.data.raw_files import csv_table, only_file, open_raw
from mllmrec.data.raw_log import read_log, require_dates
from mllmrec.stage.options import NAME, option, parse_options, print_options
from mllmrec.stage.schema import Row

SECTION = "data"
RATINGS = ("user", "item", "rating", "timestamp")  # columns, in file order
LONGEST_PAGE = 1 << 20  # bytes
ADDRESSES = {
    "2014": "https://jmcauley.ucsd.edu/data/amazon/",
    "2018": "https://nijianmo.github.io/amazon/",
}
SHOWN = 100  # bytes of a rejected line


@dataclass
class Options(SplitOptions):
    category: str = option(
        "Beauty", "as the files spell it, e.g. Beauty, Toys_and_Games", pattern=NAME
    )
    pages: Literal["2014", "2018"] = option("2014", "release that the product pages are of")


def find_files(raw_dir: str, category: str, pages: str = "2014") -> list[Path]:
    """[ratings file, pages file] of one category in `raw_dir`; pages: release of the second."""
    files = []
    stems = {f"ratings_{category}.csv": "2014", f"meta_{category}.json": pages}
    for stem, release in stems.items():
        missing = (
            f"{raw_dir} has no {stem} or {stem}.gz; get it from {ADDRESSES[release]} ({release}), "
            "or name another --raw_dir"
        )
        files.append(only_file(Path(raw_dir), (stem, f"{stem}.gz"), missing))
    return files


def parse_page(line: bytes, release: str = "2014") -> dict[str, Any]:
    """One line of meta_<category>.json: a dict of asin, title, the image's address and more.

    Raises ValueError, with what is wrong, for anything else.
    """
    if len(line) > LONGEST_PAGE:
        raise ValueError(f"the line has more than {LONGEST_PAGE:,} bytes")
    kind = "Python literal" if release == "2014" else "JSON object"
    try:
        text = line.decode()
        page = ast.literal_eval(text) if release == "2014" else json.loads(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise ValueError(f"the line is no {kind}") from None
    if not isinstance(page, dict) or not isinstance(page.get("asin"), str):
        raise ValueError("the line is no page with an asin")
    return page


def image_url(page: dict[str, Any], options: Options) -> str | None:
    """The address of a page's image; of several one, which seed and item decide."""
    urls = [page.get("imUrl")] if options.pages == "2014" else page.get("imageURL")
    named = [url for url in urls if isinstance(url, str)] if isinstance(urls, list) else []
    digest = hashlib.sha256(f"{options.seed} {page['asin']}".encode("utf-8", "replace")).digest()
    return named[int.from_bytes(digest[:8]) % len(named)] if named else None


def read_pages(path: Path, item_ids: Array, options: Options) -> tuple[pd.DataFrame, list[Row]]:
    """(catalogue, rejected rows) of the pages of some items, as `amazon_pages.read_pages`."""
    known = set(item_ids)
    rows: list[tuple[str, str, str | None]] = []
    rejected: list[Row] = []
    with open_raw(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                page = parse_page(line.strip(), options.pages)
            except ValueError as reason:
                row = line[:SHOWN].decode(errors="replace").strip()
                if row:
                    entry = {"file": path.name, "line": number, "row": row, "reason": str(reason)}
                    rejected.append(entry)
                continue
            if page["asin"].strip() in known:
                title = page.get("title")
                # Half of a surrogate pair, which no file can hold, becomes a question mark.
                text = title.encode("utf-8", "replace").decode() if isinstance(title, str) else ""
                rows.append((page["asin"].strip(), item_text(text), image_url(page, options)))
    pages = pd.DataFrame(rows, columns=["id", "title", "url"])
    catalogue, missing = catalogue_of(pages, item_ids, path)
    return catalogue, rejected + missing


def load(files: Sequence[Path], options: Options) -> tuple[InteractionLog, pd.DataFrame, list[Row]]:
    """(log, catalogue, rejected rows); every rating is an interaction."""
    ratings, pages = files
    log, rejected = read_log(csv_table(ratings, ("user", "item", "timestamp"), names=RATINGS))
    require_dates(log, ratings)
    catalogue, bad_pages = read_pages(pages, log.item_ids, options)
    return log, catalogue, rejected + bad_pages


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_options(Options, SECTION, argv, __doc__)
    print_options(options, "stage 1, data: Amazon 2014")
    files = find_files(options.raw_dir, options.category, options.pages)
    run_loader(options, files, lambda: load(files, options), has_urls=True)


if __name__ == "__main__":
    run_main(main)
