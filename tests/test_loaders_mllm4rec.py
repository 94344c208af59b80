"""The loaders of MovieLens and of Amazon's data of 2014."""

import gzip

import pytest
import yaml

from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import read_rows
from mllmrec.stage.scripts import load_script

SMALL = {"user_core": 4, "item_core": 1, "negatives": 1, "train_negatives": 1}
SMALL |= {"split_by": "leave_one_out", "require_image": False}


def prepare(name, folder, **options):
    """Run a loader on {folder}/raw; return (users, items, rejected rows)."""
    config = folder / "c.yaml"
    common = {"data_dir": str(folder / "data"), "output_dir": str(folder / "out")}
    data = {**SMALL, "raw_dir": str(folder / "raw"), **options}
    config.write_text(yaml.safe_dump({"common": common, "data": data}))
    load_script(f"data_processing/{name}.py").main(["--config", str(config)])
    rejected = folder / "data" / "interactions.rejected.jsonl"
    return (
        read_rows(folder / "data" / "users.jsonl"),
        read_rows(folder / "data" / "items.jsonl"),
        read_rows(rejected) if rejected.exists() else [],
    )


@pytest.fixture
def amazon(tmp_path):
    """Three users with five items of seven; one item has no title, one page is code."""
    raw = tmp_path / "raw"
    raw.mkdir()
    lines = [f"U{u},A{(u + n) % 6},{n}.0,{1400001000 + n}" for u in range(3) for n in range(5)]
    (raw / "ratings_Beauty.csv").write_text("\n".join([*lines, "U0,NOPAGE,5.0,1400000999"]) + "\n")
    pages = [
        {"asin": f"A{n}", "title": f"It's &amp; item {n}\ud83d", "imUrl": f"http://x.org/{n}.jpg"}
        for n in range(6)
    ]
    del pages[3]["imUrl"]
    texts = [repr(page) for page in pages]
    texts += ["__import__('os').system('touch " + str(tmp_path / "owned") + "')", "{'asin': 3}"]
    with gzip.open(raw / "meta_Beauty.json.gz", "wt") as file:
        file.write("\n".join(texts))
    return tmp_path


def test_amazon_2014_reads_literals_and_runs_none(amazon):
    users, items, rejected = prepare("amazon_2014", amazon)
    assert not (amazon / "owned").exists()
    titles = {item["item_id"]: item["title"] for item in items}
    assert titles["A0"] == "It's & item 0?"  # half of a surrogate pair
    assert {item["item_id"]: item["image"] is None for item in items}["A3"]
    assert [line["split"] for line in users] == ["train", "validation", "test"] * 3
    last = {line["user_id"]: line["target"] for line in users if line["split"] == "test"}
    assert last == {"U0": "A4", "U1": "A5", "U2": "A0"}
    reasons = {row.get("line", row.get("item_id")): row["reason"] for row in rejected}
    assert "no Python literal" in reasons[7]
    assert "no page with an asin" in reasons[8]
    assert "no page with a title" in reasons["NOPAGE"]
    urls = read_rows(amazon / "data" / "image_urls.jsonl")
    assert {"item_id": "A5", "url": "http://x.org/5.jpg"} in urls
    assert "A3" not in {row["item_id"] for row in urls}


@pytest.mark.parametrize("text", ["[" * 100_000, "{'asin': 'A'" + " " * (1 << 20) + "}", "1", "{"])
def test_a_page_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match=r"the line (is|has)"):
        load_script("data_processing/amazon_2014.py").parse_page(text.encode())


def test_amazon_2014_says_where_to_get_a_file(tmp_path):
    (tmp_path / "raw").mkdir()
    with pytest.raises(InputError, match=r"no ratings_Beauty\.csv or .*jmcauley.*--raw_dir"):
        prepare("amazon_2014", tmp_path)


def test_movielens_counts_every_rating_and_rejects_what_it_cannot_use(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    movies = ["1,Toy Story (1995),Fun", '2,"Matrix, The (1999)",Action', "3,C,x", "4,D,x", "5,E,x"]
    movies += ["5,twice,x", "6, ,x"]
    (raw / "movies.csv").write_text("\n".join(["movieId,title,genres", *movies]) + "\n")
    ratings = [f"{u},{m},0.5,{1400000100 + m}" for u in (1, 2) for m in (4, 2, 3, 1)]
    ratings += ["1,99,5.0,50", "2,5,4.0,x"]
    (raw / "ratings.csv").write_text("\n".join(["userId,movieId,rating,timestamp", *ratings]))
    users, items, rejected = prepare("movielens", tmp_path, negatives=0, train_negatives=0)
    assert {item["title"] for item in items} >= {"Toy Story (1995)", "Matrix, The (1999)"}
    test = [line for line in users if line["split"] == "test"]
    assert all(line["history"] == ["1", "2", "3"] and line["target"] == "4" for line in test)
    reasons = [row["reason"] for row in rejected]
    assert "the item 99 is not in movies.csv" in reasons
    assert "the item has a title already" in reasons
    assert "the title is empty" in reasons
    assert any("timestamp" in reason for reason in reasons)
    swapped = "\n".join(["userId,movieId,timestamp,rating", *ratings])
    (raw / "ratings.csv").write_text(swapped)
    with pytest.raises(InputError, match=r"ratings.csv: no time is after 1985"):
        prepare("movielens", tmp_path, negatives=0, train_negatives=0)


def test_movielens_without_its_files_or_with_images_is_refused(tmp_path):
    (tmp_path / "raw").mkdir()
    with pytest.raises(InputError, match=r"ratings\.csv is missing.*grouplens"):
        prepare("movielens", tmp_path)
    with pytest.raises(InputError, match="MovieLens has no images; pass --require_image false"):
        prepare("movielens", tmp_path, require_image=True)
