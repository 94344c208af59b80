"""The loaders of MovieLens and of Amazon's data of 2014."""

import gzip
import json
import shutil

import pytest
import yaml
from PIL import Image

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


def test_pages_of_2018_have_several_images_of_which_the_seed_draws_one(amazon):
    pages = [
        {"asin": f"A{n}", "title": f"t{n}", "imageURL": [f"http://x.org/{n}/{k}" for k in range(9)]}
        for n in range(6)
    ]
    pages[2]["imageURL"], pages[3]["imageURL"] = [], "http://x.org/3"
    with gzip.open(amazon / "raw/meta_Beauty.json.gz", "wt") as file:
        file.write("\n".join([*map(json.dumps, pages), "{'asin': 'A1'}"]))
    found = []
    for seed in (1, 1, 2):
        *_, rejected = prepare("amazon_2014", amazon, pages="2018", seed=seed)
        rows = read_rows(amazon / "data/image_urls.jsonl")
        found.append({row["item_id"]: row["url"] for row in rows})
        shutil.rmtree(amazon / "data")
    assert found[0] == found[1] != found[2]
    assert found[0].keys() == {"A0", "A1", "A4", "A5"}
    assert all(url.startswith(f"http://x.org/{item[1]}/") for item, url in found[0].items())
    assert "no JSON object" in {row.get("line"): row["reason"] for row in rejected}[7]


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
    with pytest.raises(InputError, match="in --image_folder or at --image_urls; name one"):
        prepare("movielens", tmp_path, image_folder="x", image_urls="y")


def test_movielens_takes_posters_from_a_folder_or_addresses(tmp_path, capsys):
    raw, posters = tmp_path / "raw", tmp_path / "posters"
    raw.mkdir()
    movies = [f'{m},"Movie {m}, The (1999)",x' for m in range(1, 7)]
    (raw / "movies.csv").write_text("\n".join(["movieId,title,genres", *movies]))
    ratings = [f"{u},{m},1,{1400000000 + m}" for u in (1, 2) for m in range(1, 7)]
    (raw / "ratings.csv").write_text("\n".join(["userId,movieId,rating,timestamp", *ratings]))
    options = {"negatives": 0, "train_negatives": 0, "titles": "natural"}
    with pytest.raises(InputError, match="posters is no folder; name that of your posters"):
        prepare("movielens", tmp_path, image_folder=str(posters), **options)
    posters.mkdir()
    with pytest.raises(InputError, match="posters names no movie of movies"):
        prepare("movielens", tmp_path, image_folder=str(posters), **options)
    for name in ("1.jpg", "3.png", "4.webp", "5.jpeg", "77.jpg"):
        Image.new("RGB", (4, 6)).save(posters / name)
    own = {"image_folder": str(posters), "image_roots": [str(posters)]}
    _, items, _ = prepare("movielens", tmp_path, **own, **options)
    assert {item["title"] for item in items} >= {"The Movie 1 (1999)"}
    named = {item["item_id"]: item["image"] for item in items}
    assert [named[m] is None for m in "123456"] == [False, True, False, False, False, True]
    assert named["3"] == "../posters/3.png"
    Image.new("RGB", (4, 6)).save(posters / "2.jpg")
    _, items, _ = prepare("movielens", tmp_path, **own, **options)
    assert {i["item_id"]: i["image"] for i in items}["2"] == "../posters/2.jpg", "a new poster"
    (posters / "2.jpg").unlink()
    shutil.rmtree(tmp_path / "data")
    users, items, _ = prepare("movielens", tmp_path, require_image=True, **own, **options)
    assert {item["item_id"] for item in items} == set("1345") and len(users) == 6
    shutil.rmtree(tmp_path / "data")
    urls = "".join(f" {m} , http://x.org/{m}.jpg\n" for m in (1, 2, 99)) + "3, \n"
    (tmp_path / "urls.csv").write_text("movieId,url\n" + urls)
    prepare("movielens", tmp_path, image_urls=str(tmp_path / "urls.csv"), **options)
    wanted = [{"item_id": m, "url": f"http://x.org/{m}.jpg"} for m in "12"]
    assert read_rows(tmp_path / "data/image_urls.jsonl") == wanted
    assert "urls.csv: 1 of 3 movies are not in movies.csv" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("title", "natural"),
    [
        ("Matrix, The (1999)", "The Matrix (1999)"),
        ("Downfall (Untergang, Der) (2004)", "Downfall (2004)"),
        ("Postman, The (Postino, Il) (1994)", "The Postman (1994)"),
        ("Honey, I Shrunk the Kids (1989)", "Honey, I Shrunk the Kids (1989)"),
        ("Babylon 5", "Babylon 5"),
        ("Saga, El (1999)", "Saga, El (1999)"),
        ("(Untitled) (2009)", "(Untitled) (2009)"),
    ],
)
def test_natural_titles_have_their_article_in_front_and_no_other_names(title, natural):
    assert load_script("data_processing/movielens.py").natural_title(title) == natural
