"""Amazon's product data of 2014: ratings without a header, pages as Python literals.

The pages are read as literals and never run: a line that is anything else is rejected.
"""

import ast
import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from mllmrec.data.amazon_pages import plain_text
from mllmrec.data.columns import clean_ids, require_rows
from mllmrec.data.interactions import Array, InteractionLog
from mllmrec.data.raw_files import blocks_of
from mllmrec.data.tables import read_table
from mllmrec.data.timestamps import parse_timestamps
from mllmrec.stage.errors import InputError
from mllmrec.stage.schema import Row

RATINGS = ("user", "item", "rating", "timestamp")  # columns, in file order
LONGEST_PAGE = 1 << 20  # bytes
SHOWN = 100  # characters of a rejected line


def read_ratings(path: Path) -> tuple[InteractionLog, list[Row]]:
    """(log, rejected rows) of ratings_<category>.csv; every rating is an interaction."""
    frame, rejected = read_table(path, RATINGS, header=False)
    frame, rejected = parse_timestamps(frame, path, rejected)
    frame, rejected = clean_ids(frame, ("user", "item"), path.name, rejected)
    require_rows(len(frame), path, rejected)
    return InteractionLog.from_ids(frame["user"], frame["item"], frame["time"]), rejected


def parse_page(line: bytes) -> dict[str, Any]:
    """One line of meta_<category>.json: a dict of asin, title, imUrl and more.

    Python literals, as published, or JSON. Raises ValueError, with what is wrong, for anything
    else.
    """
    if len(line) > LONGEST_PAGE:
        raise ValueError(f"the line has more than {LONGEST_PAGE:,} bytes")
    try:
        page = ast.literal_eval(line.decode())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        try:
            page = json.loads(line)
        except (ValueError, RecursionError):
            raise ValueError("the line is neither a Python literal nor JSON") from None
    if not isinstance(page, dict) or not isinstance(page.get("asin"), str):
        raise ValueError("the line is no page with an asin")
    return page


def read_pages(
    path: Path, item_ids: Array, folder: Path, broken: Collection[str]
) -> tuple[pd.DataFrame, list[Row]]:
    """(catalogue, rejected rows) of meta_<category>.json[.gz].

    item_ids: of the log; folder: of the images; broken: ids of the items whose image could not be
    downloaded. catalogue: indexed by item id, columns title, image (a path below `folder`, None for
    items without an image) and url. Items of the log without a page or title are rejected.
    """
    known, n_pages = set(item_ids), 0
    rows: dict[str, dict[str, str | None]] = {}
    rejected: list[Row] = []
    for number, line in _lines(path):
        n_pages += 1
        try:
            page = parse_page(line)
        except ValueError as reason:
            text = line[:SHOWN].decode(errors="replace")
            rejected.append({"file": path.name, "line": number, "row": text, "reason": str(reason)})
            continue
        item_id, title = page["asin"].strip(), page.get("title")
        if item_id not in known or not isinstance(title, str) or not plain_text(title):
            continue
        if re.fullmatch(r"[\w-]+", item_id, re.ASCII):  # it names the image file
            url = page.get("imUrl")
            has_url = isinstance(url, str) and bool(url.strip())
            image = str(folder / f"{item_id}.jpg") if has_url and item_id not in broken else None
            found = {"title": plain_text(title), "image": image, "url": url if has_url else None}
            rows.setdefault(item_id, found)
    if not n_pages:
        raise InputError(f"{path} has no product page; fetch it again")
    missing = (item for item in item_ids if item not in rows)
    why = "the item has no page with a title, or an id that cannot name a file"
    rejected += [{"file": path.name, "item_id": item, "reason": why} for item in missing]
    if not rows:
        raise InputError(f"{path}: no item of the ratings has a page with a title; fetch it again")
    return pd.DataFrame.from_dict(rows, orient="index"), rejected


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number, line) of the lines that are not blank."""
    number = 0
    for block in blocks_of(path):
        for line in block.removesuffix(b"\n").split(b"\n"):
            number += 1
            if line.strip():
                yield number, line.strip()
