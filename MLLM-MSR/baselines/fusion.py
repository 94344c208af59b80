"""A row from other rows: a logistic regression of their scores.

In:  {data_dir}/users.jsonl; of each row {output_dir}/{row}/scores.jsonl, validation_scores.jsonl
Out: {output_dir}/{system}/{variant}/scores.jsonl, its record has the weights

    python MLLM-MSR/test/test_with_llava_sft.py --config configs/sample.yaml --split validation
    python MLLM-MSR/baselines/fusion.py --config configs/sample.yaml

Fitted on the candidates of the validation users, scored on those of the test users. Scores of
different rows have different scales, so each list's scores are taken as distances from their mean
in standard deviations; a list of equal scores says nothing (0). CPU, seconds.
"""

from mllmrec.stage.main import run_main

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic.dataclasses import dataclass

from mllmrec.data.candidates import candidates, read_users, score_row, users_of_split
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import read_rows, require, write_rows
from mllmrec.stage.options import NAME, CommonOptions, option, parse_options, print_options
from mllmrec.stage.output import WholeOutput
from mllmrec.stage.record import Job, named_digests
from mllmrec.stage.schema import Row

SECTION = "fusion"


@dataclass
class Options(CommonOptions):
    system: str = option("baselines", "subfolder of output_dir for the scores", pattern=NAME)
    rows: list[str] = option(
        ["baselines/sasrec", "mllm_msr/sft"],
        "folders of scores below output_dir, two or more",
        min_length=2,
    )
    variant: str = option("fusion", "name of the row in metrics.json", pattern=NAME)


def features(path: Path, users: Sequence[Row]) -> np.ndarray[Any, Any]:
    """(candidates of all users,): a row's scores, standardised within each user's list.

    users: lines of users.jsonl. Raises InputError if the file does not have exactly their
    candidates.
    """
    scores = {(row["user_id"], row["item_id"]): row["score"] for row in read_rows(path)}
    listed = [[(user["user_id"], item) for item, _ in candidates(user)] for user in users]
    wanted = {pair for own in listed for pair in own}
    if scores.keys() != wanted:
        missing = len(wanted - scores.keys())
        raise InputError(
            f"{path} lacks {missing:,} of the {len(wanted):,} candidates of users.jsonl and has "
            f"{len(scores.keys() - wanted):,} others; score the row again, without --limit"
        )
    parts = []
    for own in listed:
        values = np.array([scores[pair] for pair in own])
        spread = values.std()
        parts.append((values - values.mean()) / spread if spread else np.zeros(len(values)))
    return np.concatenate(parts)


def fused(paths: dict[str, list[Path]], users: Sequence[Row]) -> tuple[list[Row], list[float]]:
    """(lines of scores.jsonl of the test users, weight of each row).

    paths: split -> the file of each row.
    """
    from sklearn.linear_model import LogisticRegression

    tables, labels, own = {}, {}, {}
    for split, files in paths.items():
        own[split] = users_of_split(users, split)
        tables[split] = np.stack([features(path, own[split]) for path in files], axis=1)
        labels[split] = [label for user in own[split] for _, label in candidates(user)]
    model = LogisticRegression().fit(tables["validation"], labels["validation"])
    scores = model.decision_function(tables["test"]).tolist()
    pairs = ((user["user_id"], *c) for user in own["test"] for c in candidates(user))
    rows = [score_row(*pair, score) for pair, score in zip(pairs, scores, strict=True)]
    return rows, model.coef_[0].tolist()


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_options(Options, SECTION, argv, __doc__)
    print_options(options, "fusion")
    users_path = require(Path(options.data_dir) / "users.jsonl")
    names = {"test": "scores.jsonl", "validation": "validation_scores.jsonl"}
    paths = {
        split: [
            require(Path(options.output_dir) / row / name, maker=f"the stage that scores {row}")
            for row in options.rows
        ]
        for split, name in names.items()
    }
    inputs = {f"{split} {path}": path for split, files in paths.items() for path in files}
    job = Job.of(options, named_digests({"users.jsonl": users_path, **inputs}), stage=SECTION)
    path = options.system_dir / options.variant / "scores.jsonl"
    with WholeOutput(job, [path]) as output:
        if not output.is_needed:
            return
        users = read_users(users_path)
        if not users_of_split(users, "validation"):
            raise InputError(f"{users_path} has no validation users to fit the weights on")
        rows, weights = fused(paths, users)
        output.begin()
        write_rows(path, rows)
        shown = dict(zip(options.rows, weights, strict=True))
        output.finish({"out": len(rows)}, weights=shown)
    print(f"wrote {path}: " + ", ".join(f"{row} {weight:.2f}" for row, weight in shown.items()))


if __name__ == "__main__":
    run_main(main)
