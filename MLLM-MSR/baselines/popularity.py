"""Baseline without a model: a candidate's score is its number of interactions.

In:  {data_dir}/users.jsonl
Out: {output_dir}/baselines/popularity/scores.jsonl   score = interactions in all histories and in
                                                      the training users' targets

    python MLLM-MSR/baselines/popularity.py --config configs/microlens.yaml

Every learned row should be compared with this one. CPU, seconds.
"""

import time
from pathlib import Path

from pydantic.dataclasses import dataclass

from mllmrec.data.candidates import popularity_scores, read_users
from mllmrec.stage.errors import run_main
from mllmrec.stage.jsonl import require, write_rows
from mllmrec.stage.options import CommonOptions, option, parse_options, print_options
from mllmrec.stage.record import Job, file_digests, write_record

SECTION = "popularity"


@dataclass
class Options(CommonOptions):
    system: str = option("baselines", "subfolder of output_dir for the scores")


def main(argv=None):
    started = time.monotonic()
    options = parse_options(Options, SECTION, argv, __doc__)
    print_options(options, "baseline: popularity")
    users_path = Path(options.data_dir) / "users.jsonl"
    output = options.system_dir / "popularity" / "scores.jsonl"
    job = Job.of(options, file_digests(require(users_path)))
    if job.is_up_to_date([output]):
        return
    rows = popularity_scores(read_users(users_path))
    write_rows(output, rows)
    write_record(output, job, time.monotonic() - started, {"out": len(rows)})
    print(f"wrote {output}: {len(rows):,} scores")


if __name__ == "__main__":
    run_main(main)
