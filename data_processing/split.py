"""Stage 1 for your own data: interactions.csv and catalogue.jsonl become the files of the stages.

In:  {raw_dir}/interactions.csv  header user,item,timestamp
     {raw_dir}/catalogue.jsonl   item_id, title, image (path relative to the file, or null)
Out: {data_dir}/items.jsonl      item_id, title, image (path relative to the file, or null)
     {data_dir}/users.jsonl      user_id, history (item ids, oldest first, without the target),
                                 target, negatives, split, fold
     {data_dir}/stats.json       the rows of the paper's Table 2
     {data_dir}/interactions.rejected.jsonl   file, line, row, reason

    python data_processing/split.py --config configs/microlens.yaml --raw_dir DIR --data_dir DIR

The rules of the split are in `mllmrec/data/split.py`. CPU, seconds.
"""

import time
from pathlib import Path

import pandas as pd

from mllmrec.data.interactions import InteractionLog
from mllmrec.data.split import SplitOptions, data_outputs, prepare, write_data_set
from mllmrec.data.tables import parse_timestamps, read_table, reject_rows
from mllmrec.stage.errors import InputError, run_main
from mllmrec.stage.jsonl import read_by_id, require
from mllmrec.stage.options import parse_options, print_options
from mllmrec.stage.record import Job, file_digests

SECTION = "data"


def load(raw_dir):
    """(InteractionLog, catalogue, rejected rows) from interactions.csv and catalogue.jsonl."""
    pairs, rejected = read_table(Path(raw_dir) / "interactions.csv", ("user", "item", "timestamp"))
    catalogue = read_catalogue(Path(raw_dir) / "catalogue.jsonl")
    name = "interactions.csv"
    pairs, rejected = parse_timestamps(pairs, name, rejected)
    pairs, rejected = reject_rows(pairs, pairs["user"] == "", "the user is empty", name, rejected)
    unknown = ~pairs["item"].isin(catalogue.index)
    reason = "the item is not in catalogue.jsonl"
    pairs, rejected = reject_rows(pairs, unknown, reason, name, rejected)
    log = InteractionLog.from_ids(pairs["user"], pairs["item"], pairs["time"])
    return log, catalogue, rejected


def read_catalogue(path):
    """DataFrame indexed by item_id, columns title and image (path, None if there is no such
    file).
    """
    rows = list(read_by_id(path, "item_id", keys=("item_id", "title", "image")).values())
    for row in rows:
        if not isinstance(row["title"], str) or not isinstance(row["image"], str | None):
            raise InputError(
                f"{path}, item {row['item_id']!r}: title must be a string, image a string or null; "
                "correct the line"
            )
    images = [path.parent / row["image"] if row["image"] else None for row in rows]
    return pd.DataFrame(
        {
            "title": [row["title"] for row in rows],
            "image": [str(image) if image and image.is_file() else None for image in images],
        },
        index=[row["item_id"] for row in rows],
    )


def main(argv=None):
    options = parse_options(SplitOptions, SECTION, argv, __doc__)
    print_options(options, "stage 1, data: your own interactions.csv and catalogue.jsonl")
    started = time.monotonic()
    remedy = (
        "you; the README (Real data) describes its form, or name another --raw_dir. Nothing else"
    )
    names = ("interactions.csv", "catalogue.jsonl")
    raw_files = [require(Path(options.raw_dir) / name, maker=remedy) for name in names]
    job = Job.of(options, file_digests(*raw_files), limit=options.limit, raw_dir=options.raw_dir)
    if not job.is_up_to_date(data_outputs(options)):
        log, catalogue, rejected = load(options.raw_dir)
        data = prepare(log, catalogue, options)
        write_data_set(data, rejected, options, job, started)
    print(f"next: bash scripts/02_image_summary.sh {options.config}")


if __name__ == "__main__":
    run_main(main)
