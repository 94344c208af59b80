"""Stage 1 against the released notebook's way, and its time and memory as an Amazon-shaped log grows.

    bash scripts/benchmark.sh data --raw_dir data/raw/microlens --millions 3 10 30

1. MicroLens-50k: raw file to users.jsonl in one process; and the part that the notebook does too (each user's history,
   target and negatives), beside our own straightforward re-implementation of its procedure: it filters the whole table
   once per user. That is timed on `--baseline_users` users, in turns with ours, and scaled to all of them.
2. A generated log in the form of Amazon's 0core tables, with product pages: seconds and peak memory of `amazon.py`.

Out: outputs/benchmark/data.json. 30 million interactions want 4 GB of disk in the temporary folder.
"""

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv

from data_processing.errors import run
from data_processing.jsonl import write_json
from data_processing.microlens import Args, find_files, load
from data_processing.run_record import machine
from data_processing.split import histories, prepare, write_data

OUTPUT = Path("outputs/benchmark/data.json")


def per_user_procedure(table, users):
    """The notebook's way: for each user a pass over the whole table, then negatives one by one until there are 20."""
    popularity, items = table["item"].value_counts(), list(table["item"].unique())
    made = []
    for user in users:
        rows = table[table["user"] == user].sort_values("time", kind="stable")
        taken = list(rows["item"])
        history = sorted(taken[:-1], key=lambda item: -popularity[item])[:6]
        negatives = []
        while len(negatives) < 20:
            item = random.choice(items)
            if item not in taken and item not in negatives:
                negatives.append(item)
        made.append((user, history, taken[-1], negatives))
    return made


def all_users(log, catalogue, options):
    """Ours, to the same lists: for every user (id, history, target, negatives), the filters included."""
    _, users, _ = prepare(log, catalogue, options)
    ids, negatives = users["item_ids"], users["item_ids"][users["negatives"]].tolist()
    return [
        (users["ids"][row], ids[history].tolist(), ids[target], negatives[row])
        for row, history, target in histories(users, options)
    ]


def microlens_rows(args):
    """Rows of the report for MicroLens-50k, or none where the raw files are not there."""
    folder = Path(args.raw_dir)
    if not folder.is_dir():
        print(f"{folder} is not there: MicroLens is left out")
        return []
    pairs, titles, _ = find_files(args.raw_dir, "")
    with tempfile.TemporaryDirectory() as out:
        options = Args(data_dir=out, raw_dir=args.raw_dir, require_image=False)
        log, catalogue, _ = load(pairs, titles, None)
        core_users, table = core_table(log, catalogue, options)
        whole, ours, baseline = [], [], []
        for turn in range(args.repeats):
            started = time.perf_counter()
            log, catalogue, _ = load(pairs, titles, None)
            write_data(*prepare(log, catalogue, options), options)
            whole.append(time.perf_counter() - started)
            started = time.perf_counter()
            all_users(log, catalogue, replace(options, history="released"))
            ours.append(time.perf_counter() - started)
            some = random.Random(turn).sample(core_users, args.baseline_users)
            started = time.perf_counter()
            per_user_procedure(table, some)
            baseline.append((time.perf_counter() - started) * len(core_users) / args.baseline_users)
    median_ours, median_baseline = statistics.median(ours), statistics.median(baseline)
    return [
        {
            "case": f"MicroLens-50k, raw files to users.jsonl, {len(core_users):,} users",
            "ours_s": round(statistics.median(whole), 3),
        },
        {
            "case": f"histories, targets and negatives; per-user procedure scaled from {args.baseline_users} users",
            "baseline_s": round(median_baseline, 1),
            "ours_s": round(median_ours, 3),
            "ratio": round(median_baseline / median_ours, 1),
        },
    ]


def core_table(log, catalogue, options):
    """(user ids, table of the core) as the notebook has them after its filters."""
    import pandas as pd

    from data_processing.split import k_core

    keep = k_core(log.user, log.item, options.user_core, options.item_core)
    table = pd.DataFrame(
        {
            "user": log.user_ids[log.user[keep]],
            "item": log.item_ids[log.item[keep]],
            "time": log.time[keep],
        }
    )
    return list(table["user"].unique()), table


def generate_log(folder, millions, rng):
    """Toys.csv and meta_Toys.jsonl: a tenth as many users as interactions, a fortieth as many items, popular ones first."""
    n = millions * 1_000_000
    users, items = n // 10, n // 40
    header = True
    with open(folder / "Toys.csv", "wb") as file:
        for start in range(0, n, 2_000_000):
            size = min(2_000_000, n - start)
            item = (items * rng.random(size) ** 2.5).astype(np.int64)
            columns = {
                "user_id": pa.array(
                    np.char.add("AE", np.char.zfill(rng.integers(0, users, size).astype("U9"), 26))
                ),
                "parent_asin": pa.array(np.char.add("B", np.char.zfill(item.astype("U9"), 9))),
                "rating": pa.array(np.full(size, 5.0)),
                "timestamp": pa.array(rng.integers(1_200_000_000_000, 1_700_000_000_000, size)),
            }
            pacsv.write_csv(
                pa.table(columns),
                file,
                pacsv.WriteOptions(include_header=header, quoting_style="none"),
            )
            header = False
    with open(folder / "meta_Toys.jsonl", "w") as file:
        for number in range(items):
            page = {"parent_asin": f"B{number:09d}", "title": f"Item number {number}, of a size", "description": ["A long text. " * 20],
                    "features": [], "images": [{"large": f"https://images.example/{number}.jpg", "variant": "MAIN"}]}  # fmt: skip
            file.write(json.dumps(page) + "\n")


def amazon_row(millions):
    """Seconds and peak memory of `amazon.py` on a generated log, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        generate_log(Path(folder), millions, np.random.default_rng(millions))
        command = [
            sys.executable, __file__, "--child", "--config", "configs/amazon_baby.yaml", "--category", "Toys", "--raw_dir", folder,
            "--data_dir", f"{folder}/data",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stdout[-2000:] + done.stderr[-2000:])
        seconds, gigabytes = map(float, done.stdout.splitlines()[-1].split())
        stats = json.loads((Path(folder) / "data" / "stats.json").read_text())
    return {
        "case": f"generated Amazon log, {millions} million interactions, {stats['users']:,} users in the core",
        "ours_s": round(seconds, 1),
        "ours_s_per_million": round(seconds / millions, 2),
        "peak_gb": round(gigabytes, 2),
        "peak_gb_per_million": round(gigabytes / millions, 3),
    }


def child(argv):
    """`amazon.py` in this process; the last line printed is its seconds and peak memory."""
    from data_processing.amazon import main as amazon

    started = time.perf_counter()
    amazon(argv)
    print(
        time.perf_counter() - started,
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    )


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--child"]:
        return child(argv[1:])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--raw_dir", default="data/raw/microlens", help="folder of the MicroLens-50k files"
    )
    parser.add_argument(
        "--millions", type=int, nargs="*", default=[3, 10, 30], help="sizes of the generated logs"
    )
    parser.add_argument(
        "--baseline_users",
        type=int,
        default=100,
        help="users on whom the per-user procedure is timed",
    )
    parser.add_argument("--repeats", type=int, default=5, help="turns of which the median is taken")
    args = parser.parse_args(argv)
    rows = microlens_rows(args)
    for millions in args.millions:
        rows.append(amazon_row(millions))
        print(rows[-1])
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    write_json(OUTPUT, {"rows": rows, **machine()})
    print(f"wrote {OUTPUT}")


if __name__ == "__main__":
    run(main)
