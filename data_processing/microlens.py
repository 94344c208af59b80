"""Stage 1 for MicroLens-50k and -100k, from the published files.

In, all in {raw_dir}, as published:
     MicroLens-50k_pairs.csv     header user,item,timestamp (milliseconds); or
     MicroLens-50k_pairs.tsv     user, TAB, item ids separated by blanks, oldest first
     MicroLens-50k_titles.csv    item,title with or without a header; also *_title_en.csv
     MicroLens-50k_covers/       <item>.jpg, also .jpeg, .png, .webp, upper case
Out: see `split.py`; the rules of the split are in `mllmrec/data/split.py`.

    python data_processing/microlens.py --config configs/microlens.yaml --raw_dir data/raw/microlens

CPU; about 2 seconds for MicroLens-50k.
"""

from mllmrec.stage.main import run_main

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from pydantic.dataclasses import dataclass

from mllmrec.data.columns import clean_ids, reject_rows, require_rows
from mllmrec.data.images import image_index
from mllmrec.data.interactions import InteractionLog
from mllmrec.data.split import (
    SplitOptions,
    data_outputs,
    prepare,
    rejected_rows_path,
    write_data_set,
)
from mllmrec.data.tables import first_fields, read_table, read_text_table
from mllmrec.data.timestamps import parse_timestamps
from mllmrec.stage.errors import InputError
from mllmrec.stage.options import option, parse_options, print_options
from mllmrec.stage.output import WholeOutput
from mllmrec.stage.record import Job, file_digests

SECTION = "data"


@dataclass
class Options(SplitOptions):
    name: str = option(
        "",
        "prefix of the files, e.g. MicroLens-50k; needed if there are several",
        pattern=r"^[\w.-]*$",
    )


def find_files(raw_dir, name):
    """(pairs file, titles file, covers folder or None) in `raw_dir`."""
    folder = Path(raw_dir)
    if not folder.is_dir():
        raise InputError(
            f"the folder {folder} is missing; put the MicroLens files there or name another "
            f"--raw_dir"
        )
    pairs = sorted(folder.glob(f"{name or '*'}_pairs.csv")) or sorted(
        folder.glob(f"{name or '*'}_pairs.tsv")
    )
    if not pairs:
        raise InputError(
            f"{folder} has no {name or '*'}_pairs.csv or .tsv; the README (Real data) says where "
            f"to get "
            "it"
        )
    if len(pairs) > 1:
        raise InputError(
            f"{folder} has {len(pairs)} sets of pairs ({pairs[0].name}, {pairs[1].name}); choose "
            f"one "
            "with --name"
        )
    prefix = pairs[0].name.rsplit("_pairs", 1)[0]
    titles = [folder / f"{prefix}_{end}" for end in ("titles.csv", "title_en.csv", "title.csv")]
    existing = [path for path in titles if path.exists()]
    if not existing:
        raise InputError(f"{titles[0]} is missing; the README (Real data) says where to get it")
    covers = folder / f"{prefix}_covers"
    return pairs[0], existing[0], covers if covers.is_dir() else None


def read_pairs(path):
    """(DataFrame of user, item, time, line; rejected rows) from pairs.csv or pairs.tsv."""
    if path.suffix == ".csv":
        frame, rejected = read_table(path, ("user", "item", "timestamp"))
        frame, rejected = parse_timestamps(frame, path, rejected)
    else:
        frame, rejected = read_sequences(path)
    return clean_ids(frame, ("user", "item"), path.name, rejected)


def read_sequences(path):
    """As `read_pairs`, from pairs.tsv. time: place in the user's line, there is nothing else."""
    columns = ("user", "items")
    frame, rejected = read_table(path, columns, delimiter="\t", header=False, quoted=False)
    empty = frame["items"] == ""
    frame, rejected = reject_rows(frame, empty, "the user has no items", path.name, rejected)
    lists = pc.utf8_split_whitespace(pa.array(frame["items"].to_list(), pa.string()))
    length = pc.list_value_length(lists).to_numpy()
    row = np.repeat(np.arange(len(frame)), length)
    pairs = frame[["user", "line"]].iloc[row].reset_index(drop=True)
    pairs.insert(1, "item", pd.Series(pc.list_flatten(lists).to_pandas(), dtype="str"))
    pairs["time"] = np.arange(len(row)) - np.repeat(length.cumsum() - length, length)
    return pairs, rejected


def read_titles(path):
    """(Series item -> title, rejected rows).

    Whether there is a header is seen from the first line.
    """
    fields = first_fields(path)
    has_header = fields[0].lower() in ("item", "item_id", "id", "video_id")
    names = fields[:2] if has_header else ["item", "title"]
    frame, rejected = read_text_table(path, names, header=has_header)
    frame.columns = ["item", "title", "line"]
    frame, rejected = clean_ids(frame, ("item",), path.name, rejected)
    repeated = frame["item"].duplicated()
    reason = "the item has a title already"
    frame, rejected = reject_rows(frame, repeated, reason, path.name, rejected)
    empty = frame["title"].str.strip() == ""
    frame, rejected = reject_rows(frame, empty, "the title is empty", path.name, rejected)
    require_rows(len(frame), path, rejected)
    return frame.set_index("item")["title"], rejected


def load(pairs_path, titles_path, covers):
    """(InteractionLog, catalogue, rejected rows) of one MicroLens release."""
    titles, bad_titles = read_titles(titles_path)
    pairs, rejected = read_pairs(pairs_path)
    unknown = ~pairs["item"].isin(titles.index)
    reason = f"the item has no title in {titles_path.name}"
    pairs, rejected = reject_rows(pairs, unknown, reason, pairs_path.name, rejected)
    require_rows(len(pairs), pairs_path, rejected)
    images = pd.Series(image_index(covers), dtype=object).reindex(titles.index)
    log = InteractionLog.from_ids(pairs["user"], pairs["item"], pairs["time"])
    return log, pd.DataFrame({"title": titles, "image": images}), bad_titles + rejected


def main(argv=None):
    options = parse_options(Options, SECTION, argv, __doc__)
    print_options(options, "stage 1, data: MicroLens")
    pairs, titles, covers = find_files(options.raw_dir, options.name)
    if options.require_image and covers is None:
        prefix = pairs.name.rsplit("_pairs", 1)[0]
        raise InputError(
            f"{options.raw_dir} has no folder {prefix}_covers; put the covers there, or pass "
            "--require_image false to prepare the log without them"
        )
    if options.split_by == "released" and pairs.suffix == ".tsv":
        raise InputError(
            f"{pairs} has no timestamps, so the order of the users' first interactions, which "
            "decides the released split, is not known; give MicroLens-50k_pairs.csv, or use "
            "--split_by user"
        )
    if options.negative_sampling == "period" and pairs.suffix == ".tsv":
        raise InputError(
            f"{pairs} has no timestamps, so what others had at the time of a target is not known; "
            "give MicroLens-50k_pairs.csv, or another --negative_sampling"
        )
    job = Job.of(
        options,
        file_digests(pairs, titles),
        limit=options.limit,
        raw_dir=options.raw_dir,
        images=len(os.listdir(covers)) if covers else 0,
    )
    with WholeOutput(job, data_outputs(options), [rejected_rows_path(options)]) as output:
        if output.is_needed:
            log, catalogue, rejected = load(pairs, titles, covers)
            data = prepare(log, catalogue, options)
            _, counts = write_data_set(data, rejected, options)
            output.finish(counts)
    print(f"next: bash scripts/02_image_summary.sh {options.config}")


if __name__ == "__main__":
    run_main(main)
