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

from pathlib import Path

import numpy as np
import pyarrow as pa
from pydantic.dataclasses import dataclass

from mllmrec.data.amazon_pages import PageOptions, add_texts, read_pages, write_image_urls
from mllmrec.data.columns import id_reasons, require_rows, trimmed
from mllmrec.data.interactions import InteractionLog
from mllmrec.data.raw_files import check_raw_file, only_file
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
from mllmrec.stage.jsonl import read_rejected, rejected_path
from mllmrec.stage.options import parse_options, print_options
from mllmrec.stage.output import WholeOutput
from mllmrec.stage.record import Job, file_digests

SECTION = "data"
REVIEW = {"user_id": pa.string(), "parent_asin": pa.string(), "timestamp": pa.int64()}
ENDINGS = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz")


@dataclass
class Options(SplitOptions, PageOptions):
    pass


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
        missing = (
            f"{folder} has no {prefix}{category}.jsonl or .jsonl.gz; the README (Real data) says "
            "where to get it"
        )
        files.append(only_file(folder, names, missing))
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


def _codes(chunks):
    """(ids as an object array, int32 code of each row) of dictionary-encoded chunks."""
    unified = pa.chunked_array(chunks).unify_dictionaries()
    codes = np.concatenate([chunk.indices.to_numpy() for chunk in unified.chunks])
    dictionary = unified.chunk(unified.num_chunks - 1).dictionary
    return dictionary.to_numpy(zero_copy_only=False), codes


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
    with WholeOutput(job, outputs, [rejected_rows_path(options)]) as output:
        if output.is_needed:
            output.finish(write_all(options, (reviews, pages), (images_path, urls_path), broken))
            print(
                f"wrote {urls_path}; next: python data_processing/download_images.py --config "
                f"{options.config}"
            )


if __name__ == "__main__":
    run_main(main)
