"""Stage 1 for MovieLens (ml-latest-small, ml-latest, ml-25m, ml-32m), from the published files.

In, both in {raw_dir}, as published:
     ratings.csv    header userId,movieId,rating,timestamp (seconds)
     movies.csv     header movieId,title,genres
Out: see `split.py`; the rules of the split are in `mllmrec/data/data_split.py`

    python data_processing/movielens.py --config configs/ml_latest_small.yaml

Every rating is an interaction, however low. There are no images, so `--require_image false` is
needed. CPU, seconds for ml-latest-small.
"""

from mllmrec.stage.main import run_main

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from mllmrec.data.data_split import SplitOptions
from mllmrec.data.interactions import InteractionLog
from mllmrec.data.loader import run_loader
from mllmrec.data.raw_files import check_raw_file, csv_table
from mllmrec.data.raw_log import read_log, read_titles, require_dates
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import require
from mllmrec.stage.options import parse_options, print_options
from mllmrec.stage.schema import Row

SECTION = "data"
FILES = ("ratings.csv", "movies.csv")
MAKER = (
    "you: unpack ml-latest-small.zip of https://grouplens.org/datasets/movielens/ there, or name "
    "another --raw_dir. Nothing else"
)


def load(ratings: Path, movies: Path) -> tuple[InteractionLog, pd.DataFrame, list[Row]]:
    """(log, catalogue, rejected rows)."""
    catalogue, bad_movies = read_titles(csv_table(movies, ("movieId", "title")))
    columns = ("userId", "movieId", "timestamp")
    table = csv_table(ratings, columns)
    log, rejected = read_log(table, catalogue.index, f"is not in {movies.name}")
    require_dates(log, ratings)
    return log, catalogue.assign(image=None), bad_movies + rejected


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_options(SplitOptions, SECTION, argv, __doc__)
    print_options(options, "stage 1, data: MovieLens")
    if options.require_image:
        raise InputError("MovieLens has no images; pass --require_image false")
    files = [check_raw_file(require(Path(options.raw_dir) / n, maker=MAKER)) for n in FILES]
    run_loader(options, files, lambda: load(*files))


if __name__ == "__main__":
    run_main(main)
