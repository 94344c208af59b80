"""Stage 1 for the Amazon lists that the authors of MLLM-MSR ship: used as they are.

In, all in {raw_dir}:
     <category>_user_items_negs_train.csv, ..._test.csv, as shipped: user, items and negatives,
                                 separated by tabs; items and negatives separated by commas. A
                                 ..._val.csv is read, too, if it is there
     <category>_i_map.tsv        header original,item_id: the items' own ids
     meta_<category>.jsonl[.gz]  product pages of Amazon Reviews 2023
Out: users.jsonl, items.jsonl, stats.json, image_urls.jsonl: as `amazon.py`. The last of a user's
     items is the target, those before it are the history, in the order of the list; negatives and
     split are the authors'. Users are called as in the lists, items by their own ids

    python data_processing/released_lists.py --config configs/amazon_games_released.yaml

A user with an item that has no page or no title is rejected, and so is one whose target is among
the negatives. `--limit N` takes the first N users of each file. CPU, minutes for the pages.
"""

from mllmrec.stage.main import run_main

from pathlib import Path

import numpy as np
import pandas as pd
from pydantic.dataclasses import dataclass

from mllmrec.data.amazon_pages import PageOptions, add_texts, read_pages, write_image_urls
from mllmrec.data.columns import require_rows
from mllmrec.data.images import check_image_paths
from mllmrec.data.raw_files import check_raw_file
from mllmrec.data.split import write_items
from mllmrec.data.tables import read_table
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import (
    read_rejected,
    rejected_path,
    relative_path,
    write_json,
    write_rejected,
    write_rows,
)
from mllmrec.stage.options import option, parse_options, print_options
from mllmrec.stage.output import WholeOutput
from mllmrec.stage.record import Job, file_digests

SECTION = "data"
SPLITS = {"train": "train", "val": "validation", "test": "test"}  # ending of the file -> split


@dataclass
class Options(PageOptions):
    raw_dir: str = option("data/raw/amazon", "folder of the raw files", min_length=1)


def find_files(raw_dir, category):
    """(dict split -> list file, item map, pages file) of one category."""
    folder = Path(raw_dir)
    paths = {s: folder / f"{category}_user_items_negs_{end}.csv" for end, s in SPLITS.items()}
    if not paths["validation"].exists():  # not shipped
        del paths["validation"]
    pages = [folder / f"meta_{category}.jsonl{ending}" for ending in ("", ".gz")]
    page = pages[1] if pages[1].exists() else pages[0]
    lists = {split: check_raw_file(path) for split, path in paths.items()}
    return lists, check_raw_file(folder / f"{category}_i_map.tsv"), check_raw_file(page)


def read_lists(path, split, own_ids):
    """(lines of users.jsonl, rejected rows) of one list file. own_ids: Series code -> item id."""
    frame, rejected = read_table(
        path, ("user", "items", "negatives"), delimiter="\t", header=False, quoted=False
    )
    lines = []
    for row in frame.itertuples(index=False):
        listed = [[code.strip() for code in text.split(",")] for text in (row.items, row.negatives)]
        unknown = [code for codes in listed for code in codes if code not in own_ids.index]
        reason = None
        if unknown:
            reason = f"item {unknown[0]!r} is not in the item map"
        elif len(listed[0]) < 2:
            reason = "a list needs a history and a target"
        elif listed[0][-1] in listed[1]:
            reason = "the target is among the negatives"
        elif len(set(listed[1])) < len(listed[1]):
            reason = "a negative is listed twice"
        if reason:
            text = f"{row.user} {row.items} {row.negatives}"[:200]
            rejected.append({"file": path.name, "line": row.line, "row": text, "reason": reason})
            continue
        items, negatives = (own_ids[codes].tolist() for codes in listed)
        line = {"user_id": row.user, "history": items[:-1], "target": items[-1]}
        lines.append(line | {"negatives": negatives, "split": split, "fold": None})
    require_rows(len(lines), path, rejected)
    return lines, rejected


def without_unknown_items(lines, known, rejected):
    """(lines whose items are all `known`, `rejected` plus the others)."""
    kept = []
    for line in lines:
        items = [*line["history"], line["target"], *line["negatives"]]
        missing = [item for item in items if item not in known]
        if missing:
            reason = f"item {missing[0]} has no page or no title"
            rejected = [*rejected, {"user_id": line["user_id"], "reason": reason}]
        else:
            kept.append(line)
    return kept, rejected


def statistics(lines, rejected):
    """For stats.json: as for other data sets, of the lists."""
    splits = pd.Series([line["split"] for line in lines]).value_counts()
    lengths = [len(line["history"]) + 1 for line in lines]
    items = {item for line in lines for item in (*line["history"], line["target"])}
    return {
        "users": len(lines),
        "items": len(items),
        "interactions": int(np.sum(lengths)),
        "average_length": round(float(np.mean(lengths)), 2),
        "written_users": {split: int(splits.get(split, 0)) for split in SPLITS.values()},
        "rejected_rows": len(rejected),
    }


def write_all(options, files, broken):
    """Read the lists and pages and write all outputs; return the counts for the record."""
    lists, map_path, pages = files
    users_path, items_path, stats_path, urls_path, rejected_rows = outputs_of(options)
    table, _ = read_table(map_path, ("original", "item_id"), delimiter="\t", quoted=False)
    own_ids = table.set_index("item_id")["original"]
    lines, rejected = [], []
    for split, path in lists.items():
        more, bad = read_lists(path, split, own_ids)
        lines, rejected = lines + more[: options.limit or None], rejected + bad
    repeated = pd.Series([line["user_id"] for line in lines])
    if repeated.duplicated().any():
        user = repeated[repeated.duplicated()].iloc[0]
        raise InputError(f"user {user!r} has two lists in {', '.join(map(str, lists.values()))}")
    used = {i for line in lines for i in (*line["history"], line["target"], *line["negatives"])}
    catalogue, without_page = read_pages(pages, np.array(sorted(used), object), options, broken)
    lines, rejected = without_unknown_items(lines, set(catalogue.index), rejected + without_page)
    items = add_texts(catalogue, pages, options)
    found = statistics(lines, rejected)
    write_rows(users_path, lines)
    names = [relative_path(image, items_path) for image in items["image"] if image]
    check_image_paths(names, items_path, options.data_dir, options.image_roots)
    write_items(items, items_path)
    write_json(stats_path, found)
    write_image_urls(items, urls_path, broken)
    write_rejected(rejected_rows, rejected)
    print(f"wrote {users_path}: {found['written_users']}, {len(rejected):,} rows rejected")
    return {"in": len(repeated), "out": len(lines), "items": len(items), "rejected": len(rejected)}


def outputs_of(options):
    """users.jsonl, items.jsonl, stats.json, image_urls.jsonl and the rejected rows."""
    names = ("users.jsonl", "items.jsonl", "stats.json", "image_urls.jsonl")
    folder = Path(options.data_dir)
    return [*(folder / name for name in names), folder / "interactions.rejected.jsonl"]


def main(argv=None):
    options = parse_options(Options, SECTION, argv, __doc__)
    print_options(options, "stage 1, data: the released lists of Amazon")
    files = find_files(options.raw_dir, options.category)
    images_path = Path(options.data_dir) / "images.jsonl"
    broken = set(read_rejected(images_path, "item_id"))
    raw_files = [*files[0].values(), *files[1:], *([rejected_path(images_path)] if broken else [])]
    job = Job.of(options, file_digests(*raw_files), limit=options.limit, raw_dir=options.raw_dir)
    *outputs, rejected_rows = outputs_of(options)
    with WholeOutput(job, outputs, [rejected_rows]) as output:
        if output.is_needed:
            output.finish(write_all(options, files, broken))
    print(f"next: python data_processing/download_images.py --config {options.config}")


if __name__ == "__main__":
    run_main(main)
