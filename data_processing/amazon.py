"""Stage 1 for Amazon Reviews 2023: a category's reviews and product pages.

In, all in {raw_dir}, as published, gzipped or not:
     <category>.jsonl[.gz]       reviews: user_id, parent_asin, timestamp (milliseconds), ...; or
     <category>.csv[.gz]         the 0core and 5core tables, with the header
                                 user_id,parent_asin,rating,timestamp
     meta_<category>.jsonl[.gz]  product pages: parent_asin, title, description, features, images
Out: users.jsonl, items.jsonl, stats.json: see `split.py`; the rules are in `mllmrec/data/split.py`
     {data_dir}/image_urls.jsonl  item_id, url: what `download_images.py` downloads into images/

    python data_processing/amazon.py --config configs/amazon_baby.yaml --raw_dir data/raw/amazon

An item has an image if its page names one and `download_images.py` has not rejected it
(images.rejected.jsonl): run again after the download, and items whose image could not be downloaded
are removed before the k-core. The pages are streamed, once for which items have an image and once
for the texts of the core, so memory grows with the log and not with the pages. CPU.
"""

from mllmrec.stage.main import run_main

import html
import re
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from pydantic.dataclasses import dataclass

from mllmrec.data.columns import id_reasons, require_rows, trimmed
from mllmrec.data.interactions import InteractionLog
from mllmrec.data.raw_files import check_raw_file
from mllmrec.data.split import (
    SplitOptions,
    data_outputs,
    prepare,
    rejected_rows_path,
    write_data_set,
)
from mllmrec.data.tables import stream_jsonl, stream_table
from mllmrec.data.timestamps import Times, read_times
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import read_by_id, read_rejected, rejected_path, write_rows
from mllmrec.stage.options import NAME, option, parse_options, print_options
from mllmrec.stage.record import Job, file_digests
from mllmrec.stage.transaction import writing

SECTION = "data"
REVIEW = {"user_id": pa.string(), "parent_asin": pa.string(), "timestamp": pa.int64()}
IMAGE_SIZES = ("large", "hi_res", "thumb")
PAGE_IMAGES = {
    "parent_asin": pa.string(),
    "title": pa.string(),
    "images": pa.list_(pa.struct(dict.fromkeys(IMAGE_SIZES, pa.string()))),
}
PAGE_TEXTS = {"description": pa.list_(pa.string()), "features": pa.list_(pa.string())}
ENDINGS = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz")
# Elements of HTML: those that start a new line or cell, and those inside a line.
APART = "br|p|div|li|ul|ol|dl|dt|dd|h[1-6]|hr|table|tbody|thead|tr|td|th|center|blockquote|pre"
INLINE = "a|b|i|u|s|em|strong|span|font|sup|sub|small|big|tt|code|strike|del|ins|img"
TAG = re.compile(rf"</?(?:({APART})|{INLINE})(?:\s[^<>]*=[^<>]*)?\s*/?>", re.IGNORECASE)
NO_PAGE, NO_TITLE, NO_IMAGE, COMPLETE = range(4)  # what is known of an item's page


@dataclass
class Options(SplitOptions):
    category: str = option(
        "Baby_Products",
        "as Amazon Reviews 2023 spells it, e.g. Baby_Products, Video_Games",
        pattern=NAME,
    )
    item_text: Literal["title", "full"] = option("title", "full: title, features and description")
    image_size: Literal["large", "hi_res", "thumb"] = option(
        "large", "size of the first image; another one if it is not there"
    )


def find_files(raw_dir, category):
    """(reviews file, pages file) of one category in `raw_dir`."""
    folder = Path(raw_dir)
    if not folder.is_dir():
        raise InputError(
            f"the folder {folder} is missing; put the Amazon files there or name another --raw_dir"
        )
    files = []
    for prefix, endings in (("", ENDINGS), ("meta_", ENDINGS[:2])):
        names = [f"{prefix}{category}{ending}" for ending in endings]
        paths = [folder / name for name in names if (folder / name).exists()]
        if not paths:
            raise InputError(
                f"{folder} has no {prefix}{category}.jsonl or .jsonl.gz; the README (Real data) "
                f"says "
                "where to get it"
            )
        if len(paths) > 1:
            raise InputError(
                f"{folder} has both {paths[0].name} and {paths[1].name}; keep one of them there"
            )
        files.append(paths[0])
    return tuple(map(check_raw_file, files))  # both, before the reviews are read for minutes


def read_reviews(path):
    """(InteractionLog, rejected rows) of all reviews; ids become codes while the file is
    streamed.
    """
    rejected, chunks, times = [], {"user_id": [], "parent_asin": []}, Times(path)
    is_table = ".csv" in path.suffixes
    for batch in stream_table(path, REVIEW, rejected) if is_table else stream_jsonl(path, REVIEW):
        lines, found = batch["line"].to_numpy(), read_times(batch["timestamp"])
        ids = {name: trimmed(batch[name]) for name in chunks}
        reasons = found.reasons | {
            n: reason for name in chunks for n, reason in id_reasons(ids[name], name).items()
        }
        for n in sorted(reasons):
            row = " ".join(str(batch[name][n]) for name in REVIEW)
            entry = {"file": path.name, "line": int(lines[n]), "row": row, "reason": reasons[n]}
            rejected.append(entry)
        keep = np.ones(len(lines), dtype=bool)
        keep[list(reasons)] = False
        times.append(found, keep, lines)
        for name, column in ids.items():
            column = column.filter(pa.array(keep)) if reasons else column
            chunks[name].append(column.dictionary_encode())
    time = times.values()
    require_rows(len(time), path, rejected)
    users, user = _codes(chunks["user_id"])
    items, item = _codes(chunks["parent_asin"])
    return InteractionLog(users, items, user, item, time), rejected


def _is_filled(column):
    """Arrow mask: the string is neither null nor empty."""
    return pc.fill_null(pc.greater(pc.binary_length(column), 0), False)


def _codes(chunks):
    """(ids as an object array, int32 code of each row) of dictionary-encoded chunks."""
    unified = pa.chunked_array(chunks).unify_dictionaries()
    codes = np.concatenate([chunk.indices.to_numpy() for chunk in unified.chunks])
    dictionary = unified.chunk(unified.num_chunks - 1).dictionary
    return dictionary.to_numpy(zero_copy_only=False), codes


def first_image_urls(batch, size):
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


def read_pages(path, item_ids, options, broken):
    """(catalogue, rejected rows). catalogue: index item_id, columns title ("" as yet) and image.

    image: a path below {data_dir}/images, None for items without an image and those in `broken`.
    Items of the log without a page, or whose page has no title, are rejected.
    """
    places = pd.Index(item_ids)
    state = np.full(len(item_ids), NO_PAGE, dtype=np.int8)
    for batch in stream_jsonl(path, PAGE_IMAGES):
        place = places.get_indexer(page_ids(batch))
        known = place >= 0
        has_image = first_image_urls(batch, options.image_size).is_valid()
        page = np.where(has_image.to_numpy(zero_copy_only=False), COMPLETE, NO_IMAGE)
        page[~has_text(batch["title"])] = NO_TITLE
        np.maximum.at(state, place[known], page[known].astype(np.int8))
    # The id names the image file.
    unusable = np.array([re.fullmatch(r"[\w-]+", i, re.ASCII) is None for i in item_ids], bool)
    state[unusable] = -1
    reasons = {
        -1: "the item's id is not made of letters and digits",
        NO_PAGE: "the item has no page",
        NO_TITLE: "the item's page has no title",
    }
    rejected = [
        {"file": path.name, "item_id": item_ids[n], "reason": reasons[state[n]]}
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


def add_texts(items, path, options):
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


def item_text(page, kind):
    """The title, or the title, features and description as one line."""
    parts = [page["title"]]
    if kind == "full":
        parts += [text for key in ("features", "description") for text in page[key] or () if text]
    return " ".join(" ".join(map(plain_text, parts)).split())


def plain_text(text):
    """One line without HTML: entities become characters, tags of HTML's elements are removed.

    Some texts are escaped twice. `I <3 you`, `a < b` and `<image>` are no tags.
    """
    if "&" in text:
        text = html.unescape(html.unescape(text))
    if "<" in text:
        text = TAG.sub(lambda tag: " " if tag[1] else "", text)
    return " ".join(text.split())


def has_text(titles):
    """NumPy mask: the title is not empty without HTML and blanks."""
    titles = pc.utf8_trim_whitespace(pc.fill_null(titles, ""))
    found = _is_filled(titles).to_numpy(zero_copy_only=False).copy()
    for n in np.flatnonzero(pc.match_substring_regex(titles, "^[&<]")):
        found[n] = bool(plain_text(titles[n].as_py()))
    return found


def page_ids(batch):
    """The ids of product pages as an object array, without surrounding blanks."""
    return trimmed(batch["parent_asin"]).to_numpy(zero_copy_only=False)


def write_image_urls(items, path, broken):
    """Write image_urls.jsonl; the URLs of rejected images are kept, so that they can be tried
    again.
    """
    urls = {}
    if path.exists():
        rows = read_by_id(path, "item_id", keys=("item_id", "url"))
        urls = {item_id: row["url"] for item_id, row in rows.items() if item_id in broken}
    urls |= {item_id: url for item_id, url in items["url"].items() if isinstance(url, str)}
    write_rows(path, ({"item_id": item_id, "url": url} for item_id, url in urls.items()))


def write_all(options, raw_files, image_files, broken):
    """Read the raw files and write all outputs; return the counts for the record.

    raw_files: (reviews, pages); image_files: (images.jsonl, image_urls.jsonl); broken: ids of the
    items whose image could not be downloaded.
    """
    (reviews, pages), (images_path, urls_path) = raw_files, image_files
    log, rejected = read_reviews(reviews)
    catalogue, without_page = read_pages(pages, log.item_ids, options, broken)
    if broken and catalogue["image"].isna().all():
        raise InputError(
            f"no image could be fetched ({rejected_path(images_path)} says why); when that is "
            f"fixed: "
            f"python data_processing/download_images.py --config {options.config} --data_dir "
            f"{options.data_dir} --retry_rejected true"
        )
    data = prepare(log.only_items(catalogue.index), catalogue, options)
    data.items = add_texts(data.items, pages, options)
    items, counts = write_data_set(data, rejected + without_page, options)
    write_image_urls(items, urls_path, broken)
    return counts


def main(argv=None):
    options = parse_options(Options, SECTION, argv, __doc__)
    print_options(options, "stage 1, data: Amazon Reviews 2023")
    reviews, pages = find_files(options.raw_dir, options.category)
    images_path, urls_path = (
        Path(options.data_dir) / name for name in ("images.jsonl", "image_urls.jsonl")
    )
    broken = set(read_rejected(images_path, "item_id")) if options.require_image else set()
    raw_files = [reviews, pages, *([rejected_path(images_path)] if broken else [])]
    job = Job.of(options, file_digests(*raw_files), limit=options.limit, raw_dir=options.raw_dir)
    outputs = [*data_outputs(options), urls_path]
    with writing(job, outputs, [rejected_rows_path(options)]) as output:
        if output.is_needed:
            output.finish(write_all(options, (reviews, pages), (images_path, urls_path), broken))
            print(
                f"wrote {urls_path}; next: python data_processing/download_images.py --config "
                f"{options.config}"
            )


if __name__ == "__main__":
    run_main(main)
