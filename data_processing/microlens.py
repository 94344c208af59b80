"""Stage 1 for MicroLens-50k and -100k: the published files become users.jsonl, items.jsonl and stats.json.

In, all in {raw_dir}, as published:
     MicroLens-50k_pairs.csv     header user,item,timestamp (milliseconds); or
     MicroLens-50k_pairs.tsv     user, TAB, item ids separated by blanks, oldest first
     MicroLens-50k_titles.csv    item,title with or without a header; also *_title_en.csv
     MicroLens-50k_covers/       <item>.jpg, also .jpeg, .png, .webp, upper case
Out: see `split.py`, which holds the rules of the split.

    python data_processing/microlens.py --config configs/microlens.yaml --raw_dir data/raw/microlens

CPU; about 2 seconds for MicroLens-50k.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from data_processing.config import option, parse_args, show
from data_processing.errors import InputError, run
from data_processing.images import image_index
from data_processing.split import Log, SplitArgs, run_loader
from data_processing.tables import first_fields, read_table, set_aside, with_time


@dataclass
class Args(SplitArgs):
    name: str = option("", "prefix of the files, e.g. MicroLens-50k; found by itself if there is one")


def find_files(raw_dir, name):
    """(pairs file, titles file, covers folder or None) in `raw_dir`."""
    folder = Path(raw_dir)
    if not folder.is_dir():
        raise InputError(f"the folder {folder} is missing; put the MicroLens files there or name another --raw_dir")
    pairs = sorted(folder.glob(f"{name or '*'}_pairs.csv")) or sorted(folder.glob(f"{name or '*'}_pairs.tsv"))
    if not pairs:
        raise InputError(f"{folder} holds no {name or '*'}_pairs.csv or .tsv; the README, section «Real data», says where to get it")
    if len(pairs) > 1:
        raise InputError(f"{folder} holds {len(pairs)} sets of pairs ({pairs[0].name}, {pairs[1].name}); choose one with --name")
    prefix = pairs[0].name.rsplit("_pairs", 1)[0]
    titles = [folder / f"{prefix}_{ending}" for ending in ("titles.csv", "title_en.csv", "title.csv")]
    found = [path for path in titles if path.exists()]
    if not found:
        raise InputError(f"{titles[0]} is missing; the README, section «Real data», says where to get it")
    covers = folder / f"{prefix}_covers"
    return pairs[0], found[0], covers if covers.is_dir() else None


def read_pairs(path):
    """(DataFrame of user, item, time, line; refused rows) from pairs.csv or pairs.tsv."""
    if path.suffix == ".csv":
        frame, refused = read_table(path, ("user", "item", "timestamp"))
        return with_time(frame, path.name, refused)
    frame, refused = read_table(path, ("user", "items"), delimiter="\t", header=False, quoted=False)
    frame["items"] = frame["items"].str.split()
    frame, refused = set_aside(frame, frame["items"].str.len() == 0, "the user has no items", path.name, refused)
    frame = frame.explode("items").rename(columns={"items": "item"})
    frame["time"] = frame.groupby("line", sort=False).cumcount()  # the file tells only the order
    return frame, refused


def read_titles(path):
    """(Series item -> title, refused rows). Whether there is a header is read off the first line."""
    has_header = first_fields(path)[0].lower() in ("item", "item_id", "id", "video_id")
    names = first_fields(path)[:2] if has_header else ["item", "title"]
    frame, refused = read_table(path, names, header=has_header)
    frame.columns = ["item", "title", "line"]
    frame, refused = set_aside(frame, frame["item"].duplicated(), "the item has a title already", path.name, refused)
    frame, refused = set_aside(frame, frame["title"].str.strip() == "", "the title is empty", path.name, refused)
    return frame.set_index("item")["title"], refused


def load(pairs_path, titles_path, covers):
    """(Log, catalogue, refused rows) of one MicroLens release."""
    titles, bad_titles = read_titles(titles_path)
    pairs, refused = read_pairs(pairs_path)
    pairs, refused = set_aside(
        pairs, ~pairs["item"].isin(titles.index), f"the item has no title in {titles_path.name}", pairs_path.name, refused
    )
    catalogue = pd.DataFrame({"title": titles, "image": pd.Series(image_index(covers), dtype=object).reindex(titles.index)})
    return Log.from_ids(pairs["user"], pairs["item"], pairs["time"]), catalogue, bad_titles + refused


def main(argv=None):
    args = parse_args(Args, "data", argv, __doc__)
    show(args, "stage 1, data: MicroLens")
    pairs, titles, covers = find_files(args.raw_dir, args.name)
    if args.require_image and covers is None:
        raise InputError(
            f"{args.raw_dir} has no folder {pairs.name.rsplit('_pairs', 1)[0]}_covers; put the covers there, or pass "
            "--require_image false to prepare the log without them"
        )
    run_loader(args, (pairs, titles), lambda: load(pairs, titles, covers), images=len(os.listdir(covers)) if covers else 0)
    print(f"next: bash scripts/02_image_summary.sh {args.config}")


if __name__ == "__main__":
    run(main)
