"""Amazon Reviews 2023: hand-written reviews or tables, gzipped or not, become the same data."""

import gzip
import json

import pytest

from mllmrec.data.amazon_pages import NO_PAGE, plain_text
from mllmrec.data.raw_log import NO_TIME
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import read_by_id, read_rows
from mllmrec.stage.scripts import load_script

REVIEWS = [
    ("u1", "A", 10),
    ("u1", "B", 20),
    ("u1", "C", 15),
    ("u2", "B", 1),
    ("u2", "A", 2),
    ("u2", "D", 3),
    ("u3", "C", 7),
    ("u3", "D", 9),
]
CUP_IMAGES = [
    {"thumb": "http://x/a_t.jpg", "large": "http://x/a_l.jpg", "variant": "MAIN", "hi_res": None},
    {"large": "http://x/a2.jpg"},
]
BIB_IMAGES = [{"large": "http://x/d.jpg", "hi_res": "http://x/d_h.jpg"}]
PAGES = [
    {"parent_asin": "A", "title": "Cup", "features": ["steel", ""], "images": CUP_IMAGES},
    {"parent_asin": "Z", "title": "Nobody bought it", "images": [{"large": "http://x/z.jpg"}]},
    {
        "parent_asin": "B",
        "title": "Büchse 杯",
        "images": [{"thumb": "http://x/b.jpg", "large": None}],
    },
    {"parent_asin": "C", "title": "Toy", "images": [], "price": "12.0"},
    {"parent_asin": "D", "title": "Bib", "images": BIB_IMAGES, "details": {"a": 1}},
]
PAGES[0]["description"] = ["keeps  warm"]


def write(path, text):
    content = text.encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def as_lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def raw(folder, form):
    """The files of a category Toys in one of the published forms."""
    if ".csv" in form:
        text = "user_id,parent_asin,rating,timestamp\n" + "".join(
            f"{u},{i},5.0,{t}\n" for u, i, t in REVIEWS
        )
    else:
        names = ("user_id", "parent_asin", "timestamp")
        rows = (dict(zip(names, review, strict=True)) for review in REVIEWS)
        text = as_lines({"rating": 5.0, "text": "ok", "images": [], **row} for row in rows)
    write(folder / f"Toys{form}", text)
    write(folder / f"meta_Toys.jsonl{'.gz' if form.endswith('.gz') else ''}", as_lines(PAGES))
    return folder


def load(folder, *options, cores=("2", "1")):
    data = folder / "data"
    words = ["--config", "configs/amazon_baby.yaml", "--category", "Toys"]
    words += ["--raw_dir", str(folder), "--data_dir", str(data)]
    words += ["--user_core", cores[0], "--item_core", cores[1]]
    words += ["--negatives", "0", "--train_negatives", "0", "--train_fraction", "0.5", *options]
    load_script("data_processing/amazon.py").main(words)
    return data


@pytest.mark.parametrize("form", [".jsonl", ".jsonl.gz", ".csv", ".csv.gz"])
def test_every_published_form_gives_the_same_data(tmp_path, form):
    data = load(raw(tmp_path, form), "--require_image", "false")
    users = read_by_id(data / "users.jsonl", "user_id")
    assert {u: [*row["history"], row["target"]] for u, row in users.items()} == {
        "u1": ["A", "C", "B"],
        "u2": ["B", "A", "D"],
        "u3": ["C", "D"],
    }
    items = read_by_id(data / "items.jsonl", "item_id")
    assert {i: (row["title"], row["image"]) for i, row in items.items()} == {
        "A": ("Cup", "images/A.jpg"),
        "B": ("Büchse 杯", "images/B.jpg"),
        "C": ("Toy", None),
        "D": ("Bib", "images/D.jpg"),
    }
    urls = {row["item_id"]: row["url"] for row in read_rows(data / "image_urls.jsonl")}
    assert urls == {"A": "http://x/a_l.jpg", "B": "http://x/b.jpg", "D": "http://x/d.jpg"}, (
        "the first image; another size if that one is missing"
    )
    stats = json.loads((data / "stats.json").read_text())
    assert (stats["users"], stats["items"], stats["interactions"]) == (3, 4, 8)


def test_items_without_an_image_are_removed_before_the_core(tmp_path):
    data = load(raw(tmp_path, ".jsonl"), cores=("2", "1"))
    users = read_by_id(data / "users.jsonl", "user_id")
    assert set(users) == {"u1", "u2"}, "u3 has one interaction left without item C"
    assert set(read_by_id(data / "items.jsonl", "item_id")) == {"A", "B", "D"}


def test_items_whose_download_failed_are_removed_on_the_second_run(tmp_path, capsys):
    folder = raw(tmp_path, ".jsonl")
    data = load(folder)
    assert "D" in read_by_id(data / "items.jsonl", "item_id")
    (data / "images.rejected.jsonl").write_text('{"item_id": "D", "reason": "404"}\n')
    load(folder)
    assert set(read_by_id(data / "items.jsonl", "item_id")) == {"A", "B"}
    assert set(read_by_id(data / "image_urls.jsonl", "item_id", keys=())) == {"A", "B", "D"}, (
        "D can be tried again"
    )
    capsys.readouterr()
    load(folder)
    assert "up to date" in capsys.readouterr().err
    (data / "images.rejected.jsonl").unlink()  # the second try fetched it
    load(folder)
    assert "D" in read_by_id(data / "items.jsonl", "item_id")


def test_when_no_image_could_be_fetched_the_remedy_is_the_download(tmp_path):
    folder = raw(tmp_path, ".jsonl")
    data = load(folder)
    (data / "images.rejected.jsonl").write_text(
        "".join(f'{{"item_id": "{i}", "reason": "no network"}}\n' for i in "ABD")
    )
    with pytest.raises(
        InputError, match=r"no image could be fetched .*download_images.py .*--retry_rejected true"
    ):
        load(folder)
    assert set(read_by_id(data / "image_urls.jsonl", "item_id", keys=())) == {"A", "B", "D"}


def test_a_pilot_lists_the_images_of_its_own_items(tmp_path):
    data = load(raw(tmp_path, ".jsonl"), "--limit", "1")
    items = read_by_id(data / "items.jsonl", "item_id")
    assert set(read_by_id(data / "image_urls.jsonl", "item_id", keys=())) == set(items)
    assert len(read_rows(data / "users.jsonl")) == 1


def test_title_and_image_are_those_of_one_page(tmp_path):
    """Of an item's pages the first that has both."""
    folder = raw(tmp_path, ".jsonl")
    more = [("Toy 2", "http://x/2.jpg"), ("Toy 3", "http://x/3.jpg"), ("", "http://x/4.jpg")]
    rows = [{"parent_asin": "C", "title": t, "images": [{"large": url}]} for t, url in more]
    write(folder / "meta_Toys.jsonl", as_lines([*PAGES, *rows]))
    data = load(folder)
    assert read_by_id(data / "items.jsonl", "item_id")["C"]["title"] == "Toy 2"
    assert read_by_id(data / "image_urls.jsonl", "item_id")["C"]["url"] == "http://x/2.jpg"


def test_full_text_and_image_size_on_request(tmp_path):
    data = load(raw(tmp_path, ".jsonl"), "--item_text", "full", "--image_size", "hi_res")
    assert read_by_id(data / "items.jsonl", "item_id")["A"]["title"] == "Cup steel keeps warm"
    urls = {row["item_id"]: row["url"] for row in read_rows(data / "image_urls.jsonl")}
    assert urls == {"A": "http://x/a_l.jpg", "B": "http://x/b.jpg", "D": "http://x/d_h.jpg"}


def test_titles_with_descriptions_as_the_released_code_has_them(tmp_path):
    data = load(raw(tmp_path, ".jsonl"), "--item_text", "described")
    titles = {row["item_id"]: row["title"] for row in read_rows(data / "items.jsonl")}
    assert titles["A"] == "Cup. keeps warm"
    assert not titles["B"].endswith("."), "without a description, the title alone"


def test_rejected_rows_are_kept_with_their_reason(tmp_path):
    folder = raw(tmp_path, ".csv")
    with open(folder / "Toys.csv", "a") as file:
        file.write("u4,A,5.0,soon\n,A,5.0,3\nu5,QQ,5.0,4\n")
    with open(folder / "meta_Toys.jsonl", "a") as file:
        file.write('{"parent_asin": "E", "title": ""}\n')
    data = load(folder, "--require_image", "false")
    rejected = {
        (row.get("line"), row.get("item_id")): row["reason"]
        for row in read_rows(data / "interactions.rejected.jsonl")
    }
    assert rejected == {
        (10, None): NO_TIME,
        (11, None): "the user_id is empty",
        (None, "QQ"): NO_PAGE,
    }
    stats = json.loads((data / "stats.json").read_text())
    assert (stats["interactions"], stats["rejected_rows"]) == (8, 3)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("Toys.jsonl", lambda b: b.replace(b'"u1"', b'"\xff"', 1), "Toys.jsonl, line 1: not valid"),
        ("Toys.jsonl", lambda b: b + b'{"user_id": ', "Toys.jsonl, line 9: not valid JSON"),
        ("Toys.jsonl", lambda b: b"", "Toys.jsonl is empty; fetch it again"),
        ("Toys.jsonl", lambda b: b.replace(b": 10}", b": 1589233210123}"), "mixes units of time"),
        (
            "Toys.jsonl",
            lambda b: b'{"user_id": "u", "parent_asin": "A"}\n' * 2,
            "Toys.jsonl, line 1: the timestamp is not .*; none of the 2 rows can be used",
        ),
        (
            "meta_Toys.jsonl",
            lambda b: b.replace(b'"Toy"', rb'"\ud83d"'),
            "meta_Toys.jsonl, line 4: not valid JSON",
        ),
        ("meta_Toys.jsonl", lambda b: b"<html>" + b, "meta_Toys.jsonl is a web page"),
        ("meta_Toys.jsonl", lambda b: b"[1]\n" + b, "meta_Toys.jsonl.*, in line 1: Expected OBJ"),
        ("meta_Toys.jsonl", lambda b: b'{"parent_asin": "X"}', "no item of the log has a page"),
    ],
)
def test_bad_files_are_named_with_line_and_remedy(tmp_path, name, change, message):
    folder = raw(tmp_path, ".jsonl")
    (folder / name).write_bytes(change((folder / name).read_bytes()))
    with pytest.raises(InputError, match=message):
        load(folder)


def test_bad_ids_and_times_of_reviews_are_rejected_with_their_lines(tmp_path):
    folder = raw(tmp_path, ".jsonl")
    more = [("u4\x07", "A", 5), ("u4", None, 5), (" u1 ", "\u00a0D", 30), ("u4", "A", -5)]
    review = {"user_id": "", "parent_asin": "", "timestamp": 0}
    with open(folder / "Toys.jsonl", "a") as file:
        file.write("\n")
        for row in more:
            file.write(json.dumps(dict(zip(review, row, strict=True))) + "\n")
    data = load(folder, "--require_image", "false")
    rejected = read_rows(data / "interactions.rejected.jsonl")
    assert [(row["line"], row["reason"]) for row in rejected] == [
        (10, "the user_id has a line break or control character"),
        (11, "the parent_asin is empty"),
        (13, NO_TIME),
    ]
    assert read_by_id(data / "users.jsonl", "user_id")["u1"]["target"] == "D"


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("Cups &amp; Saucers", "Cups & Saucers"),
        ("Mom&amp;#39;s &quot;best&quot;", 'Mom\'s "best"'),
        ("&amp;amp;amp;", "&amp;"),
        ("<b>Cup</b>s <BR/>and<br>more", "Cups and more"),
        ('<p class="x">One</p><p>Two</p>', "One Two"),
        ("<ul><li>a</li><li>b</li></ul>H<sub>2</sub>O", "a b H2O"),
        ("&lt;b&gt;bold&lt;/b&gt;", "bold"),
        ('<a href="http://x/?a=1&b=2">link</a> <h1>T</h1>', "link T"),
        ("I <3 you, a < b and b > a, <image>", "I <3 you, a < b and b > a, <image>"),
        ("x <b and y> z, <bib>, </image>", "x <b and y> z, <bib>, </image>"),
        ("&#xD83D; AT&T &unknown; R&D", "\ufffd AT&T &unknown; R&D"),
    ],
)
def test_html_becomes_text(text, plain):
    assert plain_text(text) == plain


def test_html_of_pages_becomes_text_and_a_page_without_a_title_is_none(tmp_path):
    folder = raw(tmp_path, ".jsonl")
    pages = [*PAGES[:-1], {**PAGES[-1], "title": "<b> </b>&nbsp;"}]
    pages[0] = {**PAGES[0], "title": "<i>Cup</i> &amp; saucer", "features": ["<p>a</p>b"]}
    (folder / "meta_Toys.jsonl").write_text(as_lines(pages))
    data = load(folder, "--require_image", "false", "--item_text", "full")
    items = read_by_id(data / "items.jsonl", "item_id")
    assert items["A"]["title"] == "Cup & saucer a b keeps warm"
    assert set(items) == set("ABC")
    rejected = read_rows(data / "interactions.rejected.jsonl")
    assert [(row["item_id"], row["reason"]) for row in rejected] == [("D", NO_PAGE)]


def test_missing_files_are_named(tmp_path):
    with pytest.raises(InputError, match=r"has no Toys.jsonl"):
        load(tmp_path)
    write(tmp_path / "Toys.jsonl", "{}")
    with pytest.raises(InputError, match=r"has no meta_Toys.jsonl"):
        load(tmp_path)


def test_the_kind_of_both_files_is_checked_before_one_is_read(tmp_path):
    write(tmp_path / "Toys.jsonl", "null")
    write(tmp_path / "meta_Toys.jsonl", "<html>")
    with pytest.raises(InputError, match=r"meta_Toys.jsonl is a web page"):
        load(tmp_path)


def test_an_id_that_is_no_file_name_is_rejected(tmp_path):
    folder = raw(tmp_path, ".jsonl")
    for path in (folder / "Toys.jsonl", folder / "meta_Toys.jsonl"):
        path.write_text(path.read_text().replace('"parent_asin": "D"', '"parent_asin": "../D"'))
    data = load(folder)
    assert "../D" not in read_by_id(data / "items.jsonl", "item_id")
    assert [row["item_id"] for row in read_rows(data / "interactions.rejected.jsonl")] == ["../D"]
