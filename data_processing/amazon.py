"""Stage 1 for Amazon Reviews 2023: one category's reviews and product pages become users.jsonl, items.jsonl, stats.json.

In, all in {raw_dir}, as published, gzipped or not:
     <category>.jsonl[.gz]       reviews: user_id, parent_asin, timestamp (milliseconds), …; or
     <category>.csv[.gz]         the 0core and 5core tables: header user_id,parent_asin,rating,timestamp
     meta_<category>.jsonl[.gz]  product pages: parent_asin, title, description, features, images, …
Out: see `split.py`, which holds the rules of the split; and
     {data_dir}/image_urls.jsonl  item_id, url: what `download_images.py` fetches into {data_dir}/images/

    python data_processing/amazon.py --config configs/amazon_baby.yaml --raw_dir data/raw/amazon

An item has an image if its page names one and `download_images.py` has not set it aside (images.rejected.jsonl): run
again after the download, and what could not be fetched leaves before the k-core. The pages are streamed, once for which
items have an image and once for the texts of the core, so memory grows with the log and not with the pages. CPU.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from data_processing.config import option, parse_args, show
from data_processing.errors import InputError, run
from data_processing.jsonl import read_by_id, write_rows
from data_processing.split import Log, SplitArgs, run_loader
from data_processing.tables import stream_jsonl, stream_table

REVIEW = {"user_id": pa.string(), "parent_asin": pa.string(), "timestamp": pa.int64()}
PICTURE_SIZES = ("large", "hi_res", "thumb")
PAGE_PICTURES = {
    "parent_asin": pa.string(),
    "title": pa.string(),
    "images": pa.list_(pa.struct(dict.fromkeys(PICTURE_SIZES, pa.string()))),
}
PAGE_TEXTS = {"description": pa.list_(pa.string()), "features": pa.list_(pa.string())}
ENDINGS = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz")


@dataclass
class Args(SplitArgs):
    category: str = option("Baby_Products", "as Amazon Reviews 2023 spells it, e.g. Baby_Products, Video_Games")
    item_text: Literal["title", "full"] = option("title", "full: title, features and description")
    image_size: Literal["large", "hi_res", "thumb"] = option("large", "which size of the first picture; another one if it is not there")


def find_files(raw_dir, category):
    """(reviews file, pages file) of one category in `raw_dir`."""
    folder = Path(raw_dir)
    if not folder.is_dir():
        raise InputError(f"the folder {folder} is missing; put the Amazon files there or name another --raw_dir")
    found = []
    for prefix, endings in (("", ENDINGS), ("meta_", ENDINGS[:2])):
        paths = [path for ending in endings if (path := folder / f"{prefix}{category}{ending}").exists()]
        if not paths:
            raise InputError(
                f"{folder} holds no {prefix}{category}.jsonl or .jsonl.gz; the README, section «Real data», says where to get it"
            )
        if len(paths) > 1:
            raise InputError(f"{folder} holds both {paths[0].name} and {paths[1].name}; keep one of them there")
        found.append(paths[0])
    return tuple(found)


# ------------------------------------------------------------------------------------------------- the log
def read_reviews(path):
    """(Log, refused rows): users, items and times of all reviews; ids become codes while the file streams by."""
    refused, malformed, chunks = [], [], {name: [] for name in REVIEW}
    is_table = ".csv" in path.suffixes
    n_before = 2 if is_table else 1  # the number of the first row's line
    for batch in stream_table(path, REVIEW, malformed) if is_table else stream_jsonl(path, REVIEW):
        time = _as_integers(batch["timestamp"]) if is_table else batch["timestamp"]
        good = pc.and_(_is_filled(batch["user_id"]), pc.and_(_is_filled(batch["parent_asin"]), pc.is_valid(time)))
        for place in np.flatnonzero(~good.to_numpy(zero_copy_only=False)):
            row = " ".join(str(batch[name][place]) for name in REVIEW)
            line = n_before + int(place)
            for skipped in malformed:  # in the order of the file
                line += skipped["line"] <= line
            refused.append({"file": path.name, "line": line, "row": row, "reason": "an id or the timestamp is missing"})
        n_before += batch.num_rows
        chunks["timestamp"].append(time.filter(good).to_numpy(zero_copy_only=False))
        for name in ("user_id", "parent_asin"):
            chunks[name].append(batch[name].filter(good).dictionary_encode())
    if not any(map(len, chunks["timestamp"])):
        raise InputError(f"{path} holds no review with an id and a timestamp; fetch it again")
    (users, user), (items, item) = (_codes(chunks.pop(name)) for name in ("user_id", "parent_asin"))
    return Log(users, items, user, item, np.concatenate(chunks["timestamp"])), malformed + refused


def _is_filled(column):
    return pc.fill_null(pc.greater(pc.binary_length(column), 0), False)


def _as_integers(column):
    """Timestamps of a table; null where there is no whole number."""
    try:
        return pc.cast(column, pa.int64())
    except pa.ArrowInvalid:
        return pa.array([int(value) if re.fullmatch(r"\d{1,18}", value) else None for value in column.to_pylist()], pa.int64())


def _codes(chunks):
    """(ids as an object array, int32 code of each row) of dictionary-encoded chunks."""
    whole = pa.chunked_array(chunks).unify_dictionaries()
    codes = np.concatenate([chunk.indices.to_numpy() for chunk in whole.chunks])
    return whole.chunk(whole.num_chunks - 1).dictionary.to_numpy(zero_copy_only=False), codes


# ----------------------------------------------------------------------------------------------- the pages
def pictures(batch, size):
    """Arrow array: the URL of the first picture of each page in the wished size, else another; null where there is none."""
    rows = batch.num_rows
    parents, values = pc.list_parent_indices(batch["images"]).to_numpy(), pc.list_flatten(batch["images"])
    first = np.full(rows, -1, dtype=np.int64)
    first[parents[::-1]] = np.arange(len(parents))[::-1]  # the first of each page, written last
    sizes = (size, *(other for other in PICTURE_SIZES if other != size))
    urls = pc.coalesce(*(pc.if_else(_is_filled(column), column, None) for column in (pc.struct_field(values, name) for name in sizes)))
    return urls.take(pa.array(first, mask=first < 0))


def read_pages(path, item_ids, args, broken):
    """(catalogue, refused rows). catalogue: index item_id, columns title ("" yet) and image: a path below
    {data_dir}/images, or None for items without a picture and those in `broken`.

    Items of the log without a page, or whose page has no title, are left out of the catalogue and told in the refused rows.
    """
    places = pd.Index(item_ids)
    state = np.zeros(len(item_ids), dtype=np.int8)  # 0 no page, 1 no title, 2 no picture, 3 all there
    for batch in stream_jsonl(path, PAGE_PICTURES):
        place = places.get_indexer(batch["parent_asin"].to_numpy(zero_copy_only=False))
        mine = place >= 0
        found = 2 + pictures(batch, args.image_size).is_valid().to_numpy(zero_copy_only=False).astype(np.int8)
        found[~_is_filled(batch["title"]).to_numpy(zero_copy_only=False)] = 1
        np.maximum.at(state, place[mine], found[mine])
    state[[re.fullmatch(r"[\w-]+", item_id, re.ASCII) is None for item_id in item_ids]] = -1  # it names the image file
    reasons = {-1: "the item's id is not made of letters and digits", 0: "the item has no page", 1: "the item's page has no title"}
    refused = [{"file": path.name, "item_id": item_ids[n], "reason": reasons[state[n]]} for n in np.flatnonzero(state < 2)]
    folder = Path(args.data_dir) / "images"
    known = state >= 2
    has_image = (state == 3) & ~places.isin(broken)
    image = [str(folder / f"{item_id}.jpg") if there else None for item_id, there in zip(item_ids[known], has_image[known], strict=True)]
    return pd.DataFrame({"title": "", "image": pd.Series(image, index=item_ids[known], dtype=object)}, index=item_ids[known]), refused


def add_texts(items, path, args):
    """`items` with their titles (or full texts) and the column url, from a second pass over the pages."""
    wanted = items.index
    texts, urls = np.full(len(items), None, dtype=object), np.full(len(items), None, dtype=object)
    for batch in stream_jsonl(path, {**PAGE_PICTURES, **(PAGE_TEXTS if args.item_text == "full" else {})}):
        place = wanted.get_indexer(batch["parent_asin"].to_numpy(zero_copy_only=False))
        mine = np.flatnonzero(place >= 0)
        if not len(mine):
            continue
        pages = batch.take(pa.array(mine)).to_pylist()
        for page, n, url in zip(pages, place[mine], pictures(batch, args.image_size).take(pa.array(mine)).to_pylist(), strict=True):
            if texts[n] is None and page["title"]:
                texts[n] = item_text(page, args.item_text)
            urls[n] = urls[n] or url
    return items.assign(title=texts, url=urls)


def item_text(page, kind):
    """The title, or the title, features and description as one line."""
    parts = [page["title"]]
    if kind == "full":
        parts += [text for key in ("features", "description") for text in page[key] or () if text and text.strip()]
    return " ".join(" ".join(parts).split())


def main(argv=None):
    args = parse_args(Args, "data", argv, __doc__)
    show(args, "stage 1, data: Amazon Reviews 2023")
    reviews, pages = find_files(args.raw_dir, args.category)
    rejected = Path(args.data_dir) / "images.rejected.jsonl"
    broken = set(read_by_id(rejected, "item_id")) if rejected.exists() and args.require_image else set()

    def load():
        log, refused = read_reviews(reviews)
        catalogue, without_page = read_pages(pages, log.item_ids, args, broken)
        if broken and catalogue["image"].isna().all():
            raise InputError(
                f"no image could be had ({rejected} says why); when that is mended: python data_processing/download_images.py "
                f"--config {args.config} --data_dir {args.data_dir} --retry_rejected true"
            )
        return log.only_items(catalogue.index), catalogue, refused + without_page

    raw_files = (reviews, pages, *([rejected] if broken else []))
    path = Path(args.data_dir) / "image_urls.jsonl"
    if prepared := run_loader(args, raw_files, load, complete=lambda items: add_texts(items, pages, args), also=[path]):
        # What could not be had stays in the list, so that the download can be tried again.
        urls = (
            {i: row["url"] for i, row in read_by_id(path, "item_id", keys=("item_id", "url")).items() if i in broken}
            if path.exists()
            else {}
        )
        urls |= {item_id: url for item_id, url in prepared[0]["url"].items() if isinstance(url, str)}
        write_rows(path, ({"item_id": item_id, "url": url} for item_id, url in urls.items()))
        print(f"wrote {path}; next: python data_processing/download_images.py --config {args.config}")


if __name__ == "__main__":
    run(main)
