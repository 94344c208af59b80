"""Stage 1 for the bundled sample: a small world is drawn, with covers, titles and users whose taste drifts.

In:  nothing; everything follows from --seed (see `sample_world.py` for what the world is like).
Out: {data_dir}/covers/*.png, then users.jsonl, items.jsonl, stats.json as for any data set (`split.py`), and
     {output_dir}/<rule>/scores.jsonl for three rules that the learned system is read against:
     ceiling      knows the taste that drew the user's last item
     title_only   the topics of the history, recent ones first, blind to the covers
     no_recency   the most frequent colour, shape and topic of the history, blind to when

    python data_processing/sample.py --config configs/sample.yaml

CPU; about 3 seconds. No downloaded data: the catalogue, titles and covers are made here.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from data_processing import sample_world as world
from data_processing.candidates import candidates, popularity_scores, score_row
from data_processing.config import option, parse_args, show
from data_processing.errors import run
from data_processing.jsonl import read_rows, write_rows
from data_processing.metrics import evaluate
from data_processing.split import Log, SplitArgs, run_loader

RULES = ("ceiling", "title_only", "no_recency")


@dataclass
class Args(SplitArgs):
    n_items: int = option(200, "items in the catalogue")
    n_users: int = option(1200, "users in all three splits")
    min_length: int = option(9, "fewest items of a user, the target among them")
    max_length: int = option(16, "most items of a user, the target among them")


def build_world(args):
    """(items: list of dicts, covers: list of images, lives: list of (item indices, final taste)) from args.seed."""
    rng = np.random.default_rng([args.seed, 0])
    items = world.catalogue(args.n_items, rng)
    covers = [world.draw_cover(item["colour"], item["shape"], rng) for item in items]
    lengths = rng.integers(args.min_length, args.max_length + 1, size=args.n_users)
    return items, covers, [world.simulate_user(items, int(length), rng) for length in lengths]


def as_log(items, lives, covers_dir):
    """(Log, catalogue, no refused rows): what `split.py` takes. Item 7 is called i007, user 7 u0007."""
    item_ids = [f"i{n:03d}" for n in range(len(items))]
    users = np.repeat([f"u{n:04d}" for n in range(len(lives))], [len(chosen) for chosen, _ in lives])
    chosen = np.concatenate([chosen for chosen, _ in lives])
    catalogue = pd.DataFrame(
        {"title": [item["title"] for item in items], "image": [str(covers_dir / f"{i}.png") for i in item_ids]}, index=item_ids
    )
    return Log.from_ids(users, np.array(item_ids)[chosen], np.arange(len(chosen))), catalogue, []


def rule_scores(users, items, lives):
    """dict rule -> lines of scores.jsonl for the test users."""
    rows = {rule: [] for rule in RULES}
    for user in users:
        if user["split"] != "test":
            continue
        history = [items[int(item_id[1:])] for item_id in user["history"]]
        listed = candidates(user)
        offered = [items[int(item_id[1:])] for item_id, _ in listed]
        _, taste = lives[int(user["user_id"][1:])]
        commonest = {a: max(world.VALUES[a], key=lambda value, a=a: sum(item[a] == value for item in history)) for a in world.ATTRIBUTES}
        scored = {
            "ceiling": world.fits(offered, taste),
            "title_only": world.counted_scores(history, offered, attributes=("topic",), decay=0.8),
            "no_recency": world.fits(offered, commonest),
        }
        for rule, scores in scored.items():
            rows[rule] += [score_row(user["user_id"], item_id, label, float(s)) for (item_id, label), s in zip(listed, scores, strict=True)]
    return rows


def main(argv=None):
    args = parse_args(Args, "data", argv, __doc__)
    show(args, "stage 1, data: the bundled sample")
    covers_dir = Path(args.data_dir) / "covers"
    built = []

    def load():
        items, covers, lives = build_world(args)
        built.extend((items, lives))
        covers_dir.mkdir(parents=True, exist_ok=True)
        for number, cover in enumerate(covers):
            cover.save(covers_dir / f"i{number:03d}.png")
        return as_log(items, lives, covers_dir)

    scores = {rule: Path(args.output_dir) / rule / "scores.jsonl" for rule in RULES}
    if run_loader(args, (), load, also=scores.values(), n_covers=len(list(covers_dir.glob("*.png"))) or args.n_items):
        users = read_rows(Path(args.data_dir) / "users.jsonl")
        print(f"\n{'rule':12} AUC   HR@5  (test users; what can be known without a model)")
        rules = rule_scores(users, *built)
        for rule, rows in rules.items():
            write_rows(scores[rule], rows)
        for rule, rows in {**rules, "popularity": popularity_scores(users)}.items():
            found = evaluate(rows, resamples=1)
            print(f"{rule:12} {found['auc']:.3f} {found['hr@5']:.3f}")
    print(f"next: bash scripts/02_image_summary.sh {args.config}")


if __name__ == "__main__":
    run(main)
