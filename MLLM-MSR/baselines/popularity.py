"""Baseline without a model: a candidate's score is its number of interactions.

In:  {data_dir}/users.jsonl, items.jsonl, touched.jsonl
Out: {output_dir}/baselines/popularity/scores.jsonl   score = interactions in all histories and in
                                                      the training users' targets
     popularity_uniform_negatives/scores.jsonl, popularity_weighted_negatives/scores.jsonl, beside
     it: the same for test lists whose negatives are redrawn, uniformly or in proportion to their
     interactions, because what popularity alone reaches depends on that. Never an item that the
     user had in the raw log; without touched.jsonl (released lists have no log) they are not made

    python MLLM-MSR/baselines/popularity.py --config configs/microlens.yaml

Every learned row should be compared with this one. CPU, seconds.
"""

from mllmrec.stage.main import run_main

import logging
from collections.abc import Sequence
from pathlib import Path

from pydantic.dataclasses import dataclass

from mllmrec.data.candidates import (
    popularity_scores,
    read_touched,
    read_users_and_items,
    redraw_negatives,
)
from mllmrec.stage.jsonl import require, write_rows
from mllmrec.stage.options import NAME, CommonOptions, option, parse_options, print_options
from mllmrec.stage.output import WholeOutput
from mllmrec.stage.record import Job, file_digests

logger = logging.getLogger("mllmrec")  # a script has no name of its own

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


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_options(Options, SECTION, argv, __doc__)
    print_options(options, "baseline: popularity")
    users_path = Path(options.data_dir) / "users.jsonl"
    touched_path = users_path.with_name("touched.jsonl")
    has_log = touched_path.exists()
    files = [require(users_path), *([touched_path] if has_log else [])]
    job = Job.of(options, file_digests(*files), stage=SECTION)
    users, items = read_users_and_items(users_path, users_path.with_name("items.jsonl"))
    had = read_touched(touched_path, users) if has_log else {}
    if not has_log:
        logger.info(f"no list is redrawn: {touched_path}, the users' raw log, is not there")
    for variant, sampling in VARIANTS.items():
        if sampling and not has_log:
            continue
        path = options.system_dir / variant / "scores.jsonl"
        validation = [] if sampling else [path.with_name("validation_scores.jsonl")]
        with WholeOutput(job, [path, *validation]) as output:
            if output.is_needed:
                drawn = users
                if sampling:
                    drawn = redraw_negatives(users, items, had, sampling, options.seed)
                rows = popularity_scores(drawn)
                output.begin()
                write_rows(path, rows)
                for other in validation:
                    write_rows(other, popularity_scores(users, "validation"))
                lists = {"lists": "redrawn"} if sampling else {}
                output.finish({"out": len(rows)}, **lists)
                print(f"wrote {path}: {len(rows):,} scores")


if __name__ == "__main__":
    run_main(main)
