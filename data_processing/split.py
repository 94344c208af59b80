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

from mllmrec.stage.main import run_main

import os
from pathlib import Path

import pandas as pd
import pyarrow as pa

from mllmrec.data.columns import clean_ids, reject_rows, require_rows
from mllmrec.data.interactions import InteractionLog
from mllmrec.data.split import (
    SplitOptions,
    data_outputs,
    prepare,
    rejected_rows_path,
    write_data_set,
)
from mllmrec.data.tables import read_table, stream_jsonl
from mllmrec.data.timestamps import parse_timestamps
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import require
from mllmrec.stage.options import parse_options, print_options
from mllmrec.stage.output import WholeOutput
from mllmrec.stage.record import Job, file_digests

SECTION = "data"
CATALOGUE = dict.fromkeys(("item_id", "title", "image"), pa.string())


def load(raw_dir):
    """(InteractionLog, catalogue, rejected rows) from interactions.csv and catalogue.jsonl."""
    path = Path(raw_dir) / "interactions.csv"
    catalogue, bad_items = read_catalogue(Path(raw_dir) / "catalogue.jsonl")
    pairs, rejected = read_table(path, ("user", "item", "timestamp"))
    pairs, rejected = parse_timestamps(pairs, path, rejected)
    pairs, rejected = clean_ids(pairs, ("user", "item"), path.name, rejected)
    unknown = ~pairs["item"].isin(catalogue.index)
    reason = "the item is not in catalogue.jsonl"
    pairs, rejected = reject_rows(pairs, unknown, reason, path.name, rejected)
    require_rows(len(pairs), path, rejected)
    log = InteractionLog.from_ids(pairs["user"], pairs["item"], pairs["time"])
    return log, catalogue, bad_items + rejected


def read_catalogue(path):
    """(DataFrame indexed by item_id, rejected rows). Columns: title and image (path, None if there
    is no such file).
    """
    batches = list(stream_jsonl(path, CATALOGUE))
    schema = pa.schema([*CATALOGUE.items(), ("line", pa.int64())])
    frame = pa.Table.from_batches(batches, schema).to_pandas()
    for column in ("item_id", "title"):
        missing = frame[column].isna()
        if missing.any():
            raise InputError(
                f"{path}, line {frame.loc[missing, 'line'].iloc[0]}: {column} is missing or null; "
                "it must be a string"
            )
    frame, rejected = clean_ids(frame, ("item_id",), path.name, [])
    require_rows(len(frame), path, rejected)
    repeated = frame["item_id"].duplicated()
    if repeated.any():
        item_id, line = frame.loc[repeated, ["item_id", "line"]].iloc[0]
        other = frame.loc[frame["item_id"] == item_id, "line"].iloc[0]
        raise InputError(
            f"{path}, line {line}: item_id {item_id!r} is already in line {other}; remove one of "
            "the two"
        )
    images = [
        str(path.parent / name) if isinstance(name, str) and name else None
        for name in frame["image"]
    ]
    catalogue = {
        "title": frame["title"].to_list(),
        "image": [image if image and os.path.isfile(image) else None for image in images],
    }
    return pd.DataFrame(catalogue, index=frame["item_id"].to_list()), rejected


def main(argv=None):
    options = parse_options(SplitOptions, SECTION, argv, __doc__)
    print_options(options, "stage 1, data: your own interactions.csv and catalogue.jsonl")
    remedy = (
        "you; the README (Real data) describes its form, or name another --raw_dir. Nothing else"
    )
    names = ("interactions.csv", "catalogue.jsonl")
    raw_files = [require(Path(options.raw_dir) / name, maker=remedy) for name in names]
    job = Job.of(options, file_digests(*raw_files), limit=options.limit, raw_dir=options.raw_dir)
    with WholeOutput(job, data_outputs(options), [rejected_rows_path(options)]) as output:
        if output.is_needed:
            log, catalogue, rejected = load(options.raw_dir)
            data = prepare(log, catalogue, options)
            _, counts = write_data_set(data, rejected, options)
            output.finish(counts)
    print(f"next: bash scripts/02_image_summary.sh {options.config}")


if __name__ == "__main__":
    run_main(main)
