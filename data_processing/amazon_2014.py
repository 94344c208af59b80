"""Stage 1 for Amazon's product data of 2014 (Beauty, Toys_and_Games, Video_Games).

In, both in {raw_dir}, as published, gzipped or not:
     ratings_<category>.csv       no header: user, item, rating, seconds
     meta_<category>.json[.gz]    a Python literal in each line: asin, title, imUrl (may be missing)
Out: users.jsonl, items.jsonl, stats.json: see `split.py`; the rules are in `mllmrec/data/split.py`
     {data_dir}/image_urls.jsonl  item_id, url: what `download_images.py` downloads into images/

    python data_processing/amazon_2014.py --config configs/mllm4rec/beauty.yaml

The literals are parsed, never run. An item has an image if its page names one and
`download_images.py` has not rejected it: run again after the download. CPU, minutes.
"""

from mllmrec.stage.main import run_main

from pathlib import Path

from pydantic.dataclasses import dataclass

from mllmrec.data.amazon_2014 import read_pages, read_ratings
from mllmrec.data.amazon_pages import write_image_urls
from mllmrec.data.raw_files import check_raw_file, only_file
from mllmrec.data.split import (
    SplitOptions,
    data_outputs,
    prepare,
    rejected_rows_path,
    write_data_set,
)
from mllmrec.stage.jsonl import read_rejected, rejected_path
from mllmrec.stage.options import NAME, option, parse_options, print_options
from mllmrec.stage.output import WholeOutput
from mllmrec.stage.record import Job, file_digests

SECTION = "data"


@dataclass
class Options(SplitOptions):
    category: str = option(
        "Beauty", "as the files spell it, e.g. Beauty, Toys_and_Games", pattern=NAME
    )


def find_files(raw_dir, category):
    """[ratings file, pages file] of one category in `raw_dir`."""
    files = []
    for stem in (f"ratings_{category}.csv", f"meta_{category}.json"):
        missing = (
            f"{raw_dir} has no {stem} or {stem}.gz; get it from "
            "https://jmcauley.ucsd.edu/data/amazon/ (2014), or name another --raw_dir"
        )
        files.append(only_file(Path(raw_dir), (stem, f"{stem}.gz"), missing))
    return list(map(check_raw_file, files))


def main(argv=None):
    options = parse_options(Options, SECTION, argv, __doc__)
    print_options(options, "stage 1, data: Amazon 2014")
    ratings, pages = find_files(options.raw_dir, options.category)
    data_dir = Path(options.data_dir)
    images_path, urls_path = data_dir / "images.jsonl", data_dir / "image_urls.jsonl"
    broken = set(read_rejected(images_path, "item_id"))
    raw_files = [ratings, pages, *([rejected_path(images_path)] if broken else [])]
    job = Job.of(options, file_digests(*raw_files), limit=options.limit, raw_dir=options.raw_dir)
    outputs = [*data_outputs(options), urls_path]
    with WholeOutput(job, outputs, [rejected_rows_path(options)]) as output:
        if output.is_needed:
            log, rejected = read_ratings(ratings)
            catalogue, more = read_pages(pages, log.item_ids, data_dir / "images", broken)
            data = prepare(log.only_items(catalogue.index), catalogue, options)
            items, counts = write_data_set(data, rejected + more, options)
            write_image_urls(items, urls_path, broken)
            output.finish(counts)
            print(f"wrote {urls_path}; next: data_processing/download_images.py")


if __name__ == "__main__":
    run_main(main)
