"""Stage 1 for MovieLens (ml-latest-small, ml-latest, ml-25m, ml-32m), from the published files.

In, both in {raw_dir}, as published:
     ratings.csv    header userId,movieId,rating,timestamp (seconds)
     movies.csv     header movieId,title,genres
     posters, of your own: `--image_folder DIR`, files called <movieId>.jpg (or .png, .webp), or
     `--image_urls FILE`, header movieId,url, which `download_images.py` downloads
Out: see `split.py`; the rules of the split are in `mllmrec/data/data_split.py`
     {data_dir}/image_urls.jsonl    item_id, url, with `--image_urls`

    python data_processing/movielens.py --config configs/ml_latest_small.yaml

Every rating is an interaction, however low. MovieLens itself has no images: without posters,
`--require_image false` is needed. CPU, seconds for ml-latest-small.
"""

from mllmrec.stage.main import run_main

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import pandas as pd
from pydantic.dataclasses import dataclass

from mllmrec.data.data_split import SplitOptions
from mllmrec.data.images import image_index
from mllmrec.data.interactions import InteractionLog
from mllmrec.data.loader import run_loader
from mllmrec.data.raw_files import check_raw_file, csv_table
from mllmrec.data.raw_log import read_log, read_titles, require_dates, require_unique
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import require
from mllmrec.stage.options import option, parse_options, print_options
from mllmrec.stage.provenance import short_digest
from mllmrec.stage.schema import Row

SECTION = "data"
FILES = ("ratings.csv", "movies.csv")
YEAR = re.compile(r"\s*\(\d{4}[^)]*\)\s*$")
BRACKETS = re.compile(r"\s*\([^)]*\)")
ARTICLE = re.compile(r"(.+), (The|A|An)")
MAKER = (
    "you: unpack ml-latest-small.zip of https://grouplens.org/datasets/movielens/ there, or name "
    "another --raw_dir. Nothing else"
)


@dataclass
class Options(SplitOptions):
    image_folder: str = option("", "folder of posters that are called after the movie's id")
    image_urls: str = option("", "CSV file of the posters' addresses, header movieId,url")
    titles: Literal["published", "natural"] = option(
        "published",
        "natural: `Matrix, The (1999)` becomes `The Matrix (1999)`, other names in brackets go "
        "(MLLM4Rec's released code)",
    )


def natural_title(title: str) -> str:
    """The article in front, and no brackets but the year's.

    "Downfall (Untergang, Der) (2004)" -> "Downfall (2004)".
    """
    year = YEAR.search(title)
    whole = title[: year.start()] if year else title
    name = BRACKETS.sub("", whole).strip() or whole
    if article := ARTICLE.fullmatch(name):
        name = f"{article[2]} {article[1]}"
    return f"{name} {year[0].strip()}" if year else name


def load(
    files: Sequence[Path], posters: Mapping[str, str], options: Options
) -> tuple[InteractionLog, pd.DataFrame, list[Row]]:
    """(log, catalogue, rejected rows). The catalogue has a column image, or url to download.

    posters: movie -> path, of --image_folder.
    """
    ratings, movies = files
    catalogue, bad_movies = read_titles(csv_table(movies, ("movieId", "title")))
    columns = ("userId", "movieId", "timestamp")
    table = csv_table(ratings, columns)
    log, rejected = read_log(table, catalogue.index, f"is not in {movies.name}")
    require_dates(log, ratings)
    if options.titles == "natural":
        catalogue["title"] = [natural_title(title) for title in catalogue["title"]]
    return log, catalogue.assign(**images_of(catalogue, posters, options)), bad_movies + rejected


def images_of(
    catalogue: pd.DataFrame, posters: Mapping[str, str], options: Options
) -> dict[str, list[str | None]]:
    """Column image or url of the catalogue. Raises InputError if no movie has one."""
    if options.image_urls:
        table = csv_table(Path(options.image_urls), ("movieId", "url"))
        require_unique(table, "movieId")
        column, source = "url", options.image_urls
        pairs = table.frame().itertuples(index=False)
        found = {movie.strip(): url.strip() for movie, url in pairs if url.strip()}
        if unknown := len(found.keys() - set(catalogue.index)):
            print(f"{source}: {unknown:,} of {len(found):,} movies are not in movies.csv")
    else:
        column, source, found = "image", options.image_folder, dict(posters)
    values = [found.get(movie) for movie in catalogue.index]
    if source and not any(values):
        raise InputError(f"{source} names no movie of movies.csv; posters are called <movieId>.jpg")
    return {column: values}


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_options(Options, SECTION, argv, __doc__)
    print_options(options, "stage 1, data: MovieLens")
    if options.image_folder and options.image_urls:
        raise InputError("posters are in --image_folder or at --image_urls; name one of them")
    if options.require_image and not (options.image_folder or options.image_urls):
        raise InputError(
            "MovieLens has no images; pass --require_image false, or name your posters with "
            "--image_folder"
        )
    if options.image_folder and not Path(options.image_folder).is_dir():
        raise InputError(
            f"--image_folder {options.image_folder} is no folder; name that of your posters"
        )
    files = [check_raw_file(require(Path(options.raw_dir) / n, maker=MAKER)) for n in FILES]
    more = [check_raw_file(Path(options.image_urls))] if options.image_urls else []
    has_urls = bool(options.image_urls)
    posters = image_index(options.image_folder or None)
    run_loader(
        options,
        [*files, *more],
        lambda: load(files, posters, options),
        has_urls=has_urls,
        posters=short_digest(sorted(posters.values())),
    )


if __name__ == "__main__":
    run_main(main)
