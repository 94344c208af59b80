"""Stage 1 for the bundled sample: a small world is drawn, with covers, titles and users who drift.

In:  nothing; everything follows from --seed (see `mllmrec/data/sample_world.py`).
Out: {data_dir}/covers/*.png, then users.jsonl, items.jsonl, stats.json as for any data set, and
     {output_dir}/bounds/<rule>/scores.jsonl for three rules to compare the learned system with:
     ceiling      knows the favourites that drew the user's last item
     title_only   the topics of the history, recent ones first, without the covers
     no_recency   the most frequent colour, shape and topic of the history, without the order

    python data_processing/sample.py --config configs/sample.yaml

CPU; about 3 seconds. No downloaded data: the catalogue, titles and covers are made here.
"""

from mllmrec.stage.main import run_main

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from PIL.Image import Image
from pydantic.dataclasses import dataclass

from mllmrec.data import sample_world as world
from mllmrec.data.candidates import (
    candidates,
    popularity_scores,
    read_users,
    score_row,
    users_of_split,
)
from mllmrec.data.data_split import SplitOptions, prepare
from mllmrec.data.interactions import InteractionLog
from mllmrec.data.loader import data_outputs, report, write_data_set
from mllmrec.evaluation.metrics import evaluate
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import atomic_file, write_rows
from mllmrec.stage.options import option, parse_options, print_next, print_options
from mllmrec.stage.output import WholeOutput
from mllmrec.stage.record import Job
from mllmrec.stage.schema import Row

SECTION = "data"
RULES = ("ceiling", "title_only", "no_recency")


@dataclass
class Options(SplitOptions):
    n_items: int = option(200, "items in the catalogue", ge=1)
    n_users: int = option(1200, "users in all three splits", ge=1)
    min_length: int = option(9, "fewest items of a user, the target included", ge=2)
    cover_shapes: Literal["one", "varied"] = option(
        "one", "varied: a third of the covers is extended to a wider, a third to a higher format"
    )
    max_length: int = option(16, "most items of a user, the target included", ge=2)


World = tuple[list[world.Item], list[Image], list[tuple[list[int], world.Values]]]


def build_world(options: Options) -> World:
    """(items, covers, users) from options.seed; users: (item indices, final favourites) each."""
    rng = np.random.default_rng([options.seed, 0])
    items = world.catalogue(options.n_items, rng)
    covers = [world.draw_cover(item["colour"], item["shape"], rng) for item in items]
    if options.cover_shapes == "varied":
        covers = [world.extended(cover, number) for number, cover in enumerate(covers)]
    lengths = rng.integers(options.min_length, options.max_length + 1, size=options.n_users)
    return items, covers, [world.simulate_user(items, int(length), rng) for length in lengths]


def as_log(drawn: World, cover_paths: Sequence[Path]) -> tuple[InteractionLog, pd.DataFrame]:
    """(log, catalogue). Item 7 is called i007, user 7 u0007."""
    items, _, users = drawn
    item_ids = np.array([path.stem for path in cover_paths])
    lengths = [len(chosen) for chosen, _ in users]
    user = np.repeat([f"u{n:04d}" for n in range(len(users))], lengths)
    chosen = np.concatenate([chosen for chosen, _ in users])
    titles = [item["title"] for item in items]
    catalogue = pd.DataFrame({"title": titles, "image": map(str, cover_paths)}, index=item_ids)
    log = InteractionLog.from_ids(user, item_ids[chosen], np.arange(len(chosen)))
    return replace(log, has_times=False), catalogue


def rule_scores(
    lists: Iterable[tuple[Row, Sequence[tuple[str, int]]]], drawn: World, rules: Sequence[str]
) -> dict[str, list[Row]]:
    """dict rule -> lines of scores.jsonl.

    lists: (line of users.jsonl, its candidates and labels); rules: of those that are named here.
    """
    items, _, users = drawn
    rows: dict[str, list[Row]] = {rule: [] for rule in rules}
    for line, listed in lists:
        history = [items[int(item_id[1:])] for item_id in line["history"]]
        offered = [items[int(item_id[1:])] for item_id, _ in listed]
        _, favourites = users[int(line["user_id"][1:])]
        scored = {
            "ceiling": world.fits(offered, favourites),
            "title_only": world.counted_scores(history, offered, ("topic",), decay=0.8),
            "caption_only": world.counted_scores(history, offered, ("colour", "shape"), decay=0.8),
            "counted": world.counted_scores(history, offered, decay=0.8),
            "no_recency": world.fits(offered, most_frequent(history)),
        }
        for rule in rules:
            rows[rule] += [
                score_row(line["user_id"], item_id, label, float(score))
                for (item_id, label), score in zip(listed, scored[rule], strict=True)
            ]
    return rows


def most_frequent(history: Sequence[world.Item]) -> world.Values:
    """dict attribute -> its most frequent value in the history."""
    counts = {
        attribute: {v: sum(item[attribute] == v for item in history) for v in values}
        for attribute, values in world.VALUES.items()
    }
    return {attribute: max(count, key=lambda v: count[v]) for attribute, count in counts.items()}


def write_rules(drawn: World, options: Options) -> None:
    """Write the rules' scores and print their metrics beside popularity's."""
    lines = read_users(Path(options.data_dir) / "users.jsonl")
    lists = ((line, candidates(line)) for line in users_of_split(lines, "test"))
    rules = rule_scores(lists, drawn, RULES)
    for rule, path in rule_outputs(options).items():
        write_rows(path, rules[rule])
    print(f"\n{'rule':12} AUC   HR@5  (test users; what can be known without a model)")
    for rule, rows in {**rules, "popularity": popularity_scores(lines)}.items():
        metrics: Any = evaluate(rows, resamples=1)
        print(f"{rule:12} {metrics['auc']:.3f} {metrics['hr@5']:.3f}")


def rule_outputs(options: Options) -> dict[str, Path]:
    """dict rule -> its scores.jsonl."""
    folder = Path(options.output_dir) / "bounds"
    return {rule: folder / rule / "scores.jsonl" for rule in RULES}


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_options(Options, SECTION, argv, __doc__)
    if not options.min_length <= options.max_length <= options.n_items:
        raise InputError(
            "--min_length, --max_length and --n_items must rise in this order, since no item "
            f"repeats, not {options.min_length}, {options.max_length}, {options.n_items}"
        )
    print_options(options, "stage 1, data: the bundled sample")
    folder = Path(options.data_dir) / "covers"
    cover_paths = [folder / f"i{number:03d}.png" for number in range(options.n_items)]
    job = Job.of(options, {}, stage=SECTION, limit=options.limit)
    outputs = [*data_outputs(options), *rule_outputs(options).values(), *cover_paths]
    with WholeOutput(job, outputs) as output:
        if output.is_needed:
            drawn = build_world(options)
            output.begin()
            for cover, path in zip(drawn[1], cover_paths, strict=True):
                with atomic_file(path) as file:
                    cover.save(file, "PNG")
            data = prepare(*as_log(drawn, cover_paths), options)
            counts = write_data_set(data, [], options)
            write_rules(drawn, options)
            output.finish(counts)
            report(data.statistics, options)
    print_next("scripts/02_image_summary.sh", options.config, options.words)


if __name__ == "__main__":
    run_main(main)
