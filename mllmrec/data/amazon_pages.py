"""Product pages of Amazon Reviews 2023: titles and texts without HTML, and the first image's URL.

A page is a line of meta_<category>.jsonl: parent_asin, title, description, features, images.
"""

import html
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import duckdb
import pandas as pd
from pydantic.dataclasses import dataclass

from mllmrec.data.raw_files import json_table, run
from mllmrec.stage.errors import InputError
from mllmrec.stage.options import NAME, CommonOptions, option
from mllmrec.stage.schema import Row

# Elements of HTML: those that start a new line or cell, and those inside a line.
APART = "br|p|div|li|ul|ol|dl|dt|dd|h[1-6]|hr|table|tbody|thead|tr|td|th|center|blockquote|pre"
INLINE = "a|b|i|u|s|em|strong|span|font|sup|sub|small|big|tt|code|strike|del|ins|img"
TAG = re.compile(rf"</?(?:({APART})|{INLINE})(?:\s[^<>]*=[^<>]*)?\s*/?>", re.IGNORECASE)
SIZES = ("large", "hi_res", "thumb")
NO_PAGE = "the item has no page with a title, or an id that cannot name a file"


@dataclass
class PageOptions(CommonOptions):
    """Options of every loader that reads product pages."""

    category: str = option(
        "Baby_Products",
        "as Amazon Reviews 2023 spells it, e.g. Baby_Products, Video_Games",
        pattern=NAME,
    )
    item_text: Literal["title", "full", "described"] = option(
        "title",
        "full: title, features and description; described: title, full stop, description "
        "(MLLM-MSR's released code)",
    )
    image_size: Literal["large", "hi_res", "thumb"] = option(
        "large", "size of the first image; another one if it is not there"
    )


def read_pages(
    path: Path, item_ids: Iterable[str], options: PageOptions
) -> tuple[pd.DataFrame, list[Row]]:
    """(catalogue, rejected rows) of the items: indexed by item id, columns title and url.

    title: or the full text; url: of the first image, None for items without one. Items without a
    page or a title are rejected. Memory grows with the items, not with the pages.
    """
    table = json_table(path, ("parent_asin", "title", "features", "description", "images"))
    sizes = sorted(SIZES, key=lambda size: size != options.image_size)
    url = ", ".join(f"nullif(images->>'$[0].{size}', '')" for size in sizes)
    more = {"full": ["features", "description"], "described": ["description"]}
    texts = ["title", *more.get(options.item_text, [])]
    fields = ", ".join(f"{table.columns[text]} AS {text}" for text in texts)
    query = f"SELECT trim(parent_asin) AS id, {fields}, coalesce({url}) AS url"
    with duckdb.connect() as database:
        database.register("wanted", pd.DataFrame({"id": list(item_ids)}, dtype="str"))
        table.create(database, f"{query} FROM {table.scan} WHERE id IN (FROM wanted)")
        pages = run(database, "SELECT * FROM raw ORDER BY rowid").df()
    end = "." if options.item_text == "described" else ""
    columns = (pages[text].tolist() for text in texts)
    pages["title"] = [item_text(*row, end=end) for row in zip(*columns, strict=True)]
    return catalogue_of(pages, item_ids, path)


def catalogue_of(
    pages: pd.DataFrame, item_ids: Iterable[str], path: Path
) -> tuple[pd.DataFrame, list[Row]]:
    """(catalogue, rejected rows), as in `read_pages`. pages: columns id, title and url."""
    is_name = pages["id"].str.fullmatch(r"[\w-]+", flags=re.ASCII)  # of the image file
    pages = pages[is_name & (pages["title"] != "")]
    # Of an item's pages the first with an image, or the first.
    pages = pages.sort_values("url", key=pd.isna, kind="stable").drop_duplicates("id").sort_index()
    catalogue = pages.set_index("id")[["title", "url"]].astype(object)
    if catalogue.empty:
        raise InputError(f"{path}: no item of the log has a page with a title; fetch it again")
    missing = pd.Index(item_ids).difference(catalogue.index)
    return catalogue, [{"file": path.name, "item_id": i, "reason": NO_PAGE} for i in missing]


def item_text(title: str, *more: str, end: str = "") -> str:
    """The title, followed by further lists of texts (as JSON), as one line; "": no title.

    end: of the title, before further texts.
    """
    name = plain_text(title)
    if not name:
        return ""
    parts = [plain_text(text) for texts in more for text in json.loads(texts or "[]") if text]
    parts = [part for part in parts if part]
    return " ".join([name + end if parts else name, *parts])


def plain_text(text: str) -> str:
    """One line without HTML: entities become characters, tags of HTML's elements are removed.

    Some texts are escaped twice. `I <3 you`, `a < b` and `<image>` are no tags.
    """
    if "&" in text:
        text = html.unescape(html.unescape(text))
    if "<" in text:
        text = TAG.sub(lambda tag: " " if tag[1] else "", text)
    return " ".join(text.split())
