"""Stage 1 for MovieLens (ml-latest-small, ml-latest, ml-25m, ml-32m), from the published files.

In, both in {raw_dir}, as published:
     ratings.csv    header userId,movieId,rating,timestamp (seconds)
     movies.csv     header movieId,title,genres
Out: see `split.py`; the rules of the split are in `mllmrec/data/split.py`

    python data_processing/movielens.py --config configs/ml_latest_small.yaml

Every rating is an interaction, however low. There are no images, so `--require_image false` is
needed. CPU, seconds for ml-latest-small.
"""

from mllmrec.stage.main import run_main

from mllmrec.data import movielens
from mllmrec.data.split import (
    SplitOptions,
    data_outputs,
    prepare,
    rejected_rows_path,
    write_data_set,
)
from mllmrec.stage.errors import InputError
from mllmrec.stage.options import parse_options, print_options
from mllmrec.stage.output import WholeOutput
from mllmrec.stage.record import Job, file_digests

SECTION = "data"


def main(argv=None):
    options = parse_options(SplitOptions, SECTION, argv, __doc__)
    print_options(options, "stage 1, data: MovieLens")
    if options.require_image:
        raise InputError("MovieLens has no images; pass --require_image false")
    files = movielens.find_files(options.raw_dir)
    job = Job.of(options, file_digests(*files), limit=options.limit, raw_dir=options.raw_dir)
    with WholeOutput(job, data_outputs(options), [rejected_rows_path(options)]) as output:
        if output.is_needed:
            log, catalogue, rejected = movielens.load(*files)
            data = prepare(log, catalogue, options)
            _, counts = write_data_set(data, rejected, options)
            output.finish(counts)


if __name__ == "__main__":
    run_main(main)
