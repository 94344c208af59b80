"""Baseline without a model: a candidate's score is its number of interactions.

In:  {data_dir}/users.jsonl
Out: {output_dir}/baselines/popularity/scores.jsonl   score = interactions in all histories and in
                                                      the training users' targets
     popularity_uniform_negatives/scores.jsonl, popularity_weighted_negatives/scores.jsonl, beside
     it: the same for test lists whose negatives are drawn anew, uniformly or in proportion to their
     interactions, because what popularity alone reaches depends on that

    python MLLM-MSR/baselines/popularity.py --config configs/microlens.yaml

Every learned row should be compared with this one. CPU, seconds.
"""

from mllmrec.stage.main import run_main

import functools
from collections.abc import Sequence
from pathlib import Path

from pydantic.dataclasses import dataclass

from mllmrec.data.candidates import (
    check_negatives,
    popularity_scores,
    read_users,
    redraw_negatives,
)
from mllmrec.stage.jsonl import require, write_rows
from mllmrec.stage.options import NAME, CommonOptions, option, parse_options, print_options
from mllmrec.stage.output import WholeOutput
from mllmrec.stage.record import Job, file_digests
from mllmrec.stage.schema import Row

SECTION = "popularity"
# variant -> how the negatives of its lists are drawn, "" for those of users.jsonl.
VARIANTS = {
    "popularity": "",
    "popularity_uniform_negatives": "uniform",
    "popularity_weighted_negatives": "popularity",
}


@dataclass
class Options(CommonOptions):
    system: str = option("baselines", "subfolder of output_dir for the scores", pattern=NAME)


def read_lists(users_path: Path) -> list[Row]:
    """Lines of users.jsonl, each of which must have negatives."""
    users = read_users(users_path)
    for number, user in enumerate(users, start=1):
        check_negatives(user, f"{users_path}, line {number}")
    return users


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_options(Options, SECTION, argv, __doc__)
    print_options(options, "baseline: popularity")
    users_path = Path(options.data_dir) / "users.jsonl"
    job = Job.of(options, file_digests(require(users_path)))
    lists = functools.cache(lambda: read_lists(users_path))  # read if a variant needs it
    for variant, sampling in VARIANTS.items():
        path = options.system_dir / variant / "scores.jsonl"
        with WholeOutput(job, [path]) as output:
            if output.is_needed:
                users = lists()
                if sampling:
                    users = redraw_negatives(users, sampling, options.seed)
                rows = popularity_scores(users)
                write_rows(path, rows)
                output.finish({"out": len(rows)})
                print(f"wrote {path}: {len(rows):,} scores")


if __name__ == "__main__":
    run_main(main)
