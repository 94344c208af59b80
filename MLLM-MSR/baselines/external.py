"""A row from another library: its scores of our candidates become scores.jsonl.

In:  {data_dir}/users.jsonl; --scores FILE with user, item and score of each candidate of the test
     users: .csv or .tsv with the header user_id,item_id,score (or tabs), .jsonl with these keys
Out: {output_dir}/{system}/{variant}/scores.jsonl

    python MLLM-MSR/baselines/external.py --config configs/sample.yaml --scores bpr.csv

A higher score is a better one. The file must have exactly the candidates of the test users:
scripts/export_dataset.sh --format recbole or mmrec writes them beside the data set. CPU, seconds.
"""

from mllmrec.stage.main import run_main

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic.dataclasses import dataclass

from mllmrec.data.candidates import candidates, read_users, score_row, users_of_split
from mllmrec.data.raw_files import check_raw_file, csv_table
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import read_lines, require, write_rows
from mllmrec.stage.options import NAME, CommonOptions, option, parse_options, print_options
from mllmrec.stage.output import WholeOutput
from mllmrec.stage.record import Job, file_digests
from mllmrec.stage.schema import Row

SECTION = "external"
COLUMNS = ("user_id", "item_id", "score")


@dataclass
class Options(CommonOptions):
    system: str = option("external", "subfolder of output_dir for the scores", pattern=NAME)
    scores: str = option("", "file of the other library's scores: .csv, .tsv or .jsonl")
    variant: str = option("external", "name of the row in metrics.json", pattern=NAME)


def read_scores(path: Path) -> Iterator[tuple[str, str, str, float]]:
    """(where, user, item, score) of each line. Raises InputError for a score that is no number."""
    if path.suffix == ".jsonl":
        lines = ((n, [row.get(name) for name in COLUMNS]) for n, row in read_lines(path))
    else:
        table = csv_table(path, COLUMNS, delimiter="\t" if path.suffix == ".tsv" else ",")
        lines = ((n, list(row)) for n, row in enumerate(table.frame().itertuples(index=False), 2))
    for number, (user, item, score) in lines:
        where = f"{path}, line {number}"
        try:
            value = float(str(score))
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise InputError(f"{where}: the score {score!r} is no number; correct the line")
        yield where, str(user).strip(), str(item).strip(), value


def scored_candidates(path: Path, users: Sequence[Row]) -> list[Row]:
    """Lines of scores.jsonl. users: lines of users.jsonl of the test split.

    Raises InputError for a line that is no candidate or there twice, and for a missing candidate.
    """
    listed = [(user["user_id"], *own) for user in users for own in candidates(user)]
    wanted = {(user, item) for user, item, _ in listed}
    scores: dict[tuple[str, str], float] = {}
    for where, user, item, score in read_scores(path):
        if (user, item) not in wanted:
            raise InputError(
                f"{where}: item {item!r} is no candidate of test user {user!r}; score the "
                "candidates of users.jsonl and no others"
            )
        if (user, item) in scores:
            raise InputError(f"{where}: user {user!r} and item {item!r} are there twice; keep one")
        scores[user, item] = score
    for user, item, _ in listed:
        if (user, item) not in scores:
            raise InputError(
                f"{path} has {len(scores):,} of {len(listed):,} candidates, item {item!r} of user "
                f"{user!r} is missing; score all candidates"
            )
    return [score_row(user, item, label, scores[user, item]) for user, item, label in listed]


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_options(Options, SECTION, argv, __doc__)
    print_options(options, "scores of another library")
    if Path(options.scores).suffix not in (".csv", ".tsv", ".jsonl"):
        raise InputError(f"--scores {options.scores!r}: name a .csv, .tsv or .jsonl file")
    path = check_raw_file(require(options.scores, maker="the other library"))
    users_path = require(Path(options.data_dir) / "users.jsonl")
    job = Job.of(options, file_digests(users_path, path), ("scores",), stage=SECTION)
    out = options.system_dir / options.variant / "scores.jsonl"
    with WholeOutput(job, [out]) as output:
        if output.is_needed:
            rows = scored_candidates(path, users_of_split(read_users(users_path), "test"))
            output.begin()
            write_rows(out, rows)
            output.finish({"out": len(rows)})
            print(f"wrote {out}: {len(rows):,} scores")


if __name__ == "__main__":
    run_main(main)
