"""A baseline without a model: a candidate's score is how often it was interacted with.

In:  {data_dir}/users.jsonl
Out: {output_dir}/popularity/scores.jsonl   score = interactions in all histories and in the training users' targets

    python MLLM-MSR/baselines/popularity.py --config configs/microlens.yaml

Every learned row should be read against this one. CPU, seconds.
"""

import time
from pathlib import Path

from data_processing.candidates import popularity_scores
from data_processing.config import CommonArgs, parse_args, show
from data_processing.errors import run
from data_processing.jsonl import read_rows, require, write_rows
from data_processing.run_record import digests, is_up_to_date, settings_of, write_record


def main(argv=None):
    started = time.monotonic()
    args = parse_args(CommonArgs, "popularity", argv, __doc__)
    show(args, "baseline: popularity")
    users_path, output = Path(args.data_dir) / "users.jsonl", Path(args.output_dir) / "popularity" / "scores.jsonl"
    settings, inputs = settings_of(args), digests(require(users_path))
    if is_up_to_date([output], settings, inputs, args.overwrite):
        print(f"{output} is up to date, nothing to do")
        return
    rows = popularity_scores(read_rows(users_path))
    write_rows(output, rows)
    write_record(output, args, settings, inputs, time.monotonic() - started, {"out": len(rows)})
    print(f"wrote {output}: {len(rows):,} scores")


if __name__ == "__main__":
    run(main)
