"""MovieLens in its "latest" form: ratings.csv and movies.csv become a log and a catalogue."""

from pathlib import Path

import pandas as pd

from mllmrec.data.columns import clean_ids, reject_rows, require_rows
from mllmrec.data.interactions import InteractionLog
from mllmrec.data.tables import read_table, read_text_table
from mllmrec.data.timestamps import parse_timestamps
from mllmrec.stage.jsonl import require
from mllmrec.stage.schema import Row

FILES = ("ratings.csv", "movies.csv")
MAKER = (
    "you: unpack ml-latest-small.zip of https://grouplens.org/datasets/movielens/ there, or name "
    "another --raw_dir. Nothing else"
)


def find_files(raw_dir: str) -> list[Path]:
    """Paths of ratings.csv and movies.csv. Raises InputError, with where to get them."""
    return [require(Path(raw_dir) / name, maker=MAKER) for name in FILES]


def load(ratings_path: Path, movies_path: Path) -> tuple[InteractionLog, pd.DataFrame, list[Row]]:
    """(log, catalogue, rejected rows).

    Every rating is an interaction, however low. catalogue: indexed by movie id, columns title and
    image (None: the files bring none).
    """
    movies, rejected_movies = read_text_table(movies_path, ("movieId", "title"))
    movies, rejected_movies = clean_ids(movies, ("movieId",), movies_path.name, rejected_movies)
    repeated = movies["movieId"].duplicated()
    reason = "the movie has a title already"
    movies, rejected_movies = reject_rows(
        movies, repeated, reason, movies_path.name, rejected_movies
    )
    empty = movies["title"].str.strip() == ""
    movies, rejected_movies = reject_rows(
        movies, empty, "the title is empty", movies_path.name, rejected_movies
    )
    require_rows(len(movies), movies_path, rejected_movies)
    ratings, rejected = read_table(ratings_path, ("userId", "movieId", "timestamp"))
    ratings, rejected = parse_timestamps(ratings, ratings_path, rejected)
    ratings, rejected = clean_ids(ratings, ("userId", "movieId"), ratings_path.name, rejected)
    unknown = ~ratings["movieId"].isin(movies["movieId"])
    reason = f"the movie is not in {movies_path.name}"
    ratings, rejected = reject_rows(ratings, unknown, reason, ratings_path.name, rejected)
    require_rows(len(ratings), ratings_path, rejected)
    log = InteractionLog.from_ids(ratings["userId"], ratings["movieId"], ratings["time"])
    catalogue = pd.DataFrame(
        {"title": movies["title"].to_list(), "image": None}, index=movies["movieId"].to_list()
    )
    return log, catalogue, rejected_movies + rejected
