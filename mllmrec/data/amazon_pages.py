"""Product pages of Amazon Reviews 2023: titles and texts without HTML, and the first image's URL.

A page is a line of meta_<category>.jsonl: parent_asin, title, description, features, images.
"""

import html
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from pydantic.dataclasses import dataclass

from mllmrec.data.columns import trimmed
from mllmrec.data.interactions import Array
from mllmrec.data.tables import stream_jsonl
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import PathLike, read_by_id, write_rows
from mllmrec.stage.options import NAME, CommonOptions, option
from mllmrec.stage.schema import Row

IMAGE_SIZES = ("large", "hi_res", "thumb")
PAGE_IMAGES = {
    "parent_asin": pa.string(),
    "title": pa.string(),
    "images": pa.list_(pa.struct(dict.fromkeys(IMAGE_SIZES, pa.string()))),
}
PAGE_TEXTS = {"description": pa.list_(pa.string()), "features": pa.list_(pa.string())}
# Elements of HTML: those that start a new line or cell, and those inside a line.
APART = "br|p|div|li|ul|ol|dl|dt|dd|h[1-6]|hr|table|tbody|thead|tr|td|th|center|blockquote|pre"
INLINE = "a|b|i|u|s|em|strong|span|font|sup|sub|small|big|tt|code|strike|del|ins|img"
TAG = re.compile(rf"</?(?:({APART})|{INLINE})(?:\s[^<>]*=[^<>]*)?\s*/?>", re.IGNORECASE)
NO_PAGE, NO_TITLE, NO_IMAGE, COMPLETE = range(4)  # what is known of an item's page


@dataclass
class PageOptions(CommonOptions):
    """Options of every loader that reads product pages."""

    category: str = option(
        "Baby_Products",
        "as Amazon Reviews 2023 spells it, e.g. Baby_Products, Video_Games",
        pattern=NAME,
    )
    item_text: Literal["title", "full"] = option("title", "full: title, features and description")
    image_size: Literal["large", "hi_res", "thumb"] = option(
        "large", "size of the first image; another one if it is not there"
    )


def first_image_urls(batch: pa.RecordBatch, size: str) -> pa.Array:
    """Arrow array: URL of each page's first image in `size`, else in another one; null if it has
    none.
    """
    parents = pc.list_parent_indices(batch["images"]).to_numpy()
    values = pc.list_flatten(batch["images"])
    first = np.full(batch.num_rows, -1, dtype=np.int64)
    first[parents[::-1]] = np.arange(len(parents))[::-1]  # the first of each page is written last
    sizes = (size, *(other for other in IMAGE_SIZES if other != size))
    columns = [pc.struct_field(values, name) for name in sizes]
    urls = pc.coalesce(*(pc.if_else(_is_filled(column), column, None) for column in columns))
    return urls.take(pa.array(first, mask=first < 0))


def read_pages(
    path: PathLike, item_ids: Array, options: PageOptions, broken: Collection[str]
) -> tuple[pd.DataFrame, list[Row]]:
    """(catalogue, rejected rows). catalogue: index item_id, columns title ("" as yet) and image.

    image: a path below {data_dir}/images, None for items without an image and those in `broken`.
    Items of the log without a page, or whose page has no title, are rejected.
    """
    places = pd.Index(item_ids)
    state, n_pages = np.full(len(item_ids), NO_PAGE, dtype=np.int8), 0
    for batch in stream_jsonl(path, PAGE_IMAGES):
        place = places.get_indexer(page_ids(batch))
        known, n_pages = place >= 0, n_pages + batch.num_rows
        has_image = first_image_urls(batch, options.image_size).is_valid()
        page = np.where(has_image.to_numpy(zero_copy_only=False), COMPLETE, NO_IMAGE)
        page[~has_text(batch["title"])] = NO_TITLE
        np.maximum.at(state, place[known], page[known].astype(np.int8))
    if not n_pages:
        raise InputError(f"{path} has no product page; fetch it again")
    # The id names the image file.
    unusable = np.array([re.fullmatch(r"[\w-]+", i, re.ASCII) is None for i in item_ids], bool)
    state[unusable] = -1
    reasons = {
        -1: "the item's id is not made of letters and digits",
        NO_PAGE: "the item has no page",
        NO_TITLE: "the item's page has no title",
    }
    rejected = [
        {"file": Path(path).name, "item_id": item_ids[n], "reason": reasons[state[n]]}
        for n in np.flatnonzero(state < NO_IMAGE)
    ]
    kept, folder = state >= NO_IMAGE, Path(options.data_dir) / "images"
    has_image = (state == COMPLETE) & ~places.isin(broken)
    image = [
        str(folder / f"{item_id}.jpg") if there else None
        for item_id, there in zip(item_ids[kept], has_image[kept], strict=True)
    ]
    images = pd.Series(image, index=item_ids[kept], dtype=object)
    return pd.DataFrame({"title": "", "image": images}, index=item_ids[kept]), rejected


def add_texts(items: pd.DataFrame, path: PathLike, options: PageOptions) -> pd.DataFrame:
    """`items` with their titles (or full texts) and the column url, from a second pass over the
    pages.
    """
    texts = np.full(len(items), None, dtype=object)
    urls = np.full(len(items), None, dtype=object)
    columns = {**PAGE_IMAGES, **(PAGE_TEXTS if options.item_text == "full" else {})}
    for batch in stream_jsonl(path, columns):
        place = items.index.get_indexer(page_ids(batch))
        rows = np.flatnonzero(place >= 0)
        if not len(rows):
            continue
        pages = batch.take(pa.array(rows)).to_pylist()
        page_urls = first_image_urls(batch, options.image_size).take(pa.array(rows)).to_pylist()
        for page, n, url in zip(pages, place[rows], page_urls, strict=True):
            if texts[n] is None and plain_text(page["title"] or ""):
                texts[n] = item_text(page, options.item_text)
            urls[n] = urls[n] or url
    return items.assign(title=texts, url=urls)


def item_text(page: Row, kind: str) -> str:
    """The title, or the title, features and description as one line."""
    parts = [page["title"]]
    if kind == "full":
        parts += [text for key in ("features", "description") for text in page[key] or () if text]
    return " ".join(" ".join(map(plain_text, parts)).split())


def plain_text(text: str) -> str:
    """One line without HTML: entities become characters, tags of HTML's elements are removed.

    Some texts are escaped twice. `I <3 you`, `a < b` and `<image>` are no tags.
    """
    if "&" in text:
        text = html.unescape(html.unescape(text))
    if "<" in text:
        text = TAG.sub(lambda tag: " " if tag[1] else "", text)
    return " ".join(text.split())


def has_text(titles: pa.Array) -> Array:
    """NumPy mask: the title is not empty without HTML and blanks."""
    titles = pc.utf8_trim_whitespace(pc.fill_null(titles, ""))
    found = _is_filled(titles).to_numpy(zero_copy_only=False).copy()
    for n in np.flatnonzero(pc.match_substring_regex(titles, "^[&<]")):
        found[n] = bool(plain_text(titles[n].as_py()))
    return found


def page_ids(batch: pa.RecordBatch) -> Any:
    """The ids of product pages as an object array, without surrounding blanks."""
    return trimmed(batch["parent_asin"]).to_numpy(zero_copy_only=False)


def _is_filled(column: pa.Array) -> pa.Array:
    """Arrow mask: the string is neither null nor empty."""
    return pc.fill_null(pc.greater(pc.binary_length(column), 0), False)


def write_image_urls(items: pd.DataFrame, path: Path, broken: Collection[str]) -> None:
    """Write image_urls.jsonl; the URLs of rejected images are kept, so that they can be tried
    again.
    """
    urls = {}
    if path.exists():
        rows = read_by_id(path, "item_id", keys=("item_id", "url"))
        urls = {item_id: row["url"] for item_id, row in rows.items() if item_id in broken}
    urls |= {item_id: url for item_id, url in items["url"].items() if isinstance(url, str)}
    write_rows(path, ({"item_id": item_id, "url": url} for item_id, url in urls.items()))
