"""Stage 1 compared with the released notebook's procedure, and its time and memory on large logs.

    bash scripts/benchmark.sh data --raw_dir data/raw/microlens --millions 3 10 30

1. MicroLens-50k: raw file to users.jsonl in one process; and the part that the notebook has, too
   (each user's history, target and negatives), compared with our own straightforward
   re-implementation of its procedure: it filters the whole table once per user. That one is timed
   on `--baseline_users` users and scaled to all; the repeats of both alternate.
2. A generated log in the form of Amazon's 0core tables, with product pages: seconds and peak memory
   of `amazon.py`.

Out: outputs/benchmark/data.json. 30 million interactions need 4 GB of disk in the temporary folder.
"""

from mllmrec.stage.main import run_main

import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import duckdb
import pandas as pd
from tools import print_row, read_options, write_report

from mllmrec.data.data_split import prepare
from mllmrec.data.interactions import k_core
from mllmrec.stage.scripts import load_script

MICROLENS = load_script("data_processing/microlens.py")


@dataclass
class Options:
    """Of the command line."""

    raw_dir: Annotated[str, "folder of the MicroLens-50k files"] = "data/raw/microlens"
    millions: Annotated[tuple[int, ...], "sizes of the generated logs"] = (3, 10, 30)
    baseline_users: Annotated[int, "users on whom the per-user procedure is timed"] = 100
    repeats: Annotated[int, "of which the median is taken"] = 5


def per_user_procedure(table, users):
    """(user, history, target, negatives) of each user, the notebook's way.

    For each user the whole table is filtered, then negatives are drawn one by one until there are
    20.
    """
    popularity, items = table["item"].value_counts(), list(table["item"].unique())
    lists = []
    for user in users:
        rows = table[table["user"] == user].sort_values("time", kind="stable")
        touched = list(rows["item"])
        history = sorted(touched[:-1], key=lambda item: -popularity[item])[:6]
        negatives = []
        while len(negatives) < 20:
            item = random.choice(items)
            if item not in touched and item not in negatives:
                negatives.append(item)
        lists.append((user, history, touched[-1], negatives))
    return lists


def our_procedure(log, catalogue, options):
    """The same of all users, by this repository, the filters included."""
    return list(prepare(log, catalogue, replace(options, history="released")).encoded_lines())


def core_table(log, options):
    """(user ids, table of the core) as the notebook has them after its filters."""
    keep = k_core(log.user, log.item, options.user_core, options.item_core)
    table = pd.DataFrame(
        {
            "user": log.user_ids[log.user[keep]],
            "item": log.item_ids[log.item[keep]],
            "time": log.time[keep],
        }
    )
    return list(table["user"].unique()), table


def seconds_of(work, *arguments):
    started = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - started


def microlens_rows(args):
    """Rows of the report for MicroLens-50k; none if the raw files are missing."""
    if not Path(args.raw_dir).is_dir():
        print(f"{args.raw_dir} is missing: MicroLens is skipped")
        return []
    pairs, titles, _ = MICROLENS.find_files(args.raw_dir, "")
    n_sampled, seconds = args.baseline_users, {"stage": [], "ours": [], "baseline": []}
    with tempfile.TemporaryDirectory() as folder:
        options = MICROLENS.Options(data_dir=folder, raw_dir=args.raw_dir, require_image=False)
        log, catalogue, _ = MICROLENS.load(pairs, titles, None)
        users, table = core_table(log, options)
        stage = ["--raw_dir", args.raw_dir, "--data_dir", folder, "--require_image", "false"]
        stage += ["--config", "configs/microlens.yaml", "--overwrite", "true"]
        for repeat in range(args.repeats):
            sample = random.Random(repeat).sample(users, n_sampled)
            seconds["stage"].append(seconds_of(MICROLENS.main, stage))
            seconds["ours"].append(seconds_of(our_procedure, log, catalogue, options))
            sampled_s = seconds_of(per_user_procedure, table, sample)
            seconds["baseline"].append(sampled_s * len(users) / n_sampled)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    lists = "histories, targets and negatives"
    return [
        {
            "case": f"MicroLens-50k, raw files to users.jsonl, {len(users):,} users",
            "ours_s": round(median["stage"], 3),
        },
        {
            "case": f"{lists}; per-user procedure scaled from {n_sampled} users",
            "baseline_s": round(median["baseline"], 1),
            "ours_s": round(median["ours"], 3),
            "ratio": round(median["baseline"] / median["ours"], 1),
        },
    ]


def generate_log(folder, millions):
    """Write Toys.csv and meta_Toys.jsonl, the same ones each time.

    A tenth as many users as interactions, a fortieth as many items; the first items are the most
    popular ones.
    """
    n = millions * 1_000_000
    log = f"""SELECT format('AE{{:026d}}', (random() * {n // 10})::BIGINT) AS user_id,
        format('B{{:09d}}', (random() ** 2.5 * {n // 40})::BIGINT) AS parent_asin, 5.0 AS rating,
        (1.2e12 + random() * 5e11)::BIGINT AS timestamp FROM range({n})"""
    pages = f"""SELECT format('B{{:09d}}', n) AS parent_asin, 'Item number ' || n AS title,
        [repeat('A long text. ', 20)] AS description, [] AS features,
        [{{'large': 'https://images.example/' || n || '.jpg', 'variant': 'MAIN'}}] AS images
        FROM range({n // 40 + 1}) AS numbers(n)"""
    with duckdb.connect(config={"threads": 1}) as database:  # one: the order of the random numbers
        database.execute("SELECT setseed(0.5)")
        database.execute(f"COPY ({log}) TO '{folder}/Toys.csv' (HEADER)")
        database.execute(f"COPY ({pages}) TO '{folder}/meta_Toys.jsonl' (FORMAT json)")


def amazon_row(millions):
    """Row of the report: `amazon.py` on a generated log, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        generate_log(folder, millions)
        command = [sys.executable, __file__, "--child", "--config", "configs/amazon_baby.yaml"]
        command += ["--category", "Toys", "--raw_dir", folder, "--data_dir", f"{folder}/data"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stdout[-2000:] + done.stderr[-2000:])
        seconds, gigabytes = map(float, done.stdout.splitlines()[-1].split())
        users = json.loads((Path(folder) / "data" / "stats.json").read_text())["users"]
    log = f"generated Amazon log, {millions} million interactions"
    row = {
        "case": f"{log}, {users:,} users in the core",
        "ours_s": round(seconds, 1),
        "ours_s_per_million": round(seconds / millions, 2),
        "peak_gb": round(gigabytes, 2),
        "peak_gb_per_million": round(gigabytes / millions, 3),
    }
    print_row(row)
    return row


def child(argv):
    """Run `amazon.py` in this process; the last line printed is its seconds and peak memory."""
    seconds = seconds_of(load_script("data_processing/amazon.py").main, argv)
    print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--child"]:
        child(argv[1:])
        return
    args = read_options(Options, __doc__, argv)
    rows = microlens_rows(args)
    for row in rows:
        print_row(row)
    rows += [amazon_row(millions) for millions in args.millions]
    write_report("data", rows)


if __name__ == "__main__":
    run_main(main)
